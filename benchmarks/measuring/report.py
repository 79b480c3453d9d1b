"""The result for people: Markdown tables that a page can hold as they are."""

from __future__ import annotations

from typing import Any

import numpy as np

from measuring.contenders import TRL
from measuring.figures import Figure, speed_ratio
from measuring.stages import StageResult, Timed


def figure_table(figures: list[Figure]) -> str:
    """All figures with their bars."""
    lines = ["| | figure | rows | median (95% interval) | bar | |", "| --- | --- | --- | --- | --- | --- |"]
    for figure in figures:
        sign = "" if figure.bar is None else f"{'>=' if figure.at_least else '<='} {figure.bar:g}"
        cells = (figure.number, figure.what.replace(" | ", ", "), figure.rows, figure.value, sign, figure.verdict)
        lines.append(f"| {' | '.join(str(cell) for cell in cells)} |")
    return "\n".join(lines)


def stage_table(name: str, stage: StageResult) -> str:
    """What every contender of a stage cost."""
    lines = [f"Rows {name}, {stage.source}."]
    for pairs, tokens in stage.tokens.items():
        lines.append(
            f"A step of {pairs} comparisons reads {tokens.texts:.0f} texts of {tokens.real:.0f} tokens "
            f"({tokens.padded:.0f} with padding, {tokens.once:.0f} if prompts are read once); {tokens.completion:.0f} "
            "of them are completion tokens."
        )
    lines += ["", "| contender | pairs a step | CPU s a step | s a pair | times TRL LoRA (95%) | last loss |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    for contender, timed in stage.timed.items():
        ratio = str(speed_ratio(stage, "TRL LoRA", contender)) if "TRL LoRA" in stage.timed else ""
        shown = contender if contender in TRL else f"ours: {contender.replace(' | ', ', ')}"
        per_pair = timed.per_step / timed.pairs
        lines.append(
            f"| {shown} | {timed.pairs} | {timed.per_step:.2f} | {per_pair:.3f} | {ratio} | {_losses(timed)[-1]:.4f} |"
        )
    for dtype in stage.caches:
        lines += ["", _cache_line(dtype, stage)]
    return "\n".join(lines)


def memory_table(memory: dict[str, float]) -> str:
    """Peak of fresh processes."""
    lines = ["| contender | peak MB |", "| --- | --- |"]
    return "\n".join([*lines, *(f"| {name.replace(' | ', ', ')} | {peak:.0f} |" for name, peak in memory.items())])


def break_even_epochs(stage: StageResult, dtype: str) -> float | None:
    """Epochs after which building the cache has paid for itself: build / (a step with trunk - a step from states)."""
    suffix = ", bf16" if dtype == "bfloat16" else ""
    cached, whole = stage.timed.get(f"heads, K=8, cached{suffix}"), stage.timed.get(f"heads, K=8{suffix}")
    if cached is None or whole is None:
        return None
    steps = len(cached.costs) + 1
    return stage.caches[dtype].cpu / steps / (whole.per_step - cached.per_step)


def _cache_line(dtype: str, stage: StageResult) -> str:
    cache = stage.caches[dtype]
    line = (
        f"States in {dtype}: {cache.cpu:.1f} CPU s for {cache.texts} texts of {cache.tokens} tokens "
        f"({1e3 * cache.cpu / cache.tokens:.2f} ms a token), {cache.completion_tokens} states kept."
    )
    epochs = break_even_epochs(stage, dtype)
    if epochs is not None:
        line += f" Built first, the cache has paid for itself after {epochs:.2f} epochs of distinct texts."
    elif "TRL LoRA" in stage.timed:
        line += f" As much as TRL needs for {cache.cpu / _median_per_pair(stage.timed['TRL LoRA']):.0f} comparisons."
    return line


def as_json(stages: dict[str, StageResult], figures: list[Figure], memory: dict[str, float]) -> dict[str, Any]:
    """Everything that was measured."""
    return {
        "stages": {
            name: {
                "source": stage.source,
                "tokens_of_a_step": {pairs: tokens._asdict() for pairs, tokens in stage.tokens.items()},
                "caches": {
                    dtype: cache._asdict() | {"break_even_epochs": break_even_epochs(stage, dtype)}
                    for dtype, cache in stage.caches.items()
                },
                "contenders": {contender: _timed_json(timed) for contender, timed in stage.timed.items()},
            }
            for name, stage in stages.items()
        },
        "memory_mb": memory,
        "figures": [
            figure._asdict() | {"value": figure.value._asdict(), "verdict": figure.verdict} for figure in figures
        ],
    }


def _timed_json(timed: Timed) -> dict[str, Any]:
    return {
        "pairs_of_a_step": timed.pairs,
        "cpu_s": [None if cost is None else cost.cpu for cost in timed.costs],
        "wall_s": [None if cost is None else cost.wall for cost in timed.costs],
        "loss": [None if cost is None else cost.loss for cost in timed.costs],
        "build_cpu_s": timed.build_cpu,
        "configuration": timed.configuration,
    }


def _losses(timed: Timed) -> list[float]:
    return [cost.loss for cost in timed.costs if cost is not None]


def _median_per_pair(timed: Timed) -> float:
    return float(np.median([value for value in timed.per_pair if value is not None]))
