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


def _language(rng: np.random.Generator, count: int, exponent: float = 1.0) -> list[str]:
    """Texts of invented words with frequencies rank^-exponent (Zipf's law at 1)."""
    rank = np.arange(1, 2001)
    share = rank**-exponent / (rank**-exponent).sum()
    return [" ".join(f"w{i}" for i in rng.choice(rank, size=rng.integers(5, 120), p=share)) for _ in range(count)]


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


def test_a_writer_of_common_words_gains_nothing_by_writing_less() -> None:
    """The loophole: with a sum, whoever is below the texts at every length is least below where it is short."""
    rng = np.random.default_rng(1)
    texts, plain = _language(rng, 1500), _language(rng, 400, exponent=1.25)
    responses = [" ".join(text.split()[: rng.integers(2, 70)]) for text in _language(rng, 2000, exponent=1.25)]
    lengths, short = length_reward(responses, responses), length_reward(responses, responses) < 12
    against_texts, against_writer = (InformativenessReward(texts, like=like) for like in (None, plain))
    found = against_writer(responses, responses)
    assert found.mean() == pytest.approx(0, abs=0.03)
    for low, high in ((0, 12), (12, 25), (25, 45), (45, 80)):
        there = (lengths >= low) & (lengths < high)
        assert abs(found[there].mean()) < 4 * found[there].std() / there.sum() ** 0.5 + 0.03
    deficit = against_texts(responses, responses)
    assert deficit.mean() < -0.2  # below the texts
    # As a sum the deficit shrinks with the words; a word of it does not, down to `shortest` words.
    total = deficit * np.maximum(lengths, 20)
    assert total[~short].mean() < 3 * total[short].mean() < 0
    middle, long = deficit[(lengths >= 20) & (lengths < 40)].mean(), deficit[lengths >= 40].mean()
    assert middle == pytest.approx(long, abs=0.15)


def test_informativeness_names_what_is_wrong() -> None:
    texts = ["the film was good"] * 10
    with pytest.raises(ValueError, match="texts: 9 are too few"):
        InformativenessReward(texts[1:])
    with pytest.raises(ValueError, match="like: 1 are too few"):
        InformativenessReward(texts, like=texts[:1])
    with pytest.raises(ValueError, match="shortest=0"):
        InformativenessReward(texts, shortest=0)


def test_informativeness_pays_nothing_for_words_that_nobody_else_writes() -> None:
    texts = [*[f"the film number {i % 5} was good" for i in range(20)], "qwrtz"]
    reward = InformativenessReward(texts)
    gibberish, unseen = reward(["", ""], ["qwrtz qwrtz", "zzzzz zzzzz"])
    assert gibberish == unseen
    number = sum(f"the film number {i % 5} was good".split().count("3") for i in range(20))
    gain = reward([""], ["the 3"])[0] - reward([""], ["the the"])[0]
    assert gain == pytest.approx(math.log(21 / number) / 20)  # a text of two words is divided by `shortest`


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
    assert reward([""], ["They are both one"]).shape == (1,)  # harper panics where this is the end


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
