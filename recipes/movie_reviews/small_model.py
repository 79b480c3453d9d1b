"""A small language model made smaller: the tokens that reviews use, and a short fine-tuning on reviews.

On a CPU most of the cost of a 15-million-parameter model with 32,000 tokens is its output head. A tokenizer with fewer
merges writes every text with the tokens that are left (a few percent more of them), so sampling, scoring and training
heads cost a fraction. It is another model, fine-tuned afterwards with its own tokenizer; results say so.

Legend: N blocks, L tokens of a block, V vocabulary.
"""

from __future__ import annotations

import copy
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefmix.experts.base_model import BaseModel, load_base


class FineTuning(NamedTuple):
    """How the reference is fine-tuned.

    Attributes:
        tokens: of reviews, read once each; 0 leaves the model as it is.
        learning_rate: at its highest, after a tenth of the steps; a cosine to zero follows.
        block: tokens of one row.
        batch_size: rows of one step.
    """

    tokens: int = 400_000
    learning_rate: float = 1e-3
    block: int = 128
    batch_size: int = 8


def small_vocabulary(base: BaseModel, texts: Sequence[str], size: int, folder: Path) -> BaseModel:
    """The base with the `size` tokens that `texts` use most and the merges that make them, saved to `folder`.

    Special tokens, bytes and the characters of `texts` always stay, so that every text can still be written.

    Args:
        base: a model with a BPE tokenizer.
        texts: what tokens are counted in.
        size: about how many tokens stay.
        folder: where model and tokenizer are written.

    Raises:
        ValueError: the tokenizer is not BPE.
    """
    assert base.tokenizer is not None
    whole = json.loads(base.tokenizer.backend_tokenizer.to_str())  # type: ignore[attr-defined]
    if whole["model"]["type"] != "BPE":
        raise ValueError(f"--vocabulary {size}: {base.source} has a {whole['model']['type']} tokenizer; use 0 (whole)")
    vocab = whole["model"]["vocab"] | {token["content"]: token["id"] for token in whole["added_tokens"]}
    kept = sorted(_kept_tokens(whole, _counts(base.tokenizer, texts), size), key=vocab.__getitem__)
    position = {token: index for index, token in enumerate(kept)}
    _write_tokenizer(base.tokenizer, _cut_tokenizer(whole, position), folder)
    rows = torch.tensor([vocab[token] for token in kept])
    special = {name: position[token] for name, token in base.tokenizer.special_tokens_map.items() if token in position}
    _cut_model(base.model, rows, special).save_pretrained(folder)
    return load_base(folder)


