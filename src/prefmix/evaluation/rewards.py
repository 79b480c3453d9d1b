"""Reward functions that need no network and no large model: what a text is worth by one criterion.

A reward is any callable from prompts and responses to one number each (`Reward`); larger is better. The parts here are
fitted on texts that the caller gives, so that reward models, policies and evaluation can read disjoint ones.

| part | unit | fitted on | needs |
| --- | --- | --- | --- |
| `SentimentReward` | log-odds of praise, nats | labelled texts | scikit-learn |
| `GrammarReward` | minus lints per 100 words | nothing | harper-py |
| `InformativenessReward` | nats of idf a word beyond what a text of that length has | texts | - |
| `length_reward` | words | nothing | - |
| `ClassifierReward` | log-probability of a label, nats | a trained classifier of transformers | - |

`pip install 'prefmix[rewards]'` brings what the third column's parts need.

Legend: N texts, L padded length, C labels.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Float

_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
MIN_PIECES = 2000  # that say what is usual at a length; few texts are cut several times
MIN_DOCUMENTS = 3  # a word that fewer texts hold is no word of the language; nothing is earned by writing it

# Not grammar: names and rare words are spelt as they are spelt, a cut text ends in the middle, and taste is no error.
NOT_GRAMMAR = frozenset({"Spelling", "Formatting", "Typo", "Style", "Enhancement", "Readability", "Regionalism"})


class Reward(Protocol):
    """What a response is worth by one criterion; larger is better."""

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> Float[np.ndarray, "N"]:
        """[N] float64, one number for each of N prompts and responses."""
        ...


def words(text: str) -> list[str]:
    """Words in lower case: letters and digits, with apostrophes inside."""
    return _WORD.findall(text.lower())


def length_reward(prompts: Sequence[str], responses: Sequence[str]) -> Float[np.ndarray, "N"]:
    """Number of words of the response: what many rewards turn out to measure when length is not controlled."""
    return np.array([len(words(response)) for response in responses], dtype=np.float64)


class SentimentReward:
    """Log-odds that a response praises, by TF-IDF of words and word pairs and a logistic regression.

        r(y) = b + sum_w c_w tfidf_w(y) = log p(praise | y) - log p(blame | y)

    It reads the response alone. Measured on IMDb with 4,600 training reviews: see the recipe movie_reviews.
    """

    def __init__(self, texts: Sequence[str], praise: Sequence[bool], *, strength: float = 4.0) -> None:
        """Fits the classifier.

        Args:
            texts: labelled texts, both labels among them.
            praise: whether each text praises.
            strength: inverse of the ridge (scikit-learn's C).

        Raises:
            ValueError: scikit-learn is not installed, or only one label is there.
        """
        if len(set(praise)) < 2:
            raise ValueError("praise: all texts have one label; a sentiment needs praise and blame")
        feature_extraction, linear_model = _scikit_learn()
        self._features = feature_extraction.TfidfVectorizer(
            ngram_range=(1, 2), min_df=min(MIN_DOCUMENTS, len(texts)), sublinear_tf=True, tokenizer=words,
            token_pattern=None, lowercase=False,
        )  # fmt: skip
        self._model = linear_model.LogisticRegression(C=strength, max_iter=1000)
        self._model.fit(self._features.fit_transform(texts), np.asarray(praise, dtype=bool))

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> Float[np.ndarray, "N"]:
        """[N] log-odds of praise, nats."""
        if not len(responses):
            return np.zeros(0)
        found: Float[np.ndarray, "N"] = self._model.decision_function(self._features.transform(responses))
        return found

    def accuracy(self, texts: Sequence[str], praise: Sequence[bool]) -> float:
        """Share of labelled texts on whose side of zero the reward lies."""
        return float(np.mean((self(texts, texts) > 0) == np.asarray(praise, dtype=bool)))


class InformativenessReward:
    """How much rarer the words of a response are than those of other texts of its length, for each word.

        r(y) = (sum of idf(w) over distinct words w of y  -  expected(n(y))) / max(n(y), shortest)
        idf(w) = log(N / df(w))

    The sum alone is mostly length, so its mean given the number of words n is taken away: a + b n + c n log n, by
    least squares over pieces of texts. What is left is divided by n: a writer whose words are a little too common
    would otherwise gain by writing fewer of them. Below `shortest` words the divisor stays, so that one rare word is
    not the best text. Words that fewer than `MIN_DOCUMENTS` texts hold count nothing: otherwise the best text would
    be one of misspellings.

    `like` are texts that responses are compared to, length by length. With the reference policy's own writing the mean
    reward of the reference is zero at every length, and nothing is gained or lost by length alone. Without it, a
    reference that writes commoner words than `texts` still gains by answers below `shortest` words.
    """

    def __init__(
        self,
        texts: Sequence[str],
        *,
        like: Sequence[str] | None = None,
        longest: int = 80,
        shortest: int = 20,
        seed: int = 0,
    ) -> None:
        """Counts words, and measures what length alone gives.

        Args:
            texts: at least 10 texts of the language that responses are written in.
            like: at least 10 texts whose pieces say what is usual at a length; None: `texts`.
            longest: pieces have 1 to so many words, so that short responses are covered as well as long ones.
            shortest: least number of words that a response is divided by, positive.
            seed: of the pieces.

        Raises:
            ValueError: too few texts, or `shortest` is not positive.
        """
        if len(texts) < 10:
            raise ValueError(f"texts: {len(texts)} are too few to know which words are rare; give at least 10")
        if like is not None and len(like) < 10:
            raise ValueError(f"like: {len(like)} are too few to know what is usual at a length; give at least 10")
        if shortest < 1:
            raise ValueError(f"shortest={shortest}: at least one word")
        documents = [words(text) for text in texts]
        count = Counter(word for document in documents for word in set(document))
        self._idf = {word: math.log(len(texts) / df) for word, df in count.items() if df >= MIN_DOCUMENTS}
        usual = documents if like is None else [words(text) for text in like]
        rounds, rng = -(-MIN_PIECES // len(usual)), np.random.default_rng(seed)
        pieces = [piece for _ in range(rounds) for piece in _pieces(usual, longest, rng)]
        sums = np.array([self._sum(piece) for piece in pieces])
        design = _length_terms(np.array([len(piece) for piece in pieces]))
        self._expected = np.linalg.lstsq(design, sums, rcond=None)[0]
        self._shortest = shortest

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> Float[np.ndarray, "N"]:
        """[N] nats of idf a word beyond the mean of texts with as many words."""
        documents = [words(response) for response in responses]
        lengths = np.array([len(document) for document in documents], dtype=np.int64)
        sums = np.array([self._sum(document) for document in documents], dtype=np.float64)
        return np.asarray((sums - _length_terms(lengths) @ self._expected) / np.maximum(lengths, self._shortest))

    def _sum(self, document: Iterable[str]) -> float:
        # Sorted: the sum of a set would depend on Python's hash seed in its last digits.
        return sum(self._idf.get(word, 0.0) for word in sorted(set(document)))


class GrammarReward:
    """Minus the grammar errors per 100 words that harper finds in a response, read after its prompt.

    Lints of the kinds in `NOT_GRAMMAR` do not count, nor do those that lie in the prompt. Texts below `shortest` words
    are divided by `shortest`, so that one word is not the best text.
    """

    def __init__(self, *, not_counted: frozenset[str] = NOT_GRAMMAR, shortest: int = 20) -> None:
        """Starts the linter (half a second).

        Args:
            not_counted: kinds of lint (harper's `lint_kind`) to leave out.
            shortest: least number of words that errors are divided by.

        Raises:
            ValueError: harper-py is not installed.
        """
        try:
            import harper
        except ImportError:
            raise ValueError("GrammarReward: harper-py is not installed; pip install 'prefmix[rewards]'") from None
        self._linter = harper.Linter()
        if "Spelling" in not_counted:  # half of the time, and nothing of it would count
            self._linter.set_lint_config({**self._linter.get_default_lint_config(), "SpellCheck": False})
        self._not_counted, self._shortest = not_counted, shortest

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> Float[np.ndarray, "N"]:
        """[N] minus errors per 100 words."""
        return np.array([self._one(p, r) for p, r in zip(prompts, responses, strict=True)], dtype=np.float64)

    def _one(self, prompt: str, response: str) -> float:
        # A line's end: rules of harper 2.13 read one token past a text that ends in "both one", and panic.
        lints = self._linter.lint(f"{prompt}{response}\n", language="plaintext")
        # Where one word goes from prompt to response, the error is the response's.
        errors = sum(lint.lint_kind not in self._not_counted and lint.span.end > len(prompt) for lint in lints)
        return -100.0 * errors / max(len(words(response)), self._shortest)


class ClassifierReward:
    """Log p(label | response) of a text-classification model of transformers, nats."""

    def __init__(self, model: Any, tokenizer: Any, label: int | str, *, batch_size: int = 32) -> None:
        """Takes a trained classifier.

        Args:
            model: an `AutoModelForSequenceClassification`.
            tokenizer: its tokenizer, with a padding token.
            label: index or name (of `config.label2id`) of the label that is rewarded.
            batch_size: texts read at once.

        Raises:
            ValueError: the model has no such label.
        """
        names = {str(name): int(index) for name, index in (model.config.label2id or {}).items()}
        index = names.get(label, -1) if isinstance(label, str) else label
        if not 0 <= index < model.config.num_labels:
            raise ValueError(f"label={label!r}: the classifier has {', '.join(names) or model.config.num_labels}")
        self._model, self._tokenizer, self._label, self._batch_size = model.eval(), tokenizer, index, batch_size

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> Float[np.ndarray, "N"]:
        """[N] log p(label | response), nats."""
        found = [np.zeros(0)]
        for start in range(0, len(responses), self._batch_size):
            texts = list(responses[start : start + self._batch_size])
            batch = self._tokenizer(texts, return_tensors="pt", padding=True, truncation=True).to(self._model.device)
            log_probs = torch.log_softmax(self._model(**batch).logits.double(), dim=-1)
            found.append(log_probs[:, self._label].cpu().numpy())
        return np.concatenate(found)


def _pieces(documents: Sequence[list[str]], longest: int, rng: np.random.Generator) -> Iterable[list[str]]:
    for document in documents:
        if document:
            length = int(rng.integers(1, longest + 1))
            start = int(rng.integers(0, max(1, len(document) - length + 1)))
            yield document[start : start + length]


def _length_terms(lengths: np.ndarray) -> Float[np.ndarray, "N 3"]:
    lengths = lengths.astype(np.float64)
    return np.stack([np.ones_like(lengths), lengths, lengths * np.log(np.maximum(lengths, 1))], axis=1)


def _scikit_learn() -> tuple[Any, Any]:
    try:
        from sklearn import linear_model
        from sklearn.feature_extraction import text
    except ImportError:
        raise ValueError("SentimentReward: scikit-learn is not installed; pip install 'prefmix[rewards]'") from None
    return text, linear_model
