"""The table of a sweep: CSV, GitHub markdown and one HTML page."""

import csv
import dataclasses
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from gae_jax import __version__
from gae_jax.report import data_uri, enlarge, plots, render, strip
from gae_jax.run.recorded_config import run_of
from gae_jax.runtime.errors import number_of
from gae_jax.runtime.files import read_figures, write_bytes
from gae_jax.sweep.definition import Metric, Point, Sweep
from gae_jax.sweep.outcomes import Outcome
from gae_jax.train.log import read_metrics


@dataclasses.dataclass(frozen=True)
class Row:
    """One point: its runs, and label of a metric -> values of the runs that have one."""

    point: Point
    outcomes: list[Outcome]
    values: dict[str, list[float]]

    @property
    def seeds(self) -> str:
        """How many of its runs are finished."""
        done = sum(outcome.state == "finished" for outcome in self.outcomes)
        return f"{done} of {len(self.outcomes)}"

    @property
    def shown(self) -> Outcome | None:
        """The run whose pictures are shown for the point: the first that was evaluated."""
        folders = [(o, o.run.stage("evaluate").path / "pictures.npz") for o in self.outcomes]
        return next((outcome for outcome, path in folders if path.exists()), None)


def with_values(sweep: Sweep, outcomes: list[Outcome]) -> Sweep:
    """The sweep without metrics that no run has, such as FID where no Inception was imported."""
    labels = {label for outcome in outcomes for label in outcome.figures}
    metrics = [metric for metric in sweep.metrics if metric.label in labels]
    return dataclasses.replace(sweep, metrics=metrics) if metrics else sweep


def rows_of(sweep: Sweep, outcomes: list[Outcome]) -> list[Row]:
    rows = []
    for point in sweep.points:
        mine = [outcome for outcome in outcomes if outcome.point.name == point.name]
        values = {
            metric.label: [o.figures[metric.label] for o in mine if metric.label in o.figures]
            for metric in sweep.metrics
        }
        rows.append(Row(point, mine, values))
    return rows


def summary(metric: Metric, values: list[float]) -> tuple[str, str]:
    """(mean, "smallest to largest") as text; "" without values, and of one value the range."""
    if not values:
        return "", ""
    low, high = metric.form.format(min(values)), metric.form.format(max(values))
    spread = f"{low} to {high}" if len(values) > 1 else ""
    return metric.form.format(np.mean(values)), spread


def quoted_labels(sweep: Sweep) -> list[str]:
    """Labels of the paper's figures, in order of appearance."""
    return list(dict.fromkeys(label for figures in sweep.paper.values() for label in figures))


def findings(sweep: Sweep, rows: list[Row]) -> list[tuple[str, bool]] | None:
    """Results of the sweep's check; None without a check, or if a run lacks a figure."""
    complete = all(
        len(values) == len(row.outcomes) for row in rows for values in row.values.values()
    )
    if sweep.check is None or not complete:
        return None
    means = {
        row.point.name: {label: float(np.mean(values)) for label, values in row.values.items()}
        for row in rows
    }
    return sweep.check(means)


def to_csv(sweep: Sweep, rows: list[Row]) -> bytes:
    """Write table.csv: every run, then mean, min, max and the paper's figures of every point."""
    changed = list(dict.fromkeys(path for row in rows for path in row.point.overrides))
    labels, quoted = [metric.label for metric in sweep.metrics], quoted_labels(sweep)
    columns = ["point", "seed", "state", *changed, *labels, *(f"paper: {x}" for x in quoted)]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="")
    writer.writeheader()
    for row in rows:
        head = {"point": row.point.name, **row.point.overrides}
        for outcome in row.outcomes:
            here = {"seed": outcome.seed, "state": outcome.state, **outcome.figures}
            writer.writerow(head | here)
    for row in rows:
        head = {"point": row.point.name, **row.point.overrides}
        for name, of in (("mean", np.mean), ("min", min), ("max", max)):
            figures = {label: float(of(values)) for label, values in row.values.items() if values}
            if figures:
                writer.writerow(head | {"seed": name} | figures)
        if published := sweep.paper.get(row.point.name):
            cited = {f"paper: {label}": value for label, value in published.items()}
            writer.writerow(head | {"seed": "paper"} | cited)
    return text.getvalue().encode()


def to_markdown(sweep: Sweep, rows: list[Row]) -> str:
    """Write the table in GitHub's Markdown."""
    quoted = quoted_labels(sweep)
    head = [
        "point",
        *(metric.label for metric in sweep.metrics),
        *(f"*paper: {label}*" for label in quoted),
    ]
    lines = [head, ["---"] + ["---:"] * (len(head) - 1)]
    for row in rows:
        cells = []
        for metric in sweep.metrics:
            mean, spread = summary(metric, row.values[metric.label])
            cells.append(f"{mean} ({spread})" if spread else mean or "-")
        figures = sweep.paper.get(row.point.name, {})
        cited = [f"*{figures[label]}*" if label in figures else "" for label in quoted]
        lines.append([row.point.name, *cells, *cited])
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    parts = [f"**{sweep.title}**", table, note(sweep)]
    parts += [f"{row.point.name}: {text}" for row in rows for text in failures(row)]
    if sweep.expectation:
        parts.append(f"The paper's order: {sweep.expectation}")
    if results := findings(sweep, rows):
        parts.append("\n".join(f"- {statement}: {verdict(so)}" for statement, so in results))
    return "\n\n".join(parts) + "\n"


