"""The config of an existing run: the sections that its stages record, over the defaults.

``python -m gae_jax evaluate RUN`` reads it instead of a config file.
"""

import contextlib
import copy
import logging
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ml_collections

from gae_jax.config import default_config, precision
from gae_jax.config.validate import validate
from gae_jax.run.run import STAGES, Run, StageFolder
from gae_jax.runtime.errors import ConfigError, UserError

# A stage records in this section the file that it was made of; a config says what to import next.
RECORDS = ("import_torch",)
TRAINED = ("backbone", "teacher", "tokenizer", "diffusion")  # sections of stages that train
BESIDE = ("latents", "sample", "evaluate", "likelihood")  # sections of stages that do not train


def get_config(path: str) -> ml_collections.ConfigDict:
    """Read the config of the run directory ``path``.

    Sections that no stage records have their defaults. A section that several stages record is
    taken from the stage of its name, else from the one that was amended last. Folders that no stage
    makes (an export, the user's) are ignored.

    Raises:
      UserError: if there is no run, or a stage's record is damaged.
    """
    config = default_config()
    folders = Run(Path(path)).require()
    folders.sort(key=_last_amended)
    for folder in folders:
        for name, section in folder.marker["config"].items():
            if name not in (*RECORDS, "precision"):
                _update(config, name, section, folder)
    for folder in folders:
        if folder.name in folder.marker["config"]:
            _update(config, folder.name, folder.marker["config"][folder.name], folder)
    return precision.fill(config, recorded_precision(Run(Path(path))))


def recorded_precision(run: Run) -> dict[str, str]:
    """How the stages of a run that have begun compute: "precision.NETWORK.FIELD" -> value."""
    recorded: dict[str, str] = {}
    for stage in sorted({use.stage for use in precision.NETWORKS.values()}):
        folder = run.stage(stage)
        if (folder.path / "config.json").exists():
            with contextlib.suppress(UserError):  # whoever opens the folder says what is wrong
                recorded |= precision.flat(folder.marker["config"].get("precision", {}))
    return recorded


def without_recorded_precision(
    config: ml_collections.ConfigDict, path: str
) -> ml_collections.ConfigDict:
    """Return a copy of a run's config, of its precision only what was set since `get_config`."""
    config, recorded = copy.deepcopy(config), get_config(path).precision.override
    texts = config.precision.override
    if texts[: len(recorded)] == recorded:
        config.precision.override = texts[len(recorded) :]
    return config


def unrecorded(path: str, names: Iterable[str]) -> list[str]:
    """Select the sections of ``names`` that no stage of a run records: they have the defaults."""
    folders = [Run(Path(path)).stage(name) for name in sorted(STAGES)]
    recorded = {
        name
        for folder in folders
        if (folder.path / "config.json").exists()
        for name in folder.marker["config"]
    }
    return [name for name in names if name not in recorded]


def run_of(file: str) -> str:
    """Return the run whose recorded config ``file`` stands for; "" if it is a config file."""
    path, _, run = file.partition(":")
    return run if Path(path).name == Path(__file__).name else ""


def validate_config(command: str, config: ml_collections.ConfigDict, file: str) -> None:
    """Validate the config that was read from ``file``; warn of sections that a run lacks.

    Raises:
      ConfigError: if it cannot be used.
    """
    run = run_of(file)

    def said(names: Iterable[str]) -> str:
        return (
            f"no stage of {run} records {', '.join(names)}, which have the defaults here; to take "
            f"them from a config file: python -m gae_jax {command} --config=FILE "
            f"--workdir={shlex.quote(run)}"
        )

    lacking = unrecorded(run, TRAINED) if run else []
    try:
        validate(config)
    except ConfigError as error:
        if not lacking:
            raise
        raise ConfigError(f"{error}\n{said(lacking)}") from None
    # command -> the sections that it reads, if not only that of its name
    several = {"demo": (*TRAINED, *BESIDE), "reference": ("reference", "evaluate")}
    read = several.get(command, (command,))
    unread = [*lacking, *(unrecorded(run, (*BESIDE, "reference")) if run else ())]
    if set(read) & set(lacking):
        logging.warning("%s", said(lacking))
    elif silent := [name for name in read if name in unread]:
        logging.warning("%s", said(silent))


def _last_amended(folder: StageFolder) -> str:
    return max(
        (item["time"] for item in folder.amended if item["stage"] == folder.name), default=""
    )


def _update(config: ml_collections.ConfigDict, name: str, section: Any, folder: StageFolder):
    try:
        if isinstance(section, dict):
            config[name].update(_tuples(section))
        else:
            config[name] = section
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        what = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{folder.path / 'config.json'}: its section {name} does not fit this version of "
            f"gae_jax ({what}); was it made by a later one? Name a config and the run instead: "
            f"--config=FILE --workdir={shlex.quote(str(folder.path.parent))}"
        ) from None


def _tuples(value: Any) -> Any:
    """Replace the lists of JSON by the tuples of a config."""
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
