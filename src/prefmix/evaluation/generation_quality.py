"""What a policy writes: its responses, what they are worth, and how far they are from the reference.

One reward at one point says little, since every policy trades reward against distance from the reference. So responses
come with log-probabilities under the policy and the reference, and comparisons are between whole frontiers.

Legend: P prompts, S points of a frontier, N = P n responses, n for each prompt, K experts, R rewards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float

from prefmix.data.text_table import SplitText, TextTableBuilder
from prefmix.evaluation.intervals import Estimate, cluster_bootstrap
from prefmix.evaluation.rewards import Reward
from prefmix.evaluation.text_statistics import distinct_share, overlap_within_prompts, repetition
from prefmix.policy.generation import PRODUCT
from prefmix.policy.mixture_policy import MixturePolicy
from prefmix.policy.prompts import prompt_token_ids
from prefmix.policy.text_scores import text_log_probs

BATCH = 256  # sequences decoded together; more no longer help on a CPU (their caches and logits leave its caches)


class Samples(NamedTuple):
    """n responses to each of P prompts, prompt after prompt.

    Attributes:
        prompts: P prompts.
        responses: N texts.
        token_ids: N token sequences, the end of sequence included where it was written.
        log_probs: [N] log pi(y | x) = log sum_k w_k pi_k(y | x) of the policy that wrote them (or its product), nats.
        expert_log_probs: [N, K] log pi_k(y | x), nats.
        ref_log_probs: [N] log pi_ref(y | x), nats.
    """

    prompts: list[str]
    responses: list[str]
    token_ids: list[list[int]]
    log_probs: Float[np.ndarray, "N"]
    expert_log_probs: Float[np.ndarray, "N K"]
    ref_log_probs: Float[np.ndarray, "N"]

    @property
    def each(self) -> int:
        """n, responses for each prompt."""
        return len(self.responses) // len(self.prompts)

    @property
    def prompt(self) -> np.ndarray:
        """[N] which prompt a response answers."""
        return np.repeat(np.arange(len(self.prompts)), self.each)

    @property
    def log_ratio(self) -> Float[np.ndarray, "N"]:
        """[N] log pi(y | x) - log pi_ref(y | x), nats; its mean estimates the sequence KL, single ones may be < 0."""
        return self.log_probs - self.ref_log_probs

    def by_prompt(self, values: np.ndarray) -> Float[np.ndarray, "P"]:
        """[P] means over the responses of each prompt."""
        means: Float[np.ndarray, "P"] = np.asarray(values, dtype=np.float64).reshape(len(self.prompts), -1).mean(axis=1)
        return means


def sample_responses(
    policy: MixturePolicy,
    prompts: Sequence[str],
    *,
    each: int = 2,
    weights: Sequence[float] | None = None,
    decoder: str | None = None,
    max_new_tokens: int = 48,
    seed: int = 0,
    batch: int = BATCH,
) -> Samples:
    """Draws responses as the policy is, at temperature 1, and scores the very tokens that were drawn.

    Args:
        policy: K experts whose references are one.
        prompts: P prompts.
        each: n, responses for each prompt.
        weights: K weights to use; by default those of an unknown user.
        decoder: `sample` or `mixture`, which draw from one distribution, or `product`, if that is the policy; None: the
            policy's own.
        max_new_tokens: longest response; the KL is that of the policies stopped there.
        seed: of the draws.
        batch: sequences decoded together.

    Raises:
        ValueError: another decoder.
    """
    own = (PRODUCT,) if policy.decoder == PRODUCT else ("sample", "mixture")
    decoder = policy.decoder if decoder is None else decoder
    if decoder not in own:
        raise ValueError(f"decoder={decoder!r}: only {' and '.join(own)} draw from the policy itself")
    log_weights = (policy.gate_weights() if weights is None else torch.tensor(weights, dtype=torch.float64)).log()
    log_weights = torch.log_softmax(log_weights.double(), dim=0)
    prompts, written = list(prompts), []
    # Prompts of a batch are padded to the longest: those of one length go together, and come back in order.
    order = sorted(range(len(prompts)), key=lambda i: len(prompt_token_ids(prompts[i], policy.tokenizer)))
    width = max(1, batch // each)
    for start in range(0, len(order), width):
        chosen = order[start : start + width]
        call: dict[str, Any] = {"decoder": decoder, "max_new_tokens": max_new_tokens, "seed": 1_000_003 * seed + start}
        call |= {"num_return_sequences": each, "weights": log_weights.exp(), "return_details": True}
        responses = policy.generate([prompts[i] for i in chosen], **call)
        written += [(i, response) for i, response in zip(np.repeat(chosen, each), responses, strict=True)]
    written.sort(key=lambda pair: pair[0])  # stable: the responses of a prompt stay together
    builder = TextTableBuilder(None, "keep_start")
    for i, response in written:
        prompt = prompt_token_ids(prompts[i], policy.tokenizer)
        builder.add(SplitText(prompt, response.token_ids), reuse=False)
    scored = text_log_probs(policy.model.experts, builder.build())
    expert, drawn = scored.log_probs.double(), np.array([response.log_prob for _, response in written])
    return Samples(
        prompts,
        [response.text for _, response in written],
        [response.token_ids for _, response in written],
        drawn if decoder == PRODUCT else torch.logsumexp(log_weights + expert, dim=1).numpy(),
        expert.numpy(),
        scored.ref_log_probs[:, 0].double().numpy(),
    )


def reward_columns(samples: Samples, rewards: Mapping[str, Reward]) -> Float[np.ndarray, "N R"]:
    """[N, R] every reward of every response, in the mapping's order."""
    prompts = [samples.prompts[i] for i in samples.prompt]
    return np.stack([reward(prompts, samples.responses) for reward in rewards.values()], axis=1)


