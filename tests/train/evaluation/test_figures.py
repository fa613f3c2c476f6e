"""What is drawn: read back from the figure's own coordinates."""

import itertools
import math
import re
from xml.etree import ElementTree

import pytest

from train.evaluation.figures import COLOURS, Line, Point, curves, heat_map, mark, selection, sign


def parsed(figure):
    return ElementTree.fromstring(figure)


def texts(figure):
    return [element.text for element in parsed(figure).iter("text")]


def marks(figure):
    """Centres of the circles, by the note that stands with them."""
    return {
        group.find("title").text: tuple(float(group.find("circle").get(a)) for a in ("cx", "cy"))
        for group in parsed(figure).iter("g")
        if group.find("circle") is not None
    }


def line(*points):
    return Line("quest", 0, tuple(points))


def test_costs_stand_on_a_logarithmic_axis():
    points = [Point(2.0**-n, n / 4, None, None, str(n)) for n in range(5)]
    drawn = marks(curves("t", [line(*points)], None, "cost", "score"))
    xs, ys = zip(*(drawn[f"quest {n}"] for n in range(5)), strict=True)
    steps = [a - b for a, b in itertools.pairwise(xs)]
    assert steps == pytest.approx([steps[0]] * 4, abs=0.2)
    assert steps[0] > 0
    rises = [a - b for a, b in itertools.pairwise(ys)]
    assert rises == pytest.approx([rises[0]] * 4, abs=0.2)
    assert rises[0] > 0


def test_axes_are_named_and_numbered():
    shown = texts(curves("t", [line(Point(0.2, 0.5, None, None))], None, "bytes", "score"))
    assert {"bytes", "score", "1", "1/2", "1/4", "1/8", "0", "0.2"} <= set(shown)


def test_values_beyond_one_get_their_own_axis():
    points = [Point(0.5, 2.75, 2.7, 2.8), Point(0.25, 2.9, None, None)]
    shown = texts(curves("t", [line(*points)], None, "cost", "nats"))
    assert {"2.75", "2.85"} <= set(shown)


def test_equal_values_can_be_drawn():
    figure = curves("t", [line(Point(1.0, 3.0, None, None))], None, "cost", "nats")
    assert "nan" not in figure


def test_interval_reaches_from_low_to_high():
    inside = Point(0.5, 0.5, 0.25, 0.75, "a")
    figure = curves("t", [line(inside, Point(0.25, 0.25, None, None, "b"))], None, "x", "y")
    (bar,) = re.findall(r"M[\d.]+ ([\d.]+)V([\d.]+)\" stroke=\"#0072b2\"", figure)
    low, high = map(float, bar)
    drawn = marks(figure)
    assert low == pytest.approx(drawn["quest b"][1], abs=0.1)
    middle = drawn["quest a"][1]
    assert low - middle == pytest.approx(middle - high, abs=0.2)


def test_flagged_points_are_ringed():
    plain, ringed = (
        curves("t", [line(Point(0.5, 0.5, None, None, "", flag))], None, "x", "y")
        for flag in (False, True)
    )
    assert plain.count("<circle") == 1
    assert ringed.count("<circle") == 2


def test_points_without_a_place_are_left_out():
    points = [Point(0.0, 0.5, None, None), Point(0.5, math.nan, None, None)]
    assert marks(curves("t", [line(*points)], None, "x", "y")) == {}


def test_dense_level_is_a_dashed_line_with_its_band():
    level = Point(1.0, 0.9, 0.8, 1.0, "dense 0.9")
    figure = curves("t", [line(Point(0.5, 0.5, None, None))], level, "x", "y")
    assert figure.count("stroke-dasharray") == 1
    assert "<title>dense 0.9</title><rect" in figure
    assert "<rect" not in curves("t", [], Point(1.0, 0.9, None, None), "x", "y")


def test_marks_and_colours_tell_methods_apart():
    count = 2 * len(COLOURS)
    assert len({mark(0, 0, number) for number in range(count)}) == count
    assert parsed(sign(3)).find("polygon").get("fill") == COLOURS[3]


def test_heat_map_shows_every_value():
    figure = heat_map("t", ["a", "b"], ["1", "2"], [[0.0, 1.0], [None, 0.25]], row_name="depth")
    fills = [box.get("fill") for box in parsed(figure).iter("rect")]
    assert fills == ["#f6f9fc", "#084594", "#eceff2", "#bacce2"]
    assert [found for found in texts(figure) if found.isdigit()] == ["1", "2", "0", "100", "25"]
    assert "depth b, " in figure
    assert "not measured" in figure


def test_all_text_is_escaped():
    name = '<b a="1"> & co'
    figures = [
        heat_map(name, [name], [name], [[0.5]], row_name=name, column_name=name),
        curves(name, [Line(name, 0, (Point(1.0, 1.0, 0.5, 1.0, name),))], None, name, name),
        selection(name, [[[0]]], 3, [1]),
    ]
    for figure in figures:
        assert parsed(figure).get("aria-label") == name


def boxes(path):
    """Ranges of keys, and the top, of every box of a path of boxes."""
    return [tuple(map(float, found)) for found in re.findall(r"M([\d.]+) ([\d.]+)h([\d.]+)", path)]


def test_selected_keys_stand_where_they_are():
    chosen = (((0, 1, 2, 50), (99,)), ((10, 11), ()))
    figure = selection("t", chosen, 99, [40, 41])
    (path,) = [element.get("d") for element in parsed(figure).iter("path") if element.get("fill")]
    found = boxes(path)
    scale = (760 - 34 - 6) / 100
    expected = [(0, 3), (50, 1), (99, 1), (10, 2)]
    assert [left for left, _, _ in found] == pytest.approx(
        [34 + s * scale for s, _ in expected], abs=0.1
    )
    assert [wide for _, _, wide in found] == pytest.approx(
        [n * scale for _, n in expected], abs=0.1
    )
    tops = [top for _, top, _ in found]
    assert tops[0] == tops[1] < tops[2] < tops[3]
    bands = [box for box in parsed(figure).iter("rect") if box.get("opacity")]
    assert [float(band.get("x")) for band in bands] == pytest.approx([34 + 40 * scale], abs=0.1)
    assert float(bands[0].get("width")) == pytest.approx(2 * scale, abs=0.1)
