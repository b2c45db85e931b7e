"""Charts of the pages as SVG text, and pictures as PNG files."""

import io
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from PIL import Image

MANY_CLASSES = 40  # beyond so many, bars with names no longer fit
INK, BLUE, ORANGE, GREY = "#1c2430", "#2f5fd0", "#e0762f", "#8a94a3"

NOISE_LABEL = "std of the noise on the latents"

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "gae_jax",  # the same run gives the same page
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.edgecolor": "#c5ccd6",
    "axes.labelcolor": INK,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#eceff3",
    "axes.axisbelow": True,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
}


def _svg(figure: Figure) -> Markup:
    text = io.StringIO()
    figure.savefig(text, format="svg", bbox_inches="tight", metadata={"Date": None})
    svg = text.getvalue()
    # the page is HTML: no XML prologue, and the width is the page's to choose
    return Markup(svg[svg.index("<svg") :])


def curves(rows: list[dict[str, float]]) -> Markup:
    """Draw a small chart of every metric of a stage against training steps.

    Args:
      rows: of ``metrics.csv``: metric -> value, and "step".
    """
    names = sorted({name for row in rows for name in row} - {"step"})
    trained = [name for name in names if not name.startswith("eval/")]
    alone = [name for name in names if name.startswith("eval/") and name[5:] not in trained]
    panels = trained + alone
    columns = min(4, len(panels))
    lines = -(-len(panels) // columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(2.6 * columns, 1.75 * lines), layout="constrained")
        axes = iter(figure.subplots(lines, columns, squeeze=False).flat)
        for name in panels:
            axis = next(axes)
            _line(axis, rows, name, BLUE, "training")
            if f"eval/{name}" in names:
                _line(axis, rows, f"eval/{name}", ORANGE, "held out")
                axis.legend(frameon=False, fontsize=7)
            if name == "grad_norm":
                axis.set_yscale("log")
            axis.set_title(name.removeprefix("eval/") + (" (held out)" if name in alone else ""))
        for axis in axes:
            axis.axis("off")
        return _svg(figure)


def _line(axis, rows, name, colour, label):
    points = [(row["step"], row[name]) for row in rows if name in row]
    axis.plot(
        *zip(*points, strict=True), color=colour, label=label, linewidth=1.4, marker=".", ms=3
    )


def noise_curve(levels: list[float], psnr: list[float]) -> Markup:
    """Draw the PSNR of decoded latents against the std of the noise on them."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.6, 2.5), layout="constrained")
        axis = figure.subplots()
        axis.plot(levels, psnr, color=BLUE, marker="o", ms=4)
        axis.set_xlabel(NOISE_LABEL)
        axis.set_ylabel("PSNR, dB")
        return _svg(figure)


def class_accuracies(sets: dict[str, dict[str, float]], names: list[str]) -> Markup:
    """Draw the judge's accuracy of every class: bars, or sorted curves beyond `MANY_CLASSES`.

    Args:
      sets: label of a set of samples -> {number of a class: accuracy}.
      names: of all classes, by number.
    """
    with matplotlib.rc_context(STYLE):
        many = len(names) > MANY_CLASSES
        size = (4.6 if many else max(4.6, 0.5 * len(names)), 2.5)
        figure = Figure(figsize=size, layout="constrained")
        axis = figure.subplots()
        width = 0.8 / len(sets)
        for index, ((label, accuracies), colour) in enumerate(
            zip(sets.items(), (BLUE, ORANGE), strict=False)
        ):
            if many:
                axis.plot(sorted(accuracies.values()), color=colour, label=label, linewidth=1.4)
                continue
            at = [int(number) - 0.4 + width * (index + 0.5) for number in accuracies]
            axis.bar(at, list(accuracies.values()), width, label=label, color=colour)
        if many:
            axis.set_xlabel("classes of each set, sorted by accuracy")
        else:
            long = sum(map(len, names)) > 8 * len(names)
            axis.set_xticks(range(len(names)), names, rotation=90 if long else 0)
        axis.set_ylim(0, 1.02)
        axis.set_ylabel("judged right")
        axis.grid(visible=False, axis="x")
        figure.legend(frameon=False, ncols=2, loc="outside upper right", fontsize=8)
        return _svg(figure)


def noise_curves(curves: dict[str, tuple[list[float], list[float]]]) -> Markup:
    """Draw `noise_curve` of several decoders: name -> (levels, PSNR), from light to dark."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 3.1), layout="constrained")
        axis = figure.subplots()
        colours = matplotlib.colormaps["viridis_r"]
        for index, (name, (levels, psnr)) in enumerate(curves.items()):
            # the ends of the map are too pale and too dark to be told from paper and ink
            colour = colours(0.15 + 0.75 * index / max(len(curves) - 1, 1))
            axis.plot(levels, psnr, color=colour, marker="o", ms=3, linewidth=1.4, label=name)
        axis.set_xlabel(NOISE_LABEL)
        axis.set_ylabel("PSNR, dB")
        figure.legend(frameon=False, loc="outside right upper", fontsize=8)
        return _svg(figure)


def points(metrics: dict[str, tuple[str, dict[str, list[float]]]]) -> Markup:
    """Draw a panel per metric, with a line per point: values of single runs, and their mean.

    Args:
      metrics: label -> (format of a value, {name of a point: values}).
    """
    names = list(next(iter(metrics.values()))[1])
    columns = min(3, len(metrics))
    lines = -(-len(metrics) // columns)
    with matplotlib.rc_context(STYLE):
        size = (1 + 3.2 * columns, lines * (0.75 + 0.25 * len(names)))
        # wide enough that labels of neighbours stay apart
        figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(w_pad=0.15))
        grid = figure.subplots(lines, columns, squeeze=False, sharey=True)
        grid[0, 0].set_yticks(range(len(names)), names)
        grid[0, 0].set_ylim(len(names) - 0.5, -0.5)
        axes = iter(grid.flat)
        for label, (form, values) in metrics.items():
            axis = next(axes)
            for at, name in enumerate(names):
                runs = values[name]
                if not runs:
                    continue
                axis.plot([min(runs), max(runs)], [at, at], color=BLUE, linewidth=1, alpha=0.5)
                axis.plot(runs, [at] * len(runs), "o", color=BLUE, ms=3, alpha=0.5)
                axis.plot(sum(runs) / len(runs), at, "D", color=BLUE, ms=5)
            axis.set_title(label)
            axis.xaxis.set_major_locator(MaxNLocator(3))
            axis.xaxis.set_major_formatter(lambda value, _, form=form: form.format(value))
        for axis in axes:
            axis.axis("off")
        return _svg(figure)


def lines(
    metrics: dict[str, tuple[str, dict[str, list[list[tuple[float, float]]]]]], across: str
) -> Markup:
    """Draw a panel per metric against a number, with a line per series through the means.

    Args:
      metrics: label -> (format of a value, {series: [[(x, value) of every run] of every point]}).
      across: label of x, whose axis is logarithmic if it spans more than a factor of ten.
    """
    numbers = [
        x for _, series in metrics.values() for points in series.values() for runs in points
        for x, _ in runs
    ]  # fmt: skip
    logarithmic = min(numbers) > 0 and max(numbers) > 10 * min(numbers)
    names = list(dict.fromkeys(name for _, series in metrics.values() for name in series))
    with matplotlib.rc_context(STYLE):
        figure, axes = _panels(len(metrics), width=4.6, height=3.2)
        for (label, (form, series)), axis in zip(metrics.items(), axes, strict=True):
            for name, points in series.items():
                means = sorted(
                    tuple(sum(column) / len(column) for column in zip(*runs, strict=True))
                    for runs in points
                )
                look = dict(color=_colour(names, name), ms=3)
                axis.plot(*zip(*means, strict=True), **look, marker="o", linewidth=1.4)
                for runs in points:
                    axis.plot(*zip(*runs, strict=True), ".", **look, alpha=0.4)
            if logarithmic:
                axis.set_xscale("log")
            axis.set_xlabel(across)
            axis.set_title(label)
            axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axis.yaxis.set_major_formatter(lambda value, _, form=form: form.format(value))
        _legend(figure, names)
        return _svg(figure)


def _panels(count: int, *, width: float, height: float, columns: int = 2) -> tuple[Figure, list]:
    """A figure with ``count`` panels in rows of ``columns``; what is left over is blank."""
    columns = min(columns, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(width * columns + 0.8, height * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[count:]:
        axis.axis("off")
    return figure, axes[:count]


def _colour(names: list[str], name: str) -> tuple[float, float, float, float]:
    """The colour of one of several names; up to 20 differ."""
    return matplotlib.colormaps["tab10" if len(names) <= 10 else "tab20"](names.index(name) % 20)


def _legend(figure: Figure, names: list[str]) -> None:
    """Name the colours of `_colour` beside the panels, whichever of them show a name."""
    handles = [Line2D([], [], color=_colour(names, name), marker="o", ms=3) for name in names]
    figure.legend(handles, names, frameon=False, loc="outside right upper", fontsize=8)


Curves = dict[str, tuple[str, dict[str, list[list[tuple[float, float]]]]]]


def training_curves(metrics: Curves) -> tuple[Markup, bytes]:
    """Draw a panel per metric against training steps, in a colour per point; as SVG and as PNG.

    Args:
      metrics: label -> (format of a value, {name of a point: [[(step, value)] of every run]}).
    """
    names = list(dict.fromkeys(name for _, points in metrics.values() for name in points))
    with matplotlib.rc_context(STYLE):
        figure, axes = _panels(len(metrics), width=3.4, height=2.9, columns=3)
        for (label, (form, points)), axis in zip(metrics.items(), axes, strict=True):
            for name, runs in points.items():
                for run in runs:
                    look = dict(color=_colour(names, name), lw=1.4, marker="o", ms=3)
                    axis.plot(*zip(*run, strict=True), **look)
            axis.set_xlabel("training steps")
            axis.set_title(label)
            axis.xaxis.set_major_locator(MaxNLocator(4))
            axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
            axis.yaxis.set_major_formatter(lambda value, _, form=form: form.format(value))
        _legend(figure, names)
        drawn = io.BytesIO()
        figure.savefig(drawn, format="png", dpi=110)
        return _svg(figure), _small(drawn)


def portrait(rows: dict[str, np.ndarray], grids: dict[str, np.ndarray]) -> bytes:
    """Draw strips of images below each other and grids beside them, as a PNG.

    Args:
      rows: label -> uint8 [H, W, 3], all of one width.
      grids: title -> uint8 [H, W, 3].
    """
    widths = [2.4] + [1.0] * len(grids)
    with matplotlib.rc_context(STYLE | {"axes.grid": False}):
        figure = Figure(figsize=(2.6 * sum(widths), 0.62 * len(rows) + 0.2), layout="constrained")
        axes = figure.subplot_mosaic(
            [[label, *grids] for label in rows], width_ratios=widths, empty_sentinel=None
        )
        for label, pixels in (rows | grids).items():
            axis = axes[label]
            axis.imshow(pixels, interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            axis.spines[:].set_visible(False)
            if label in grids:
                axis.set_title(label)
            else:
                axis.set_ylabel(label, rotation=0, ha="right", va="center")
        drawn = io.BytesIO()
        figure.savefig(drawn, format="png", dpi=100)
    return _small(drawn)


def _small(drawn: io.BytesIO) -> bytes:
    """Reduce a PNG to a palette: a third of the bytes, for pictures in repositories."""
    picture = io.BytesIO()
    Image.open(drawn).convert("RGB").quantize(128).save(picture, "png", optimize=True)
    return picture.getvalue()
