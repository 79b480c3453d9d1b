"""What rows alone say before training: who judged how much, where people disagree, and what else texts differ in.

No model and no embedding is read, and no torch: an answer comes within a second.
Legend: B comparisons, N texts, U users, M pairs of texts.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from prefmix.data.counted import counted
from prefmix.data.schema import PreferenceRow
from prefmix.experiments.diagnosis import Finding

ENOUGH_ROWS = 8
NEAR_EQUAL = 0.9
# Rows do not say how they will be trained on.
NOISE_REMEDY = "set label_noise, or have it learnt (label_noise_update: per_annotator)"


class RowColumns(NamedTuple):
    """Rows as integers.

    Attributes:
        user: [B] index of the user, -1 where unnamed.
        prompt: [B] index of the prompt.
        chosen, rejected: [B] indices of texts (responses under their prompts).
        texts: N responses; empty strings where rows are token ids.
        length: [N] words, or tokens.
    """

    user: np.ndarray
    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray
    texts: Sequence[str]
    length: np.ndarray


def row_columns(rows: Sequence[PreferenceRow]) -> RowColumns:
    """Columns of checked rows."""
    users: dict[str, int] = {}
    prompts: dict[str, int] = {}
    texts: dict[tuple[int, str], int] = {}
    lengths: list[int] = []
    found = np.empty((4, len(rows)), dtype=np.int64)
    for index, row in enumerate(rows):
        tokens = row.responses.token_ids
        prompt, *responses = tokens or row.responses[:3]
        prompt_id = prompts.setdefault(_plain(prompt), len(prompts))
        sides = []
        for response in responses:
            plain = _plain(response)
            sides.append(texts.setdefault((prompt_id, plain), len(texts)))
            if len(texts) > len(lengths):
                lengths.append(len(response) if tokens else len(plain.split()))
        name = row.attributes.user
        user = -1 if name is None else users.setdefault(name, len(users))
        found[:, index] = (user, prompt_id, *sides)
    is_tokens = bool(rows and rows[0].responses.token_ids)
    plain_texts = [""] * len(texts) if is_tokens else [text for _, text in texts]
    user_B, prompt_B, chosen_B, rejected_B = found
    return RowColumns(user_B, prompt_B, chosen_B, rejected_B, plain_texts, np.array(lengths))


def diagnose_columns(columns: RowColumns, seed: int = 0) -> list[Finding]:
    """All checks that read rows only."""
    return [
        comparisons_per_user(columns),
        prompt_overlap(columns),
        both_directions(columns),
        disagreement_rank(columns, seed),
        duplicates(columns),
        near_equal_pairs(columns),
        length_bias(columns),
        length_tastes(columns),
    ]


def comparisons_per_user(columns: RowColumns) -> Finding:
    """Do user ids repeat, so that a person's answers hang together?"""
    count = np.bincount(columns.user[columns.user >= 0])
    count = count[count > 0]
    repeated = float(count[count >= 2].sum()) / len(columns.user)
    median = float(np.median(count)) if len(count) else 0.0
    numbers = {"users": float(len(count)), "median": median, "share_of_repeated": repeated}
    rows = "row" if median == 1 else "rows"
    what = f"{counted(len(count), 'user')} with {median:g} {rows} in the median; "
    what += f"{repeated:.0%} of the rows belong to repeated users"
    if repeated < 0.5:
        what += ". Groups of users are not identifiable: two equal groups of opposed tastes look like coin flips"
        remedy = "add a `user` column with two or more rows a user; else only groups by prompt or metadata can be found"
        return Finding("comparisons per user", "warning", what, numbers, remedy)
    what += (
        ". Groups of users are identifiable; experts of single comparisons (latent: pair) only by prompt or metadata"
    )
    if median < ENOUGH_ROWS:
        remedy = f"with fewer than {ENOUGH_ROWS} rows a user stays uncertain; collect more from the same users"
        return Finding("comparisons per user", "note", what, numbers, remedy)
    return Finding("comparisons per user", "fine", what, numbers)


def prompt_overlap(columns: RowColumns) -> Finding:
    """Do different users judge the same prompts?"""
    known = columns.user >= 0
    if not known.any():
        what = "no row names a user: who was asked the same cannot be seen"
        return Finding("prompt overlap", "note", what, {"shared": float("nan")}, "add a `user` column")
    pairs = np.unique(np.stack([columns.user[known], columns.prompt[known]]), axis=1)
    shared = float((np.bincount(pairs[1])[pairs[1]] >= 2).mean())
    what = f"{shared:.0%} of what a user was asked (prompts) somebody else was asked too"
    if shared < 0.2:
        remedy = "who differs in taste cannot be told from who was asked differently; give some prompts to many users"
        return Finding("prompt overlap", "warning", what, {"shared": shared}, remedy)
    return Finding("prompt overlap", "fine", what, {"shared": shared})


