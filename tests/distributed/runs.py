"""Runs that one process or several can do, with the same rows in every global batch; started by torchrun or imported.

    torchrun --nproc_per_node 2 tests/distributed/runs.py FOLDER NAME...

Every process writes what it ended with: parameters, optimizer, EM's memory, and the log.
"""

from __future__ import annotations

import contextlib
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

from prefmix.experts.spread_experts import SpreadExperts
from prefmix.training import membership_step
from prefmix.training.config import MixtureConfig
from prefmix.training.sharding import load_whole, own_part, whole, whole_tensor
from prefmix.training.trainer import MixtureTrainer
from prefmix.training.zero import Zero

WORDS = [f"w{i}" for i in range(40)]
GLOBAL_BATCH = 8
ROWS = 21  # neither a multiple of the global batch nor of a process's share of it

# Three steps an epoch, the last with 5 rows: with two processes 4 + 1, so three copies fill the second batch.
SCENARIOS: dict[str, dict[str, Any]] = {
    "user": {"latent": "user", "init": "random", "init_hold_epochs": 0.5, "save_steps": 2, "pooling": 0.5},
    "pair": {
        "latent": "pair", "gate": ["global", "user", "metadata"], "init": "kmeans", "init_hold_epochs": 0.0,
        "save_steps": 4, "group_texts": True, "cache_states": "off", "label_noise": 0.05,
    },
    "robust": {  # an adversary over users, whose rows stand on both processes
        "latent": "user", "init": "random", "init_hold_epochs": 0.5, "save_steps": 2, "robust_over": "user",
        "robust_step": 0.5, "gradient_accumulation_steps": 2,
    },
    "membership": {  # with error rates of annotators, an E-step of their own too
        "latent": "membership", "init": "random", "init_hold_epochs": 0.5, "save_steps": 4, "membership_samples": 4,
        "label_noise_update": "per_annotator",
    },
    "encoder": {
        "latent": "membership", "init": "random", "init_hold_epochs": 0.5, "save_steps": 4, "membership_samples": 4,
        "membership_estep": "encoder", "free_bits": 0.05,
    },
    "amortized": {
        "latent": "user", "init": "random", "init_hold_epochs": 0.5, "save_steps": 4, "estep": "amortized",
        "adaptive_beta": 0.6,
    },
    "fsdp": {
        "latent": "user", "init": "random", "init_hold_epochs": 0.5, "save_steps": 2, "cache_states": "off",
        "gate_update": "gradient", "sharding": "fsdp2",
    },
    "parallel": {  # experts 0 and 2 on the first process, the wider expert 1 on the second
        "expert_kind": "independent", "expert_models": ["base", "wide", "base"], "latent": "user", "init": "random",
        "init_hold_epochs": 0.5, "save_steps": 2, "max_grad_norm": 0.3, "pooling": 0.5,
    },
    "parallel gates": {
        "expert_kind": "independent", "expert_models": ["wide", "base", "wide"], "reference": "shared",
        "latent": "pair", "gate": ["global", "user", "metadata"], "init": "experts", "save_steps": 5,
        "gradient_accumulation_steps": 2, "m_step": "top", "freeze_experts": [2], "max_grad_norm": 0.0,
    },
    "parallel draws": {  # everything that is random; in one model attention drops out too
        "expert_kind": "independent", "expert_models": ["base", "dropping", "base"], "latent": "user", "init": "random",
        "init_hold_epochs": 0.0, "save_steps": 2, "m_step": "sampled", "token_dropout": 0.3,
    },
    "zero2 heads": {
        "latent": "user", "init": "random", "init_hold_epochs": 0.5, "save_steps": 4, "gate_update": "gradient",
    },
    "zero3 heads": {
        "latent": "user", "init": "random", "init_hold_epochs": 0.5, "save_steps": 4, "gate_update": "gradient",
        "cache_states": "off",
    },
    "zero3 branches": {
        "latent": "user", "init": "random", "init_hold_epochs": 0.5, "save_steps": 2, "cache_states": "off",
        "branch_depth": 1, "trunk": "lora", "m_step": "top",
    },
    "fsdp branches": {
        "latent": "user", "init": "random", "init_hold_epochs": 0.5, "save_steps": 2, "cache_states": "off",
        "branch_depth": 1, "trunk": "lora", "sharding": "fsdp2", "m_step": "top", "gradient_checkpointing": True,
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


def make_model(**shape: Any) -> LlamaForCausalLM:
    """A tiny model with opinions; the same for the same shape."""
    torch.manual_seed(0)
    defaults: dict[str, Any] = {
        "vocab_size": len(WORDS) + 2, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64,
    }  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**(defaults | shape))).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:  # Llama's small initial weights give nearly uniform predictions, which hide mistakes
            torch.nn.init.normal_(parameter, std=0.3)
    return model