def verdict(so: bool) -> str:
    return "agrees" if so else "does not agree"


def failures(row: Row) -> list[str]:
    """One line about every run that failed."""
    errors = [(outcome, outcome.error) for outcome in row.outcomes]
    return [f"seed {o.seed} failed: {last_line(text)}" for o, text in errors if text]


def last_line(error: str) -> str:
    """The last line of a traceback, or the first of a message."""
    lines = error.strip().splitlines()
    return lines[-1] if lines[0].startswith("Traceback") else lines[0]


def note(sweep: Sweep) -> str:
    """The note under the table."""
    seeds = ", ".join(map(str, sweep.seeds))
    text = f"Mean over seeds {seeds}, with the smallest and the largest value."
    if len(sweep.seeds) == 1:
        text = f"One run each, seed {seeds}."
    if sweep.paper:
        text += (
            f" The paper's figures ({sweep.source}, ImageNet at 256 pixels) are quoted, not "
            "reproduced; other data, sizes and metrics make only their order comparable."
        )
    return text


def to_page(sweep: Sweep, rows: list[Row], command: str) -> bytes:
    """Render table.html."""
    quoted = quoted_labels(sweep)
    shown = [(row.point.name, row.shown) for row in rows if row.shown and not sweep.lines]
    finished = sum(outcome.state == "finished" for row in rows for outcome in row.outcomes)
    total = sum(len(row.outcomes) for row in rows)
    measured = {
        metric.label: (metric.form, {row.point.name: row.values[metric.label] for row in rows})
        for metric in sweep.metrics
        if any(row.values[metric.label] for row in rows)
    }
    curves = {row.point.name: noise_curve(row) for row in rows if row.shown} if sweep.noise else {}
    return render(
        dict(
            title=sweep.title,
            lead=f"{finished} of {total} runs are finished: {number_of(len(rows), 'point')}, "
            f"{len(sweep.seeds)} {'seeds' if len(sweep.seeds) > 1 else 'seed'} each. Every point "
            f"is {run_of(sweep.config) or sweep.config} with a few fields changed.",
            labels=[metric.label for metric in sweep.metrics],
            quoted=quoted,
            source=sweep.source,
            rows=[
                {
                    "name": row.point.name,
                    "overrides": [f"{k}={_short(v)}" for k, v in row.point.overrides.items()],
                    "cells": [summary(m, row.values[m.label]) for m in sweep.metrics],
                    "quoted": [
                        sweep.paper.get(row.point.name, {}).get(label, "") for label in quoted
                    ],
                    "seeds": row.seeds,
                    "failures": failures(row),
                }
                for row in rows
            ],
            note=note(sweep),
            expectation=sweep.expectation,
            compared=sweep.check is not None,
            findings=[
                {"statement": statement, "agrees": so, "verdict": verdict(so)}
                for statement, so in findings(sweep, rows) or ()
            ],
            chart=plots.points(measured) if measured and not sweep.lines else "",
            lines_chart=lines_chart(sweep, rows) if sweep.lines else "",
            curves=plots.training_curves(steps)[0] if (steps := curves_of(sweep, rows)) else "",
            noise_chart=plots.noise_curves(curves) if curves else "",
            **pictures(shown),
            grids=[grid for name, outcome in shown for grid in grids(name, outcome)],
            command=command,
            overrides=json.dumps(dict(sweep.overrides), indent=2),
            commands=", ".join(sweep.commands),
            version=f"gae_jax {__version__}",
        ),
        "sweep.html.j2",
    )


def curves_of(sweep: Sweep, rows: list[Row]) -> plots.Curves:
    """Collect figures against training steps, for `plots.training_curves`."""
    metrics = {}
    for metric in sweep.curves:
        points = {}
        for row in rows:
            runs = [
                [(line["step"], line[metric.name]) for line in lines if metric.name in line]
                for outcome in row.outcomes
                if (lines := read_metrics(outcome.run.stage(metric.folder).path))
            ]
            if runs := [run for run in runs if run]:
                points[row.point.name] = runs
        if points:
            metrics[metric.label] = metric.form, points
    return metrics


