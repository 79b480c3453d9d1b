"""What a run cost and reached, for the model card and the report; nothing here decides anything."""

from __future__ import annotations

import platform
import sys
import time
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from prefmix.training.trainer import MixtureTrainer

# Figures of a held-out set that a card shows, as `held_out_metrics` names them.
HELD_OUT = ("accuracy", "loss", "population_accuracy", "population_loss")


class Clock(NamedTuple):
    """When a run began, or went on.

    Attributes:
        step: steps taken before.
        wall: of `time.perf_counter`, seconds.
        cpu: of `time.process_time`, seconds over all threads of this process.
    """

    step: int
    wall: float
    cpu: float

    @classmethod
    def now(cls, step: int) -> Clock:
        """A clock that starts here."""
        return cls(step, time.perf_counter(), time.process_time())


def training_record(trainer: MixtureTrainer) -> dict[str, Any]:
    """JSON values: rows, time, memory, machine, and the held-out figures of the log; what is not known is left out.

    `seconds` and `cpu_seconds` count from the first step of this process (`first_step`): reading texts comes before.
    """
    found: dict[str, Any] = {"data": trainer.data_source} if trainer.data_source else {}
    if trainer.clock is not None:
        begun = trainer.clock
        found |= {
            "first_step": begun.step,
            "seconds": round(time.perf_counter() - begun.wall, 1),
            "cpu_seconds": round(time.process_time() - begun.cpu, 1),
        }
    if (peak := peak_memory()) is not None:
        found["peak_memory_bytes"] = peak
    experts = trainer.mixture.experts
    trained = [parameter for parameter in trainer.mixture.parameters() if parameter.requires_grad]
    if (adversary := trainer.em.adversary) is not None:
        found["robust"] = adversary.record()
    return found | {
        "trained_parameters": sum(parameter.numel() for parameter in trained),
        "base_parameters": sum(parameter.numel() for parameter in experts.base_model.parameters()),
        "processes": trainer.args.world_size,
        "device": trainer.args.device.type,
        "machine": machine(),
        "held_out": _held_out(trainer),
    }


def machine() -> str:
    """The processor by name where the system tells it, and how many threads torch uses."""
    import torch

    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    except OSError:
        pass
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{name} ({torch.get_num_threads()} threads){gpu}"


def peak_memory() -> int | None:
    """Largest resident memory of this process so far, bytes; None where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


def _held_out(trainer: MixtureTrainer) -> dict[str, float]:
    """The log's figures of the step that the policy is of: the best one where that is loaded, else the last."""
    state = trainer.state
    step = state.best_global_step if trainer.args.load_best_model_at_end else state.global_step
    lines = [line for line in state.log_history if line.get("step") == step and "eval_loss" in line]
    if not lines:
        return {}
    return {name: float(lines[-1][f"eval_{name}"]) for name in HELD_OUT if f"eval_{name}" in lines[-1]}