def both_directions(columns: RowColumns) -> Finding:
    """Are pairs of texts that several people judged decided both ways?"""
    pair, upward, user = _pairs(columns)
    judges = np.unique(np.stack([pair, user]), axis=1)[0]
    repeated = np.flatnonzero(np.bincount(judges) >= 2)
    if len(repeated) < 10:
        numbers = {"repeated_pairs": float(len(repeated)), "both_ways": float("nan")}
        what = f"only {len(repeated)} pairs of texts were judged by two people or more: disagreement cannot be seen"
        return Finding("both directions", "note", what, numbers, "let several users judge the same pairs")
    total, up = np.bincount(pair), np.bincount(pair, upward)
    both = float(((up[repeated] > 0) & (up[repeated] < total[repeated])).mean())
    numbers = {"repeated_pairs": float(len(repeated)), "both_ways": both}
    what = f"{both:.0%} of {len(repeated)} pairs that several people judged were decided both ways"
    if both < 0.1:
        return Finding(
            "both directions", "warning", what, numbers, "people agree: one expert (num_experts: 1) is enough"
        )
    return Finding("both directions", "fine", what, numbers)


def disagreement_rank(columns: RowColumns, seed: int = 0, permutations: int = 20) -> Finding:
    """Directions of the user x pair matrix of disagreement that are stronger than chance.

    D_um = answer of u on pair m less the pair's mean; chance: the answers of a pair are dealt anew to those who judged
    it (parallel analysis, Horn 1965, with the pattern of who judged what kept). Effective rank: (sum s^2)^2 / sum s^4.
    """
    pair, upward, user = _pairs(columns, named=True)
    count = np.bincount(pair)
    kept = (count >= 2)[pair] if len(pair) else np.zeros(0, bool)
    kept &= user < 500  # the first 500 users and 3,000 pairs settle it, in a second
    pair, upward, user = _compact(pair[kept], 3000), upward[kept], user[kept]
    inside = pair >= 0
    pair, upward, user = pair[inside], upward[inside], user[inside]
    numbers = {"answers": float(len(pair)), "effective_rank": float("nan"), "directions": 0.0}
    if len(pair) < 40:
        what = f"only {len(pair)} answers are about pairs that two people judged: too few to look for structure"
        return Finding("disagreement rank", "note", what, numbers, "let several users judge the same pairs")
    values = _singular_values(user, pair, upward)
    rng, order = np.random.default_rng(seed), np.argsort(pair, kind="stable")
    chance = []
    for _ in range(permutations):
        dealt = np.empty_like(upward)
        dealt[order] = upward[np.lexsort((rng.random(len(pair)), pair))]
        chance.append(_singular_values(user, pair, dealt)[0])
    energy = values**2
    directions = int((values > max(chance)).sum())
    rank = float(energy.sum() ** 2 / max((energy**2).sum(), 1e-30))
    numbers |= {
        "effective_rank": rank,
        "directions": float(directions),
        "strongest_over_chance": values[0] / max(chance),
    }
    found = counted(directions, "direction")
    what = f"{found} of disagreement above chance (effective rank {rank:.0f}, {counted(len(pair), 'answer')})"
    if directions == 0:
        remedy = f"disagreement looks like noise: {NOISE_REMEDY}; or more rows on shared pairs may show groups"
        return Finding("disagreement rank", "warning", what, numbers, remedy)
    return Finding("disagreement rank", "fine", what, numbers)


def duplicates(columns: RowColumns) -> Finding:
    """Rows that repeat or contradict an earlier row of the same user."""
    known = columns.user >= 0
    rows = Counter(zip(*(column[known].tolist() for column in (columns.user, columns.chosen, columns.rejected))))
    total = max(sum(rows.values()), 1)
    repeats = sum(count - 1 for count in rows.values()) / total
    against = sum(min(n, rows.get((u, b, a), 0)) for (u, a, b), n in rows.items() if a < b) / total
    numbers = {"repeated": repeats, "contradicted": against}
    what = f"{repeats:.1%} of the rows repeat a row of the same user, {against:.1%} are contradicted by the same user"
    if repeats > 0.02:
        remedy = "repeated rows count twice in a user's evidence; drop them, or give weights"
        return Finding("duplicates", "warning", what, numbers, remedy)
    if against > 0.02:
        return Finding("duplicates", "warning", what, numbers, f"people contradict themselves: {NOISE_REMEDY}")
    return Finding("duplicates", "fine", what, numbers)


