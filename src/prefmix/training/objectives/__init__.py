"""What a run maximises, one class each; a run chooses one of them at its start and asks no questions afterwards."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prefmix.training.objectives.discrete import DiscreteObjective
from prefmix.training.objectives.interface import AbstractObjective, BatchBound
from prefmix.training.objectives.log_linear import LogLinearObjective
from prefmix.training.objectives.marginal import MarginalObjective
from prefmix.training.objectives.membership import MembershipObjective

if TYPE_CHECKING:
    from prefmix.training.trainer import MixtureTrainer

__all__ = ["AbstractObjective", "BatchBound", "objective_of"]


def objective_of(trainer: MixtureTrainer) -> AbstractObjective:
    """The objective that a configuration asks for; every one begins as the discrete bound at held responsibilities."""
    if trainer.latent == "membership":
        return MembershipObjective(trainer) if trainer.args.combine == "mixture" else LogLinearObjective(trainer)
    return DiscreteObjective(trainer) if trainer.args.likelihood == "mbt" else MarginalObjective(trainer)
