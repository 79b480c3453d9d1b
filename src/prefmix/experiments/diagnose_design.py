"""With these users and rows, would groups be found if there were any? Invented opposed groups on the rows' own design.

Legend: B comparisons, N texts, U users, P features.
"""

from __future__ import annotations

import numpy as np
import torch

from prefmix.evaluation.metrics import adjusted_rand_index
from prefmix.experiments.diagnose_rows import RowColumns
from prefmix.experiments.diagnosis import Finding
from prefmix.mixture.linear_em import ProbeData, fit_linear_em

NUM_FEATURES = 8
SCALE = 2.0
MAX_ROWS = 4_000


def simulate_and_refit(columns: RowColumns, *, repeats: int = 3, seed: int = 0) -> Finding:
    """Plants two opposed linear tastes on made-up features of the texts, lets the rows' own users answer, refits, and
    compares the groups: who judged which pairs stays, what they answered and what the texts say do not.

    It is an upper bound for real groups: tastes are linear in 8 features that are known, opposed, equally frequent, and
    as sure as a margin of standard deviation 2 makes them (78% of the answers are as the taste says).

    Args:
        columns: the rows.
        repeats: invented data sets; their mean is reported.
        seed: of everything invented.
    """
    rows = _whole_users(columns, seed)
    user = np.unique(columns.user[rows], return_inverse=True)[1].reshape(-1)
    if len(rows) == 0 or user.max() < 1:
        what = "no two users are named, so there are no groups of users to find"
        return Finding("simulate and refit", "warning", what, {"ari": 0.0}, "add a `user` column")
    found = [_one(columns, rows, user, np.random.default_rng([seed, repeat]), repeat) for repeat in range(repeats)]
    ari = float(np.mean(found))
    numbers = {"ari": ari, "smallest": float(np.min(found)), "rows": float(len(rows)), "users": float(user.max() + 1)}
    what = (
        f"with these {user.max() + 1} users and {len(rows)} rows, two opposed groups would be found with ARI {ari:.2f} "
        f"({repeats} invented data sets, linear tastes; real groups are harder)"
    )
    if ari < 0.5:
        remedy = "more rows a user, or more users: even clear groups would be missed"
        return Finding("simulate and refit", "warning", what, numbers, remedy)
    if ari < 0.8:
        return Finding("simulate and refit", "note", what, numbers, "a few more rows a user make assignments sure")
    return Finding("simulate and refit", "fine", what, numbers)


def _whole_users(columns: RowColumns, seed: int) -> np.ndarray:
    """Rows of random users, whole, up to about MAX_ROWS."""
    named = np.flatnonzero(columns.user >= 0)
    if len(named) == 0:
        return named
    count = np.bincount(columns.user[named])
    order = np.random.default_rng(seed).permutation(len(count))
    kept = order[: int((count[order].cumsum() <= MAX_ROWS).sum()) + 1]
    return named[np.isin(columns.user[named], kept)]


def _one(columns: RowColumns, rows: np.ndarray, user: np.ndarray, rng: np.random.Generator, seed: int) -> float:
    features = rng.normal(scale=np.sqrt(0.5), size=(len(columns.texts), NUM_FEATURES))
    taste = rng.normal(size=NUM_FEATURES)
    group = rng.permutation(user.max() + 1) % 2
    difference = features[columns.chosen[rows]] - features[columns.rejected[rows]]
    margin = SCALE * (difference @ taste) / np.linalg.norm(taste) * np.where(group[user] == 1, 1.0, -1.0)
    turned = rng.random(len(margin)) > 1.0 / (1.0 + np.exp(-margin))
    answered = torch.from_numpy(np.where(turned[:, None], -difference, difference)).float()
    data = ProbeData(answered, torch.from_numpy(user), torch.ones(len(rows)), int(user.max()) + 1)
    generator = torch.Generator().manual_seed(seed)
    fit = fit_linear_em(data, 2, torch.full((4,), 2.0), anneal=4.0, generator=generator, max_steps=60, tolerance=1e-5)
    labels = fit.log_resp[int(fit.penalised.argmax())].argmax(dim=1).numpy()
    return adjusted_rand_index(group, labels)
