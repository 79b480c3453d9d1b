"""Whole responses from prompts: batching, the end of a response, text.

Legend: B prompts, K experts, T tokens of a response, L padded prompt length.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from prefmix.experts.interface import AbstractExperts
from prefmix.policy.generation import DECODERS, PRODUCT, SamplingOptions, decode, rho_dtype
from prefmix.policy.streaming import TextStream, decode_response


class Response(NamedTuple):
    """One response and how it came about.

    Attributes:
        text: what was written, without special tokens; after a prompt of text, prompt + text reads on.
        token_ids: T tokens, the end-of-sequence token included.
        log_prob: sum_t log p(y_t | y_<t) of the processed, mixed distribution, nats.
        log_rho: [T + 1, K] log rho(0), the decoder's start, to log rho(T), the posterior over experts given the
            response; the weights throughout under `product`.
        expert: the expert that wrote it, where one did (`sample`, `top`, or all others at weight zero), else None.
        finished: whether it ended by itself, not by `max_new_tokens`.
    """

    text: str
    token_ids: list[int]
    log_prob: float
    log_rho: Float[Tensor, "T1 K"]
    expert: int | None
    finished: bool


class LeftPadded(NamedTuple):
    """Prompts of unequal length, ending in one column.

    Attributes:
        input_ids: [B, L].
        attention_mask: [B, L] 1 on tokens.
    """

    input_ids: Int[Tensor, "B L"]
    attention_mask: Int[Tensor, "B L"]


def left_pad(prompts: Sequence[Sequence[int]], pad_token_id: int, device: torch.device) -> LeftPadded:
    """Pads on the left, so that the next token of every prompt stands in the same column."""
    length = max(len(prompt) for prompt in prompts)
    input_ids = torch.full((len(prompts), length), pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, length - len(prompt) :] = torch.tensor(list(prompt))
        attention_mask[row, length - len(prompt) :] = 1
    return LeftPadded(input_ids.to(device), attention_mask.to(device))


def end_tokens(experts: AbstractExperts, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens that end a response: the tokenizer's, and those of the base model's generation config."""
    generation_config = experts.base_model.generation_config
    base_eos = None if generation_config is None else generation_config.eos_token_id
    found = base_eos if isinstance(base_eos, list) else [base_eos]
    return {int(token) for token in (tokenizer.eos_token_id, *found) if token is not None}


def response_call(
    experts: AbstractExperts,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    log_weights: Float[Tensor, "B K"],
    decoder: str,
    seed: int | None,
) -> dict[str, Any]:
    """Arguments of `write_responses` and `stream_response` for B prompts at some weights; None: a seed by chance."""
    device = next(experts.parameters()).device
    generator = torch.Generator(device)
    generator.seed() if seed is None else generator.manual_seed(seed)
    return {
        "experts": experts,
        "tokenizer": tokenizer,
        "prompt": left_pad(prompts, tokenizer.pad_token_id or 0, device),
        "log_rho": DECODERS[decoder](log_weights.to(device, rho_dtype(device)), generator),
        "eos_token_ids": end_tokens(experts, tokenizer),
        "generator": generator,
        "product": decoder == PRODUCT,
    }


def write_responses(
    experts: AbstractExperts,
    tokenizer: PreTrainedTokenizerBase,
    prompt: LeftPadded,
    log_rho: Float[Tensor, "B K"],
    options: SamplingOptions,
    *,
    text_before: Sequence[Sequence[int]],
    eos_token_ids: Collection[int],
    generator: torch.Generator,
    product: bool = False,
) -> list[Response]:
    """Decodes B prompts together.

    `prompt` holds them all, `text_before` the tokens of those whose text the response goes on (`decode_response`);
    other arguments as those of `generation.decode`.
    """
    token_ids: list[list[int]] = [[] for _ in log_rho]
    trajectories = [[start] for start in log_rho.cpu().double()]
    log_probs = [0.0] * len(log_rho)
    steps = decode(
        experts, *prompt, log_rho, options, eos_token_ids=eos_token_ids, generator=generator, product=product
    )
    for step in steps:
        columns = zip(step.rows.tolist(), step.tokens.tolist(), step.log_probs.tolist(), step.log_rho.cpu().double())
        for row, token, log_prob, after in columns:
            token_ids[row].append(token)
            trajectories[row].append(after)
            log_probs[row] += log_prob
    return [
        Response(
            text=decode_response(tokenizer, token_ids[row], text_before[row]),
            token_ids=token_ids[row],
            log_prob=log_probs[row],
            log_rho=torch.stack(trajectories[row]),
            expert=_only_expert(trajectories[row][0]),
            finished=token_ids[row][-1] in eos_token_ids,
        )
        for row in range(len(log_rho))
    ]


def stream_response(
    experts: AbstractExperts,
    tokenizer: PreTrainedTokenizerBase,
    prompt: LeftPadded,
    log_rho: Float[Tensor, "1 K"],
    options: SamplingOptions,
    *,
    text_before: Sequence[Sequence[int]],
    eos_token_ids: Collection[int],
    generator: torch.Generator,
    product: bool = False,
) -> Iterator[str]:
    """Decodes one prompt (B = 1) and yields pieces of text whose concatenation is the response."""
    stream = TextStream(tokenizer, text_before[0])
    steps = decode(
        experts, *prompt, log_rho, options, eos_token_ids=eos_token_ids, generator=generator, product=product
    )
    for step in steps:
        piece = stream.push(int(step.tokens[0]))
        if piece:
            yield piece
    rest = stream.flush()
    if rest:
        yield rest


def _only_expert(log_rho: Float[Tensor, "K"]) -> int | None:
    possible = torch.nonzero(log_rho > -torch.inf)[:, 0].tolist()
    return possible[0] if len(possible) == 1 else None
