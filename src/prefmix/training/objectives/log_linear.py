"""The bound of continuous groups whose experts' rewards are summed: each user judges by one reward.

    ELBO_i = a_i [ mean_s log p(sum_k w_ik(z_s) m_ik) - c KL(q_u || N(0, I)) / n_u ],   p(m) = sigmoid(m), or with noise

No comparison has an expert of its own here, so there is no M-step by responsibilities: the bound's own gradient reaches
experts, gate, A and (by an encoder) q. In m_ik it is mean_s w_ik(z_s) p'(m) / p(m): all experts learn from the error of
their sum, each by its share.

Legend: S draws, B rows of a batch, K experts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from prefmix.mixture.bradley_terry import implicit_rewards, margins
from prefmix.mixture.estep import EStep
from prefmix.mixture.membership import log_linear_rows, membership_elbo_rows, membership_log_weights
from prefmix.policy.mixture_model import MixtureOutput
from prefmix.training.membership_step import kl_factor_now, remember_users
from prefmix.training.objective import Likelihoods
from prefmix.training.objectives.discrete import DiscreteObjective
from prefmix.training.objectives.interface import BatchBound
from prefmix.training.objectives.membership import MembershipObjective


class LogLinearObjective(MembershipObjective):
    """The Monte Carlo ELBO of users who blend rewards, once first responsibilities are no longer held.

    Until then it is the discrete bound: experts that have not parted sum to one. Afterwards the log's responsibilities
    are the mean blends E_q w, and its evidence is the log-likelihood under them, as a policy would judge.
    """

    def bound(self, model: nn.Module, inputs: dict[str, Tensor], output: MixtureOutput, lik: Likelihoods) -> BatchBound:
        """See the class; q(z) of the batch's users is brought up to date."""
        if self.is_held:
            return DiscreteObjective.bound(self, model, inputs, output, lik)
        trainer, weight, noise = self.trainer, inputs["weight"], self.trainer.args.label_noise
        loading, z, kl = self.draw_users(inputs, lik)
        rewards = implicit_rewards(output.log_probs, output.ref_log_probs, trainer._beta)
        margins_BK = margins(rewards, inputs["chosen"], inputs["rejected"])
        log_weights = membership_log_weights(output.log_weights, loading, z)
        group_weight = trainer.em.group_weight[inputs["group"]]
        row_log_lik = log_linear_rows(log_weights, margins_BK, noise)
        rows = membership_elbo_rows(row_log_lik, kl, weight, group_weight, kl_factor_now(trainer))
        with torch.no_grad():
            blend = log_weights.exp().mean(dim=0)
            judged = log_linear_rows(blend.log().unsqueeze(0), margins_BK, noise)[0]
        remember_users(trainer, inputs, blend)
        q, evidence = EStep(blend, blend.log()), judged.unsqueeze(1).expand_as(blend)
        return BatchBound(rows.elbo, rows, q, evidence, blend.log(), torch.ones_like(weight), judged)
