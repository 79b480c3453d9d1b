"""Runs that one process or several can do, with the same rows in every global batch; started by torchrun or imported.

    torchrun --nproc_per_node 2 tests/distributed/runs.py FOLDER NAME...

Every process writes what it ended with: parameters, optimizer, EM's memory, and the log.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from prefmix.training.config import MixtureConfig
from prefmix.training.sharding import load_whole, own_part, whole, whole_optimizer_state, whole_tensor
from prefmix.training.trainer import MixtureTrainer

WORDS = [f"w{i}" for i in range(40)]
GLOBAL_BATCH = 8
ROWS = 21  # neither a multiple of the global batch nor of a process's share of it

# Three steps an epoch, the last with 5 rows: with two processes 4 + 1, so three copies fill the second batch.
SCENARIOS: dict[str, dict[str, Any]] = {
    "user": {"latent": "user", "init": "random", "init_hold_epochs": 0.5, "save_steps": 2},
    "pair": {
        "latent": "pair", "gate": ["global", "user", "metadata"], "init": "kmeans", "init_hold_epochs": 0.0,
        "save_steps": 5, "group_texts": True, "cache_states": "off", "label_noise": 0.05,
    },
    "fsdp": {
        "latent": "user", "init": "random", "init_hold_epochs": 0.5, "save_steps": 2, "cache_states": "off",
        "gate_update": "gradient", "sharding": "fsdp2",
    },
    "fsdp branches": {
        "latent": "user", "init": "random", "init_hold_epochs": 0.5, "save_steps": 2, "cache_states": "off",
        "branch_depth": 1, "trunk": "lora", "sharding": "fsdp2", "m_step": "top",
    },
}  # fmt: skip


def rows() -> list[dict[str, Any]]:
    """Weighted comparisons of 5 users; few distinct texts, so that they repeat within and across processes."""
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, size=rng.integers(2, 6))) for _ in range(12)]
    found = []
    for i in range(ROWS):
        chosen, rejected = rng.choice(12, size=2, replace=False)
        row = {"prompt": f"w{i % 4} w9", "chosen": " " + texts[chosen], "rejected": " " + texts[rejected]}
        found.append(row | {"user": f"u{i % 5}", "weight": 0.5 + i % 3, "metadata": {"user_age": 20 + i % 5}})
    return found


def make_trainer(run_dir: Path, num_processes: int, **fields: Any) -> MixtureTrainer:
    """A trainer whose experts differ from the start and from each other."""
    torch.manual_seed(0)
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")
    shape = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    model = LlamaForCausalLM(shape).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:  # Llama's small initial weights give nearly uniform predictions, which hide mistakes
            torch.nn.init.normal_(parameter, std=0.3)
    defaults: dict[str, Any] = {
        "num_experts": 3, "expert_rank": 2, "num_train_epochs": 2, "logging_steps": 2, "save_strategy": "steps",
        "save_total_limit": None, "per_device_train_batch_size": GLOBAL_BATCH // num_processes, "use_cpu": True,
        "disable_tqdm": True, "learning_rate": 1e-2, "cache_dir": str(run_dir.parent / "cache"),
        "num_processes": num_processes, "eval_strategy": "steps", "eval_steps": 3,
    }  # fmt: skip
    base = run_dir.parent / f"base-{os.environ.get('RANK', '0')}"
    model.save_pretrained(str(base))
    tokenizer.save_pretrained(str(base))
    trainer = MixtureTrainer(
        base, MixtureConfig(str(run_dir), **(defaults | fields)), train_dataset=rows(), eval_dataset=rows()[:7],
    )  # fmt: skip
    start = {name: p for name, p in trainer.mixture.named_parameters() if p.requires_grad and "gate" not in name}
    load_whole(trainer.mixture, {k: whole_tensor(p.data) + 0.3 * torch.randn(p.shape) for k, p in start.items()})
    return trainer


def ended_with(trainer: MixtureTrainer) -> dict[str, torch.Tensor]:
    """Everything that decides what would come next."""
    found = {f"model.{name}": value for name, value in trainer._trained_tensors().items()}
    found |= {f"em.{name}": value for name, value in trainer.em.state_dict().items()}
    for i, state in whole_optimizer_state(trainer.optimizer)["state"].items():
        found |= {f"optimizer.{i}.{name}": torch.as_tensor(value) for name, value in state.items()}
    return {name: value.detach().clone().contiguous() for name, value in found.items()}


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Equal up to sums of float32 in another order, through 6 steps of AdamW; parameters move by 0.02 and more."""
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=5e-6)


def held_share(trainer: MixtureTrainer) -> float:
    """The share of all numbers of experts and base model, and of AdamW's moments, that this process holds."""
    with whole(trainer.mixture.experts):  # an evaluation leaves some parts gathered
        pass
    moments = [m for state in trainer.optimizer.state.values() for m in state.values() if m.dim() > 0]
    tensors = [*trainer.mixture.experts.parameters(), *moments]
    return sum(own_part(t).numel() for t in tensors) / sum(t.numel() for t in tensors)


def history(trainer: MixtureTrainer) -> list[dict[str, float]]:
    """The log without times."""
    times = ("runtime", "per_second", "total_flos")
    return [{k: v for k, v in line.items() if not any(t in k for t in times)} for line in trainer.state.log_history]


def work(folder: Path, name: str) -> None:
    """Trains a scenario to its end, then once more from its first checkpoint, and writes both ends."""
    fields, processes = SCENARIOS[name], int(os.environ["WORLD_SIZE"])
    for kind in ("whole", "resumed"):
        run_dir = folder / f"{name}-{kind}"
        trainer = make_trainer(run_dir, processes, **fields)
        rank = trainer.args.process_index
        assert trainer.accelerator.num_processes == torch.distributed.get_world_size() == processes
        checkpoint = run_dir / f"checkpoint-{fields['save_steps']}"
        if kind == "resumed" and rank == 0:
            shutil.copytree(folder / f"{name}-whole" / checkpoint.name, checkpoint)
        trainer.accelerator.wait_for_everyone()
        trainer.train(resume_from_checkpoint=kind == "resumed")
        metrics = trainer.evaluate()
        save_file(ended_with(trainer), str(folder / f"{name}-{kind}-{rank}.safetensors"))
        text = json.dumps({"history": history(trainer), "metrics": metrics, "share": held_share(trainer)})
        (folder / f"{name}-{kind}-{rank}.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    for scenario in sys.argv[2:]:
        work(Path(sys.argv[1]), scenario)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
