"""The part of the trainer that outlives a process: atomic checkpoints, exact resume, finished runs.

`transformers.Trainer` writes a checkpoint file by file into its final folder; `checkpoint.py` does it atomically, and
everything that decides the rest of the run goes in: experts, gate, optimizer, scheduler, random numbers, EM's memory,
and the sums that the next line of the log is made of.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
from abc import ABC, abstractmethod
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_callback import ExportableState, TrainerState
from transformers.trainer_utils import TrainOutput

from prefmix.data.collator import ComparisonDataset
from prefmix.policy.metadata_fields import silent_fields
from prefmix.policy.mixture_model import MixtureModel
from prefmix.policy.mixture_policy import MixturePolicy
from prefmix.training import checkpoint as store
from prefmix.training.announcements import followers, report_end
from prefmix.training.config import MixtureConfig
from prefmix.training.em_state import EMState
from prefmix.training.final_gate import ends_with_a_fit
from prefmix.training.metrics_log import Meter
from prefmix.training.old_runs import FINISHED, POLICY, make_room, refusal
from prefmix.training.placement import AbstractPlacement
from prefmix.training.processes import Readers, share_object, summed
from prefmix.training.record import Clock

logger = logging.getLogger(__name__)


class AbstractCheckpointedTrainer(Trainer, ABC):
    """A trainer whose runs can be killed at any moment and continue bit for bit (on a CPU).

    Attributes:
        em: running evidence and responsibilities.
        meter: sums of the next line of the log.
        placement: where weights and moments live among the processes.
        identity: what a checkpoint must agree with: data, base model, shape of the mixture.
        warm_steps: optimizer steps at the start in which every expert learns from every row.
        hold_steps: optimizer steps before experts decide responsibilities themselves.
        clock: since this process trains; None before.
        followers: users with each expert in the policy saved last; None: before, or where users have no weights.
        data_source: what the model card calls the training rows; empty: nothing.
    """

    args: MixtureConfig
    em: EMState
    latent: Literal["pair", "user", "membership"]
    meter: Meter
    placement: AbstractPlacement
    identity: dict[str, Any]
    warm_steps: int
    hold_steps: int
    clock: Clock | None = None
    followers: list[int] | None = None
    silent: tuple[str, ...] = ()
    data_source: str = ""
    _loop_state: dict[str, Tensor] | None = None

    @property
    @abstractmethod
    def mixture(self) -> MixtureModel:
        """Experts and gate."""

    @property
    @abstractmethod
    def policy(self) -> MixturePolicy:
        """The mixture as it stands."""

    @abstractmethod
    def policy_of(self, log_lik: Tensor) -> MixturePolicy:
        """The mixture as it stands; [B, K] `log_lik` is what it says of the training rows."""

    @property
    def readers(self) -> Readers:
        """The processes that read different rows of a global batch."""
        return Readers(self.accelerator, 1 if self.args.expert_parallel else self.accelerator.num_processes)

    @property
    def run_dir(self) -> Path:
        """`args.output_dir`: checkpoints, `metrics.jsonl`, `policy` and `finished.json`."""
        return Path(str(self.args.output_dir))

    @abstractmethod
    def start_em(self) -> None:
        """Computes the first responsibilities of a fresh run."""

    @abstractmethod
    def share_evidence(self) -> None:
        """Gives every process the evidence of the first."""

    @abstractmethod
    def refresh_evidence(self) -> Tensor:
        """Recomputes the evidence of every training row from the experts as they are; returns it, [B, K]."""

    # --- runs -------------------------------------------------------------------------------------------------------

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Trains, or continues, and writes the policy.

        Args:
            resume_from_checkpoint: True: from the newest intact checkpoint of `output_dir`; "auto": the same, or a
                fresh start where there is none; a path: from that checkpoint. Damaged checkpoints are named and passed
                over. A finished run takes no further step.
            trial: of a hyperparameter search.
            ignore_keys_for_eval: not used.

        Raises:
            ValueError: no checkpoint is intact, or a fresh run would overwrite another.
            NonFiniteError: loss, gradient, weights or gate became NaN or infinite.
        """
        run_dir = Path(self._get_output_dir(trial))
        resume = self.args.resume_from_checkpoint if resume_from_checkpoint is None else resume_from_checkpoint
        fresh = not resume and not self.args.overwrite_output_dir
        if fresh and self.args.should_save and (problem := refusal(run_dir)) is not None:
            raise ValueError(problem)
        run_dir.mkdir(parents=True, exist_ok=True)
        max_steps = self._plan_steps()
        # The first process cleans and chooses; the others must not look before it has, nor find another one.
        checkpoint = share_object(
            self.accelerator, self._checkpoint_to_resume(run_dir, resume) if self.args.process_index == 0 else None
        )
        if checkpoint is None:
            if self.args.should_save:
                make_room(run_dir, self.args.overwrite_output_dir)
            self.start_em()
        else:
            store.check_identity(checkpoint, self.identity)
            finished = _finished(run_dir, max_steps)
            if finished is not None:
                return self._reopen(checkpoint, finished)
        output = super().train(str(checkpoint) if checkpoint else None, trial, ignore_keys_for_eval)
        output = output._replace(training_loss=output.metrics["train_loss"])
        self.save_model(str(run_dir / POLICY))
        self.share_evidence()
        if self.args.should_save:
            report_end(run_dir / POLICY, run_dir, self.followers, self.silent)
            _write_json(run_dir / FINISHED, {"step": output.global_step, "max_steps": max_steps, **output.metrics})
        return output

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the policy folder atomically; null: `output_dir/policy`. All processes must call."""
        writes = self.placement.joint or self.args.should_save
        # What training rows say is kept by user, and ends the gate's training; else nobody would read it.
        users = len(cast(ComparisonDataset, self.train_dataset).table.users) > 0
        known = writes and (users or ends_with_a_fit(self.mixture.gate, self.args, self.latent))
        log_lik = self.refresh_evidence() if known else torch.empty(0, self.args.num_experts)

        def policy() -> MixturePolicy:
            finished = self.policy_of(log_lik)
            self.followers = followers(finished)
            self.silent = silent_fields(finished.model.gate, finished.metadata_encoder)
            return finished

        self.placement.save_policy(policy, Path(output_dir or self.run_dir / POLICY))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As `Trainer.log`, with the mean loss of the whole run, not of the part since it was resumed."""
        if "train_loss" in logs:
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step, 1)
        super().log(logs, start_time)

    def _plan_steps(self) -> int:
        plan = self.set_initial_training_values(self.args, self.get_train_dataloader())
        updates_per_epoch, max_steps = plan[1], plan[-1]
        assert max_steps is not None
        self.warm_steps = math.ceil(self.args.warm_start_epochs * updates_per_epoch)
        self.hold_steps = self.warm_steps + math.ceil(self.args.init_hold_epochs * updates_per_epoch)
        return max_steps

    def _checkpoint_to_resume(self, run_dir: Path, resume: str | bool | None) -> Path | None:
        if not resume:
            return None
        if self.args.should_save:
            store.clean(run_dir)
        if resume == "auto" and not store.checkpoints(run_dir):
            return None
        if resume in (True, "auto", "true", "True"):
            newest = store.newest_intact(run_dir)
            logger.info("prefmix: resuming from %s", newest)
            return newest
        problems = store.damage(Path(str(resume)))
        if problems:
            raise ValueError(
                f"resume_from_checkpoint={str(resume)!r}: damaged ({'; '.join(problems)}); use "
                "resume_from_checkpoint=True for the newest intact checkpoint of output_dir"
            )
        return Path(str(resume))

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """As `Trainer._run_epoch`, but a run that has taken all its steps takes none more."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _reopen(self, checkpoint: Path, finished: dict[str, Any]) -> TrainOutput:
        """Puts a finished run back into memory without a single step."""
        self._load_from_checkpoint(str(checkpoint))
        self.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
            self._load_best_model()
        self.refresh_evidence()
        logger.warning("%s: this run is finished (step %s); nothing is trained", self.args.output_dir, finished["step"])
        metrics = {name: value for name, value in finished.items() if name not in ("step", "max_steps")}
        return TrainOutput(finished["step"], metrics["train_loss"], metrics)

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run_dir, step = Path(self._get_output_dir(trial)), self.state.global_step
        staging = store.staging_folder(run_dir, step)
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        self.store_flos()
        best = run_dir / f"checkpoint-{self.state.best_global_step}"
        if self.state.best_global_step == step or best.is_dir():
            self.state.best_model_checkpoint = str(best)
        self._save_optimizer_and_scheduler(str(staging))
        self._save_rng_state(str(staging))
        self.placement.write_own(staging, self._made_optimizer)
        trained, run_state = self._trained_tensors(), self._run_state()  # every process takes part
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            save_file(_on_cpu(trained), str(staging / store.WEIGHTS))
            save_file(_on_cpu(run_state), str(staging / store.RUN_STATE))
            self._export_callbacks()
            self.state.save_to_json(str(staging / "trainer_state.json"))
            store.publish(run_dir, step, self.identity)
            store.rotate(run_dir, self.args.save_total_limit, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        state = self.placement.optimizer_state(self._made_optimizer)  # every process takes part
        if self.args.should_save:
            assert self.lr_scheduler is not None
            torch.save(state, Path(output_dir) / "optimizer.pt")
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        assert self.lr_scheduler is not None
        state, schedule = (
            torch.load(Path(checkpoint) / name, map_location="cpu", weights_only=True)
            for name in ("optimizer.pt", "scheduler.pt")
        )
        self.placement.load_optimizer_state(self._made_optimizer, state)
        self.placement.read_own(Path(checkpoint), self._made_optimizer)
        self.lr_scheduler.load_state_dict(schedule)

    @property
    def _made_optimizer(self) -> torch.optim.Optimizer:
        assert self.optimizer is not None, "training has begun"
        return self.optimizer

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        """As `Trainer`'s, which would look for a checkpoint of DeepSpeed's own."""
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        self.placement.begin()
        if resume_from_checkpoint is not None:
            if self.is_deepspeed_enabled:  # nothing has been loaded yet: the engine has copies of the weights
                self._load_from_checkpoint(resume_from_checkpoint)
            self._load_optimizer_and_scheduler(resume_from_checkpoint)
        return prepared

    def _sync_replicated_trainable_parameters(self, model: nn.Module) -> None:
        self.placement.share_gradients()

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        norm = self.placement.clip(self.args.max_grad_norm)
        return super()._clip_grad_norm(model) if norm is None else norm

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | None = None) -> Any:
        return super()._get_grad_norm(model, self.placement.clip(math.inf) if grad_norm is None else grad_norm)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        self._load_trained_tensors(folder)
        state = load_file(str(folder / store.RUN_STATE))  # safetensors does not know torch's "cpu:0" of a process
        self.em.load_state_dict(_part(state, "em."))
        self.meter.load_state_dict(_part(state, "meter."), self.args.device, self.readers.number)
        self._loop_state = _part(state, "loop.")

    def restore_loop(self) -> None:
        """Gives a resumed loop the sums of losses that the uninterrupted one would have."""
        if self._loop_state is not None:
            self._tr_loss = self._loop_state["tr_loss"].to(self.args.device)
            self._total_loss_scalar = self._loop_state["total_loss"].item()
            self._globalstep_last_logged = int(self._loop_state["last_logged"])
            self._loop_state = None

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        best = Path(self.state.best_model_checkpoint)
        problems = store.damage(best)
        if problems:
            raise ValueError(
                f"load_best_model_at_end: the best checkpoint {best} is damaged ({'; '.join(problems)}); restore it, "
                "or resume with load_best_model_at_end=False to keep the last step"
            )
        self._load_trained_tensors(best)

    def _load_trained_tensors(self, folder: Path) -> None:
        self.placement.load_trained_tensors(load_file(str(folder / store.WEIGHTS)))
        self.placement.read_own(folder, None)

    def _trained_tensors(self) -> dict[str, Tensor]:
        return self.placement.trained_tensors()

    def _run_state(self) -> dict[str, Tensor]:
        over_processes = partial(summed, self.readers)
        loop = {
            # What is logged is the mean over processes.
            "tr_loss": over_processes(self._tr_loss.detach()).clone() / self.readers.number,
            "total_loss": torch.tensor(self._total_loss_scalar, dtype=torch.float64),
            "last_logged": torch.tensor(self._globalstep_last_logged),
        }
        parts = {"em.": self.em.state_dict(), "meter.": self.meter.state_dict(over_processes), "loop.": loop}
        return {prefix + name: value for prefix, part in parts.items() for name, value in part.items()}

    def _export_callbacks(self) -> None:
        exported: dict[str, list[Any]] = {}
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                exported.setdefault(type(callback).__name__, []).append(callback.state())
        states = {name: found[0] if len(found) == 1 else found for name, found in exported.items()}
        self.state.stateful_callbacks = states  # type: ignore[assignment]  # the library's annotation is of the argument


def _finished(run_dir: Path, max_steps: int) -> dict[str, Any] | None:
    """What `finished.json` says, if the run ended and its planned length has not changed since."""
    file = run_dir / FINISHED
    if not file.is_file() or not (run_dir / POLICY).is_dir():
        return None
    finished = json.loads(file.read_text(encoding="utf-8"))
    return finished if finished["max_steps"] == max_steps else None


def _write_json(file: Path, value: Any) -> None:
    text = json.dumps(value, indent=2) + "\n"
    store.write_atomically(file, lambda path: path.write_text(text, encoding="utf-8"))


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