class LanguageFigures(NamedTuple):
    """Whether the responses are still language, and varied; no reward enters.

    Attributes:
        perplexity: exp of the mean negative log-probability of a token under the reference.
        repetition: mean share of a response's 3-grams that stood in it before.
        distinct: different 2-grams over all 2-grams of all responses (compare equal numbers).
        overlap: how alike two responses to one prompt are, 0 to 1; nan with one response each.
        tokens: mean length, tokens.
    """

    perplexity: float
    repetition: float
    distinct: float
    overlap: float
    tokens: float


def language_figures(samples: Samples) -> LanguageFigures:
    """Perplexity under the reference, repetition and diversity of responses."""
    lengths = np.array([len(ids) for ids in samples.token_ids])
    return LanguageFigures(
        perplexity=float(np.exp(-samples.ref_log_probs.sum() / lengths.sum())),
        repetition=float(np.mean([repetition(text) for text in samples.responses])),
        distinct=distinct_share(samples.responses),
        overlap=overlap_within_prompts(samples.responses, samples.prompt.tolist()),
        tokens=float(lengths.mean()),
    )


def win_rate(first: Float[np.ndarray, "P n"], second: Float[np.ndarray, "P m"], *, seed: int = 0) -> Estimate:
    """How often a response of the first policy has the larger reward; ties count half.

        mean over prompts of  1/(n m) sum_ij [a_i > b_j] + [a_i = b_j] / 2

    Args:
        first: [P, n] rewards of the first policy's responses to P prompts.
        second: [P, m] rewards of the second policy's responses to the same prompts.
        seed: of the interval's resampling of prompts.
    """
    difference = first[:, :, None] - second[:, None, :]
    wins = (difference > 0).mean(axis=(1, 2)) + 0.5 * (difference == 0).mean(axis=(1, 2))
    return cluster_bootstrap(wins, np.arange(len(wins)), seed=seed)


class Frontier(NamedTuple):
    """A family of policies from the reference outwards, on the same prompts.

    Attributes:
        kl: [S, P] mean log-ratio of each prompt's responses, nats; the first row is the reference's, zeros.
        rewards: [S, P, R] mean rewards of each prompt's responses.
    """

    kl: Float[np.ndarray, "S P"]
    rewards: Float[np.ndarray, "S P R"]

    def drawn(self, prompts: np.ndarray) -> Frontier:
        """The frontier on these prompts ([M] indices, repetitions allowed)."""
        return Frontier(self.kl[:, prompts], self.rewards[:, prompts])

    @property
    def mean_kl(self) -> Float[np.ndarray, "S"]:
        """[S] sequence KL from the reference, nats."""
        means: Float[np.ndarray, "S"] = self.kl.mean(axis=1)
        return means

    def at_kl(self, kl: float) -> Float[np.ndarray, "R"]:
        """[R] mean rewards at a KL, linear between neighbours; the last point beyond the end (nothing extrapolates).

        A policy drawn at random between two neighbours has these rewards, and a KL of at most this.
        """
        order = np.argsort(self.mean_kl, kind="stable")
        means = self.rewards.mean(axis=1)[order]
        return np.array([np.interp(kl, self.mean_kl[order], column) for column in means.T])
