"""Definition of a sweep: its file, its points, and the config of each of its runs."""

import copy
import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections

from gae_jax.commands.table import ALIASES
from gae_jax.config import expand_home
from gae_jax.config.tools import explaining, run_file, set_field
from gae_jax.config.validate import validate
from gae_jax.runtime.errors import ConfigError, UserError


@dataclasses.dataclass(frozen=True)
class Point:
    """One row of the table.

    Attributes:
      name: also that of its run directories.
      overrides: dotted path of a config field -> value.
    """

    name: str
    overrides: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Metric:
    """One column of the table; left out while no run has a value.

    Attributes:
      label: head of the column.
      name: dotted path in the folder's ``result.json``. A part of it may be a pattern as of
        `fnmatch`, e.g. ``generation.ode.fd_vgg16_*`` where the number of images is in the name.
        Of several names with "|" between, the first that the run has.
      form: format of the value, for `str.format`.
      folder: folder of the run with the ``result.json``.
    """

    label: str
    name: str
    form: str = "{:.2f}"
    folder: str = "evaluate"


# Means over the seeds: point -> label of a metric -> value.
Means = Mapping[str, Mapping[str, float]]
# Compares means with the paper: a list of (statement, whether it holds).
Check = Callable[[Means], list[tuple[str, bool]]]


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What is varied, which commands are run, and what the table shows.

    Attributes:
      title: of the page.
      config: path of the config that the points change; ``--run`` replaces it.
      points: rows of the table.
      metrics: columns of the table.
      commands: commands of the pipeline and of `probes.PROBES`, in order.
      overrides: fields that all points change alike; the command line may change them again.
      seeds: each point is run with every one.
      source: the table of the paper that this follows, e.g. "Table 6".
      paper: name of a point -> label -> figure as the paper prints it.
      expectation: the order that the paper finds, in a sentence.
      check: compares our order with the paper's once all points have all figures; None: no check.
      noise: whether the page shows reconstructions from noisy latents.
      lines: label of the metric on the horizontal axis of a line chart of all other metrics, which
        replaces the pictures of every point; a point's series is its name up to the last "-".
      curves: figures against training steps: columns of the folder's ``metrics.csv``.
    """

    title: str
    config: str
    points: Sequence[Point]
    metrics: Sequence[Metric]
    commands: Sequence[str]
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    seeds: Sequence[int] = (0, 1)
    source: str = ""
    paper: Mapping[str, Mapping[str, str]] = dataclasses.field(default_factory=dict)
    expectation: str = ""
    check: Check | None = None
    noise: bool = False
    lines: str = ""
    curves: Sequence[Metric] = ()

    def __post_init__(self):
        object.__setattr__(self, "points", tuple(self.points))
        object.__setattr__(self, "commands", tuple(ALIASES.get(x, x) for x in self.commands))
        names = [point.name for point in self.points]
        odd = [name for name in names if not re.fullmatch(r"[\w.=+-]+", name)]
        if odd:
            raise ConfigError(
                f"points are named {odd}; directories are called so: use letters, digits and . _ "
                "= + - alone"
            )
        if len(set(names)) < len(names) or not names:
            raise ConfigError(f"points are named {names}; give at least one, each once")
        if strange := set(self.paper) - set(names):
            raise ConfigError(f"the paper's figures name no point: {sorted(strange)}")

    def runs(self) -> list[tuple[Point, int]]:
        """Every (point, seed); seed by seed, so that the table is soon complete with one."""
        return [(point, seed) for seed in self.seeds for point in self.points]


def load_sweep(path: str | Path) -> Sweep:
    """Load the sweep that ``get_sweep`` of a file returns.

    Raises:
      UserError: if there is no such file, or no ``get_sweep`` in it.
    """
    path = Path(path)
    if not path.is_file():
        known = ", ".join(map(str, sorted(path.parent.glob("*.py")))) or "none"
        raise UserError(f"there is no sweep {path}; in that directory: {known}")
    module = run_file(path, f"sweep_{path.stem}")
    if not hasattr(module, "get_sweep"):
        raise UserError(f"{path} has no function get_sweep, so it is no sweep")
    try:
        with explaining(path):
            sweep = module.get_sweep()
            if not isinstance(sweep, Sweep):
                raise TypeError(f"get_sweep gives a {type(sweep).__name__}, no Sweep")
    except UserError as error:
        raise ConfigError(
            f"{path}: {error}" if str(path) not in str(error) else str(error)
        ) from None
    return sweep


def configs_of(
    sweep: Sweep,
    changes: Sequence[str] = (),
    check: Callable[[str, ml_collections.ConfigDict], None] | None = None,
) -> dict[tuple[str, int], Any]:
    """Build the config of every run: (name of the point, seed) -> valid config.

    Args:
      changes: ``--config.KEY=VALUE`` as on the command line.
      check: called with the name and the config of every point before the config is validated.

    Raises:
      ConfigError: if a field is unknown, a config is invalid, or a change would undo a point.
    """
    from gae_jax.commands.parsing import parse

    changed = {change.removeprefix("--config.").split("=")[0] for change in changes}
    varied = {"seed"}.union(*(point.overrides for point in sweep.points))
    if both := changed & varied:
        raise ConfigError(
            f"{', '.join(sorted(both))}: the runs of this sweep differ in it, so it cannot be "
            "changed for all of them; change the sweep's file (seeds: --seeds=0,1)"
        )
    _, base, _, _ = parse(["gae_jax", "demo", f"--config={sweep.config}", *changes])
    for path, value in sweep.overrides.items():
        if path not in changed:
            set_field(base, path, value)
    configs = {}
    for point, seed in sweep.runs():
        config = copy.deepcopy(base)  # keeps data.workers a field of more than one type
        try:
            for path, value in {**point.overrides, "seed": seed}.items():
                set_field(config, path, value)
            expand_home(config)
            if check:
                check(point.name, config)
            validate(config)
        except ConfigError as error:
            raise ConfigError(f"point {point.name}: {error}") from None
        configs[point.name, seed] = config
    return configs
