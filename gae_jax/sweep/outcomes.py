"""How far the runs of a sweep are, and the figures that they came to."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gae_jax.run.run import Run, folder_of
from gae_jax.runtime.files import read_figures
from gae_jax.sweep.definition import Metric, Point, Sweep

LEAVE_NO_STAGE = ("import-torch", "export-torch", "report")  # commands without a folder


def run_of(workdir: Path, point: Point, seed: int) -> Run:
    return Run(workdir / f"{point.name}-seed{seed}")


def state_of(sweep: Sweep, run: Run) -> str:
    """How far a run is: finished, failed, begun or new."""
    if (run.path / "error.txt").exists():
        return "failed"
    folders = [folder_of(command) for command in sweep.commands if command not in LEAVE_NO_STAGE]
    if all(run.stage(folder).done for folder in folders):
        return "finished"
    return "begun" if run.path.exists() else "new"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What one run came to: the values of the metrics that it has, by label."""

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
    """What is there of every run, in the order of the points."""
    outcomes = []
    for point in sweep.points:
        for seed in sweep.seeds:
            run = run_of(workdir, point, seed)
            found = {metric.label: figure(run, metric) for metric in sweep.metrics}
            figures = {label: value for label, value in found.items() if value is not None}
            outcomes.append(Outcome(point, seed, run, state_of(sweep, run), figures))
    return outcomes


def figure(run: Run, metric: Metric) -> float | None:
    """The metric's value, or None if the run has none."""
    path = run.path / metric.folder / "result.json"
    result = read_figures(path) if path.exists() else {}
    found = (_look_up(result, name) for name in metric.name.split("|"))
    return next((value for value in found if value is not None), None)


def _look_up(value: Any, name: str) -> Any:
    """The number of a dotted name, or None."""
    for part in name.split("."):
        if isinstance(value, list):
            value = value[int(part)] if part.isdigit() and int(part) < len(value) else None
        else:
            value = value.get(part) if isinstance(value, dict) else None
    return value if isinstance(value, int | float) else None