def curves_csv(metrics: plots.Curves) -> bytes:
    """Write curves.csv: metric, point, number of the run, step, value."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("metric", "point", "run", "step", "value"))
    for label, (_, points) in metrics.items():
        for name, runs in points.items():
            for number, run in enumerate(runs):
                writer.writerows((label, name, number, int(step), value) for step, value in run)
    return text.getvalue().encode()


def lines_chart(sweep: Sweep, rows: list[Row]) -> str:
    """Chart all metrics against that of ``sweep.lines``; "" without finished runs."""
    metrics = {}
    for metric in sweep.metrics:
        if metric.label == sweep.lines:
            continue
        series: dict[str, list] = {}
        for row in rows:
            runs = [
                (outcome.figures[sweep.lines], outcome.figures[metric.label])
                for outcome in row.outcomes
                if {sweep.lines, metric.label} <= set(outcome.figures)
            ]
            if runs:
                series.setdefault(row.point.name.rsplit("-", 1)[0], []).append(runs)
        if series:
            metrics[metric.label] = metric.form, series
    return plots.lines(metrics, sweep.lines) if metrics else ""


def _short(value) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def noise_curve(row: Row) -> tuple[list[float], list[float]]:
    """(noise levels, mean PSNR of the runs)."""
    results = [
        read_figures(outcome.run.stage("evaluate").path / "result.json")["tokenizer"]
        for outcome in row.outcomes
        if outcome.run.stage("evaluate").done
    ]
    levels = results[0]["noise_levels"]
    same = [result["noise_psnr"] for result in results if result["noise_levels"] == levels]
    return levels, np.mean(same, axis=0).tolist()


def pictures(shown: list[tuple[str, Outcome]]) -> dict[str, list[dict[str, str]]]:
    """Rows of pictures: real images; reconstructions, also with noise, and latents per point."""
    rows: dict[str, list[dict[str, str]]] = {"clean": [], "noisy": [], "latents": []}
    for name, outcome in shown:
        folder = outcome.run.stage("evaluate").path
        with np.load(folder / "pictures.npz") as file:
            images = dict(file)
        size = images["real"].shape[1]
        factor = max(1, 64 // size)
        if not rows["clean"]:
            rows["clean"].append(picture("real", enlarge(images["real"], factor)))
        rows["clean"].append(picture(name, enlarge(images["reconstructed"], factor)))
        rows["noisy"].append(picture(name, enlarge(images["noisy"][:, -1], factor)))
        colours = enlarge(images["colours"], factor * size // images["colours"].shape[1])
        rows["latents"].append(picture(name, colours, "hard"))
    return rows


def picture(label: str, images: np.ndarray, kind: str = "soft") -> dict[str, str]:
    return {"label": label, "image": data_uri(strip(images)), "kind": kind}


def grids(name: str, outcome: Outcome) -> list[dict[str, str]]:
    """Every set of samples of a run, as a picture."""
    files = sorted(outcome.run.stage("sample").path.glob("*/grid.png"))
    return [
        {"title": f"{name}, {path.parent.name}", "image": data_uri(np.asarray(Image.open(path)))}
        for path in files
    ]


def portrait(outcome: Outcome, columns: int = 12) -> bytes:
    """Reconstructions and samples of one run in one PNG."""
    evaluation = outcome.run.stage("evaluate").path
    with np.load(evaluation / "pictures.npz") as file:
        shown = {name: images[:columns] for name, images in dict(file).items()}
    size = shown["real"].shape[1]
    factor = max(1, 64 // size)
    rows = {name: enlarge(shown[name], factor) for name in ("real", "reconstructed")}
    levels = read_figures(evaluation / "result.json")["tokenizer"].get("noise_levels", [])
    for index in (len(levels) // 2, len(levels) - 1) if levels else ():
        rows[f"noise {levels[index]:g}"] = enlarge(shown["noisy"][:, index], factor)
    rows["latent"] = enlarge(shown["colours"], factor * size // shown["colours"].shape[1])
    grids = sorted(outcome.run.stage("sample").path.glob("*/grid.png"))
    return plots.portrait(
        {name: strip(images) for name, images in rows.items()},
        {f"samples, {path.parent.name}": np.asarray(Image.open(path)) for path in grids},
    )


def write_table(sweep: Sweep, workdir: Path, outcomes: list[Outcome], command: str) -> str:
    """Write the tables and a picture of every point; returns the table and its path as text.

    Writes table.csv, table.md, table.html, pictures/POINT.png unless ``sweep.lines`` is set, and
    curves.csv and curves.png if the sweep has curves.

    Args:
      command: the sweep's command line, for the page.
    """
    sweep = with_values(sweep, outcomes)
    rows = rows_of(sweep, outcomes)
    text = to_markdown(sweep, rows)
    write_bytes(workdir / "table.csv", to_csv(sweep, rows))
    write_bytes(workdir / "table.md", text.encode())
    write_bytes(workdir / "table.html", to_page(sweep, rows, command))
    if curves := curves_of(sweep, rows):
        write_bytes(workdir / "curves.csv", curves_csv(curves))
        write_bytes(workdir / "curves.png", plots.training_curves(curves)[1])
    for row in () if sweep.lines else rows:
        if row.shown:
            (workdir / "pictures").mkdir(exist_ok=True)
            write_bytes(workdir / "pictures" / f"{row.point.name}.png", portrait(row.shown))
    return f"{text}\n{workdir / 'table.html'}"
