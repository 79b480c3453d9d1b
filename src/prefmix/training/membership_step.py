"""The E-step of continuous groups in training: q(z) of a batch's users, where it starts, and where it ends.

`per_user`: q of a user in the batch is refitted to the last likelihoods of *all* their comparisons (incremental, as for
discrete groups). `encoder`: it is read off the same ones, with gradient. Every process keeps the likelihoods of all
rows, so q is the same wherever a user's rows were read, and the gradient of an encoder, as that of A, is a sum over the
processes' rows, which DDP takes.

Legend: B rows of a batch, C rows of its M users, G users, K experts, d latent dimensions.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from prefmix.mixture.gates import GateInputs
from prefmix.mixture.membership import (
    GaussianQ,
    MembershipRows,
    free_bits,
    kl_factor,
    kl_to_prior,
    standard_draws,
)
from prefmix.mixture.membership_fit import fit_users
from prefmix.mixture.membership_network import MembershipNetwork, rows_as
from prefmix.mixture.user_encoder import UserEncoder, encode, train_encoder
from prefmix.policy.mixture_model import MixtureModel
from prefmix.policy.user_state import UserState
from prefmix.training.processes import gathered, share_tensors
from prefmix.training.setup import Comparisons

if TYPE_CHECKING:
    from prefmix.training.trainer import MixtureTrainer

# Steps of the fit of a batch's users; it goes on from where their last visit ended.
STEP_FITS, STEP_TOLERANCE = 20, 1e-3
# Steps of an encoder on the rows seen, before it decides anything.
FIRST_LESSONS = 300


class BatchUsers(NamedTuple):
    """The M users of a batch, that of all processes together.

    Attributes:
        position: [B] which of them each row of this process's batch belongs to; 0 for copies that fill a batch.
        q: of each, with gradient where an encoder gives it.
        kl: [M] KL(q || N(0, I)), nats, free bits applied.
    """

    position: Int[Tensor, "B"]
    q: GaussianQ
    kl: Float[Tensor, "M"]


def teach_encoder_first(trainer: MixtureTrainer, network: MembershipNetwork) -> None:
    """Trains the encoder on the rows seen, at the experts as they are, when first responsibilities cease to be held.

    Untrained it would call all users alike, and experts that have just parted would be taught alike again. The first
    process teaches a copy, whose gradients DDP does not wait for, and the others take what it has learnt.
    """
    q = trainer.em.q
    assert q is not None, "latent='membership' keeps q"
    if network.encoder is None or bool(q.mean.any()):
        return
    lesson = copy.deepcopy(network.encoder)
    if trainer.accelerator.is_main_process:
        _first_lessons(trainer, network, lesson)
    share_tensors(trainer.accelerator, [parameter.data for parameter in lesson.parameters()])
    network.encoder.load_state_dict(lesson.state_dict())


def _first_lessons(trainer: MixtureTrainer, network: MembershipNetwork, encoder: UserEncoder) -> None:
    rows = _rows_of_users(trainer, torch.arange(len(trainer.em.initial), device=trainer.args.device))
    train_encoder(
        encoder, network.judged(rows), rows.score, network.loading, network.combine, steps=FIRST_LESSONS,
        users_per_step=100, samples=4, learning_rate=5e-3, generator=torch.Generator().manual_seed(trainer.args.seed),
    )  # fmt: skip


def batch_users(trainer: MixtureTrainer, network: MembershipNetwork, inputs: dict[str, Tensor]) -> BatchUsers:
    """The users of a batch, their q(z) brought up to date, on every process alike."""
    row, everywhere = gathered(trainer.readers, inputs["row"], inputs["group"])
    touched = torch.unique(everywhere[row >= 0])  # a copy of a row says nothing new of its user
    position = torch.searchsorted(touched, inputs["group"])
    position = torch.where(inputs["row"] >= 0, position, 0)
    rows = _rows_of_users(trainer, touched)
    state = trainer.em.q
    assert state is not None, "latent='membership' keeps q"
    if network.encoder is None:
        noise = standard_draws(trainer.args.membership_samples, network.dim).to(network.loading)
        start = GaussianQ(state.mean[touched], state.log_std[touched])
        q = fit_users(
            network.judged(rows), network.loading, network.combine, noise,
            start=start, steps=STEP_FITS, tolerance=STEP_TOLERANCE,
        ).q  # fmt: skip
        kl = kl_to_prior(q)
    else:
        q = encode(network.encoder, rows, rows.score)
        kl = free_bits(kl_to_prior(q), trainer.args.free_bits)
    kept = [q.mean.detach().clone(), q.log_std.detach().clone()]
    share_tensors(trainer.accelerator, kept)  # rounding on another machine must not part the processes
    state.mean[touched], state.log_std[touched] = kept
    return BatchUsers(position, q, kl.sum(dim=-1))


def _rows_of_users(trainer: MixtureTrainer, touched: Int[Tensor, "M"]) -> MembershipRows:
    """All rows seen so far of some users, at their last likelihoods and the gate as it is."""
    found = trainer.em.evidence.rows_of(touched)
    gate = gate_of_rows(trainer.mixture, trainer.train_comparisons, found.row)
    rows = MembershipRows(gate, found.log_lik, found.segment, found.weight, len(touched))
    return rows_as(rows, gate.dtype, gate.device)


@torch.no_grad()
def gate_of_rows(mixture: MixtureModel, comparisons: Comparisons, row: Int[Tensor, "C"]) -> Float[Tensor, "C K"]:
    """[C, K] log w of some rows by the gate's terms, at z = 0."""
    device, cpu_row = mixture.gate.population_log_weights().device, row.cpu()
    prompt, states, metadata = (
        torch.from_numpy(comparisons.table.prompt),
        comparisons.prompt_states,
        comparisons.metadata,
    )
    inputs = GateInputs(
        user=torch.full((len(row),), -1, device=device),
        prompt_states=None if states is None else states[prompt[cpu_row]].to(device),
        metadata=None if metadata is None else metadata[cpu_row].to(device),
    )
    return mixture.gate(inputs)


