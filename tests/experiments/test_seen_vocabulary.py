"""The cut vocabulary against the whole one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from prefmix.data.tokenization import tokenize_rows
from prefmix.experiments.seen_vocabulary import seen_vocabulary
from prefmix.experts.base_model import BaseModel, content_sha256


def test_cut_model_is_the_whole_one_renormalised(
    make_tiny_model: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    model = make_tiny_model()
    base = BaseModel(model, tiny_tokenizer, "tiny", content_sha256(model))
    rows = [
        {"prompt": "What color is the sky?", "chosen": " It is blue.", "rejected": " It is green.", "user": "a"},
        {"prompt": "What color is the sky?", "chosen": " In the sea.", "rejected": " It is blue.", "group": "g"},
    ]
    cut, (cut_rows,) = seen_vocabulary([rows], base, tmp_path / "cut")
    assert cut.model.config.vocab_size < model.config.vocab_size
    assert cut_rows[0]["user"] == "a" and cut_rows[1]["group"] == "g"
    whole = tokenize_rows(rows, tiny_tokenizer, progress=False).texts
    small = tokenize_rows(cut_rows, cut.tokenizer, progress=False).texts
    assert [len(ids) for ids in whole.completion_ids] == [len(ids) for ids in small.completion_ids]
    seen = _seen_tokens(whole, small)
    ids, cut_ids = ([*t.prompt_ids[0], *t.completion_ids[0]] for t in (whole, small))
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0][:, seen]
        cut_logits = cut.model(torch.tensor([cut_ids])).logits[0]
    known = torch.tensor([token >= 0 for token in seen])
    torch.testing.assert_close(logits[:, known], cut_logits[:, known], atol=1e-4, rtol=1e-4)


def _seen_tokens(whole: Any, small: Any) -> list[int]:
    """Token of the whole vocabulary at each position of the small one; -1 for special tokens no text holds."""
    pairs = {}
    for a, b in zip(whole.prompt_ids, small.prompt_ids):
        pairs |= dict(zip(b, a))
    for a, b in zip(whole.completion_ids, small.completion_ids):
        pairs |= dict(zip(b, a))
    return [pairs.get(index, -1) for index in range(max(pairs) + 1)]