MODELS: dict[str, dict[str, Any]] = {
    "base": {},
    "wide": {"hidden_size": 24, "num_hidden_layers": 1},
    "dropping": {"attention_dropout": 0.2},
}


def model_folders(place: Path, tokenizer: PreTrainedTokenizerFast) -> dict[str, str]:
    """Folders of `MODELS`, which both processes name alike: whoever comes first leaves them there."""
    for name, shape in MODELS.items():
        own = place / f"{name}-of-{os.environ.get('RANK', '0')}"
        if not (place / name).exists():
            make_model(**shape).save_pretrained(str(own))
            tokenizer.save_pretrained(str(own))
            with contextlib.suppress(OSError):  # the other one was faster
                os.rename(own, place / name)
    return {name: str(place / name) for name in MODELS}


def make_trainer(run_dir: Path, num_processes: int, **fields: Any) -> MixtureTrainer:
    """A trainer whose experts differ from the start and from each other."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")
    folders = model_folders(run_dir.parent, tokenizer)
    readers = 1 if fields.get("expert_parallel") else num_processes
    accumulated = fields.get("gradient_accumulation_steps", 1)
    defaults: dict[str, Any] = {
        "num_experts": 3, "expert_rank": 2, "num_train_epochs": 2, "logging_steps": 2, "save_strategy": "steps",
        "save_total_limit": None, "use_cpu": True, "disable_tqdm": True, "learning_rate": 1e-2,
        "per_device_train_batch_size": GLOBAL_BATCH // readers // accumulated,
        "cache_dir": str(run_dir.parent / "cache"),
        "num_processes": num_processes, "eval_strategy": "steps", "eval_steps": 3,
    }  # fmt: skip
    named = {"expert_models": [folders[name] for name in fields.get("expert_models", [])]}
    args = MixtureConfig(str(run_dir), **(defaults | fields | named))
    # Fits of q go on until rounding stops them: where they stop earlier is a matter of rounding too.
    membership_step.STEP_FITS, membership_step.STEP_TOLERANCE = 100, 1e-6
    torch.manual_seed(0)
    trainer = MixtureTrainer(folders["base"], args, train_dataset=rows(), eval_dataset=rows()[:7])
    if named["expert_models"]:
        for expert, model in own_models(trainer).items():
            move(model, torch.Generator().manual_seed(expert), 0.1)
    else:
        move(trainer.mixture.experts, torch.Generator().manual_seed(0), 0.3)
    return trainer


def use_deepspeed(stage: int, folder: Path) -> None:
    """What `accelerate launch` would say; nothing is too small to be shared out."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled first, for a minute
    zero = {"stage": stage} | ({"stage3_param_persistence_threshold": 0} if stage == 3 else {})
    auto = ("gradient_accumulation_steps", "gradient_clipping", "train_batch_size", "train_micro_batch_size_per_gpu")
    file = folder / f"zero{stage}-{os.environ['RANK']}.json"
    file.write_text(json.dumps({"zero_optimization": zero} | dict.fromkeys(auto, "auto")), encoding="utf-8")
    os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)}


def move(module: torch.nn.Module, generator: torch.Generator, by: float) -> None:
    """Adds noise to everything that trains."""
    start = {name: p for name, p in module.named_parameters() if p.requires_grad}
    noise = {name: by * torch.randn(p.shape, generator=generator) for name, p in start.items()}
    load_whole(module, {name: whole_tensor(p.data) + noise[name] for name, p in start.items()})


def own_models(trainer: MixtureTrainer) -> dict[int, torch.nn.Module]:
    """The whole models that this process holds."""
    experts = trainer.mixture.experts
    if isinstance(experts, SpreadExperts):
        return {expert: experts.own_model(expert) for expert in experts.own_experts}
    return dict(enumerate(experts.models))


def ended_with_experts(trainer: MixtureTrainer) -> dict[str, torch.Tensor]:
    """As `ended_with` for whole models, by expert: those of this process, and what all processes have."""
    found = {f"gate.{name}": value for name, value in trainer.mixture.gate.state_dict().items()}
    found |= {f"em.{name}": value for name, value in trainer.em.state_dict().items()}
    parts = {f"expert_{expert}": model for expert, model in own_models(trainer).items()}
    for part, module in (parts | {"gate": trainer.mixture.gate}).items():
        for name, parameter in module.named_parameters():
            found[f"{part}.{name}"] = parameter
            moments = trainer.optimizer.state.get(parameter, {})
            found |= {f"{part}.{name}.{key}": torch.as_tensor(value) for key, value in moments.items()}
    return {name: value.detach().clone().contiguous() for name, value in found.items()}