def kl_factor_now(trainer: MixtureTrainer) -> float:
    """Factor of the KL now; a fitted q has nothing to anneal."""
    if trainer.args.membership_estep == "per_user":
        return 1.0
    return kl_factor(trainer.state.global_step / max(trainer.state.max_steps, 1), trainer.args.kl_annealing)


def remember_users(trainer: MixtureTrainer, inputs: dict[str, Tensor], resp: Float[Tensor, "B K"]) -> None:
    """Keeps each user's mean responsibilities over their rows in the batch of all processes."""
    parts = (inputs["row"], inputs["group"], inputs["weight"], resp)
    row, group, weight, resp = gathered(trainer.readers, *parts)
    real = row >= 0
    group, position = torch.unique(group[real], return_inverse=True)
    trainer.em.remember(group, mean_by_user(resp[real], weight[real], position, len(group)))


def mean_by_user(
    resp: Float[Tensor, "B K"], weight: Float[Tensor, "B"], position: Int[Tensor, "B"], num: int
) -> Float[Tensor, "M K"]:
    """Log of each user's mean responsibilities over their rows of the batch."""
    weight = weight.unsqueeze(1)
    sums, total = (
        value.new_zeros(num, value.shape[1]).index_add_(0, position, value) for value in (weight * resp, weight)
    )
    return (sums / total).log()


def first_q(trainer: MixtureTrainer) -> GaussianQ | None:
    """The prior for every group, where q starts; None under the discrete latents.

    Raises:
        ValueError: several processes, and not over plain DDP.
    """
    network = trainer.mixture.gate.membership
    if network is None:
        return None
    if trainer.args.world_size > 1 and trainer.args.deepspeed_plugin is not None:
        raise ValueError(
            f"latent='membership' with {trainer.args.world_size} processes of DeepSpeed: they share q(z) over plain "
            "DDP alone; leave DeepSpeed out, or start one process"
        )
    zeros = torch.zeros(len(trainer.em.initial), network.dim, device=trainer.args.device)
    return GaussianQ(zeros, zeros.clone())


def final_memberships(trainer: MixtureTrainer, users: UserState, log_lik: Float[Tensor, "B K"]) -> UserState:
    """The users with q(z) of all their training comparisons, as `adapt` would give a user who brings the same.

    Args:
        trainer: its gate and training rows.
        users: of the training set, in the order of its indices.
        log_lik: [B, K] log p_ik of the training rows.
    """
    network, table = trainer.mixture.gate.membership, trainer.train_comparisons.table
    assert network is not None, "latent='membership' builds a gate with a loading"
    known = torch.from_numpy(table.user >= 0).nonzero().squeeze(1)
    rows = MembershipRows(
        gate_of_rows(trainer.mixture, trainer.train_comparisons, known).cpu(),
        log_lik[known],
        torch.from_numpy(table.user).long()[known],
        torch.from_numpy(table.weight)[known],
        len(users),
    )
    users.mean, users.log_std = network.learn(rows)
    return users
