"""From experts and texts to per-expert log-likelihoods of comparisons, and from weights to predictions.

Every distinct text goes through the experts once, from cached trunk states where there are some, however many
comparisons name it. Legend: N texts, B comparisons, K experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from prefmix.data.comparisons import ComparisonTable, TextTable
from prefmix.experts.interface import AbstractExperts, ExpertLogProbs, PackedStates
from prefmix.mixture.bradley_terry import implicit_rewards, margins, mixture_log_lik, preference_log_lik
from prefmix.policy.text_scores import text_log_probs


class States(Protocol):
    """Cached trunk states (`experts.trunk_cache.TrunkStates`)."""

    def gather(self, text_ids: np.ndarray) -> dict[str, Tensor]:
        """The packed states of some texts: hidden, targets, segments."""
        ...


class RowScores(NamedTuple):
    """What the experts say of B comparisons; float64, nats, on the CPU.

    Attributes:
        log_lik: [B, K] log p_k(y_w > y_l), label noise included.
        log_lik_reversed: [B, K] log p_k(y_l > y_w).
        ref_logit: [B] log pi_ref(y_w) - log pi_ref(y_l), mean over the experts' references.
    """

    log_lik: Float[Tensor, "B K"]
    log_lik_reversed: Float[Tensor, "B K"]
    ref_logit: Float[Tensor, "B"]


class Predictions(NamedTuple):
    """A model's opinion of B comparisons under given weights.

    Attributes:
        log_prob: [B] log sum_k w_k p_k(y_w > y_l), nats.
        logit: [B] log p(y_w > y_l) - log p(y_l > y_w), nats; exactly 0 without an opinion.
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
    forward = mixture_log_lik(log_weights_BK, scores.log_lik)
    backward = mixture_log_lik(log_weights_BK, scores.log_lik_reversed)
    return Predictions(forward.numpy(), (forward - backward).numpy())


def reference_predictions(scores: RowScores) -> Predictions:
    """The untrained reference: right where log pi_ref(y_w) > log pi_ref(y_l); its probability is 1/2 (m = 0).

    The logit is the sign alone, as of beta -> 0, so that calibration is judged by the same probability as log-loss.
    """
    sign = np.sign(scores.ref_logit.numpy())
    return Predictions(np.full(len(sign), -np.log(2.0)), 1e-9 * sign)


def score_rows(
    experts: AbstractExperts,
    table: ComparisonTable,
    *,
    beta: Sequence[float],
    label_noise: float = 0.0,
    states: States | None = None,
    tokens_per_chunk: int = 2048,
) -> RowScores:
    """Per-expert log-likelihoods of every comparison of a table.

    Args:
        experts: K experts.
        table: B comparisons; only texts that they name are read.
        beta: K values.
        label_noise: e of `preference_log_lik`.
        states: cached trunk states of `table.texts`, or None to read token ids.
        tokens_per_chunk: completion tokens (padded tokens without states) that go through the experts at once.
    """
    used, local = np.unique(np.stack([table.chosen, table.rejected]), return_inverse=True)
    chosen, rejected = torch.from_numpy(local.reshape(2, -1).astype(np.int64))
    log_probs = _text_log_probs(experts, table.texts, used, states, tokens_per_chunk)
    policy_NK, reference_NK = log_probs.log_probs.double(), log_probs.ref_log_probs.double()
    rewards_NK = implicit_rewards(policy_NK, reference_NK, torch.tensor(beta, dtype=torch.float64))
    margins_BK = margins(rewards_NK, chosen, rejected)
    reference_N = reference_NK.mean(dim=1)
    return RowScores(
        preference_log_lik(margins_BK, label_noise),
        preference_log_lik(-margins_BK, label_noise),
        reference_N[chosen] - reference_N[rejected],
    )


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
    for positions in np.split(np.arange(len(used)), np.flatnonzero(np.diff(ends // tokens_per_chunk)) + 1):
        packed = states.gather(used[positions])
        hidden, targets, segments = (packed[name].to(device) for name in ("hidden", "targets", "segments"))
        output = experts(PackedStates(hidden, targets, segments, len(positions)))
        log_probs[positions] = output.log_probs.float().cpu()
        ref_log_probs[positions] = output.ref_log_probs.float().cpu()
    return ExpertLogProbs(log_probs, ref_log_probs)


def _subset(texts: TextTable, used: np.ndarray) -> TextTable:
    return TextTable(
        [texts.prompt_ids[i] for i in used],
        [texts.completion_ids[i] for i in used],
        texts.prompt_index[used],
        texts.prompts,
    )
