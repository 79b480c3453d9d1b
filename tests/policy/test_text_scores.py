"""Batches change nothing but speed."""

from __future__ import annotations

import numpy as np
import torch

from prefmix.data.comparisons import TextTable
from prefmix.data.tokenization import tokenize_texts
from prefmix.policy.generation import SamplingOptions, decode
from prefmix.policy.responses import left_pad
from prefmix.policy.text_scores import length_batches, product_log_probs, text_log_probs

TEXTS = [
    ("Where is the sun?", " In the sky."),
    ("Where is the sun?", " In the sea."),
    ("", "Once upon a time there was a little girl who lived in a small house near the forest."),
    ("Write a review of the film.", " I loved the film, it was great."),
]


def test_texts_alone_equal_texts_in_batches(make_tiny_model, make_experts, tiny_tokenizer):
    experts = make_experts(make_tiny_model())
    texts = tokenize_texts(TEXTS, tiny_tokenizer)
    together = text_log_probs(experts, texts)
    for budget in (1, 60):
        apart = text_log_probs(experts, texts, tokens_per_batch=budget)
        torch.testing.assert_close(apart.log_probs, together.log_probs, atol=1e-4, rtol=0)
        torch.testing.assert_close(apart.ref_log_probs, together.ref_log_probs, atol=1e-4, rtol=0)


def test_batches_hold_every_text_once_and_keep_to_the_budget(tiny_tokenizer):
    texts = tokenize_texts(TEXTS * 3, tiny_tokenizer)
    lengths = [len(prompt) + len(completion) for prompt, completion in zip(texts.prompt_ids, texts.completion_ids)]
    batches = [batch.tolist() for batch in length_batches(texts, 100)]
    assert sorted(row for batch in batches for row in batch) == list(range(12))
    assert all(len(batch) * max(lengths[row] for row in batch) <= 100 or len(batch) == 1 for batch in batches)


def test_the_product_scores_texts_as_it_writes_them(make_tiny_model, make_experts):
    experts, prompts = make_experts(make_tiny_model()), [[17, 30, 45], [9, 80]]
    log_weights = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.0, 0.0, 1.0, 0.0]], dtype=torch.float64).log()
    start, generator = left_pad(prompts, 0, torch.device("cpu")), torch.Generator().manual_seed(0)
    call = {"eos_token_ids": set(), "generator": generator, "product": True}
    steps = list(decode(experts, *start, log_weights, SamplingOptions(6), **call))
    written = [[int(step.tokens[row]) for step in steps] for row in range(2)]
    drawn = torch.stack([step.log_probs.double() for step in steps]).sum(0)
    texts = TextTable(prompts, written, np.arange(2), prompts)
    torch.testing.assert_close(product_log_probs(experts, texts, log_weights), drawn, atol=1e-4, rtol=0)
    alone = text_log_probs(experts, texts).log_probs.double()
    assert abs(float(drawn[1] - alone[1, 2])) < 1e-4
    assert abs(float(drawn[0] - torch.logsumexp(log_weights[0] + alone[0], 0))) > 1e-2, "the mixture's is another"
