"""The state of a sweep's runs, and the figures that they produced."""

import dataclasses
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from gae_jax.run.run import Run
from gae_jax.runtime.errors import DataError
from gae_jax.runtime.files import read_figures
from gae_jax.sweep.definition import Metric, Point, Sweep

LEAVE_NO_STAGE = ("import-torch", "export-torch", "report")  # commands without a folder


def run_of(workdir: Path, point: Point, seed: int) -> Run:
    return Run(workdir / f"{point.name}-seed{seed}")


def state_of(sweep: Sweep, run: Run) -> str:
    """The state of a run: "finished", "failed", "begun" or "new"."""
    if (run.path / "error.txt").exists():
        return "failed"
    folders = [command for command in sweep.commands if command not in LEAVE_NO_STAGE]
    if all(run.stage(folder).done for folder in folders):
        return "finished"
    return "begun" if run.path.exists() else "new"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The state of one run, and label -> value of the metrics that it has."""

    point: Point
    seed: int
    run: Run
    state: str
    figures: Mapping[str, float]

    @property
    def error(self) -> str:
        path = self.run.path / "error.txt"
        return path.read_text() if path.exists() else ""


def collect(sweep: Sweep, workdir: Path) -> list[Outcome]:
    """Read the outcome of every run, in the order of the points."""
    outcomes = []
    for point in sweep.points:
        for seed in sweep.seeds:
            run = run_of(workdir, point, seed)
            values = {metric.label: figure(run, metric) for metric in sweep.metrics}
            figures = {label: value for label, value in values.items() if value is not None}
            outcomes.append(Outcome(point, seed, run, state_of(sweep, run), figures))
    return outcomes


def figure(run: Run, metric: Metric) -> float | None:
    """The metric's value, or None if the run has none.

    Raises:
      DataError: if a pattern of the metric fits several figures.
    """
    path = run.stage(metric.folder).path / "result.json"
    result = read_figures(path) if path.exists() else {}
    for name in metric.name.split("|"):
        values = _look_up(result, name)
        if len(values) > 1:
            raise DataError(
                f"{path}: the metric {metric.label!r} is {name}, which fits "
                f"{', '.join(sorted(values))}; name one of them in the sweep's file"
            )
        if values:
            return next(iter(values.values()))
    return None


def _look_up(result: Any, pattern: str) -> dict[str, float]:
    """Dotted name -> number, of all figures that the pattern fits, part by part."""
    values = {"": result}
    for part in pattern.split("."):
        values = {
            f"{name}.{key}".lstrip("."): value
            for name, section in values.items()
            for key, value in _items(section)
            if fnmatchcase(key, part)
        }
    return {
        name: value
        for name, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def _items(section: Any) -> Iterable[tuple[str, Any]]:
    if isinstance(section, list):
        return ((str(index), value) for index, value in enumerate(section))
    return section.items() if isinstance(section, dict) else ()