def near_equal_pairs(columns: RowColumns) -> Finding:
    """Comparisons of two texts with nearly the same words."""
    words = [Counter(re.findall(r"\w+", text.lower())) for text in columns.texts]
    pairs = Counter(zip(columns.chosen.tolist(), columns.rejected.tolist()))
    near = sum(n for (a, b), n in pairs.items() if words[a] and _overlap(words[a], words[b]) >= NEAR_EQUAL)
    share = near / max(len(columns.chosen), 1)
    what = f"{share:.1%} of the comparisons are between texts that share {NEAR_EQUAL:.0%} of their words"
    if share > 0.05:
        remedy = "such rows teach little and cost as much as others; leave them out, or mark them as ties"
        return Finding("near-equal pairs", "warning", what, {"share": share}, remedy)
    return Finding("near-equal pairs", "fine", what, {"share": share})


def length_bias(columns: RowColumns) -> Finding:
    """Is the longer text chosen more often, whatever it says?"""
    longer = np.sign(columns.length[columns.chosen] - columns.length[columns.rejected])
    differ = max(int((longer != 0).sum()), 1)
    share = float((longer > 0).sum()) / differ
    z = (share - 0.5) / np.sqrt(0.25 / differ)
    numbers = {"longer_chosen": share, "z": float(z)}
    what = f"the longer text is chosen in {share:.0%} of {differ} comparisons (z = {z:.1f})"
    if abs(share - 0.5) > 0.1 and abs(z) > 3:
        remedy = "experts will learn length first; compare with a length baseline, or balance the pairs"
        return Finding("length bias", "warning", what, numbers, remedy)
    return Finding("length bias", "fine", what, numbers)


def length_tastes(columns: RowColumns) -> Finding:
    """Do users differ in how they like length, more than chance makes them?"""
    longer = np.sign(columns.length[columns.chosen] - columns.length[columns.rejected])
    rows = (columns.user >= 0) & (longer != 0)
    user = np.unique(columns.user[rows], return_inverse=True)[1]
    count, hits = np.bincount(user), np.bincount(user, longer[rows] > 0)
    repeated = count >= 2
    count, hits = count[repeated], hits[repeated]
    if len(count) < 5:
        why = f"only {counted(len(count), 'user')} with two rows or more whose texts differ in length"
        why += f" ({(longer != 0).mean():.0%} of all rows are such)"
        return Finding("length tastes", "note", f"{why}: cannot be seen", {}, "")
    share = hits.sum() / count.sum()
    variance = max(share * (1 - share), 1e-9)
    chi = float((count * (hits / count - share) ** 2).sum() / variance)
    free = len(count) - 1
    z = (chi - free) / np.sqrt(2 * free)
    # Method of moments for the spread of users' own shares, beyond what their few rows explain.
    spread = float(np.sqrt(max(chi - free, 0.0) * variance / (count.sum() - (count**2).sum() / count.sum())))
    numbers = {"spread_of_users": spread, "z": float(z)}
    what = f"users' shares of longer choices spread by {spread:.2f} beyond chance (z = {z:.1f})"
    if z > 3 and spread > 0.15:
        remedy = (
            "groups may be those who like length and those who do not; look at experts' length split after training"
        )
        return Finding("length tastes", "warning", what, numbers, remedy)
    return Finding("length tastes", "fine", what, numbers)


def _pairs(columns: RowColumns, named: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of every row: index of its unordered pair, 1 where the text with the larger index won, and who judged.

    Unnamed people count as different ones, or are left out.
    """
    anonymous = columns.user < 0
    user = np.where(anonymous, columns.user.max(initial=-1) + 1 + np.arange(len(columns.user)), columns.user)
    rows = ~anonymous if named else np.ones(len(user), bool)
    low, high = np.minimum(columns.chosen, columns.rejected), np.maximum(columns.chosen, columns.rejected)
    pair = np.unique(np.stack([low[rows], high[rows]]), axis=1, return_inverse=True)[1].reshape(-1)
    return pair, (columns.chosen > columns.rejected)[rows].astype(float), user[rows]


def _compact(pair: np.ndarray, limit: int) -> np.ndarray:
    """0..M-1, and -1 beyond the limit."""
    index = np.unique(pair, return_inverse=True)[1].reshape(-1)
    return np.where(index < limit, index, -1)


def _singular_values(user: np.ndarray, pair: np.ndarray, upward: np.ndarray) -> np.ndarray:
    count = np.bincount(pair)
    mean = np.bincount(pair, upward) / np.maximum(count, 1)
    people, index = np.unique(user, return_inverse=True)
    matrix = np.zeros((len(people), len(count)))
    np.add.at(matrix, (index.reshape(-1), pair), upward - mean[pair])
    small = matrix @ matrix.T if len(people) <= len(count) else matrix.T @ matrix
    return np.sqrt(np.clip(np.linalg.eigvalsh(small)[::-1], 0.0, None))


def _overlap(first: Counter[str], second: Counter[str]) -> float:
    return (first & second).total() / max((first | second).total(), 1)


def _plain(content: Any) -> str:
    if isinstance(content, str):
        return content
    if content and isinstance(content[0], dict):
        return "\n".join(str(message.get("content")) for message in content)
    return " ".join(map(str, content))
