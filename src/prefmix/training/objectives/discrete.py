"""The bound of discrete latents: each comparison (`pair`) or user (`user`) has one expert.

    ELBO_i = a_i [E_q log p_i - KL(q_g || w_g) / n_g],   q from the running evidence of group g

With `adaptive_beta` (beta-DPO) experts learn at the pass's own beta, and its bound is what is logged; responsibilities
and evidence stay at the run's. Legend: B rows, K experts.
"""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor, nn

from prefmix.mixture.elbo import elbo_rows
from prefmix.mixture.estep import EStep
from prefmix.mixture.likelihoods.beta_dpo import adapt_beta
from prefmix.mixture.m_step import with_gradient_of
from prefmix.policy.mixture_model import MixtureOutput
from prefmix.training.objective import Likelihoods, robust_bound
from prefmix.training.objectives.interface import AbstractObjective, BatchBound
from prefmix.training.processes import gathered, own_rows


class DiscreteObjective(AbstractObjective):
    """Stochastic variational EM of a mixture of likelihoods, held first responsibilities included."""

    def bound(self, model: nn.Module, inputs: dict[str, Tensor], output: MixtureOutput, lik: Likelihoods) -> BatchBound:
        """See the class; Dr. DPO's aggregate of the rows' bounds where one is asked for."""
        trainer, weight = self.trainer, inputs["weight"]
        evidence = self._evidence(inputs["row"], lik.log_lik)
        q = trainer._responsibilities(inputs, output.log_weights, evidence)
        self.remember_flips(inputs, lik, q)
        beta = self._adapted_beta(lik, q, weight)
        teaching = lik if beta is None else trainer._likelihoods(output, inputs, beta)
        taught = self.taught(model, inputs, output, teaching, q, beta)
        group_weight = trainer.em.group_weight[inputs["group"]]
        rows = elbo_rows(teaching.log_lik.detach(), taught.log_weights, q.resp, q.log_q, weight, group_weight)
        bound = with_gradient_of(rows.elbo, taught.log_lik, taught.coefficient, weight)
        bound = robust_bound(bound, weight, trainer.args.dr_dpo_beta)
        return BatchBound(bound, rows, q, evidence, output.log_weights, group_weight)

    def _adapted_beta(self, lik: Likelihoods, q: EStep, weight: Float[Tensor, "B"]) -> Float[Tensor, "K"] | None:
        """[K] beta-DPO's beta of this pass over all processes, whose threshold moves on; None without it."""
        trainer, threshold = self.trainer, self.trainer.em.threshold
        alpha = trainer.args.adaptive_beta
        if threshold is None or alpha is None:
            return None
        margins, rows = gathered(trainer.readers, lik.margins, weight.unsqueeze(1) * q.log_q.exp())
        found = adapt_beta(margins, rows, trainer._beta, threshold, alpha=alpha)
        threshold.copy_(found.threshold)
        return found.beta

    def _evidence(self, row: Int[Tensor, "B"], log_lik: Float[Tensor, "B K"]) -> Float[Tensor, "B K"]:
        """[B, K] running evidence of each row's group; every process keeps the same table."""
        trainer = self.trainer
        if trainer.readers.number == 1:
            return trainer.em.evidence.update(row, log_lik)
        row, log_lik = gathered(trainer.readers, row, log_lik)
        real = row >= 0  # not a copy that fills a batch
        everywhere = log_lik.clone()
        everywhere[real] = trainer.em.evidence.update(row[real], log_lik[real])
        return own_rows(trainer.readers, everywhere)
