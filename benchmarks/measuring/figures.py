"""The figures to reach, from what was measured; each with its bar."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from transformers import PreTrainedModel

from measuring.contenders import RANK, fields_of_ours
from measuring.intervals import Interval, median_interval, ratio_interval
from measuring.prefixes import PrefixSharing
from measuring.products import Products, head_products
from measuring.stages import CONVARG, StageResult, Timed

PURE = " | pure torch"
ONCE, TWICE, KNOWN = " | prompts once", " | prompts twice", " | reference known"
PRECOMPUTED = "TRL LoRA, reference precomputed"
LORA, HEADS, CACHED = "LoRA, all blocks, K=1", "heads, K=8", "heads, K=8, cached"
ALL, SAMPLED = "last four blocks, K=8, all", "last four blocks, K=8, sampled"


class Figure(NamedTuple):
    """One line of the table.

    Attributes:
        number: of the figure.
        what: in words.
        rows: the stage.
        value: median with interval.
        bar: what it must reach; None where nothing is promised.
        at_least: whether more is better.
    """

    number: int
    what: str
    rows: str
    value: Interval
    bar: float | None = None
    at_least: bool = True

    @property
    def verdict(self) -> str:
        """passed, missed, or nothing."""
        if self.bar is None:
            return ""
        return (
            "passed" if (self.value.median >= self.bar) == self.at_least or self.value.median == self.bar else "missed"
        )


class Peaks(NamedTuple):
    """Best single-thread matrix products of the whole run, GFLOP per CPU second."""

    float32: float
    bfloat16: float


def speed_ratio(stage: StageResult, slow: str, fast: str) -> Interval:
    """How many times the pairs per CPU second of `slow` the contender `fast` reaches."""
    return _ratio(stage.timed[slow].per_pair, stage.timed[fast].per_pair)


def _ratio(numerator: Sequence[float | None], denominator: Sequence[float | None]) -> Interval:
    both = [(a, b) for a, b in zip(numerator, denominator) if a is not None and b is not None]
    return ratio_interval(*zip(*both))


def all_figures(
    stages: dict[str, StageResult],
    prefixes: dict[str, PrefixSharing],
    memory: dict[str, float],
    peaks: Peaks,
    model: PreTrainedModel,
) -> list[Figure]:
    """Every figure whose contenders were measured, in order."""
    found: list[Figure] = []
    for name, stage in stages.items():
        found += _against_trl(name, stage) + _whole_steps(name, stage) + _further_heads(name, stage)
        if name != CONVARG:
            found += _shares_of_peak(name, stage, peaks, model)
    return sorted([*found, *_prefix_sharing(prefixes), *_memory(memory)], key=lambda figure: figure.number)


def _against_trl(name: str, stage: StageResult) -> list[Figure]:
    bound = name in ("1:1", "4:1")
    lora_bar = {"1:1": 2.0, "4:1": 2.4}.get(name)
    wanted: list[tuple[int, str, str, str, float | None]] = [
        (1, f"K=1 LoRA{_words(variant)}, times TRL LoRA", "TRL LoRA", LORA + variant, bar)
        # Bars bind the fastest that ships: with several epochs the reference is known from one pass before them.
        for variant, bar in ((KNOWN, lora_bar), (ONCE, lora_bar), (TWICE, None))
    ]
    wanted.append((1, "K=1 LoRA, reference known, times TRL with it precomputed", PRECOMPUTED, LORA + KNOWN, None))
    for variant, bars in (("", (6.0, 4.0, 25.0, 100.0)), (PURE, (5.0, 3.5, 14.0, None))):
        words = _words(variant)
        wanted += [
            (2, f"K=8 heads, first epoch{words}, times ONE TRL LoRA", "TRL LoRA", HEADS + variant, bars[0]),
            (2, f"K=8 heads, first epoch{words}, times TRL full head", "TRL full head", HEADS + variant, bars[1]),
            (3, f"K=8 heads, cached{words}, times ONE TRL LoRA", "TRL LoRA", CACHED + variant,
             bars[3] if name == CONVARG else bars[2]),
        ]  # fmt: skip
    wanted += [
        (2, "equal capacity: K=1 full head, times TRL full head", "TRL full head", "full head, K=1", None),
        (2, "bf16: K=8 heads, first epoch, times TRL LoRA at its fastest", "TRL LoRA, fastest", f"{HEADS}, bf16", None),
        (1, "bf16: K=1 LoRA, times TRL LoRA at its fastest", "TRL LoRA, fastest", f"{LORA}, bf16", None),
        (3, "bf16: K=8 heads, cached, times TRL LoRA at its fastest", "TRL LoRA, fastest", f"{CACHED}, bf16", None),
        (1, "TRL at its defaults (bf16, checkpointing), times TRL LoRA", "TRL LoRA", "TRL LoRA, defaults", None),
        (1, "TRL at its fastest (bf16, reference precomputed), times TRL LoRA", "TRL LoRA", "TRL LoRA, fastest", None),
    ]
    figures = [
        Figure(number, what, name, speed_ratio(stage, slow, fast), bar if bound or name == CONVARG else None)
        for number, what, slow, fast, bar in wanted
        if slow in stage.timed and fast in stage.timed
    ]
    for contender, bar in ((ALL, 1.2), (SAMPLED, 0.6)):
        if contender in stage.timed and "TRL LoRA" in stage.timed:
            cost = speed_ratio(stage, contender, "TRL LoRA")
            figures.append(Figure(5, f"{contender}: steps of ONE TRL LoRA", name, cost, bar, at_least=False))
    return figures


def _whole_steps(name: str, stage: StageResult) -> list[Figure]:
    if LORA + ONCE not in stage.timed or LORA + TWICE not in stage.timed:
        return []
    ratio = speed_ratio(stage, LORA + TWICE, LORA + ONCE)
    return [Figure(6, "prompts read once, not twice: whole K=1 LoRA step with its head", name, ratio)]


def _prefix_sharing(measured: dict[str, PrefixSharing]) -> list[Figure]:
    figures = []
    for mix, found in measured.items():
        bar = {"1:1": 1.4, "4:1": 1.65}[mix.partition(" ")[0]]
        what = f"prompts read once, not twice: trunk, forward and backward ({found.limit:.2f} times fewer tokens)"
        figures.append(Figure(6, what, mix, found.ratio, bar))
    return figures


def _further_heads(name: str, stage: StageResult) -> list[Figure]:
    figures = []
    for variant, bar in (("", 0.025), (PURE, 0.05)):
        one = stage.timed.get(f"heads, K=1{variant}")
        for count in (8, 16):
            many = stage.timed.get(f"heads, K={count}{variant}")
            if one is not None and many is not None:
                steps = zip(one.costs, many.costs)
                shares = [(b.cpu - a.cpu) / (count - 1) / a.cpu for a, b in steps if a is not None and b is not None]
                what = f"each further head (K={count}){_words(variant)}, share of the K=1 step"
                figures.append(Figure(4, what, name, median_interval(shares), bar, at_least=False))
    return figures


def _memory(memory: dict[str, float]) -> list[Figure]:
    figures = []
    for contender, reference, bar in (("heads, K=16", "heads, K=1", 1.35), (HEADS, "TRL LoRA", 0.25)):
        if contender in memory and reference in memory:
            ratio = memory[contender] / memory[reference]
            what = f"peak memory, {contender} over {reference}"
            figures.append(Figure(4, what, "1:1", Interval(ratio, ratio, ratio), bar, at_least=False))
    return figures


def _shares_of_peak(name: str, stage: StageResult, peaks: Peaks, model: PreTrainedModel) -> list[Figure]:
    figures = []
    for contender, timed in stage.timed.items():
        kind = contender.partition(" | ")[0]
        if kind.startswith((HEADS, "heads, K=1")):
            products = products_of(contender, stage, timed, model)
            trunk_peak = peaks.bfloat16 if "bf16" in kind else peaks.float32
            least = products.least_seconds(trunk_peak, peaks.float32)
            share = median_interval([least / cost.cpu for cost in timed.costs if cost is not None])
            bar = 0.7 if kind in (HEADS, CACHED) and name in ("1:1", "4:1") and PURE not in contender else None
            figures.append(Figure(7, f"share of the matrix-product peak: {contender}", name, share, bar))
    return figures


def products_of(contender: str, stage: StageResult, timed: Timed, model: PreTrainedModel) -> Products:
    """Operations that one step of these heads needs."""
    fields = fields_of_ours(contender)
    cached = fields.get("cache_states") == "disk"
    # Prompts are read once unless that was switched off, so reading them again is not what the algorithm needs.
    once = fields.get("prefix_sharing", True)
    return head_products(
        model, stage.tokens[timed.pairs], fields["num_experts"], RANK, cached=cached, prompts_once=once
    )


def _words(variant: str) -> str:
    return variant.replace(" | ", ", ")