def held_numbers(trainer: MixtureTrainer) -> dict[str, int]:
    """How many numbers of the experts, of all models and of moments this process holds."""
    moments = [m for state in trainer.optimizer.state.values() for m in state.values() if m.dim() > 0]
    return {
        "trained": sum(p.numel() for model in own_models(trainer).values() for p in model.parameters()),
        "models": sum(p.numel() for p in trainer.mixture.experts.parameters()),
        "moments": sum(m.numel() for m in moments),
    }


def ended_with(trainer: MixtureTrainer) -> dict[str, torch.Tensor]:
    """Everything that decides what would come next."""
    found = {f"model.{name}": value for name, value in trainer._trained_tensors().items()}
    found |= {f"em.{name}": value for name, value in trainer.em.state_dict().items()}
    for i, state in trainer.placement.optimizer_state(trainer.optimizer)["state"].items():
        found |= {f"optimizer.{i}.{name}": torch.as_tensor(value) for name, value in state.items()}
    return {name: value.detach().clone().contiguous() for name, value in found.items()}


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Equal up to sums of float32 in another order, through 6 steps of AdamW; parameters move by 0.02 and more."""
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=5e-6)


def held_share(trainer: MixtureTrainer) -> float:
    """The share of all numbers of experts and base model, and of AdamW's moments, that this process holds."""
    if isinstance(trainer.placement, Zero):
        return held_share_of_zero(trainer)
    with whole(trainer.mixture.experts):  # an evaluation leaves some parts gathered
        pass
    moments = [m for state in trainer.optimizer.state.values() for m in state.values() if m.dim() > 0]
    tensors = [*trainer.mixture.experts.parameters(), *moments]
    return sum(own_part(t).numel() for t in tensors) / sum(t.numel() for t in tensors)


def held_share_of_zero(trainer: MixtureTrainer) -> float:
    """As `held_share`, from DeepSpeed's shares and flat tensors."""
    parameters = list(trainer.mixture.experts.parameters())
    if any(not hasattr(p, "ds_tensor") for p in parameters):  # stage 2 shares out moments alone
        moments = [m for state in trainer.optimizer.optimizer.state.values() for m in state.values() if m.dim() > 0]
        return sum(m.numel() for m in moments) / sum(2 * p.numel() for p in parameters if p.requires_grad)
    return sum(p.ds_tensor.numel() for p in parameters) / sum(p.ds_numel for p in parameters)


def history(trainer: MixtureTrainer) -> list[dict[str, float]]:
    """The log without times."""
    times = ("runtime", "per_second", "total_flos")
    return [{k: v for k, v in line.items() if not any(t in k for t in times)} for line in trainer.state.log_history]


def work(folder: Path, name: str) -> None:
    """Trains a scenario to its end, then once more from its first checkpoint, and writes both ends."""
    fields, processes = SCENARIOS[name], int(os.environ["WORLD_SIZE"])
    spread = name.startswith("parallel")
    fields = fields | ({"expert_parallel": True} if spread else {})
    kinds = ["whole", "resumed"] + (["continued"] if (folder / f"{name}-one").exists() else [])
    for kind in kinds:
        run_dir = folder / f"{name}-{kind}"
        trainer = make_trainer(run_dir, processes, **fields)
        rank = trainer.args.process_index
        assert trainer.accelerator.num_processes == torch.distributed.get_world_size() == processes
        checkpoint = run_dir / f"checkpoint-{fields['save_steps']}"
        if kind != "whole" and rank == 0:  # from where these two processes were, or from where one was
            source = f"{name}-whole" if kind == "resumed" else f"{name}-one"
            shutil.copytree(folder / source / checkpoint.name, checkpoint)
        trainer.accelerator.wait_for_everyone()
        trainer.train(resume_from_checkpoint=kind != "whole")
        metrics = trainer.evaluate()
        ends = ended_with_experts(trainer) if spread else ended_with(trainer)
        save_file(ends, str(folder / f"{name}-{kind}-{rank}.safetensors"))
        held = {"numbers": held_numbers(trainer)} if spread else {"share": held_share(trainer)}
        text = json.dumps({"history": history(trainer), "metrics": metrics, **held})
        (folder / f"{name}-{kind}-{rank}.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[2].startswith("zero"):
        use_deepspeed(int(sys.argv[2][4]), Path(sys.argv[1]))
    for scenario in sys.argv[2:]:
        work(Path(sys.argv[1]), scenario)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
