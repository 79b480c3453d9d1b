"""The face of an objective: a batch's bound, with the gradient of its M-step. Legend: B rows, N texts, K experts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, NamedTuple

from jaxtyping import Float
from torch import Tensor, nn

from prefmix.mixture.elbo import RowELBO
from prefmix.mixture.estep import EStep
from prefmix.policy.mixture_model import MixtureOutput
from prefmix.training.metrics_log import Sums, batch_sums
from prefmix.training.objective import Likelihoods, Taught, learners_of_texts
from prefmix.training.processes import gathered
from prefmix.training.token_dropout import undo_scale

if TYPE_CHECKING:
    from prefmix.training.trainer import MixtureTrainer


class BatchBound(NamedTuple):
    """A batch's share of the objective, and what the log says of it.

    Attributes:
        bound: [B] a_i times the bound of each row, with gradient; the loss is minus its sum, but for the prior.
        rows: the bound in parts, detached, for the log.
        q: responsibilities used.
        evidence: [B, K] evidence of each row's group.
        log_weights: [B, K] prior log w of each row, as the log and the guard see it.
        group_weight: [B] n_g.
        judged: [B] log p of each row under `log_weights`, where that is not log sum_k w_ik p_ik; None: it is.
    """

    bound: Float[Tensor, "B"]
    rows: RowELBO
    q: EStep
    evidence: Float[Tensor, "B K"]
    log_weights: Float[Tensor, "B K"]
    group_weight: Float[Tensor, "B"]
    judged: Float[Tensor, "B"] | None = None


def objective_sums(batch: BatchBound, output: MixtureOutput, lik: Likelihoods, inputs: dict[str, Tensor]) -> Sums:
    """What the log says of a batch."""
    seen, texts = output._replace(log_weights=batch.log_weights), (inputs["chosen"], inputs["rejected"])
    if batch.judged is not None:  # then experts agree on what the log calls the evidence
        lik = lik._replace(log_lik=batch.judged.unsqueeze(1).expand_as(lik.log_lik))
    return batch_sums(seen, lik, batch.q, batch.rows, batch.evidence, inputs["weight"], batch.group_weight, *texts)


class AbstractObjective(ABC):
    """What a run maximises. It reads the trainer's mixture and keeps EM's memory (`trainer.em`) up to date."""

    def __init__(self, trainer: MixtureTrainer) -> None:
        self.trainer = trainer

    @abstractmethod
    def bound(self, model: nn.Module, inputs: dict[str, Tensor], output: MixtureOutput, lik: Likelihoods) -> BatchBound:
        """E-step and M-step of one batch.

        Args:
            model: experts and gate as wrapped, for a cheap M-step's second pass.
            inputs: the batch.
            output: of the first pass over it.
            lik: likelihoods of its rows.
        """

    @property
    def is_held(self) -> bool:
        """Whether responsibilities are still the first ones, whatever the objective."""
        return self.trainer.state.global_step < self.trainer.hold_steps

    @property
    def comes_back(self) -> bool:
        """Whether a cheap M-step reads the batch again, for the experts that learn."""
        return self.trainer.args.m_step != "all" and self.trainer.mixture.experts.keeps_activations

    def remember_flips(self, inputs: dict[str, Tensor], lik: Likelihoods, q: EStep) -> None:
        """The E-step of learnt label noise, at the responsibilities used."""
        noise, readers = self.trainer.em.noise, self.trainer.readers
        if noise is not None:
            flipped = noise.flips(inputs["row"], lik.margins, q.log_q.exp(), inputs.get("label"))
            noise.remember(*gathered(readers, inputs["row"], flipped))

    def taught(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        output: MixtureOutput,
        lik: Likelihoods,
        q: EStep,
        beta: Float[Tensor, "K"] | None = None,
    ) -> Taught:
        """Who learns from which row, and their log-likelihoods with gradient; `beta` in the place of the run's."""
        trainer, args = self.trainer, self.trainer.args
        coefficient = trainer._m_step(q.resp, samples=args.m_step_samples, threshold=args.m_step_threshold)
        if self.comes_back:
            learners = learners_of_texts(coefficient, inputs)
            again = undo_scale(model(**inputs, learners=learners), args.token_dropout)
            output = again._replace(ref_log_probs=output.ref_log_probs)
            lik = trainer._likelihoods(output, inputs, beta)
        return Taught(coefficient, lik.log_lik, output.log_weights)
