"""Every check of rows has rows that trigger it, and a near miss that does not."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest

from prefmix.data.schema import check_rows
from prefmix.experiments.diagnose import diagnose_rows
from prefmix.experiments.diagnose_design import simulate_and_refit
from prefmix.experiments.diagnose_rows import (
    RowColumns,
    both_directions,
    comparisons_per_user,
    disagreement_rank,
    duplicates,
    length_bias,
    length_tastes,
    near_equal_pairs,
    prompt_overlap,
    row_columns,
)

WORDS = ["sun", "sea", "sky", "house", "girl", "forest", "time", "river", "stone", "bird", "road", "lamp", "window"]


def columns(
    num_users: int = 30,
    each: int = 10,
    *,
    num_pairs: int = 20,
    likes: Callable[[np.random.Generator, np.ndarray, np.ndarray], np.ndarray] | None = None,
    seed: int = 0,
) -> RowColumns:
    """Users judge random pairs of one prompt each; `likes` says from user and pair with what chance text 2m+1 wins."""
    rng = np.random.default_rng(seed)
    user = np.repeat(np.arange(num_users), each)
    pair = np.concatenate([rng.permutation(num_pairs)[:each] for _ in range(num_users)])
    chance = np.full(len(user), 0.5) if likes is None else likes(rng, user, pair)
    upward = rng.random(len(user)) < chance
    texts = [" ".join(rng.choice(WORDS, 6)) for _ in range(2 * num_pairs)]
    chosen, rejected = 2 * pair + upward, 2 * pair + ~upward
    return RowColumns(user, pair, chosen, rejected, texts, rng.integers(5, 50, size=2 * num_pairs))


def groups(strength: float) -> Callable[[np.random.Generator, np.ndarray, np.ndarray], np.ndarray]:
    """Even and odd users want opposite texts of every pair."""

    def likes(rng: np.random.Generator, user: np.ndarray, pair: np.ndarray) -> np.ndarray:
        side = rng.choice([-1.0, 1.0], size=pair.max() + 1)
        return 0.5 + strength * side[pair] * np.where(user % 2 == 0, 1.0, -1.0)

    return likes


def test_few_rows_a_user() -> None:
    sound = columns(each=8)
    assert comparisons_per_user(sound).level == "fine"
    assert comparisons_per_user(columns(each=7)).level == "note"
    # Half of the rows from people with one row each is still enough; more is not.
    for singles, level in ((240, "fine"), (241, "warning")):
        user = np.concatenate([sound.user, 1000 + np.arange(singles)])
        more = sound._replace(user=user, **{n: np.resize(getattr(sound, n), len(user)) for n in sound._fields[1:4]})
        found = comparisons_per_user(more)
        assert (found.level == "warning") == (level == "warning")
    assert "not identifiable" in found.what
    assert comparisons_per_user(sound._replace(user=np.full(240, -1))).level == "warning"


def test_prompts_that_nobody_shares() -> None:
    sound = columns()
    assert prompt_overlap(sound).level == "fine"
    apart = np.arange(300)
    assert prompt_overlap(sound._replace(prompt=apart)).level == "warning"
    apart[:100] = np.tile(np.arange(10), 10)  # a third is shared between users 0 to 9
    assert prompt_overlap(sound._replace(prompt=apart)).level == "fine"


def test_without_users_nothing_is_claimed_about_what_they_were_asked() -> None:
    found = prompt_overlap(columns()._replace(user=np.full(300, -1)))
    assert found.level == "note" and "no row names a user" in found.what and "%" not in found.what


def test_people_who_agree_and_pairs_nobody_shares() -> None:
    assert both_directions(columns(likes=lambda rng, user, pair: np.full(len(user), 1.0))).level == "warning"
    assert both_directions(columns(likes=groups(0.5))).level == "fine"

    def two_disputed(rng: np.random.Generator, user: np.ndarray, pair: np.ndarray) -> np.ndarray:
        return np.where(pair < 3, 0.5, 1.0)

    assert both_directions(columns(likes=two_disputed)).level == "fine"  # 3 of 20 pairs
    alone = columns(num_users=1, each=20)
    assert both_directions(alone).level == "note"


def test_disagreement_without_structure() -> None:
    noise, structured = columns(60, 15), columns(60, 15, likes=groups(0.4))
    assert disagreement_rank(noise).level == "warning"
    assert disagreement_rank(structured).level == "fine"
    assert disagreement_rank(structured).how_much["directions"] == 1
    assert disagreement_rank(columns(num_users=3, each=5)).level == "note"
    assert (
        disagreement_rank(structured).how_much["effective_rank"] < disagreement_rank(noise).how_much["effective_rank"]
    )


def test_consensus_alone_is_no_structure() -> None:
    """Pairs that everybody prefers alike, some more, some less: the mean is taken out, nothing is left."""

    def popular(rng: np.random.Generator, user: np.ndarray, pair: np.ndarray) -> np.ndarray:
        return np.linspace(0.2, 0.9, pair.max() + 1)[pair]

    assert disagreement_rank(columns(60, 15, likes=popular)).how_much["directions"] == 0


def test_repeated_and_contradicted_rows() -> None:
    sound = columns()
    assert duplicates(sound).level == "fine"

    def with_again(count: int, turned: bool) -> RowColumns:
        again = {
            name: np.concatenate([getattr(sound, name), getattr(sound, name)[:count]]) for name in sound._fields[:4]
        }
        if turned:
            again["chosen"], again["rejected"] = (
                np.concatenate([sound.chosen, sound.rejected[:count]]),
                np.concatenate([sound.rejected, sound.chosen[:count]]),
            )
        return sound._replace(**again)

    for turned in (False, True):
        assert duplicates(with_again(5, turned)).level == "fine"
        assert duplicates(with_again(10, turned)).level == "warning"
    assert "set label_noise, or have it learnt (label_noise_update" in duplicates(with_again(10, True)).remedy
    other = with_again(10, False)
    other.user[-10:] = np.arange(100, 110)  # other people may say the same
    assert duplicates(other).level == "fine"


def test_texts_with_the_same_words() -> None:
    sound = columns()
    assert near_equal_pairs(sound).level == "fine"
    texts = list(sound.texts)
    for pair in range(4):
        texts[2 * pair + 1] = texts[2 * pair].upper() + "!"
    assert near_equal_pairs(sound._replace(texts=texts)).level == "warning"
    texts = list(sound.texts)
    for pair in range(20):  # one word in three differs
        texts[2 * pair + 1] = " ".join([*texts[2 * pair].split()[:4], "otherwise", "else"])
    assert near_equal_pairs(sound._replace(texts=texts)).level == "fine"


def _by_length(columns: RowColumns, share: np.ndarray, seed: int = 1) -> RowColumns:
    """The same pairs, each user choosing the longer text with a chance of their own."""
    first, second = np.minimum(columns.chosen, columns.rejected), np.maximum(columns.chosen, columns.rejected)
    longer = columns.length[first] > columns.length[second]
    wants_long = np.random.default_rng(seed).random(len(first)) < share[columns.user]
    takes_first = longer == wants_long
    return columns._replace(chosen=np.where(takes_first, first, second), rejected=np.where(takes_first, second, first))


@pytest.mark.parametrize(("share", "level"), [(0.75, "warning"), (0.25, "warning"), (0.55, "fine")])
def test_longer_texts_that_win(share: float, level: str) -> None:
    found = _by_length(columns(60, 15), np.full(60, share))
    assert length_bias(found).level == level
    assert length_tastes(found).level == "fine"  # everybody alike


@pytest.mark.parametrize(("high", "level"), [(0.9, "warning"), (0.6, "fine")])
def test_users_who_differ_about_length(high: float, level: str) -> None:
    share = np.where(np.arange(60) % 2 == 0, high, 1 - high)
    found = length_tastes(_by_length(columns(60, 15), share))
    assert found.level == level
    assert found.how_much["spread_of_users"] == pytest.approx(high - 0.5, abs=0.12)


def test_equal_lengths_are_why_tastes_for_length_cannot_be_seen() -> None:
    many = columns(20, 20)
    found = length_tastes(many._replace(length=np.full(40, 7)))
    assert found.what.startswith("only 0 users with two rows or more whose texts differ in length (0% of all rows")
    few = length_tastes(columns(4, 10)._replace(length=np.arange(40)))
    assert few.what.startswith("only 4 users with two rows") and "(100% of all rows" in few.what


def test_designs_that_could_not_find_groups() -> None:
    """The check reads who judged what, not what they answered."""
    found = simulate_and_refit(columns(40, 12, num_pairs=60), repeats=2)
    assert found.level == "fine"
    assert found.how_much["ari"] > 0.8
    assert simulate_and_refit(columns(40, 1, num_pairs=60), repeats=2).level == "warning"
    nobody = columns()._replace(user=np.full(300, -1))
    assert simulate_and_refit(nobody).level == "warning"


def test_rows_become_columns_and_a_diagnosis_with_plain_json() -> None:
    rows = [
        {"prompt": p, "chosen": "a b c", "rejected": "a", "user": u}
        for u in ("x", "y")
        for p in ("one", "two", "three")
    ]
    checked = check_rows([*rows, {"prompt": "one", "chosen": "a", "rejected": "a b c"}])
    found = row_columns(checked.rows)
    assert found.user.tolist() == [0, 0, 0, 1, 1, 1, -1]
    assert found.prompt.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert found.length[found.chosen].tolist() == [3] * 6 + [1]
    assert found.chosen[6] == found.rejected[0]
    diagnosis = diagnose_rows(checked.rows, refit=False)
    assert len(diagnosis.findings) == 8
    assert all(f.remedy for f in diagnosis.findings if f.level == "warning")
    entries = {entry["check"]: entry for entry in diagnosis.to_dict()["findings"]}
    assert entries["both directions"]["how_much"]["both_ways"] is None
    assert diagnosis.text().startswith("rows: 0 warnings")
    assert "-> let several users judge the same pairs" in diagnosis.text()
    messages = [{"role": "user", "content": "hi"}]
    chat = {"prompt": messages, "chosen": [{"role": "assistant", "content": "one two"}]}
    chat |= {"rejected": [{"role": "assistant", "content": "one"}]}
    assert row_columns(check_rows([chat]).rows).length.tolist() == [2, 1]
    tokens = {"prompt_ids": [1, 2], "chosen_ids": [3, 4, 5], "rejected_ids": [3]}
    assert row_columns(check_rows([tokens]).rows).length.tolist() == [3, 1]


def test_rows_are_diagnosed_without_torch() -> None:
    code = "import sys, prefmix.experiments.diagnose; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
