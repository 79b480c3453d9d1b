"""Who belongs to which expert: the map of users, their plane, true groups, and what the gate says of whom.

Legend: U users, K experts, G true groups.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from prefmix.data.counted import counted
from prefmix.evaluation.figures.canvas import WIDTH, Canvas, Figure, expert_colour, expert_name, number
from prefmix.evaluation.figures.charts import clipped, share_rows

MOST_COLUMNS, MOST_DOTS, BINS = 210, 700, 20
TOP, HEIGHT = 30.0, 130.0


def people_map(weights: np.ndarray, names: Sequence[str] = (), groups: Sequence[str | None] = ()) -> Figure:
    """One column for each user, divided among the experts; sorted by most probable expert, the surest first.

    Args:
        weights: [U, K] posterior of each user, rows sum to one. Beyond 210 users neighbours share a column (its mean).
        names: U names for tooltips; empty: none are written.
        groups: U true groups, drawn as a strip below and never used for sorting; empty: none are known.
    """
    order = _sorted_users(weights)
    columns = np.array_split(order, min(len(order), MOST_COLUMNS))
    num_experts, width = weights.shape[1], WIDTH / max(len(columns), 1)
    canvas = Canvas("Map of users", 0)
    top = canvas.legend(10, [(expert_name(k), expert_colour(k)) for k in range(num_experts)]) + 4
    known = list(dict.fromkeys(sorted(g for g in groups if g is not None)))
    gap = 0.6 if width > 2.5 else 0.0
    for c, members in enumerate(columns):
        mean, y = weights[members].mean(axis=0), top
        who = _who(members, names)
        for k in np.flatnonzero(mean > 0.004):
            tall = HEIGHT * float(mean[k])
            tip = f"{who}: {expert_name(int(k))} {mean[k]:.0%}"
            canvas.box(c * width, y, width - gap, tall, expert_colour(int(k)), tip=tip, expert=int(k))
            y += tall
        if known:
            counts = [sum(groups[u] == g for u in members) for g in known]
            colour = _shade(int(np.argmax(counts)), len(known))
            canvas.box(
                c * width,
                top + HEIGHT + 6,
                width - gap,
                12,
                colour,
                tip=f"{who}: group {known[int(np.argmax(counts))]}",
            )
    y = top + HEIGHT + (36 if known else 18)
    if known:
        canvas.text(0, y, "Strip: true groups", muted=True)
        y = canvas.legend(y + 18, [(clipped(g, 40), _shade(i, len(known))) for i, g in enumerate(known)])
    canvas.height = y + 6
    shared = (
        "" if len(columns) == len(order) else f" Each column is the mean of about {len(order) // len(columns)} users."
    )
    caption = f"{counted(len(order), 'user')}, sorted by most probable expert, the surest first.{shared}"
    sizes = np.bincount(weights.argmax(axis=1), minlength=num_experts)
    sure = weights.max(axis=1)
    rows = [
        [expert_name(k), f"{sizes[k]:,}", f"{weights[:, k].mean():.3f}", _mean(sure[weights.argmax(axis=1) == k])]
        for k in range(num_experts)
    ]
    return Figure("Who is with whom", canvas.svg(), caption, ["", "users", "mean weight", "mean certainty"], rows)


def people_plane(weights: np.ndarray, names: Sequence[str] = (), groups: Sequence[str | None] = ()) -> Figure:
    """Users by their weights: a histogram for two experts, a triangle for three, principal components beyond.

    Args:
        weights: [U, K], K >= 2. Of many users 700 evenly spaced ones are drawn (all, in a histogram).
        names: U names for tooltips; empty: none are written.
        groups: U true groups, drawn as shapes; empty: none are known.
    """
    if weights.shape[1] == 2:
        return _histogram(weights)
    corners = 3 if weights.shape[1] == 3 else 0
    place = _triangle(weights) if corners else _principal(weights)
    shown = np.unique(np.linspace(0, len(weights) - 1, min(len(weights), MOST_DOTS)).round().astype(int))
    known = list(dict.fromkeys(sorted(g for g in groups if g is not None)))
    canvas = Canvas("Plane of users", 0)
    if corners:
        _draw_triangle(canvas)
    # People who are sure stand on one another; a small fixed scatter lets them be counted.
    scatter = np.random.default_rng(0).normal(scale=3.0, size=(len(weights), 2))
    for user in shown:
        k, sure = int(weights[user].argmax()), weights[user]
        who = names[user] if names else f"user {user}"
        tip = f"{who}: " + ", ".join(f"{expert_name(j)} {share:.0%}" for j, share in enumerate(sure) if share > 0.005)
        shape = known.index(group) if known and (group := groups[user]) is not None else 0
        x, y = place[user] + scatter[user]
        canvas.dot(x, y, expert_colour(k), tip=tip, expert=k, r=3.4, shape=shape)
    canvas.height = _shape_legend(canvas, 372, known) if known else 352
    kind = "corners are experts" if corners else "first two principal components of the weights"
    few = "" if len(shown) == len(weights) else f" {len(shown)} of {len(weights):,} users are drawn."
    return Figure(
        "Users in a plane", canvas.svg(), f"{kind[0].upper()}{kind[1:]}; colour is the most probable one.{few}"
    )


def groups_matrix(weights: np.ndarray, groups: Sequence[str | None]) -> Figure | None:
    """Users by true group and most probable expert; None where nobody's group is known.

    Args:
        weights: [U, K].
        groups: U true groups.
    """
    known = sorted({group for group in groups if group is not None})
    if not known:
        return None
    hard, num_experts = weights.argmax(axis=1), weights.shape[1]
    counts = np.zeros((len(known), num_experts), dtype=int)
    for user, group in enumerate(groups):
        if group is not None:
            counts[known.index(group), hard[user]] += 1
    left, cell = 120.0, min(64.0, (WIDTH - 120.0) / num_experts)
    tall = min(cell, 40.0)
    canvas = Canvas("True groups and experts", 36 + tall * len(known) + 8)
    for k in range(num_experts):
        canvas.text(left + cell * (k + 0.5), 22, str(k) if cell < 56 else expert_name(k), anchor="middle", muted=True)
    for g, name in enumerate(known):
        y = 32 + tall * g
        canvas.text(0, y + tall / 2 + 4, clipped(name, 17))
        for k in range(num_experts):
            share = counts[g, k] / max(counts[g].sum(), 1)
            colour = f"color-mix(in srgb,{expert_colour(k)} {100 * share:.0f}%,transparent)"
            tip = f"{name}: {counts[g, k]} of {counts[g].sum()} with {expert_name(k)}"
            canvas.box(left + cell * k, y, cell - 2, tall - 2, colour, tip=tip, expert=k)
            canvas.text(left + cell * (k + 0.5) - 1, y + tall / 2 + 4, str(counts[g, k]), anchor="middle")
    caption = "Training never read these groups. One full cell a row means that they were found."
    rows = [[name, *map(str, counts[g])] for g, name in enumerate(known)]
    return Figure("True groups", canvas.svg(), caption, ["group", *map(expert_name, range(num_experts))], rows)


def weights_by(
    title: str, rows: Sequence[tuple[str, int, Sequence[float]]], caption: str, unit: str = "rows"
) -> Figure:
    """Mean weights of the gate for kinds of prompts, or values of metadata.

    Args:
        title: of the figure.
        rows: (kind, how many, K mean weights).
        caption: how to read it.
        unit: of the counts.
    """
    bars = [(label, f"{count:,} {unit}", shares) for label, count, shares in rows]
    cells = [[label, f"{count:,}", *(number(share) for share in shares)] for label, count, shares in rows]
    header = ["", unit, *(expert_name(k) for k in range(len(rows[0][2])))]
    return Figure(title, share_rows(title, bars), caption, header, cells)


def _shade(place: int, count: int) -> str:
    """Greys for true groups: which expert belongs to which is for the eye to find."""
    return f"color-mix(in srgb,currentColor {15 + 85 * place / max(count - 1, 1):.0f}%,transparent)"


def _shape_legend(canvas: Canvas, y: float, names: Sequence[str]) -> float:
    """True groups with their shapes in rows; returns the y below them."""
    x = 4.0
    for place, name in enumerate(names):
        said = clipped(name, 40)
        if x > 4 and x + 22 + 6.6 * len(said) > WIDTH:
            x, y = 4.0, y + 19
        canvas.dot(x, y - 4, "currentColor", shape=place)
        canvas.text(x + 10, y, said)
        x += 34 + 6.6 * len(said)
    return y + 10


def _sorted_users(weights: np.ndarray) -> np.ndarray:
    return np.lexsort((-weights.max(axis=1), weights.argmax(axis=1)))


def _who(members: np.ndarray, names: Sequence[str]) -> str:
    if len(members) == 1:
        return names[int(members[0])] if names else f"user {members[0]}"
    return counted(len(members), "user")


def _mean(values: np.ndarray) -> str:
    return number(float(values.mean())) if len(values) else "–"


def _histogram(weights: np.ndarray) -> Figure:
    counts, edges = np.histogram(weights[:, 1], bins=BINS, range=(0.0, 1.0))
    canvas, left, width = Canvas("Users by weight of expert 1", TOP + HEIGHT + 50), 4.0, (WIDTH - 8) / BINS
    for i, count in enumerate(counts):
        tall = HEIGHT * count / max(counts.max(), 1)
        k = int(edges[i] + edges[i + 1] > 1)
        tip = f"{counted(count, 'user')} with {edges[i]:.0%} to {edges[i + 1]:.0%} of expert 1"
        canvas.box(left + i * width, TOP + HEIGHT - tall, width - 2, tall, expert_colour(k), tip=tip, expert=k)
        if count:
            said = f"{count:,}" if count < 1000 else f"{count / 1000:.0f}k"
            middle = left + (i + 0.5) * width
            canvas.text(middle, TOP + HEIGHT - tall - 4, said, anchor="middle", muted=True, size=10)
    for share, anchor in ((0.0, "start"), (0.5, "middle"), (1.0, "end")):
        canvas.text(left + share * (WIDTH - 8), TOP + HEIGHT + 17, f"{share:g}", anchor=anchor, muted=True)
    canvas.text(WIDTH / 2, TOP + HEIGHT + 38, "weight of expert 1", anchor="middle", muted=True)
    caption = "Two heaps at the ends: people are of one kind or the other. A heap in the middle: nobody knows."
    return Figure("Users by weight", canvas.svg(), caption)


_CORNERS = np.array([[WIDTH / 2, 24.0], [24.0, 320.0], [WIDTH - 24.0, 320.0]])


def _triangle(weights: np.ndarray) -> np.ndarray:
    return weights @ _CORNERS


def _draw_triangle(canvas: Canvas) -> None:
    names = ((WIDTH / 2 + 14, 18, "start"), (4, 342, "start"), (WIDTH - 4, 342, "end"))
    for k, (x, y, anchor) in enumerate(names):
        canvas.line(*_CORNERS[k], *_CORNERS[(k + 1) % 3])
        canvas.text(x, y, expert_name(k), anchor=anchor)
    middle = _CORNERS.mean(axis=0)
    for k in range(3):  # where two experts weigh the same
        canvas.line(*middle, *((_CORNERS[k] + _CORNERS[(k + 1) % 3]) / 2), dash=True)


def _principal(weights: np.ndarray) -> np.ndarray:
    centred = weights - weights.mean(axis=0)
    _, _, directions = np.linalg.svd(centred, full_matrices=False)
    found = centred @ directions[:2].T
    low, high = found.min(axis=0), found.max(axis=0)
    span = np.where(high - low > 1e-12, high - low, 1.0)
    return np.array([16.0, 16.0]) + (found - low) / span * np.array([WIDTH - 32.0, 310.0])
