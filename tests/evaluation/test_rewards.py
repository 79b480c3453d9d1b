"""Rewards on texts whose order is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from prefmix.evaluation.rewards import (
    ClassifierReward,
    GrammarReward,
    InformativenessReward,
    SentimentReward,
    length_reward,
)

PRAISE = ["a great film i loved it", "great acting and i loved the end", "loved it it was great"] * 4
BLAME = ["an awful film i hated it", "awful acting and i hated the end", "hated it it was awful"] * 4


def test_sentiment_learns_the_words_that_carry_it_and_reads_the_response_alone() -> None:
    pytest.importorskip("sklearn")
    reward = SentimentReward(PRAISE + BLAME, [True] * 12 + [False] * 12)
    texts = ["great, loved it", "awful, hated it", "the film"]
    found = reward(["hated awful"] * 3, texts)
    assert found[0] > found[2] > found[1] and found[0] > 0 > found[1]
    np.testing.assert_array_equal(found, reward(["loved great"] * 3, texts))
    assert reward.accuracy(["i loved this", "i hated this"], [True, False]) == 1
    assert reward([], []).shape == (0,)
    with pytest.raises(ValueError, match="praise and blame"):
        SentimentReward(PRAISE, [True] * 12)


def _language(rng: np.random.Generator, count: int) -> list[str]:
    """Texts of invented words with Zipf frequencies."""
    rank = np.arange(1, 2001)
    return [
        " ".join(f"w{i}" for i in rng.choice(rank, size=rng.integers(5, 120), p=(1 / rank) / (1 / rank).sum()))
        for _ in range(count)
    ]


def test_informativeness_does_not_grow_with_length_and_grows_with_rare_words() -> None:
    rng = np.random.default_rng(0)
    reward = InformativenessReward(_language(rng, 1500))
    pieces = [" ".join(text.split()[: rng.integers(2, 70)]) for text in _language(rng, 600)]
    lengths, found = length_reward(pieces, pieces), reward(pieces, pieces)
    assert abs(np.corrcoef(lengths, found)[0, 1]) < 0.1
    idf_alone = [sum(reward._idf.get(w, 0) for w in set(text.split())) for text in pieces]
    assert np.corrcoef(lengths, idf_alone)[0, 1] > 0.9
    common, rare = reward(["", ""], ["w1 w2 w3 w4 w5", "w200 w300 w150 w250 w280"])
    assert rare > common
    assert reward([""], ["w1 w1 w1 w1"])[0] < reward([""], ["w1 w2 w3 w4"])[0]


def test_informativeness_pays_nothing_for_words_that_nobody_else_writes() -> None:
    texts = [*[f"the film number {i % 5} was good" for i in range(20)], "qwrtz"]
    reward = InformativenessReward(texts)
    gibberish, unseen = reward(["", ""], ["qwrtz qwrtz", "zzzzz zzzzz"])
    assert gibberish == unseen
    number = sum(f"the film number {i % 5} was good".split().count("3") for i in range(20))
    gain = reward([""], ["the 3"])[0] - reward([""], ["the the"])[0]
    assert gain == pytest.approx(math.log(21 / number))


def test_grammar_counts_errors_of_the_response_per_hundred_words_and_no_spelling() -> None:
    pytest.importorskip("harper")
    reward = GrammarReward()
    prompts = ["I saw this film", "I saw this film", "I saw an film", "I saw this film"]
    responses = [" with a friend.", " with with an friend.", " with a friend.", " with a freind."]
    found = reward(prompts, responses)
    assert found[0] == 0 and found[2] == 0 and found[3] == 0
    assert found[1] <= -5  # at least one error over no more than 20 words
    strict = GrammarReward(not_counted=frozenset())
    assert strict(prompts[3:], responses[3:])[0] < 0
    long = " with a friend." + " The sky is blue." * 20
    assert reward(["I saw this film"], [" with with a friend." + " The sky is blue." * 20])[0] > found[1]
    assert reward(["I saw this film"], [long])[0] == 0


def test_any_classifier_of_transformers_is_a_reward(tiny_tokenizer: object) -> None:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_labels=2, pad_token_id=0, label2id={"blame": 0, "praise": 1},
        id2label={0: "blame", 1: "praise"},
    )  # fmt: skip
    model = LlamaForSequenceClassification(config)
    texts = ["The sky is blue.", "It is not.", "Where is the sun? In the sky."]
    praise = ClassifierReward(model, tiny_tokenizer, "praise", batch_size=2)(texts, texts)
    blame = ClassifierReward(model, tiny_tokenizer, 0)(texts, texts)
    np.testing.assert_allclose(np.exp(praise) + np.exp(blame), 1, atol=1e-5)
    assert praise.std() > 0
    with pytest.raises(ValueError, match="blame, praise"):
        ClassifierReward(model, tiny_tokenizer, "neutral")
