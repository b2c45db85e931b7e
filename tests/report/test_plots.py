"""Charts of the pages: many classes, many series, and values in their places."""

import re

import numpy as np
import pytest
from matplotlib.figure import Figure

from gae_jax.report import plots


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn, as matplotlib's objects."""
    drawn, to_svg = [], plots._svg

    def keep(figure: Figure):
        drawn.append(figure)
        return to_svg(figure)

    monkeypatch.setattr(plots, "_svg", keep)
    return drawn


def width_of(svg: str) -> float:
    return float(re.search(r'width="([\d.]+)pt"', svg)[1])


def test_classes_up_to_forty_have_bars_at_their_numbers(figures):
    """A set of samples may have some of the classes only."""
    names = ["cat", "dog", "owl", "yak"]
    svg = plots.class_accuracies({"SDE": {"1": 0.5, "3": 1.0}}, names)
    assert all(name in svg for name in names)
    (axis,) = figures[0].axes
    bars = {round(bar.get_x() + bar.get_width() / 2): bar.get_height() for bar in axis.patches}
    assert bars == {1: 0.5, 3: 1.0}


def test_two_hundred_classes_fit_the_page(figures):
    names = [f"n{index:08}" for index in range(200)]
    sets = {
        label: {str(index): share for index, share in enumerate(np.roll(np.linspace(0, 1, 200), 7))}
        for label in ("SDE", "ODE")
    }
    svg = plots.class_accuracies(sets, names)
    assert width_of(svg) < 500
    assert "n00000000" not in svg
    for line in figures[0].axes[0].lines:
        np.testing.assert_array_equal(line.get_ydata(), np.linspace(0, 1, 200))


def test_many_series_and_metrics_fit_the_page(figures):
    series = {f"interval-{index}": [[(1.0, 0.1)], [(4.0, 0.2)]] for index in range(12)}
    metrics = {f"metric {index}": ("{:.1f}", series) for index in range(5)}
    svg = plots.lines(metrics, "guidance")
    assert width_of(svg) < 900
    axes = [axis for axis in figures[0].axes if axis.get_title("left")]
    assert [axis.get_title("left") for axis in axes] == list(metrics)
    assert {axis.get_xscale() for axis in axes} == {"linear"}
    colours = {line.get_color() for line in axes[0].lines}
    assert len(colours) == 12
    assert all(name in svg for name in series)
    plots.lines({"FD": ("{:.1f}", {"euler": [[(5, 3.0)], [(250, 1.0)]]})}, "network calls")
    assert figures[1].axes[0].get_xscale() == "log"


def test_a_series_that_only_the_second_metric_has_is_in_the_legend(figures):
    curves = {
        "one": ("{:.1f}", {"a": [[(1, 0.5), (2, 0.4)]]}),
        "two": ("{:.1f}", {"b": [[(1, 0.5), (2, 0.4)]]}),
    }
    svg, png = plots.training_curves(curves)
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == ["a", "b"]
    assert png.startswith(b"\x89PNG")
    assert "training steps" in svg
