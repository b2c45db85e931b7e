"""Charts of the page as SVG text, and pictures that stand alone as PNG."""

import io

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

INK, BLUE, ORANGE, GREY = "#1c2430", "#2f5fd0", "#e0762f", "#8a94a3"

STYLE = {
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
    """One small chart per metric of a stage, in training steps."""
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
    """PSNR of decoded latents against the deviation of the noise on them."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.6, 2.5), layout="constrained")
        axis = figure.subplots()
        axis.plot(levels, psnr, color=BLUE, marker="o", ms=4)
        axis.set_xlabel("deviation of the noise on the latent (a token has mean square 1)")
        axis.set_ylabel("PSNR, dB")
        return _svg(figure)


NAMED_CLASSES = 40  # beyond so many bars have numbers, not names, below them


def class_bars(sets: dict[str, dict[str, float]], names: list[str]) -> Markup:
    """The judge's accuracy per class, one group of bars per class."""
    with matplotlib.rc_context(STYLE):
        many = len(names) > NAMED_CLASSES
        inches = 0.1 if many else 0.5
        figure = Figure(figsize=(min(max(4.6, inches * len(names)), 40), 2.5), layout="constrained")
        axis = figure.subplots()
        width = 0.8 / len(sets)
        for index, (label, accuracies) in enumerate(sets.items()):
            at = [i - 0.4 + width * (index + 0.5) for i in range(len(accuracies))]
            axis.bar(at, list(accuracies.values()), width, label=label, color=(BLUE, ORANGE)[index])
        if many:
            axis.set_xlabel("class")
        else:
            axis.set_xticks(range(len(names)), names)
        axis.set_ylim(0, 1.02)
        axis.set_ylabel("judged right")
        axis.grid(visible=False, axis="x")
        figure.legend(frameon=False, ncols=2, loc="outside upper right", fontsize=8)
        return _svg(figure)


def noise_curves(curves: dict[str, tuple[list[float], list[float]]]) -> Markup:
    """`noise_curve` of several decoders: name -> (levels, PSNR), from light to dark."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 3.1), layout="constrained")
        axis = figure.subplots()
        colours = matplotlib.colormaps["viridis_r"]
        for index, (name, (levels, psnr)) in enumerate(curves.items()):
            # the ends of the map are too pale and too dark to be told from paper and ink
            colour = colours(0.15 + 0.75 * index / max(len(curves) - 1, 1))
            axis.plot(levels, psnr, color=colour, marker="o", ms=3, linewidth=1.4, label=name)
        axis.set_xlabel("deviation of the noise on the latent")
        axis.set_ylabel("PSNR, dB")
        figure.legend(frameon=False, loc="outside right upper", fontsize=8)
        return _svg(figure)


def points(metrics: dict[str, tuple[str, dict[str, list[float]]]]) -> Markup:
    """One panel per metric, one line per point: values of single runs, and their mean.

    Args:
      metrics: label -> (form of a value, {name of a point: values}).
    """
    names = list(next(iter(metrics.values()))[1])
    columns = min(3, len(metrics))
    lines = -(-len(metrics) // columns)
    with matplotlib.rc_context(STYLE):
        size = (1 + 3.2 * columns, lines * (0.75 + 0.25 * len(names)))
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(lines, columns, squeeze=False, sharey=True)
        grid[0, 0].set_yticks(range(len(names)), names)
        grid[0, 0].set_ylim(len(names) - 0.5, -0.5)
        figure.get_layout_engine().set(w_pad=0.15)  # labels of neighbours stay apart
        axes = iter(grid.flat)
        for label, (form, values) in metrics.items():
            axis = next(axes)
            for at, name in enumerate(names):
                found = values[name]
                if not found:
                    continue
                axis.plot([min(found), max(found)], [at, at], color=BLUE, linewidth=1, alpha=0.5)
                axis.plot(found, [at] * len(found), "o", color=BLUE, ms=3, alpha=0.5)
                axis.plot(sum(found) / len(found), at, "D", color=BLUE, ms=5)
            axis.set_title(label)
            axis.xaxis.set_major_locator(MaxNLocator(3))
            axis.xaxis.set_major_formatter(lambda value, _, form=form: form.format(value))
        for axis in axes:
            axis.axis("off")
        return _svg(figure)


def lines(
    metrics: dict[str, tuple[str, dict[str, list[list[tuple[float, float]]]]]], across: str
) -> Markup:
    """One panel per metric against a number, one line per series through the means of its points.

    Args:
      metrics: label -> (form of a value, {series: [[(x, value) of every run] of every point]}).
      across: what x is.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.6 * len(metrics), 3.2), layout="constrained")
        axes = figure.subplots(1, len(metrics), squeeze=False)[0]
        colours = matplotlib.colormaps["tab10"]
        for (label, (form, series)), axis in zip(metrics.items(), axes, strict=True):
            for index, (name, points) in enumerate(series.items()):
                means = sorted(
                    tuple(sum(column) / len(column) for column in zip(*runs, strict=True))
                    for runs in points
                )
                look = dict(color=colours(index), marker="o", ms=3, linewidth=1.4)
                label_once = name if axis is axes[0] else None
                axis.plot(*zip(*means, strict=True), **look, label=label_once)
                for runs in points:
                    axis.plot(*zip(*runs, strict=True), ".", color=colours(index), alpha=0.4, ms=3)
            axis.set_xscale("log")
            axis.set_xlabel(across)
            axis.set_title(label)
            axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axis.yaxis.set_major_formatter(lambda value, _, form=form: form.format(value))
        figure.legend(frameon=False, loc="outside right upper", fontsize=8)
        return _svg(figure)


Curves = dict[str, tuple[str, dict[str, list[list[tuple[float, float]]]]]]


def training_curves(metrics: Curves) -> tuple[Markup, bytes]:
    """One panel per metric against training steps, one colour per point; as SVG and as PNG.

    Args:
      metrics: label -> (form of a value, {name of a point: [[(step, value)] of every run]}).
    """
    with matplotlib.rc_context(STYLE):
        size = (3.4 * len(metrics) + 0.8, 2.9)
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(1, len(metrics), squeeze=False)[0]
        colours = matplotlib.colormaps["tab10"]
        names = list(dict.fromkeys(name for _, points in metrics.values() for name in points))
        for (label, (form, points)), axis in zip(metrics.items(), axes, strict=True):
            for name, runs in points.items():
                colour = colours(names.index(name))
                for at, run in enumerate(runs):
                    once = name if at == 0 and axis is axes[0] else None
                    axis.plot(
                        *zip(*run, strict=True), color=colour, label=once, lw=1.4, marker="o", ms=3
                    )
            axis.set_xlabel("training steps")
            axis.set_title(label)
            axis.xaxis.set_major_locator(MaxNLocator(4))
            axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
            axis.yaxis.set_major_formatter(lambda value, _, form=form: form.format(value))
        figure.legend(frameon=False, loc="outside right upper", fontsize=8)
        drawn = io.BytesIO()
        figure.savefig(drawn, format="png", dpi=110)
        return _svg(figure), _small(drawn)


def portrait(rows: dict[str, np.ndarray], grids: dict[str, np.ndarray]) -> bytes:
    """Strips of images below each other, grids beside them, as a PNG.

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
    """A PNG with a palette: a third of the bytes, and such pictures go into repositories."""
    picture = io.BytesIO()
    Image.open(drawn).convert("RGB").quantize(128).save(picture, "png", optimize=True)
    return picture.getvalue()
