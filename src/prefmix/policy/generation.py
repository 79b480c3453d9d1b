"""Token-by-token decoding: of a mixture of experts, exact at any sampling setting, and of a product of experts.

Legend: B prompts, M <= B unfinished sequences, K experts, V vocabulary, t the token's position.

    p(y_t | y_<t) = sum_k rho_k(t) pi_k(y_t | y_<t),    rho_k(t) proportional to w_k pi_k(y_<t | x)

`mixture`, `sample` and `top` are this recursion with another start rho(0): the weights w (`mixture`), one expert drawn
from w (`sample`), or the heaviest expert (`top`). A one-hot rho stays one-hot, so `sample` and `mixture` draw from one
distribution over responses. Temperature, top-k, top-p and the repetition penalty act on each expert's own logits before
mixing, and rho moves with the processed probabilities.

`product` is another policy (a logit blend), the one that `combine: log_linear` trains for:

    p(y_t | y_<t) proportional to prod_k pi_k(y_t | y_<t)^w_k,   the weights constant

Each token's geometric mean is normalised, which is the usual approximation of the product over whole responses,
pi(y) proportional to prod_k pi_k(y)^w_k, that nobody can sample token by token. With Z_t(y_<t) = sum_v prod_k
pi_k(v | y_<t)^w_k <= 1, how far the experts agree on the next token, it is the product divided by prod_t Z_t: equal
where agreement is the same along all responses (one expert alone: Z_t = 1), and otherwise too fond of responses that
lead to where experts disagree. Here temperature, top-k, top-p and the repetition penalty act on the product, which is
one policy.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
)

from prefmix.experts.interface import AbstractExperts
from prefmix.policy.nucleus import NucleusWarper

PRODUCT = "product"


@dataclass(frozen=True)
class SamplingOptions:
    """How tokens are chosen; the defaults are the policy itself, unprocessed.

    Attributes:
        max_new_tokens: longest response, in tokens.
        temperature: divides every expert's logits; 0 is greedy: the argmax of the mixed distribution, where top-k and
            top-p have no effect. Under `product` all of these act on the product in the place of every expert.
        top_k: keep the k most probable tokens of every expert; 0 keeps all.
        top_p: keep the smallest set of tokens of every expert with at least this probability; 1 keeps all.
        repetition_penalty: divides the scores of tokens that were read before; 1 is none.
    """

    max_new_tokens: int = 256
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        checks = (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < float("inf"), "0 (greedy) or a positive number"),
            ("top_k", self.top_k >= 0, "0 (off) or a number of tokens"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1 (off)"),
            ("repetition_penalty", 0 < self.repetition_penalty < float("inf"), "positive; 1 is off"),
        )
        for name, holds, remedy in checks:
            if not holds:
                raise ValueError(f"{name}={getattr(self, name)!r}: must be {remedy}")

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is taken."""
        return self.temperature == 0

    def processors(self) -> LogitsProcessorList:
        """The processors that these options mean, transformers' own or equal to them, in transformers' order."""
        chain = LogitsProcessorList()
        if self.repetition_penalty != 1:
            chain.append(RepetitionPenaltyLogitsProcessor(self.repetition_penalty))
        if self.greedy:
            return chain
        if self.temperature != 1:
            chain.append(TemperatureLogitsWarper(self.temperature))
        if self.top_k:
            chain.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            chain.append(NucleusWarper(self.top_p))
        return chain


class DecodeStep(NamedTuple):
    """One more token of every unfinished sequence.

    Attributes:
        rows: [M] which of the B sequences.
        tokens: [M] the token y_t chosen.
        distribution: [M, V] log p(. | y_<t), mixed and processed, that the token was chosen from, nats.
        log_probs: [M] log p(y_t | y_<t) of the token chosen.
        log_rho: [M, K] log rho(t+1), after the token; -inf for experts that cannot have written it. float64. Under
            `product` the weights, which never move.
    """

    rows: Int[Tensor, "M"]
    tokens: Int[Tensor, "M"]
    distribution: Float[Tensor, "M V"]
    log_probs: Float[Tensor, "M"]
    log_rho: Float[Tensor, "M K"]


def draw_expert(log_weights: Float[Tensor, "B K"], generator: torch.Generator) -> Float[Tensor, "B K"]:
    """`sample`: log rho(0) of one expert k ~ w for a whole response. Exact ancestral sampling of the mixture."""
    return _one_hot(torch.multinomial(log_weights.exp(), 1, generator=generator)[:, 0], log_weights)


def all_experts(log_weights: Float[Tensor, "B K"], generator: torch.Generator) -> Float[Tensor, "B K"]:
    """`mixture`: log rho(0) = log w, the expert marginalised out token by token; `product`: the weights."""
    return log_weights


def heaviest_expert(log_weights: Float[Tensor, "B K"], generator: torch.Generator) -> Float[Tensor, "B K"]:
    """`top`: log rho(0) of the expert with the largest weight. One policy, not the mixture."""
    return _one_hot(log_weights.argmax(dim=-1), log_weights)


DECODERS: dict[str, Callable[[Float[Tensor, "B K"], torch.Generator], Float[Tensor, "B K"]]] = {
    "sample": draw_expert,
    "mixture": all_experts,
    "top": heaviest_expert,
    PRODUCT: all_experts,
}


