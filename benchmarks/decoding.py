"""What a token costs with K output heads on one trunk, against one expert: CPU seconds, contenders interleaved.

    python benchmarks/decoding.py --model smollm2 --experts 8 --output decoding.json

First the `mixture` decoder's distribution is compared with enumeration over experts (full forward passes, no cache);
only then is anything timed. One thread, medians over repetitions, ratios within a repetition with a bootstrap interval.
The cost of a token is taken after the prompt was read; starting a response (reading the prompt, and the heads' W U_k
for all its tokens) has its own column.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from prefmix.experts.base_model import load_base
from prefmix.experts.shared_base import SharedBaseExperts
from prefmix.policy.generation import DECODERS, SamplingOptions, decode
from prefmix.policy.responses import LeftPadded, left_pad

PROMPT = "Write a short review of a film that you saw last week, and say whether you would see it again."
BAR = 1.3


class Contender(NamedTuple):
    """Something to time: how many experts, which decoder, which sampling."""

    name: str
    num_experts: int
    decoder: str
    options: SamplingOptions


class Cost(NamedTuple):
    """CPU seconds: until the first token, and for each further one."""

    start: float
    per_token: float


def random_experts(base: Any, num_experts: int, rank: int) -> SharedBaseExperts:
    """Heads that differ as trained ones do: corrections of a few percent of the trunk's state."""
    generator = torch.Generator().manual_seed(0)
    experts = SharedBaseExperts(base, num_experts, head="hidden", rank=rank, generator=generator)
    with torch.no_grad():
        experts.head.up.copy_(0.03 * torch.randn(experts.head.up.shape, generator=generator))
    return experts


