"""Figures place what they are given, keep every number, and are well-formed pictures for a notebook."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from prefmix.evaluation import figures
from prefmix.evaluation.figures.canvas import number, ticks
from prefmix.evaluation.figures.charts import MOST_POINTS, Curve, line_chart, thin
from prefmix.evaluation.figures.training import series

SVG = "{http://www.w3.org/2000/svg}"
WEIGHTS = np.array([[0.1, 0.9, 0.0], [0.95, 0.05, 0.0], [0.2, 0.2, 0.6], [0.4, 0.6, 0.0]])


def _marks(figure: figures.Figure, tag: str) -> list[ElementTree.Element]:
    root = ElementTree.fromstring(figure.svg)
    return [node for node in root.iter(SVG + tag) if node.get("data-tip")]


def _rows(num: int = 200, num_experts: int = 2, seed: int = 0) -> figures.ExpertRows:
    rng = np.random.default_rng(seed)
    chosen, rejected = rng.normal(size=(num, num_experts)), rng.normal(size=(num, num_experts))
    weights = np.eye(num_experts)[np.arange(num) % num_experts]
    return figures.ExpertRows(chosen, rejected, chosen / 9, rejected / 9, weights, rng.normal(size=num), np.arange(num))


def test_every_user_has_a_column_whose_heights_are_the_weights() -> None:
    figure = figures.people_map(WEIGHTS, ["a", "b", "c", "d"], ["x", None, "x", "y"])
    boxes = [box for box in _marks(figure, "rect") if "expert" in str(box.get("data-tip"))]
    tall = {str(box.get("data-tip")): float(str(box.get("height"))) for box in boxes}
    assert tall["b: expert 0 95%"] == pytest.approx(19 * tall["b: expert 1 5%"], rel=0.02)
    assert len(tall) == 2 + 2 + 3 + 2
    first = [re.sub(":.*", "", str(box.get("data-tip"))) for box in boxes]
    assert list(dict.fromkeys(first)) == ["b", "a", "d", "c"]  # by expert, the surest first
    assert [row[1] for row in figure.rows] == ["1", "2", "1"]


def test_many_users_share_columns_and_no_name_is_lost_or_leaked() -> None:
    weights = np.random.default_rng(0).dirichlet([0.4, 0.4], size=3000)
    figure = figures.people_map(weights)
    assert len(_marks(figure, "rect")) <= 2 * 210
    assert sum(int(row[1].replace(",", "")) for row in figure.rows) == 3000
    assert "user" in figure.svg and len(figure.svg) < 120_000


@pytest.mark.parametrize("num_experts", [2, 3, 5])
def test_the_plane_holds_everybody_within_the_picture(num_experts: int) -> None:
    weights = np.random.default_rng(1).dirichlet([0.3] * num_experts, size=60)
    figure = figures.people_plane(weights, groups=[f"g{i % 4}" for i in range(60)])
    if num_experts == 2:
        counts = [int(re.findall(r"^[\d,]+", str(box.get("data-tip")))[0]) for box in _marks(figure, "rect")]
        assert sum(counts) == 60
        return
    assert len(_marks(figure, "circle")) + len(_marks(figure, "path")) == 60
    width, height = map(float, str(ElementTree.fromstring(figure.svg).get("viewBox")).split()[2:])
    for dot in _marks(figure, "circle"):
        assert -8 < float(str(dot.get("cx"))) < width + 8 and 0 < float(str(dot.get("cy"))) < height


def test_sure_users_stand_in_the_corners_of_their_experts() -> None:
    figure = figures.people_plane(np.repeat(np.eye(3), 40, axis=0))
    dots = [(float(str(d.get("cx"))), float(str(d.get("cy")))) for d in _marks(figure, "circle")]
    means = np.array(dots).reshape(3, 40, 2).mean(axis=1)
    np.testing.assert_allclose(means, [[210, 24], [24, 320], [396, 320]], atol=3)


def test_true_groups_are_counted_and_unknown_ones_left_out() -> None:
    figure = figures.groups_matrix(WEIGHTS, ["x", "y", None, "x"])
    assert figure is not None and list(map(list, figure.rows)) == [["x", "0", "2", "0"], ["y", "1", "0", "0"]]
    assert figures.groups_matrix(WEIGHTS, [None] * 4) is None


def test_own_rows_and_others_rows_add_up_and_agreement_is_what_margins_say() -> None:
    rows = _rows()
    figure = figures.expert_rewards(rows)
    assert [row[2] for row in figure.rows] == ["100"] * 4
    own = rows.margins[rows.weights.argmax(axis=1) == 0, 0]
    assert figure.rows[0][3] == number(float(own.mean())) and figure.rows[0][4] == f"{(own > 0).mean():.1%}"


def test_displacement_and_length_come_from_the_experts_own_rows() -> None:
    rows = _rows()
    own = rows.weights.argmax(axis=1) == 1
    moved = {row[0]: row[1] for row in figures.expert_displacement(rows).rows}
    assert moved["expert 1, rejected responses"] == number(float(rows.shift_rejected[own, 1].mean()))
    longer = rows._replace(rewards_chosen=rows.rewards_rejected + rows.length_difference[:, None])
    taste = {row[0]: row[1] for row in figures.expert_length(longer).rows}
    assert taste["expert 0"] == taste["expert 1"] == "1"  # margins are the lengths
    assert taste["the people"] == number(float((rows.length_difference > 0).mean()))


def test_divergence_shows_estimates_with_their_errors() -> None:
    found = [figures.Divergence(2.0, 0.5, 8, 30.0), figures.Divergence(1.0, math.nan, 1, 30.0)]
    figure = figures.expert_divergence(found)
    assert "8 sampled" in figure.caption and len(_marks(figure, "circle")) == 2


def test_reliability_has_a_point_for_every_bin_with_rows() -> None:
    logit = np.concatenate([np.full(30, 0.1), np.full(10, 3.0), np.full(10, -3.0)])
    figure = figures.reliability_diagram({"one": logit})
    assert [(row[2], row[3]) for row in figure.rows] == [("1", "30"), ("0.5", "20")]


def test_training_figures_read_the_names_that_training_logs_and_nothing_else() -> None:
    log = [{"step": 2, "mixture/elbo": -0.7, "mixture/evidence": -0.6, "loss": 1.0}, {"step": 4, "eval_loss": 0.5}]
    assert series(log, "mixture/elbo") == [(2.0, -0.7)]
    bound = figures.bound_over_training(log)
    assert bound is not None and list(map(list, bound.rows)) == [["2", "−0.6", "−0.7"]]
    assert figures.held_out_over_training(log) is not None
    assert figures.usage_over_training(log) is None and figures.certainty_over_training([]) is None
    usage = [{"step": s, "mixture/usage_0": s / 10, "mixture/usage_1": 1 - s / 10} for s in range(1, 6)]
    figure = figures.usage_over_training(usage)
    assert figure is not None and len(figure.rows) == 5 and len(_marks(figure, "path")) == 2


def test_the_names_are_those_of_the_trainers_log() -> None:
    import torch

    from prefmix.training.metrics_log import Sums, summarize

    one = torch.ones(())
    logged = summarize(Sums(one, -one, -one, one, one, one, torch.ones(6), torch.ones(2) / 2, torch.ones(4, 2)))
    names = {"mixture/elbo", "mixture/evidence", "mixture/responsibility_entropy", "mixture/gate_entropy"}
    assert names | {"mixture/usage_0", "mixture/usage_1", "mixture/rewards/margins_1"} <= logged.keys()
    log = [{"step": 1, **logged}, {"step": 2, **logged}]
    drawn = (figures.bound_over_training, figures.usage_over_training, figures.certainty_over_training)
    assert all(draw(log) is not None for draw in (*drawn, figures.margins_over_training))


def test_figures_show_themselves_and_escape_what_they_are_given(tmp_path) -> None:
    figure = figures.weights_by("By <field>", [('a "b" <c> & d', 3, [0.25, 0.75])], "Read & see.")
    ElementTree.fromstring(figure._repr_svg_())
    assert "By &lt;field&gt;" in figure._repr_html_() and "<c>" not in figure._repr_html_()
    figure.save(tmp_path / "figure.svg")
    widths = [float(str(box.get("width"))) for box in _marks(figure, "rect")]
    assert widths[1] == pytest.approx(3 * widths[0], rel=0.03)
    assert ElementTree.parse(tmp_path / "figure.svg").getroot().tag == SVG + "svg"


def test_lines_are_thinned_with_both_ends_and_gaps_are_left_out() -> None:
    points = [(float(i), math.nan if i == 7 else float(i)) for i in range(5000)]
    kept = thin(points)
    assert len(kept) == MOST_POINTS and kept[0] == points[0] and kept[-1] == points[-1]
    svg = line_chart("t", [Curve("c", points[:20], "red")], x_label="x", y_label="y")
    ElementTree.fromstring(svg)
    assert svg.count("<circle") == 19 and "nan" not in svg


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-0.003, 0.004), (12.0, 9000.0), (0.49, 0.51)])
def test_ticks_are_round_and_within(low: float, high: float) -> None:
    found = ticks(low, high)
    assert 2 <= len(found) <= 11 and all(low - 1e-9 <= tick <= high + 1e-9 for tick in found)
    step = found[1] - found[0]
    assert round(step / 10 ** math.floor(math.log10(step) + 1e-9), 6) in (1, 2, 5, 10)


def test_losses_of_groups_are_drawn_by_name_or_the_worst_alone() -> None:
    line = {"step": 1, "mixture/worst_group_loss": 0.8}
    assert figures.group_losses_over_training([{"step": 1, "loss": 1.0}]) is None
    worst = figures.group_losses_over_training([line, line | {"step": 2}])
    assert worst is not None and "the worst group" in worst.svg
    named = [line | {"step": i, "mixture/group_loss/film": 0.8 / i, "mixture/group_loss/book": 0.5} for i in (1, 2)]
    both = figures.group_losses_over_training(named)
    assert both is not None and "film" in both.svg and "book" in both.svg and "the worst group" not in both.svg
