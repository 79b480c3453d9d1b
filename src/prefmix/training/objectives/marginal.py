"""Likelihoods of one scalar reward of the whole mixture (`likelihood: bt_lse, policy`): no closed form, no E-step."""

from __future__ import annotations

from torch import Tensor, nn

from prefmix.policy.mixture_model import MixtureOutput
from prefmix.training.objective import Likelihoods, marginal_bound
from prefmix.training.objectives.discrete import DiscreteObjective
from prefmix.training.objectives.interface import BatchBound


class MarginalObjective(DiscreteObjective):
    """The marginal's gradient once first responsibilities are no longer held; until then the discrete bound's.

    Something must part the experts first. The log's responsibilities are those of the mixture of likelihoods.
    """

    def bound(self, model: nn.Module, inputs: dict[str, Tensor], output: MixtureOutput, lik: Likelihoods) -> BatchBound:
        """See the class."""
        found = super().bound(model, inputs, output, lik)
        if self.is_held:
            return found
        args = self.trainer.args
        bound = marginal_bound(output, inputs, beta=self.trainer._beta, model=args.feedback_model)
        return found._replace(bound=bound, rows=found.rows._replace(elbo=bound.detach()))