@torch.no_grad()
def largest_error(experts: SharedBaseExperts, prompt: LeftPadded, num_tokens: int = 8) -> float:
    """Largest difference of next-token probabilities between the decoder and enumeration over experts."""
    log_weights = torch.arange(1.0, experts.num_experts + 1).log().log_softmax(0).double()
    options, generator = SamplingOptions(num_tokens), torch.Generator().manual_seed(0)
    ids, log_rho, worst = prompt.input_ids[0].tolist(), log_weights, 0.0
    for step in decode(experts, *prompt, log_weights[None], options, eos_token_ids=set(), generator=generator):
        hidden = experts.base_model.get_decoder()(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
        logits = torch.stack(
            [
                experts.base_weight @ (hidden + up @ (down @ hidden))
                for up, down in zip(experts.head.up, experts.head.down)
            ]
        )
        log_probs = logits.double().log_softmax(-1)
        expected = (log_rho.exp()[:, None] * log_probs.exp()).sum(0)
        worst = max(worst, float((step.distribution[0].double().exp() - expected).abs().max()))
        log_rho = (log_rho + log_probs[:, step.tokens[0]]).log_softmax(0)
        ids.append(int(step.tokens[0]))
    return worst


def cost(experts: SharedBaseExperts, contender: Contender, prompt: LeftPadded, seed: int) -> Cost:
    """Times one response of the contender."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.full((len(prompt.input_ids), experts.num_experts), -torch.inf, dtype=torch.float64)
    weights[:, : contender.num_experts] = -float(np.log(contender.num_experts))
    start_rho: Tensor = DECODERS[contender.decoder](weights, generator)
    begin = time.process_time()
    steps = decode(experts, *prompt, start_rho, contender.options, eos_token_ids=set(), generator=generator)
    next(steps)
    first = time.process_time()
    further = sum(1 for _ in steps)
    return Cost(first - begin, (time.process_time() - first) / further)


def contenders(max_experts: int, num_tokens: int) -> list[Contender]:
    """One expert first: the others are compared with it, or with one expert under the same sampling."""
    plain, nucleus = SamplingOptions(num_tokens), SamplingOptions(num_tokens, temperature=0.8, top_p=0.9)
    sizes = [k for k in (2, 4, 8, 16) if k < max_experts] + [max_experts]
    return [
        Contender("one expert", 1, "mixture", plain),
        *(Contender(f"mixture K={k}", k, "mixture", plain) for k in sizes),
        Contender(f"sample of K={max_experts}", max_experts, "sample", plain),
        Contender("one expert, top-p 0.9", 1, "mixture", nucleus),
        Contender(f"mixture K={max_experts}, top-p 0.9", max_experts, "mixture", nucleus),
    ]


def ratio_interval(ratios: list[float]) -> tuple[float, float]:
    """95% bootstrap interval of the median."""
    rng = np.random.default_rng(0)
    medians = np.median(rng.choice(ratios, (2000, len(ratios))), axis=1)
    return float(np.quantile(medians, 0.025)), float(np.quantile(medians, 0.975))


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Gate, then times; JSON-ready."""
    torch.set_num_threads(1)
    base = load_base(args.model, dtype=torch.float32)
    assert base.tokenizer is not None
    experts = random_experts(base.model, args.experts, args.rank)
    prompt = left_pad([base.tokenizer(PROMPT)["input_ids"]] * args.batch, 0, torch.device("cpu"))
    error = largest_error(experts, LeftPadded(prompt.input_ids[:1], prompt.attention_mask[:1]))
    if error > 1e-4:
        raise SystemExit(f"the decoder differs from enumeration by {error:.1e}: nothing is timed")
    field = contenders(args.experts, args.tokens)
    costs: dict[str, list[Cost]] = {contender.name: [] for contender in field}
    for repeat in range(args.repeats + 1):
        for contender in field:
            measured = cost(experts, contender, prompt, seed=repeat)
            if repeat:  # the first round warms up
                costs[contender.name].append(measured)
    rows = []
    for contender in field:
        baseline = "one expert, top-p 0.9" if contender.options.top_p < 1 else "one expert"
        ratios = [own.per_token / one.per_token for own, one in zip(costs[contender.name], costs[baseline])]
        low, high = ratio_interval(ratios)
        rows.append(
            {
                "contender": contender.name,
                "seconds_per_token": statistics.median(c.per_token for c in costs[contender.name]),
                "seconds_to_start": statistics.median(c.start for c in costs[contender.name]),
                "ratio": statistics.median(ratios),
                "ratio_interval": [low, high],
            }
        )
    settings = {
        "model": args.model,
        "rank": args.rank,
        "tokens": args.tokens,
        "batch": args.batch,
        "repeats": args.repeats,
    }
    machine = {"machine": platform.machine(), "torch": torch.__version__, "threads": torch.get_num_threads()}
    return {"settings": settings, "machine": machine, "largest_error": error, "bar": BAR, "rows": rows}


def table(result: dict[str, Any]) -> str:
    """The result for people."""
    lines = [f"largest difference from enumeration: {result['largest_error']:.1e}", ""]
    lines.append("| contender | CPU s per token | ratio to one expert (95%) | CPU s to start |")
    lines.append("| --- | --- | --- | --- |")
    for row in result["rows"]:
        low, high = row["ratio_interval"]
        lines.append(
            f"| {row['contender']} | {row['seconds_per_token']:.4f} | {row['ratio']:.2f} ({low:.2f}-{high:.2f}) "
            f"| {row['seconds_to_start']:.2f} |"
        )
    return "\n".join([*lines, "", f"bar: {result['bar']}"])


def main() -> None:
    """Parses arguments, measures, prints the table and writes JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="base model: smollm2, a folder, or a hub name")
    parser.add_argument("--experts", type=int, default=8, help="K")
    parser.add_argument("--rank", type=int, default=16, help="rank of the heads")
    parser.add_argument("--tokens", type=int, default=24, help="tokens of a response")
    parser.add_argument("--batch", type=int, default=1, help="prompts decoded together")
    parser.add_argument("--repeats", type=int, default=7, help="repetitions after one round of warm-up")
    parser.add_argument("--output", type=Path, help="where the JSON goes")
    args = parser.parse_args()
    result = run(args)
    print(table(result))
    if args.output is not None:
        args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
