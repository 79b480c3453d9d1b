"""Whole training steps on a GPU: eight heads against one TRL LoRA run, for each implementation of the kernel.

    python benchmarks/gpu.py                               # a 7B-class model with random weights, bfloat16; needs 40 GB
    python benchmarks/gpu.py --shape 1b --output gpu.json

Without a CUDA device it says so and stops. Random weights and random tokens are enough for speed. A correctness gate
comes first: every implementation on this device against float64 with all logits in memory. Then each contender trains
in its own loop; a step is timed between synchronisations of the device, the first steps are left out, and the median is
compared.
TRL runs in bfloat16 without checkpointing, which is its fastest setting, and picks its own (Triton) kernels.

This file has been exercised on a CPU only (`--device cpu --shape tiny`, a test); no figure of it has been reported yet.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from measuring.scratch import scratch_folder
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

from prefmix.experts.base_model import BaseModel
from prefmix.kernels.low_rank_head import head_log_probs
from prefmix.training.config import MixtureConfig
from prefmix.training.trainer import MixtureTrainer

# hidden, intermediate, blocks, heads, key-value heads, vocabulary
SHAPES = {
    "7b": (4096, 11008, 32, 32, 32, 32000),
    "7b-large-vocabulary": (4096, 14336, 32, 32, 8, 128256),
    "1b": (2048, 8192, 16, 32, 8, 128256),
    "tiny": (32, 64, 2, 4, 2, 333),
}
RANK, WARM_UP, BAR = 16, 3, 3.0
TRL_NAME = "TRL LoRA"


class Step(NamedTuple):
    """One contender.

    Attributes:
        seconds: median of a step.
        gigabytes: peak of the device's memory while it trained, the base included; 0 on a CPU.
    """

    seconds: float
    gigabytes: float


class StepTimer(TrainerCallback):
    """Seconds between the start and the end of every optimizer step, the device synchronised."""

    def __init__(self, synchronize: Callable[[], None]) -> None:
        self._synchronize, self._start = synchronize, 0.0
        self.seconds: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Notes the time."""
        self._synchronize()
        self._start = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Keeps the difference."""
        self._synchronize()
        self.seconds.append(time.perf_counter() - self._start)


def gate(device: torch.device, implementations: list[str]) -> dict[str, float]:
    """Largest relative error of values and gradients, bfloat16 states and head, against float64 on the same numbers."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"hidden": (63, 64), "base": (333, 64), "down": (8, RANK, 64), "up": (8, 333, RANK), "grad": (5, 8)}
    drawn = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    drawn["base"] *= 0.3
    drawn["up"] *= 0.1
    rounded = {name: x.bfloat16() if name in ("hidden", "base") else x for name, x in drawn.items()}
    segments = torch.repeat_interleave(torch.arange(5), torch.tensor([1, 17, 3, 40, 2]))
    tokens = (torch.randint(333, (63,), generator=generator), segments)
    expected = _values({name: x.double() for name, x in rounded.items()}, *tokens, "eager")
    errors = {}
    for impl in implementations:
        on_device = {name: x.to(device) for name, x in rounded.items()}
        found = _values(on_device, *(x.to(device) for x in tokens), impl)
        errors[impl] = max(float((f - e).norm() / e.norm()) for f, e in zip(found, expected, strict=True))
    if max(errors.values()) > 2e-2:
        raise SystemExit(f"correctness gate: {errors}; nothing is timed")
    return errors


def _values(tensors: dict[str, Tensor], targets: Tensor, segments: Tensor, impl: Any) -> list[Tensor]:
    leaves = [tensors[name].clone().requires_grad_() for name in ("hidden", "down", "up")]
    hidden, down, up = leaves
    result = head_log_probs(hidden, targets, segments, 5, tensors["base"], down, up, impl=impl)
    grads = torch.autograd.grad((result.log_probs * tensors["grad"]).sum(), leaves)
    return [x.detach().double().cpu() for x in (result.log_probs, result.base_log_probs, *grads)]


