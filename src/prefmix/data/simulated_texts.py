"""Texts with known attributes, for simulated people to judge: made-up feature vectors, or real arguments.

Attributes are scaled so that the difference of two random texts of one prompt has unit covariance; then tastes along
different attributes are independent, and `scale` means the same on every pool. Legend: N texts, P attributes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from prefmix.data.convarg import convarg_sides

# Tastes are taken in this order; the first ones can be read off a text, a side only by who knows its debate.
ARGUMENT_ATTRIBUTES = ("length", "long words", "questions", "first person", "commas", "side")
TEST_SHARE = 0.3
_SELF = {"i", "i'm", "i've", "me", "my", "mine", "we", "our", "us"}


class TextPool(NamedTuple):
    """Texts to compare.

    Attributes:
        prompts: the distinct prompts.
        prompt_of: [N] prompt of each text.
        texts: N texts.
        attributes: [N, P] f(y).
        names: P names of the attributes.
        rotated: tastes point anywhere; False: along the attributes, so that they have names.
    """

    prompts: Sequence[str]
    prompt_of: np.ndarray
    texts: Sequence[str]
    attributes: np.ndarray
    names: Sequence[str]
    rotated: bool

    def directions(self, rng: np.random.Generator) -> np.ndarray:
        """[P, P] orthonormal directions that tastes are made of."""
        size = len(self.names)
        if not self.rotated:
            return np.eye(size)
        basis, triangle = np.linalg.qr(rng.normal(size=(size, size)))
        return (basis * np.sign(np.diag(triangle))).T

    def draw_pairs(self, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """`count` pairs of different texts, each of one prompt: prompts and texts uniformly."""
        order = np.argsort(self.prompt_of, kind="stable")
        size = np.bincount(self.prompt_of, minlength=len(self.prompts))
        start = np.concatenate([[0], size.cumsum()[:-1]])
        prompt = rng.choice(np.flatnonzero(size >= 2), size=count)
        first = rng.integers(size[prompt])
        second = (first + 1 + rng.integers(size[prompt] - 1)) % size[prompt]
        return order[start[prompt] + first], order[start[prompt] + second]


def feature_pools(
    num_attributes: int = 8, *, num_prompts: int = 40, texts_per_prompt: int = 50, seed: int = 0
) -> dict[str, TextPool]:
    """Texts that are Gaussian vectors: "text 17" stands for attributes ~ N(0, I/2).

    Args:
        num_attributes: P.
        num_prompts: prompts of each split.
        texts_per_prompt: at least 2.
        seed: of the vectors.
    """
    if num_attributes < 1 or num_prompts < 1 or texts_per_prompt < 2:
        raise ValueError(
            f"num_attributes={num_attributes}, num_prompts={num_prompts} must be at least 1, "
            f"texts_per_prompt={texts_per_prompt} at least 2"
        )
    rng, pools, size = np.random.default_rng([seed, 5]), {}, num_prompts * texts_per_prompt
    names = [f"feature {index}" for index in range(num_attributes)]
    for split in ("train", "test"):
        pools[split] = TextPool(
            prompts=[f"{split} prompt {index}\n" for index in range(num_prompts)],
            prompt_of=np.repeat(np.arange(num_prompts), texts_per_prompt),
            texts=[f"{split} text {index}" for index in range(size)],
            attributes=rng.normal(scale=np.sqrt(0.5), size=(size, num_attributes)),
            names=names,
            rotated=True,
        )
    return pools


def argument_pools(*, max_words: int | None = 60, seed: int = 0) -> dict[str, TextPool]:
    """The arguments that the package ships (UKPConvArg1), with what can be counted in them.

    `length`: log words; `long words`: letters a word; `questions`, `commas`: log (1 + count); `first person`: share
    of words; `side`: which side of the debate. Each attribute is what the ones before it do not explain
    (Gram-Schmidt within debates), so a taste for long words is none for length.

    Args:
        max_words: leave longer arguments out.
        seed: decides which texts are for testing.

    Raises:
        ValueError: so few words that no debate keeps arguments of both sides.
    """
    found_sides = convarg_sides(max_words=max_words)
    sides = {prompt: both for prompt, both in found_sides.items() if len(both) == 2 and all(both.values())}
    if not sides:
        raise ValueError(f"max_words={max_words}: no debate has arguments that short on both sides; allow more words")
    # A text that stands on both sides of a debate is counted once, on the first.
    side_of = [
        {text: 1.0 - 2.0 * side for side in (1, 0) for text in list(both.values())[side]} for both in sides.values()
    ]
    entries = [(prompt, text, side) for prompt, found in enumerate(side_of) for text, side in found.items()]
    prompt_of = np.array([entry[0] for entry in entries])
    raw = np.array([[*_count(text), side] for _, text, side in entries])
    attributes = _uncorrelated_within(raw, prompt_of)
    is_test = np.random.default_rng([seed, 6]).random(len(entries)) < TEST_SHARE
    return {
        split: TextPool(
            prompts=list(sides),
            prompt_of=prompt_of[rows],
            texts=[entries[row][1] for row in np.flatnonzero(rows)],
            attributes=attributes[rows],
            names=ARGUMENT_ATTRIBUTES,
            rotated=False,
        )
        for split, rows in (("train", ~is_test), ("test", is_test))
    }


def _count(text: str) -> list[float]:
    words = re.findall(r"[\w']+", text.lower()) or [""]
    size = len(words)
    return [
        float(np.log(size)),
        sum(map(len, words)) / size,
        float(np.log1p(text.count("?"))),
        sum(word in _SELF for word in words) / size,
        float(np.log1p(text.count(","))),
    ]


def _uncorrelated_within(raw: np.ndarray, prompt_of: np.ndarray) -> np.ndarray:
    """Columns made uncorrelated within prompts, in order, with variance one half there."""
    count = np.bincount(prompt_of)
    means = np.stack([np.bincount(prompt_of, column) for column in raw.T], axis=1) / count[:, None]
    within = raw - means[prompt_of]
    basis, triangle = np.linalg.qr(within)
    return basis * np.sign(np.diag(triangle)) * np.sqrt(0.5 * len(raw))
