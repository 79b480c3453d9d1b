"""What happened during training, from the lines of `metrics.jsonl`. Legend: K experts."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from prefmix.evaluation.figures.canvas import Figure, expert_colour, expert_name
from prefmix.evaluation.figures.charts import Curve, line_chart, stacked_areas, table_of

Log = Sequence[Mapping[str, Any]]
X_LABEL = "optimizer step"


def series(log: Log, name: str) -> list[tuple[float, float]]:
    """(step, value) of every line that has the value."""
    return [(float(line["step"]), float(line[name])) for line in log if line.get(name) is not None and "step" in line]


def num_experts_of(log: Log) -> int:
    """K, from the names of the usages; 0 where the log has none."""
    found = [re.fullmatch(r"mixture/usage_(\d+)", name) for line in log for name in line]
    return max((int(match.group(1)) + 1 for match in found if match), default=0)


def bound_over_training(log: Log) -> Figure | None:
    """ELBO and evidence per row; None where the log has neither.

    ELBO = E_q log p(row | expert) - KL(q || gate) <= evidence; the gap is what the responsibilities lose by not being
    the exact posterior.
    """
    curves = {"evidence": series(log, "mixture/evidence"), "ELBO": series(log, "mixture/elbo")}
    curves = {name: points for name, points in curves.items() if points}
    if not curves:
        return None
    colours = {"evidence": "var(--accent,#6B3FA0)", "ELBO": "var(--second,#7D858C)"}
    drawn = [Curve(name, points, colours[name], dash=name == "ELBO") for name, points in curves.items()]
    title = "Bound and evidence"
    svg = line_chart(title, drawn, x_label=X_LABEL, y_label="nats per training row")
    caption = (
        "The ELBO is a lower bound of the evidence; where the lines meet, responsibilities are exact. Both are read "
        "off batches, and what others told of a user is up to an epoch old: lines may cross while experts move fast."
    )
    return Figure(title, svg, caption, *table_of(curves, "step"))


def held_out_over_training(log: Log) -> Figure | None:
    """Held-out log-loss with and without what training taught of users; None without evaluations in the log."""
    curves = {
        "with what is known of users": series(log, "eval_loss"),
        "gate alone": series(log, "eval_population_loss"),
    }
    curves = {name: points for name, points in curves.items() if points}
    if not curves:
        return None
    colours = ("var(--accent,#6B3FA0)", "var(--second,#7D858C)")
    drawn = [Curve(name, curves[name], colours[i]) for i, name in enumerate(curves)]
    title = "Held-out log-loss"
    svg = line_chart(title, drawn, x_label=X_LABEL, y_label="nats per row", level=("a coin", math.log(2)), dots=True)
    caption = "Lower is better. A line that rises again has begun to memorise."
    return Figure(title, svg, caption, *table_of(curves, "step"))


def group_losses_over_training(log: Log) -> Figure | None:
    """Training loss of each group under group DRO, or of the worst where they are many; None for other runs."""
    prefix = "mixture/group_loss/"
    names = dict.fromkeys(name for line in log for name in line if name.startswith(prefix))
    curves = {name.removeprefix(prefix): series(log, name) for name in names}
    curves = curves or {"the worst group": series(log, "mixture/worst_group_loss")}
    if not any(curves.values()):
        return None
    drawn = [Curve(name, points, expert_colour(g)) for g, (name, points) in enumerate(curves.items())]
    title = "Group DRO: losses of groups"
    svg = line_chart(title, drawn, x_label=X_LABEL, y_label="nats per training row, last batch that had the group")
    caption = "The adversary moves to the group that fares worst; lines that meet mean that nobody is left behind."
    return Figure(title, svg, caption, *table_of(curves, "step"))


def usage_over_training(log: Log) -> Figure | None:
    """Mean responsibility of each expert, stacked to one; None where the log has none."""
    num_experts = num_experts_of(log)
    curves = {expert_name(k): series(log, f"mixture/usage_{k}") for k in range(num_experts)}
    if num_experts < 2 or not curves[expert_name(0)]:
        return None
    steps = [step for step, _ in curves[expert_name(0)]]
    shares = [[share for _, share in points] for points in curves.values()]
    title = "Usage: mean responsibilities"
    svg = stacked_areas(title, steps, shares, X_LABEL)
    caption = "How much of the training rows each expert answers for. A band that closes is an expert that died."
    return Figure(title, svg, caption, *table_of(curves, "step"))


def certainty_over_training(log: Log) -> Figure | None:
    """Entropy of responsibilities and of the gate; None for one expert or a log without them."""
    num_experts = num_experts_of(log)
    curves = {
        "responsibilities": series(log, "mixture/responsibility_entropy"),
        "gate": series(log, "mixture/gate_entropy"),
    }
    if num_experts < 2 or not all(curves.values()):
        return None
    colours = ("var(--accent,#6B3FA0)", "var(--second,#7D858C)")
    drawn = [Curve(name, curves[name], colours[i]) for i, name in enumerate(curves)]
    title = "Entropy: how sure"
    level = (f"log {num_experts}: knows nothing", math.log(num_experts))
    svg = line_chart(title, drawn, x_label=X_LABEL, y_label="nats", level=level)
    caption = "0 is certain. Responsibilities below the gate: the comparisons tell people apart."
    return Figure(title, svg, caption, *table_of(curves, "step"))


def margins_over_training(log: Log) -> Figure | None:
    """Mean implicit-reward margin of each expert over the rows it answers for; None where the log has none."""
    curves = {expert_name(k): series(log, f"mixture/rewards/margins_{k}") for k in range(num_experts_of(log))}
    curves = {name: points for name, points in curves.items() if points}
    if not curves:
        return None
    drawn = [Curve(name, points, expert_colour(k), expert=k) for k, (name, points) in enumerate(curves.items())]
    title = "Implicit-reward margins"
    svg = line_chart(title, drawn, x_label=X_LABEL, y_label="nats, rows weighted by responsibility")
    caption = "β (log π/π_ref) of the chosen response less that of the rejected one, on training rows."
    return Figure(title, svg, caption, *table_of(curves, "step"))