def kernel_table(device: torch.device, shape: str, tokens: int, implementations: list[str]) -> list[dict[str, Any]]:
    """Heads alone, forward and backward: milliseconds and memory beyond the inputs, for K = 1 and 8."""
    width, vocab = SHAPES[shape][0], SHAPES[shape][5]
    dtype = torch.bfloat16
    hidden, weight = (torch.randn(n, width, device=device, dtype=dtype) / width**0.5 for n in (tokens, vocab))
    targets = torch.randint(vocab, (tokens,), device=device)
    segments = torch.arange(tokens, device=device) // max(1, tokens // 8)
    rows = []
    for num_experts in (1, 8):
        down = torch.randn(num_experts, RANK, width, device=device, requires_grad=True)
        up = torch.randn(num_experts, RANK, vocab, device=device).mul_(0.01).transpose(1, 2).requires_grad_()
        for impl in implementations:

            def step(impl: Any = impl, down: Tensor = down, up: Tensor = up) -> None:
                inputs = (hidden, targets, segments, int(segments.max()) + 1, weight, down, up)
                head_log_probs(*inputs, impl=impl).log_probs.sum().backward()

            rows.append({"K": num_experts, "impl": impl, **_measured(device, step)})
    return rows


def _measured(device: torch.device, step: Callable[[], None], repeats: int = 10) -> dict[str, Any]:
    free_memory(device)
    before, seconds = allocated(device), []
    try:
        for _ in range(WARM_UP + repeats):
            synchronize(device)
            start = time.perf_counter()
            step()
            synchronize(device)
            seconds.append(time.perf_counter() - start)
    except torch.cuda.OutOfMemoryError:
        return {"milliseconds": None, "gigabytes": None}
    return {"milliseconds": 1e3 * statistics.median(seconds[WARM_UP:]), "gigabytes": peak(device) - before}


def make_base(shape: str, device: torch.device) -> BaseModel:
    """Random weights in bfloat16, and a tokenizer that knows one word for every token.

    The source looks like a name on the hub, so that no policy folder gets a copy of the weights.
    """
    hidden, intermediate, blocks, heads, groups, vocab = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=blocks,
        num_attention_heads=heads, num_key_value_heads=groups, tie_word_embeddings=False, max_position_embeddings=4096,
        pad_token_id=0, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        torch.set_default_dtype(torch.bfloat16)
        model = LlamaForCausalLM(config)
        torch.set_default_dtype(torch.float32)
    words = {"<pad>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, vocab)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")
    return BaseModel(model.eval(), tokenizer, f"random/{shape}", "0" * 64)


def make_rows(count: int, prompt: int, response: int, vocab: int) -> list[dict[str, str]]:
    """Distinct texts of exact lengths."""
    generator = torch.Generator().manual_seed(0)

    def text(length: int) -> str:
        return " ".join(f"w{i}" for i in torch.randint(2, vocab, (length,), generator=generator).tolist())

    return [
        {"prompt": text(prompt), "chosen": " " + text(response), "rejected": " " + text(response)} for _ in range(count)
    ]


def common(args: argparse.Namespace) -> dict[str, Any]:
    """What TRL's configuration and ours have in common."""
    on_gpu = args.device != "cpu"
    return {
        "output_dir": scratch_folder(), "max_steps": WARM_UP + args.steps, "bf16": True,
        "per_device_train_batch_size": args.pairs, "gradient_checkpointing": False, "learning_rate": 2e-4, "beta": 0.1,
        "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1000, "use_cpu": not on_gpu,
    }  # fmt: skip


def ours(num_experts: int, base: BaseModel, rows: list[dict[str, str]], args: argparse.Namespace) -> MixtureTrainer:
    """Heads on the frozen trunk, which is read in every step: an epoch that has no cached states."""
    config = MixtureConfig(
        **common(args), num_experts=num_experts, expert_rank=RANK, init="random", init_hold_epochs=0, cache_states="off"
    )
    return MixtureTrainer(base, config, train_dataset=rows)


def trl_lora(base: BaseModel, rows: list[dict[str, str]], args: argparse.Namespace) -> Any:
    """One TRL run, LoRA on all linear layers of the base itself, which nobody reads afterwards."""
    import datasets
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer

    return DPOTrainer(
        model=base.model.requires_grad_(True),
        args=DPOConfig(**common(args)),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=base.tokenizer,
        peft_config=LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM"),
    )


