"""The bound of continuous groups: q(z) of the batch's users, then the bound's gradient in everything else.

    ELBO_i = a_i [ mean_s log sum_k w_ik(z_s) p_ik - c KL(q_u || N(0, I)) / n_u ]

Experts learn by r_ik = E_q of the posterior of the comparison's expert, which is the bound's gradient in log p_ik; the
gate's terms and A by the bound itself.

Legend: S draws, B rows of a batch, M its users, K experts, d latent dimensions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from prefmix.mixture.estep import EStep
from prefmix.mixture.m_step import with_gradient_of
from prefmix.mixture.membership import (
    membership_elbo_rows,
    membership_log_weights,
    mixture_rows,
    sample_z,
    standard_draws,
)
from prefmix.policy.mixture_model import MixtureOutput
from prefmix.training.membership_step import batch_users, kl_factor_now, remember_users, teach_encoder_first
from prefmix.training.objective import Likelihoods
from prefmix.training.objectives.discrete import DiscreteObjective
from prefmix.training.objectives.interface import BatchBound


class UserDraws(NamedTuple):
    """What the bound reads of the users of B rows, with gradient where q has one.

    Attributes:
        loading: [K, d] A.
        z: [S, B, d] draws of the user of each row.
        kl: [B] KL(q || N(0, I)) of that user, nats.
    """

    loading: Float[Tensor, "K d"]
    z: Float[Tensor, "S B d"]
    kl: Float[Tensor, "B"]


class MembershipObjective(DiscreteObjective):
    """The Monte Carlo ELBO of users who blend experts, once first responsibilities are no longer held."""

    def bound(self, model: nn.Module, inputs: dict[str, Tensor], output: MixtureOutput, lik: Likelihoods) -> BatchBound:
        """See the class; q(z) of the batch's users is brought up to date."""
        if self.is_held:
            return super().bound(model, inputs, output, lik)
        trainer, weight = self.trainer, inputs["weight"]
        loading, z, kl = self.draw_users(inputs, lik)
        with torch.no_grad():
            log_weights = membership_log_weights(output.log_weights, loading, z)
            resp = torch.softmax(log_weights + lik.log_lik, dim=-1).mean(dim=0)
            mean_weights = log_weights.exp().mean(dim=0).log()
        q = EStep(resp, resp.log())
        self.remember_flips(inputs, lik, q)
        taught = self.taught(model, inputs, output, lik, q)
        log_weights = membership_log_weights(taught.log_weights, loading, z)
        row_log_lik = mixture_rows(log_weights, lik.log_lik.detach())
        group_weight = trainer.em.group_weight[inputs["group"]]
        rows = membership_elbo_rows(row_log_lik, kl, weight, group_weight, kl_factor_now(trainer))
        bound = with_gradient_of(rows.elbo, taught.log_lik, taught.coefficient, weight)
        remember_users(trainer, inputs, q.resp)
        # `mixture/evidence` is then the predictive log-likelihood of the rows: E_q of the weights, and groups of one.
        return BatchBound(bound, rows, q, lik.log_lik.detach(), mean_weights, torch.ones_like(weight))

    def draw_users(self, inputs: dict[str, Tensor], lik: Likelihoods) -> UserDraws:
        """Draws from q(z) of each row's user, once q knows what the batch says."""
        trainer = self.trainer
        self._evidence(inputs["row"], lik.log_lik)
        network = trainer.mixture.gate.membership
        assert network is not None, "latent='membership' builds a gate with a loading"
        teach_encoder_first(trainer, network)
        users = batch_users(trainer, network, inputs)
        seed = trainer.state.global_step
        noise = standard_draws(trainer.args.membership_samples, network.dim, seed=seed).to(users.q.mean)
        z_SMd = sample_z(users.q, noise.unsqueeze(1))
        return UserDraws(network.loading, z_SMd[:, users.position], users.kl[users.position])
