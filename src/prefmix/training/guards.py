"""Stops a run at the first NaN or infinity, and says where it stood.

Legend: B rows of a batch, K experts.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int
from torch import Tensor

from prefmix.experts.spread_experts import SpreadExperts
from prefmix.policy.mixture_model import MixtureModel
from prefmix.training.sharding import own_part

SHOWN = 10


class NonFiniteError(RuntimeError):
    """Loss, gradient, weights or gate are NaN or infinite. The message names step, expert and rows of the input."""


class _Batch(NamedTuple):
    """What one forward pass showed: rows [B], which [B, K] likelihoods and [B] gate rows are sound, and the loss."""

    row: Int[Tensor, "B"]
    lik_ok: Bool[Tensor, "B K"]
    gate_ok: Bool[Tensor, "B"]
    loss_ok: Bool[Tensor, ""]


class FiniteGuard:
    """Gathers flags on the device during a step and fetches one bit at its end."""

    def __init__(self, source_row: np.ndarray) -> None:
        """Args:
        source_row: [R] row of the input of every training row, for the message.
        """
        self._source_row = source_row
        self._batches: list[_Batch] = []
        self._gradients: dict[str, Tensor] = {}

    @torch.no_grad()
    def observe_batch(
        self, row: Int[Tensor, "B"], log_lik: Float[Tensor, "B K"], log_weights: Float[Tensor, "B K"], loss: Tensor
    ) -> None:
        """Notes what one forward pass gave. A weight of zero is sound, so the gate may hold -inf."""
        gate_ok = (log_weights <= 0).all(dim=1) & (log_weights > -torch.inf).any(dim=1)
        self._batches.append(_Batch(row, torch.isfinite(log_lik), gate_ok, torch.isfinite(loss)))

    @torch.no_grad()
    def observe_gradients(self, model: MixtureModel) -> None:
        """Notes which gradients are finite, before clipping spreads a NaN of one expert to all."""
        gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
        self._gradients = {name: _by_expert(model, name, gradient) for name, gradient in gradients.items()}

    @torch.no_grad()
    def check(self, step: int, model: MixtureModel) -> None:
        """Raises if anything of the step is not finite on any process; a sound step's only transfer from the device.

        Args:
            step: the optimizer step just done, counted from 1.
            model: experts and gate after the step.

        Raises:
            NonFiniteError: naming step, expert and rows; the same on all processes, none of which waits for another.
        """
        weights = {name: _by_expert(model, name, p) for name, p in model.named_parameters() if p.requires_grad}
        gate = model.gate.population_log_weights()
        gate_ok = (gate <= 0).all() & (gate > -torch.inf).any()
        batches, gradients = self._batches, self._gradients
        self._batches, self._gradients = [], {}
        flags = [gate_ok, *gradients.values(), *weights.values()]
        flags += [flag for batch in batches for flag in (batch.lik_ok, batch.gate_ok, batch.loss_ok)]
        sound = torch.stack([flag.all() for flag in flags]).all()
        if not _on_all_processes(sound):
            faults = [] if sound else self._faults(model, batches, gradients, weights, gate_ok)
            raise NonFiniteError(
                f"step {step}: NaN or infinity in {'; '.join(_of_all_processes(faults))}. The run stops and nothing of "
                "this step is saved; lower learning_rate or max_grad_norm, look at these rows, or resume from the last "
                "checkpoint"
            )

    def _faults(
        self,
        model: MixtureModel,
        batches: list[_Batch],
        gradients: dict[str, Tensor],
        weights: dict[str, Tensor],
        gate_ok: Bool[Tensor, ""],
    ) -> list[str]:
        faults = []
        for batch in batches:
            faults += [
                f"loss of expert {expert} on {self._rows(batch.row[~batch.lik_ok[:, expert]])}"
                for expert in (~batch.lik_ok).any(dim=0).nonzero().flatten().tolist()
            ]
            if not batch.gate_ok.all():
                faults.append(f"gate on {self._rows(batch.row[~batch.gate_ok])}")
            if batch.lik_ok.all() and batch.gate_ok.all() and not batch.loss_ok:
                faults.append(f"loss on {self._rows(batch.row)}")
        everything = self._rows(torch.cat([batch.row for batch in batches]))
        for kind, flags in (("gradient", gradients), ("weights", weights)):
            for name, flag in flags.items():
                for expert in (~flag).nonzero().flatten().tolist():
                    owner = _owner(model, name, expert if len(flag) > 1 else None)
                    faults.append(f"{kind} of {owner} after {everything}")
        if not gate_ok and not any(fault.startswith("gate") for fault in faults):
            faults.append(f"gate after {everything}")
        return faults

    def _rows(self, row: Int[Tensor, "M"]) -> str:
        source = sorted({int(self._source_row[max(i, ~i)]) for i in row.tolist()})  # ~i: a copy of row i
        more = f" and {len(source) - SHOWN} more" if len(source) > SHOWN else ""
        return f"rows {source[:SHOWN]}{more} of the input (counted from 0)"


def _on_all_processes(sound: Bool[Tensor, ""]) -> bool:
    """Whether the step is sound everywhere: one that stopped alone would leave the others waiting."""
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return bool(sound)
    everywhere = sound.to(torch.int32)
    dist.all_reduce(everywhere, op=dist.ReduceOp.MIN)
    return bool(everywhere)


def _of_all_processes(faults: list[str]) -> list[str]:
    """Every process's faults, each once, in the order of the processes."""
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return faults
    found: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(found, faults)
    return list(dict.fromkeys(fault for each in found for fault in each))


def _owner(model: MixtureModel, name: str, stacked: int | None) -> str:
    """Whose parameter this is; whole models by their number among all K, wherever they live."""
    if stacked is not None:
        return f"expert {stacked} ({name})"
    whole = re.match(r"experts\.(?:own\.)?models\.(\d+)\.(.*)", name)
    if whole is None:
        return f"all experts (trunk) or the gate ({name})"
    experts, local = model.experts, int(whole[1])
    expert = experts.own_experts[local] if isinstance(experts, SpreadExperts) else local
    return f"expert {expert} ({whole[2]})"


def _by_expert(model: MixtureModel, name: str, tensor: Tensor) -> Bool[Tensor, "M"]:
    """Whether the values are finite: one flag an expert where the experts stand stacked, else one."""
    num_experts = model.experts.num_experts
    own = name.startswith("experts.") and not name.startswith("experts.trunk.")
    stacked = own and tensor.dim() > 0 and len(tensor) == num_experts
    part = own_part(tensor)  # the other processes look at the other parts
    stacked = stacked and part is tensor
    return torch.isfinite(part).reshape(num_experts if stacked else 1, -1).all(dim=1)
