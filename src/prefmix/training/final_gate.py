"""The gate's last M-step: what gradient steps leave unfinished, on a copy, from the evidence of all training rows.

The gate that trains stays as it is, so that a checkpoint is of what trained. Legend: B training rows, G latent groups,
K experts, M features.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from prefmix.data.users import latent_groups
from prefmix.mixture.gates import Gate
from prefmix.mixture.posterior import group_log_lik
from prefmix.mixture.relevance import GroupEvidence, Relevance, fit_relevance
from prefmix.policy.personalization import map_offsets_of_users
from prefmix.training.config import MixtureConfig
from prefmix.training.population_gate import unknown_user_log_weights

if TYPE_CHECKING:
    from prefmix.training.trainer import MixtureTrainer


def ends_with_a_fit(gate: Gate, args: MixtureConfig, latent: str) -> bool:
    """Whether `final_gate` differs from the gate that trained."""
    return "user" in gate.terms or _fits_metadata(gate, args, latent)


@torch.no_grad()
def final_gate(trainer: MixtureTrainer, log_lik: Float[Tensor, "B K"]) -> Gate:
    """The gate with its metadata term refitted, then each training user's row; itself without such terms.

    Args:
        trainer: its experts, gate and training rows.
        log_lik: [B, K] log p_ik of the training rows.
    """
    trained, args = trainer.mixture.gate, trainer.args
    if not ends_with_a_fit(trained, args, trainer.latent):
        return trained
    gate = copy.deepcopy(trained)
    if _fits_metadata(gate, args, trainer.latent):
        found = metadata_relevance(trainer, log_lik)
        gate.set_metadata(found.weight, found.bias)
    if "user" in gate.terms and len(trainer.train_comparisons.table.users):
        gate.user.copy_(_user_rows(trainer, gate, log_lik))
    return gate


def metadata_relevance(trainer: MixtureTrainer, log_lik: Float[Tensor, "B K"]) -> Relevance:
    """The metadata term at the maximum of evidence and its fields' priors (`mixture.relevance`), others held.

    A prior keeps a field that says nothing of the groups from sending people anywhere; gradient steps, which know
    none, learn it from a few dozen people.

    Args:
        trainer: its gate and training rows, whose metadata are those of their group.
        log_lik: [B, K] log p_ik of the training rows.
    """
    comparisons, encoder = trainer.train_comparisons, trainer.metadata_encoder
    table, per_pair = comparisons.table, trainer.latent == "pair"
    assert encoder is not None and comparisons.metadata is not None
    without = copy.deepcopy(trainer.mixture.gate)
    without.set_metadata(torch.zeros_like(without.metadata.weight), torch.zeros_like(without.metadata.bias))
    weight = torch.from_numpy(table.weight).double()
    present, first, group = np.unique(latent_groups(table, trainer.latent), return_index=True, return_inverse=True)
    rows = torch.from_numpy(first)
    evidence = log_lik.double().cpu()
    if not per_pair:
        evidence = group_log_lik(evidence, torch.from_numpy(group), len(present), weight)
    data = GroupEvidence(
        features=comparisons.metadata[rows],
        offset=unknown_user_log_weights(without, comparisons)[rows],
        evidence=evidence,
        times=weight if per_pair else torch.ones(len(present)),
    )
    return fit_relevance(data, torch.tensor(encoder.field_of_feature))


def _fits_metadata(gate: Gate, args: MixtureConfig, latent: str) -> bool:
    """Groups have one expert each, and rows count as they are: what the marginal likelihood is of."""
    asked = "metadata" in gate.terms and args.metadata_prior == "relevance" and args.num_experts > 1
    return asked and args.likelihood == "mbt" and args.robust_over is None and latent != "membership"


def _user_rows(trainer: MixtureTrainer, gate: Gate, log_lik: Float[Tensor, "B K"]) -> Float[Tensor, "U K"]:
    """Each training user's row at its MAP given experts and the other terms.

    Gradient steps leave rows short of it (a user's row moves in a few steps of an epoch). This is the last M-step of
    the rows: it never lowers evidence + log prior, and it is where `adapt` puts a user who brings the same comparisons.
    """
    table = trainer.train_comparisons.table
    known = torch.from_numpy(np.flatnonzero(table.user >= 0))
    population = gate.population_log_weights().cpu().double()
    return map_offsets_of_users(
        unknown_user_log_weights(gate, trainer.train_comparisons)[known],
        log_lik[known],
        torch.from_numpy(table.weight)[known],
        torch.from_numpy(table.user).long()[known],
        population,
        (gate.user_strength * population.exp()).expand(len(table.users), -1),
    )