def time_steps(build: Callable[[], Any], device: torch.device) -> Step:
    """Trains one contender in its own loop."""
    free_memory(device)
    timer = StepTimer(lambda: synchronize(device))
    trainer = build()
    trainer.add_callback(timer)
    trainer.train()
    return Step(statistics.median(timer.seconds[WARM_UP:]), peak(device))


def synchronize(device: torch.device) -> None:
    """Waits for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free_memory(device: torch.device) -> None:
    """Drops what the contender before left, and counts the peak anew."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def allocated(device: torch.device) -> float:
    """GB in use."""
    return torch.cuda.memory_allocated(device) / 1e9 if device.type == "cuda" else 0.0


def peak(device: torch.device) -> float:
    """Largest use in GB since `free_memory`."""
    return torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else 0.0


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Gate, kernels, steps; JSON-ready."""
    device = torch.device(args.device)
    implementations = ["chunked", "eager"] + (
        ["triton"] if importlib.util.find_spec("triton") and device.type == "cuda" else []
    )
    errors = gate(device, implementations)
    kernels = kernel_table(device, args.shape, args.pairs * 2 * args.response, implementations)
    base = make_base(args.shape, device)
    rows = make_rows(args.pairs * (WARM_UP + args.steps), args.prompt, args.response, base.model.config.vocab_size)
    steps: dict[str, Step] = {}
    for impl in implementations:
        os.environ["PREFMIX_KERNEL"] = impl
        for num_experts in (1, 8):
            steps[f"heads K={num_experts}, {impl}"] = time_steps(
                lambda k=num_experts: ours(k, base, rows, args), device
            )  # type: ignore[misc]
    if importlib.util.find_spec("trl") and not args.without_trl:
        steps[TRL_NAME] = time_steps(lambda: trl_lora(base, rows, args), device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu"
    return {
        "device": name, "shape": args.shape, "prompt": args.prompt, "response": args.response, "pairs": args.pairs,
        "torch": torch.__version__, "transformers": transformers.__version__, "errors": errors, "kernels": kernels,
        "steps": {key: value._asdict() for key, value in steps.items()},
    }  # fmt: skip


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    one = result["steps"].get(TRL_NAME, {}).get("seconds")
    lines = [
        f"{result['device']}, {result['shape']}, {result['pairs']} pairs of {result['prompt']} + {result['response']}"
    ]
    lines += ["", "| contender | ms a step | times one TRL LoRA run | peak GB |", "| --- | --- | --- | --- |"]
    for name, step in result["steps"].items():
        ratio = "-" if one is None else f"{one / step['seconds']:.2f}"
        lines.append(f"| {name} | {1e3 * step['seconds']:.1f} | {ratio} | {step['gigabytes']:.1f} |")
    lines += ["", "| heads alone, forward and backward | K | ms | GB beyond inputs |", "| --- | --- | --- | --- |"]
    for row in result["kernels"]:
        figures = [
            ("out of memory" if row[key] is None else f"{row[key]:.2f}") for key in ("milliseconds", "gigabytes")
        ]
        lines.append(f"| {row['impl']} | {row['K']} | {figures[0]} | {figures[1]} |")
    if one is not None:
        best = min(step["seconds"] for name, step in result["steps"].items() if name.startswith("heads K=8"))
        lines += ["", f"eight heads, first epoch: {one / best:.2f} times one TRL LoRA run (bar {BAR:g})"]
    return "\n".join(lines)


def main() -> None:
    """Parses, runs, prints."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--response", type=int, default=256)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--device", default="cuda", help="cpu exercises the code; its timings mean nothing")
    parser.add_argument("--without-trl", action="store_true")
    parser.add_argument("--output", type=Path, help="JSON file")
    args = parser.parse_args()
    if args.device != "cpu" and not torch.cuda.is_available():
        print("benchmarks/gpu.py: no CUDA device here, nothing was measured")
        return
    result = run(args)
    print(table(result))
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