def blend(log_weights: Float[Tensor, "M K"], logits: Float[Tensor, "M K V"]) -> Float[Tensor, "M 1 V"]:
    """The product's logits sum_k w_k logits_k: their softmax is prod_k pi_k^w_k, normalised.

    They stand as a single expert's, which the recursion then follows: what all experts say alike moves no rho. An
    expert without weight says nothing, even where its logit is -inf.
    """
    weights = log_weights.to(logits.dtype).exp().unsqueeze(2)
    return torch.where(weights > 0, weights * logits, 0.0).sum(dim=1, keepdim=True)


def mix(log_rho: Float[Tensor, "M K"], log_probs: Float[Tensor, "M K V"]) -> Float[Tensor, "M V"]:
    """Log p(y_t | y_<t) = log sum_k rho_k pi_k(y_t | y_<t), nats; -inf where every expert says -inf."""
    if log_probs.shape[1] == 1:
        return log_probs[:, 0]
    return torch.logsumexp(log_rho.to(log_probs.dtype)[:, :, None] + log_probs, dim=1)


def update_log_rho(
    log_rho: Float[Tensor, "M K"], log_probs: Float[Tensor, "M J V"], tokens: Int[Tensor, "M"]
) -> Float[Tensor, "M K"]:
    """Bayes: rho_k(t+1) proportional to rho_k(t) pi_k(y_t | y_<t), in log space and float64, rows normalised.

    J = K, or 1 where all experts are said to speak as one (`product`): then rho stays.
    """
    chosen = log_probs.gather(2, tokens[:, None, None].expand(-1, log_probs.shape[1], 1))[:, :, 0]
    return torch.log_softmax(log_rho + chosen, dim=-1)


def expert_log_probs(
    logits: Float[Tensor, "M K V"], tokens_read: Int[Tensor, "M L"], processors: LogitsProcessorList
) -> Float[Tensor, "M K V"]:
    """Log pi_k(. | y_<t) of every expert after its own logits were processed, nats."""
    if processors:
        num_experts = logits.shape[1]
        repeated = tokens_read.long().repeat_interleave(num_experts, dim=0)
        logits = processors(repeated, logits.flatten(0, 1)).view_as(logits)  # type: ignore[arg-type]
    return torch.log_softmax(logits, dim=-1)


@torch.no_grad()
def decode(
    experts: AbstractExperts,
    input_ids: Int[Tensor, "B L"],
    attention_mask: Int[Tensor, "B L"],
    log_rho: Float[Tensor, "B K"],
    options: SamplingOptions,
    *,
    eos_token_ids: Collection[int],
    generator: torch.Generator,
    product: bool = False,
) -> Iterator[DecodeStep]:
    """Writes responses token by token; sequences leave the batch at their end-of-sequence token, which is yielded too.

    Experts without weight in any sequence are not computed. One trunk pass and one cache serve all others.

    Args:
        experts: K policies.
        input_ids: [B, L] left-padded prompts.
        attention_mask: [B, L] 1 on tokens.
        log_rho: [B, K] log rho(0), see `DECODERS`; rows normalised.
        options: sampling options.
        eos_token_ids: tokens that end a response.
        generator: source of randomness, on the device of `input_ids`.
        product: tokens of the product of experts, `log_rho` its log w; false: of their mixture.
    """
    num_experts = log_rho.shape[1]
    used = torch.nonzero((log_rho > -torch.inf).any(dim=0))[:, 0]
    decoder = experts.decoder(input_ids, attention_mask, used.tolist() if len(used) < num_experts else None)
    log_rho = log_rho.to(rho_dtype(input_ids.device))[:, used]
    processors, eos = (
        options.processors(),
        torch.tensor(sorted(eos_token_ids), dtype=torch.long, device=input_ids.device),
    )
    rows = torch.arange(len(input_ids), device=input_ids.device)
    # Padding is often the end-of-sequence token, which the repetition penalty must not take for one that was read.
    tokens_read = torch.where(attention_mask == 1, input_ids, input_ids[:, -1:])
    for position in range(options.max_new_tokens):
        logits = blend(log_rho, decoder.logits()) if product else decoder.logits()
        log_probs = expert_log_probs(logits, tokens_read, processors)
        mixed = mix(log_rho, log_probs)
        tokens = _choose(mixed, options, generator)
        log_rho = update_log_rho(log_rho, log_probs, tokens)
        all_log_rho = log_rho.new_full((len(rows), num_experts), -torch.inf).index_copy_(1, used, log_rho)
        yield DecodeStep(rows, tokens, mixed, mixed.gather(1, tokens[:, None])[:, 0], all_log_rho)
        going_on = torch.nonzero(~torch.isin(tokens, eos))[:, 0]
        if not len(going_on) or position + 1 == options.max_new_tokens:
            return
        if len(going_on) < len(rows):
            decoder.select(going_on)
            rows, tokens, log_rho, tokens_read = (x[going_on] for x in (rows, tokens, log_rho, tokens_read))
        decoder.append(tokens)
        tokens_read = torch.cat([tokens_read, tokens[:, None]], dim=1)


def rho_dtype(device: torch.device) -> torch.dtype:
    """Type of log rho: float64, since it sums over all tokens of a response; float32 where a device has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def _choose(mixed: Float[Tensor, "M V"], options: SamplingOptions, generator: torch.Generator) -> Int[Tensor, "M"]:
    if options.greedy:
        return mixed.argmax(dim=-1)
    return torch.multinomial(mixed.exp(), 1, generator=generator)[:, 0]


def _one_hot(expert: Int[Tensor, "B"], log_weights: Float[Tensor, "B K"]) -> Float[Tensor, "B K"]:
    return torch.full_like(log_weights, -torch.inf).scatter_(1, expert[:, None], 0.0)
