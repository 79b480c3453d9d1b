"""From experts and texts to per-expert log-likelihoods of comparisons, and from weights to predictions.

Every distinct text goes through the experts once, from cached trunk states where there are some, however many
comparisons name it. Legend: N texts, B comparisons, K experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from prefmix.data.comparisons import ComparisonTable, TextTable
from prefmix.data.stages import stage
from prefmix.experts.interface import AbstractExperts, ExpertLogProbs, PackedStates
from prefmix.mixture.bradley_terry import mixture_log_lik
from prefmix.mixture.likelihoods.feedback import (
    FeedbackLogLik,
    FeedbackRows,
    Sides,
    feedback_log_lik,
    marginal_log_lik,
    marginal_logit,
    normalised,
    pair_outcomes,
    sides_of,
)
from prefmix.mixture.likelihoods.model import FeedbackModel
from prefmix.mixture.likelihoods.own import is_proper
from prefmix.mixture.likelihoods.soft_labels import soft_label_log_lik
from prefmix.policy.feedback_rows import check_feedback, table_rows
from prefmix.policy.text_scores import text_log_probs


class States(Protocol):
    """Cached trunk states (`experts.trunk_cache.TrunkStates`)."""

    def gather(self, text_ids: np.ndarray) -> dict[str, Tensor]:
        """The packed states of some texts: hidden, targets, segments."""
        ...


class Marginal(NamedTuple):
    """What a likelihood of the whole mixture ("bt_lse", "policy") reads.

    Attributes:
        sides: log-probabilities of both responses of each row.
        beta: [K] beta_k.
        model: names the likelihood.
    """

    sides: Sides
    beta: Float[Tensor, "K"]
    model: FeedbackModel


class RowScores(NamedTuple):
    """What the experts say of B comparisons; float64, nats, on the CPU.

    Attributes:
        log_lik: [B, K] evidence of the row: log p_k(y_w > y_l), label noise included, or the loss of another kind.
        log_lik_reversed: [B, K] log p_k(y_l > y_w).
        ref_logit: [B] log pi_ref(y_w) - log pi_ref(y_l), mean over the experts' references.
        log_win: [B, K] log p_k(y_w > y_l) where `log_lik` is something else (ties, rankings, soft labels, losses that
            are no likelihoods: there it is the normalised one); None: it is that. At ties equal to `log_lik_reversed`.
        log_prob: [B, K] log-probability of the row where that is not `log_win`; None: it is.
        marginal: under a likelihood of the whole mixture; None: likelihoods of experts are mixed.
    """

    log_lik: Float[Tensor, "B K"]
    log_lik_reversed: Float[Tensor, "B K"]
    ref_logit: Float[Tensor, "B"]
    log_win: Float[Tensor, "B K"] | None = None
    log_prob: Float[Tensor, "B K"] | None = None
    marginal: Marginal | None = None

    @property
    def win(self) -> Float[Tensor, "B K"]:
        """[B, K] log p_k(y_w > y_l)."""
        return self.log_lik if self.log_win is None else self.log_win

    def select(self, rows: np.ndarray) -> RowScores:
        """The scores of some rows ([B] bool)."""
        marginal = self.marginal
        if marginal is not None:
            marginal = marginal._replace(sides=Sides(*(side[rows] for side in marginal.sides)))
        return RowScores(
            self.log_lik[rows],
            self.log_lik_reversed[rows],
            self.ref_logit[rows],
            None if self.log_win is None else self.log_win[rows],
            None if self.log_prob is None else self.log_prob[rows],
            marginal,
        )


class Predictions(NamedTuple):
    """A model's opinion of B comparisons under given weights.

    Attributes:
        log_prob: [B] log sum_k w_k p_k(y_w > y_l), or of a row's tie or order, nats.
        logit: [B] log p(y_w > y_l) - log p(y_l > y_w), nats; exactly 0 without an opinion, and at ties.
    """

    log_prob: np.ndarray
    logit: np.ndarray


def predict(log_weights: Float[Tensor, "B K"], scores: RowScores) -> Predictions:
    """Predictions under per-row weights: the gate, a posterior, or one-hot true groups.

    Args:
        log_weights: [B, K] normalised log-weights, -inf allowed.
        scores: of the same rows.
    """
    log_weights_BK = log_weights.double()
    if scores.marginal is not None:
        mixture = marginal_log_lik(log_weights_BK, *scores.marginal)
        return Predictions(mixture.numpy(), marginal_logit(log_weights_BK, *scores.marginal).numpy())
    forward = mixture_log_lik(log_weights_BK, scores.win)
    backward = mixture_log_lik(log_weights_BK, scores.log_lik_reversed)
    log_prob = forward if scores.log_prob is None else mixture_log_lik(log_weights_BK, scores.log_prob)
    return Predictions(log_prob.numpy(), (forward - backward).numpy())


def reference_predictions(scores: RowScores) -> Predictions:
    """The reference as a rule, right where log pi_ref(y_w) > log pi_ref(y_l), with the log-loss of no opinion (m = 0).

    The logit is the sign alone, as of beta -> 0, so that calibration is judged by the same probability as log-loss.
    """
    sign = np.sign(scores.ref_logit.numpy())
    return Predictions(np.full(len(sign), -np.log(2.0)), 1e-9 * sign)


class ReadTexts(NamedTuple):
    """What the experts say of the texts that a table's rows name.

    Attributes:
        used: [N] ascending indices of `table.texts`.
        log_probs: of these texts, [N, K] each.
    """

    used: np.ndarray
    log_probs: ExpertLogProbs


def score_rows(
    experts: AbstractExperts,
    table: ComparisonTable,
    *,
    beta: Sequence[float],
    feedback: FeedbackModel | None = None,
    states: States | None = None,
    tokens_per_chunk: int = 2048,
    noise: Float[Tensor, "B"] | None = None,
) -> RowScores:
    """Per-expert log-likelihoods of every comparison of a table.

    Args:
        experts: K experts.
        table: B comparisons; only texts that they name are read.
        beta: K values.
        feedback: the observation model; None: Bradley-Terry without noise.
        states: cached trunk states of `table.texts`, or None to read token ids.
        tokens_per_chunk: completion tokens (padded tokens without states) that go through the experts at once.
        noise: [B] learnt rates of whoever judged; None: the model's.
    """
    check_feedback(table, FeedbackModel() if feedback is None else feedback)
    texts = read_texts(experts, table, states=states, tokens_per_chunk=tokens_per_chunk)
    return score_texts(texts, table, beta=beta, feedback=feedback, noise=noise)


def read_texts(
    experts: AbstractExperts,
    table: ComparisonTable,
    *,
    states: States | None = None,
    tokens_per_chunk: int = 2048,
    texts: Int[np.ndarray, "N"] | None = None,
) -> ReadTexts:
    """The log-probabilities that `score_rows` works with, which cost nearly all of its time; arguments as there.

    `texts` are ascending indices of `table.texts`; None: all that a row names.
    """
    used = np.unique(table.compared) if texts is None else texts
    return ReadTexts(used, _text_log_probs(experts, table.texts, used, states, tokens_per_chunk))


def score_texts(
    texts: ReadTexts,
    table: ComparisonTable,
    *,
    beta: Sequence[float],
    feedback: FeedbackModel | None = None,
    noise: Float[Tensor, "B"] | None = None,
) -> RowScores:
    """`score_rows` from log-probabilities that are known; arguments as there."""
    model = FeedbackModel() if feedback is None else feedback
    check_feedback(table, model)
    rows = table_rows(table, texts.used, noise)
    policy_NK, reference_NK = texts.log_probs.log_probs.double(), texts.log_probs.ref_log_probs.double()
    beta_K = torch.tensor(beta, dtype=torch.float64)
    lik = feedback_log_lik(policy_NK, reference_NK, rows, beta_K, model)
    reference_N = reference_NK.mean(dim=1)
    scores = _row_scores(lik, rows, reference_N[rows.chosen] - reference_N[rows.rejected], beta_K, model)
    if model.likelihood == "mbt":
        return scores
    return scores._replace(marginal=Marginal(sides_of(policy_NK, reference_NK, rows), beta_K, model))


def _row_scores(
    lik: FeedbackLogLik,
    rows: FeedbackRows,
    ref_logit: Float[Tensor, "B"],
    beta: Float[Tensor, "K"],
    model: FeedbackModel,
) -> RowScores:
    outcomes = pair_outcomes(lik.margins, beta, model, rows.noise)
    if model.is_plain and rows.label is None and rows.rankings is None:
        return RowScores(lik.log_lik, outcomes.loss, ref_logit)
    win, tie, loss = normalised(outcomes)
    log_prob = lik.log_lik
    if not is_proper(model.loss_type) or model.label_smoothing:
        log_prob = win if rows.label is None else soft_label_log_lik(win, loss, rows.label)
    if rows.tie is not None:
        win, loss = (torch.where(rows.tie.unsqueeze(1), tie, side) for side in (win, loss))
    return RowScores(lik.log_lik, loss, ref_logit, win, log_prob)


def _text_log_probs(
    experts: AbstractExperts, texts: TextTable, used: np.ndarray, states: States | None, tokens_per_chunk: int
) -> ExpertLogProbs:
    if states is None:
        return text_log_probs(experts, _subset(texts, used), tokens_per_batch=tokens_per_chunk)
    return _cached_log_probs(experts, texts, used, states, tokens_per_chunk)


@torch.no_grad()
def _cached_log_probs(
    experts: AbstractExperts, texts: TextTable, used: np.ndarray, states: States, tokens_per_chunk: int
) -> ExpertLogProbs:
    device = next(experts.parameters()).device
    log_probs = torch.empty(len(used), experts.num_experts)
    ref_log_probs = torch.empty_like(log_probs)
    ends = np.cumsum([len(texts.completion_ids[i]) for i in used])
    with stage("scoring texts", len(used), "text") as done:
        for positions in np.split(np.arange(len(used)), np.flatnonzero(np.diff(ends // tokens_per_chunk)) + 1):
            packed = states.gather(used[positions])
            hidden, targets, segments = (packed[name].to(device) for name in ("hidden", "targets", "segments"))
            output = experts(PackedStates(hidden, targets, segments, len(positions)))
            log_probs[positions] = output.log_probs.float().cpu()
            ref_log_probs[positions] = output.ref_log_probs.float().cpu()
            done(len(positions))
    return ExpertLogProbs(log_probs, ref_log_probs)


def _subset(texts: TextTable, used: np.ndarray) -> TextTable:
    return TextTable(
        [texts.prompt_ids[i] for i in used],
        [texts.completion_ids[i] for i in used],
        texts.prompt_index[used],
        texts.prompts,
    )