def fine_tune(base: BaseModel, texts: Sequence[str], plan: FineTuning, seed: int, say: Callable[[str], None]) -> float:
    """Trains all weights on next tokens of `texts`, in place; returns the mean loss of the last tenth of steps, nats.

    Args:
        base: float32.
        texts: enough for `plan.tokens`; they are read once, in the order of `seed`.
        plan: size and rate.
        seed: of the order.
        say: gets a line now and then.
    """
    assert base.tokenizer is not None
    model, losses = base.model.requires_grad_(True).train(), []
    blocks = _blocks(base.tokenizer, texts, plan, seed)
    steps = len(blocks) // plan.batch_size
    optimizer = torch.optim.AdamW(model.parameters(), lr=plan.learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    for step in range(steps):
        rows = blocks[step * plan.batch_size : (step + 1) * plan.batch_size]
        loss = model(input_ids=rows, labels=rows, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
        if step % 25 == 0:
            say(f"fine-tuning: step {step} of {steps}, loss {losses[-1]:.3f} nats a token")
    model.requires_grad_(False).eval()
    last = losses[-max(1, steps // 10) :]
    return sum(last) / max(1, len(last))


def _rate(step: int, steps: int) -> float:
    warmup = max(1, steps // 10)
    return min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / max(1, steps))))


def _blocks(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], plan: FineTuning, seed: int
) -> Int[Tensor, "N L"]:
    """Reviews end to end, each closed by the end-of-sequence token, cut into rows of equal length."""
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
    ids: list[int] = []
    for index in order:
        if len(ids) >= plan.tokens:
            break
        ids += [*tokenizer(text=texts[index])["input_ids"], tokenizer.eos_token_id]  # type: ignore[misc]
    if len(ids) < plan.tokens:
        raise ValueError(f"--sft-tokens {plan.tokens}: the reviews have {len(ids)} tokens; ask for fewer")
    return torch.tensor(ids[: plan.tokens // plan.block * plan.block]).view(-1, plan.block)


def _counts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Counter[str]:
    return Counter(token for ids in tokenizer(list(texts))["input_ids"] for token in _tokens(tokenizer, ids))


def _tokens(tokenizer: PreTrainedTokenizerBase, ids: Any) -> Iterator[str]:
    yield from tokenizer.convert_ids_to_tokens(ids)


def _kept_tokens(whole: dict[str, Any], counts: Counter[str], size: int) -> set[str]:
    """The most frequent tokens and, for each, those that one chain of merges makes it from."""
    parts: dict[str, tuple[str, str]] = {}
    for merge in whole["model"]["merges"]:
        left, right = merge if isinstance(merge, list) else merge.split(" ")
        parts.setdefault(left + right, (left, right))
    bytes_stay = not whole["model"].get("byte_fallback")
    special = {token["content"] for token in whole["added_tokens"]}
    kept = {
        token
        for token in [*whole["model"]["vocab"], *special]
        if token in special or token.startswith("<0x") or (len(token) == 1 and (bytes_stay or token in counts))
    }
    for token, _ in counts.most_common():
        if len(kept) >= size:
            break
        waiting = [token]
        while waiting:
            current = waiting.pop()
            if current not in kept:
                kept.add(current)
                waiting += parts.get(current, ())
    return kept


def _cut_tokenizer(whole: dict[str, Any], position: dict[str, int]) -> Tokenizer:
    cut = copy.deepcopy(whole)
    special = {token["content"] for token in cut["added_tokens"]}
    cut["model"]["vocab"] = {
        token: index for token, index in position.items() if token in whole["model"]["vocab"] or token not in special
    }
    pairs = [merge if isinstance(merge, list) else merge.split(" ") for merge in cut["model"]["merges"]]
    cut["model"]["merges"] = [pair for pair in pairs if {pair[0], pair[1], "".join(pair)} <= position.keys()]
    for token in cut["added_tokens"]:
        token["id"] = position[token["content"]]
    _renumber(cut["post_processor"], position)
    return Tokenizer.from_str(json.dumps(cut))


def _renumber(processor: Any, position: dict[str, int]) -> None:
    """Ids that a template puts around texts."""
    if processor is None:
        return
    for part in [processor, *(processor.get("processors") or [])]:
        for token in (part.get("special_tokens") or {}).values():
            token["ids"] = [position[name] for name in token["tokens"]]


def _write_tokenizer(tokenizer: PreTrainedTokenizerBase, cut: Tokenizer, folder: Path) -> None:
    tokenizer.save_pretrained(folder)
    cut.save(str(folder / "tokenizer.json"))


def _cut_model(model: PreTrainedModel, rows: Int[Tensor, "V"], special: dict[str, int]) -> PreTrainedModel:
    """The same network with these rows of embedding and output head."""
    config = type(model.config).from_dict({**model.config.to_dict(), "vocab_size": len(rows), "pad_token_id": None})
    config.bos_token_id, config.eos_token_id = special.get("bos_token"), special.get("eos_token")
    cut = type(model)(config).to(torch.float32)
    size = (model.config.vocab_size,)
    cut.load_state_dict(
        {name: tensor[rows] if tensor.shape[:1] == size else tensor for name, tensor in model.state_dict().items()}
    )
    cut.tie_weights()
    if cut.generation_config is not None:
        cut.generation_config.bos_token_id = config.bos_token_id
        cut.generation_config.eos_token_id = config.eos_token_id
        cut.generation_config.pad_token_id = None
    return cut.eval()
