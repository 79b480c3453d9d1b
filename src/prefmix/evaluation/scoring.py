"""From experts and texts to per-expert log-likelihoods of comparisons, and from weights to predictions.

Every distinct text goes through the experts once, from cached trunk states where there are some, however many
comparisons name it. Legend: N texts, B comparisons, K experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from prefmix.data.comparisons import ComparisonTable, TextTable
from prefmix.experts.interface import AbstractExperts, ExpertLogProbs, PackedStates, PaddedTexts
from prefmix.mixture.bradley_terry import implicit_rewards, margins, mixture_log_lik, preference_log_lik


class States(Protocol):
    """Cached trunk states (`experts.trunk_cache.TrunkStates`)."""

    def gather(self, text_ids: Tensor) -> dict[str, Tensor]:
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
    """The untrained reference: right where log pi_ref(y_w) > log pi_ref(y_l); its log-loss is log 2 (m = 0)."""
    logit = scores.ref_logit.numpy()
    return Predictions(np.full(len(logit), -np.log(2.0)), logit)


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
    log_probs = text_log_probs(experts, table.texts, used, states=states, tokens_per_chunk=tokens_per_chunk)
    policy_NK, reference_NK = log_probs.log_probs.double(), log_probs.ref_log_probs.double()
    rewards_NK = implicit_rewards(policy_NK, reference_NK, torch.tensor(beta, dtype=torch.float64))
    margins_BK = margins(rewards_NK, chosen, rejected)
    reference_N = reference_NK.mean(dim=1)
    return RowScores(
        preference_log_lik(margins_BK, label_noise),
        preference_log_lik(-margins_BK, label_noise),
        reference_N[chosen] - reference_N[rejected],
    )


@torch.no_grad()
def text_log_probs(
    experts: AbstractExperts,
    texts: TextTable,
    text_ids: np.ndarray,
    *,
    states: States | None = None,
    tokens_per_chunk: int = 2048,
) -> ExpertLogProbs:
    """Log-probabilities of chosen texts under all experts, float32 on the CPU, in the order of `text_ids`.

    Args:
        experts: K experts.
        texts: the table that `text_ids` point into.
        text_ids: [M] indices.
        states: cached trunk states of `texts`.
        tokens_per_chunk: see `score_rows`.
    """
    device = next(experts.parameters()).device
    was_training = experts.training
    experts.eval()
    log_probs = torch.empty(len(text_ids), experts.num_experts)
    ref_log_probs = torch.empty_like(log_probs)
    for positions in _chunks(texts, text_ids, tokens_per_chunk, with_prompt=states is None):
        batch = _batch(texts, text_ids[positions], states, device)
        output = experts(batch)
        log_probs[positions] = output.log_probs.float().cpu()
        ref_log_probs[positions] = output.ref_log_probs.float().cpu()
    experts.train(was_training)
    return ExpertLogProbs(log_probs, ref_log_probs)


def _batch(
    texts: TextTable, text_ids: np.ndarray, states: States | None, device: torch.device
) -> PackedStates | PaddedTexts:
    if states is not None:
        packed = states.gather(torch.from_numpy(text_ids))
        return PackedStates(*(packed[name].to(device) for name in ("hidden", "targets", "segments")), len(text_ids))
    return PaddedTexts(*(tensor.to(device) for tensor in pad_texts(texts, text_ids)))


def pad_texts(texts: TextTable, text_ids: np.ndarray, pad_token_id: int = 0) -> PaddedTexts:
    """Right-padded token ids of some texts; the padding token is masked, so which one it is does not matter."""
    rows = [(list(texts.prompt_ids[i]), list(texts.completion_ids[i])) for i in text_ids]
    longest = max(len(prompt) + len(completion) for prompt, completion in rows)
    input_ids = torch.full((len(rows), longest), pad_token_id)
    attention_mask, completion_mask = torch.zeros_like(input_ids), torch.zeros_like(input_ids)
    for row, (prompt, completion) in enumerate(rows):
        end = len(prompt) + len(completion)
        input_ids[row, :end] = torch.tensor(prompt + completion)
        attention_mask[row, :end] = 1
        completion_mask[row, len(prompt) : end] = 1
    return PaddedTexts(input_ids, attention_mask, completion_mask)


def _chunks(texts: TextTable, text_ids: np.ndarray, budget: int, with_prompt: bool) -> Iterator[np.ndarray]:
    """Positions into `text_ids`, texts of similar length together, each chunk within `budget` tokens."""
    lengths = np.array(
        [len(texts.completion_ids[i]) + (len(texts.prompt_ids[i]) if with_prompt else 0) for i in text_ids], dtype=int
    )
    chunk: list[int] = []
    for position in np.argsort(lengths, kind="stable"):
        # Lengths rise, so the newest text sets the padded width of the whole chunk.
        if chunk and (len(chunk) + 1) * lengths[position] > budget:
            yield np.array(chunk)
            chunk = []
        chunk.append(int(position))
    if chunk:
        yield np.array(chunk)
