"""Pictures are well-formed, place everyone once, and escape what they are given."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from prefmix.evaluation.plots import (
    GLYPHS,
    ScatterPoint,
    curve_svg,
    group_map_svg,
    group_map_text,
    scatter_svg,
    user_order,
)

RESP = np.array([[0.1, 0.9], [0.95, 0.05], [0.8, 0.2], [0.3, 0.7]])


def test_users_are_sorted_by_expert_then_certainty() -> None:
    np.testing.assert_array_equal(user_order(RESP), [1, 2, 0, 3])


def test_group_map_is_xml_with_a_cell_for_every_user_and_column() -> None:
    choices = np.array([[0.0, np.nan], [1.0, 0.5], [0.9, 1.0], [0.2, 0.1]])
    svg = group_map_svg("A <title> & more", RESP, choices, ["tv", "pets"], [1, 0, 0, 1], ["a", "b"])
    root = ElementTree.fromstring(svg)
    cells = [node for node in root.iter("{http://www.w3.org/2000/svg}rect") if node.get("width") == "33.0"]
    assert len(cells) == 8
    assert "A <title> & more" in [node.text for node in root.iter("{http://www.w3.org/2000/svg}text")]


def test_curve_has_a_point_for_every_finite_value() -> None:
    svg = curve_svg("t", "x", "y", {"one": [(0, 0.5), (16, 0.7)], "two": [(0, 0.4), (4, float("nan"))]})
    circles = list(ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}circle"))
    assert len(circles) == 3


def test_scatter_places_points_by_the_logarithm_of_x_and_draws_their_bars() -> None:
    points = [
        ScatterPoint("heads", "4", 1.0, 0.6, 0.55, 0.65),
        ScatterPoint("heads", "16", 10.0, 0.7, 0.6, 0.8),
        ScatterPoint("LoRA & more", "", 100.0, 0.65, 0.6, 0.7),
    ]
    root = ElementTree.fromstring(scatter_svg("t", "CPU seconds", "accuracy", points))
    circles = list(root.iter("{http://www.w3.org/2000/svg}circle"))
    xs, ys = ([float(circle.get(name, "nan")) for circle in circles] for name in ("cx", "cy"))
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.2)
    assert ys[1] < ys[2] < ys[0]  # better is higher, and SVG counts downwards
    lengths = [
        float(line.get("y1", "nan")) - float(line.get("y2", "nan"))
        for line in root.iter("{http://www.w3.org/2000/svg}line")
        if line.get("stroke-width") == "0.7"
    ]
    assert lengths[1] == pytest.approx(2 * lengths[0], abs=0.3)
    ticks = [node.text for node in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"1", "2", "5", "10", "20", "50", "100"} <= set(ticks)


def test_text_map_shows_everyone_once_with_the_glyph_of_the_true_group() -> None:
    text = group_map_text(RESP, [1, 0, 0, 1], width=3)
    assert [line.split()[-1] for line in text.splitlines()] == [GLYPHS[0] * 2, GLYPHS[1] * 2]
    assert sum(group_map_text(RESP).count(glyph) for glyph in GLYPHS) == 4


def test_linear_axis_takes_positions_of_any_sign_and_places_them_evenly() -> None:
    points = [ScatterPoint("a", "", x, 0.0, 0.0, 0.0) for x in (-1.0, 0.0, 1.0)]
    svg = ElementTree.fromstring(scatter_svg("t", "x", "y", points, logarithmic=False))
    xs = [float(c.get("cx", "nan")) for c in svg.iter() if c.tag.endswith("circle")]
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.11) and xs[1] > xs[0]
