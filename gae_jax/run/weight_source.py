"""The source of a stage's first weights: another run's stage, or a folder of ``export-torch``."""

import dataclasses
import re
from functools import cached_property
from pathlib import Path

import numpy as np

from gae_jax.config import flatten
from gae_jax.interop.exports import Exported, is_export, networks_of, read_export
from gae_jax.nn.network import fingerprint
from gae_jax.run.run import Run, StageFolder
from gae_jax.runtime.errors import ConfigError
from gae_jax.tokenizers import made_of, name_of, section_of, sizes_of
from gae_jax.train.carry import flat
from gae_jax.train.checkpoint import (
    averaged_or_not,
    kept_steps,
    load_moments,
    load_weights,
    stored_networks,
    stored_shapes,
)

STAGES = ("tokenizer", "diffusion")  # that may start from existing weights


@dataclasses.dataclass(frozen=True)
class RunSource:
    """A stage of a run, trained or imported, or one of its retained checkpoints.

    Attributes:
      folder: of the stage.
      step: of the checkpoint; None: that of imported weights.
      which: "params" or "ema": the weights that are taken.
    """

    folder: StageFolder
    step: int | None
    which: str

    def __str__(self) -> str:
        what = "imported" if self.step is None else f"step {self.step}"
        return f"{self.folder.path}, {what}"

    @property
    def stage(self) -> str:
        return self.folder.name

    def lies_in(self, folder: StageFolder) -> bool:
        """Whether this is the stage of that folder."""
        return self.folder.path.resolve() == folder.path.resolve()

    @cached_property
    def fingerprint(self) -> str:
        done = self.folder.done or {}
        if done.get("step") == self.step and "fingerprint" in done:
            return done["fingerprint"]
        arrays = load_weights(self.folder.path, self.which, self.stage, self.step)
        return fingerprint({self.stage: arrays})

    @property
    def name(self) -> str:
        """Of the kind of tokenizer or diffusion model."""
        section = self.folder.config[self.stage]
        return (
            name_of(section) if self.stage == "tokenizer" else section.get("name", "lightningdit")
        )

    @property
    def fields(self) -> dict:
        """The config that the stage was made with, by dotted path."""
        return flatten(self.folder.config)

    @property
    def network_fields(self) -> dict:
        """The part of `fields` that says what the network is."""
        return network_fields(self.folder.config.to_dict(), self.stage)

    @property
    def tokenizer(self) -> str | None:
        """The fingerprint of the tokenizer whose latents a diffusion model was trained on."""
        recorded = (self.folder.done or {}).get("tokenizer")
        return recorded or self.folder.run.fingerprint("tokenizer")

    def shapes(self, network: str | None = None) -> dict[str, tuple[int, ...]]:
        """Shapes, by path, of the stage's network or of another one that trained with it."""
        which = self.which if network is None else "params"
        return flat(stored_shapes(self.folder.path, which, network or self.stage, self.step))

    def arrays(self, network: str | None = None) -> dict[str, np.ndarray]:
        """Arrays, by path, as `shapes`."""
        which = self.which if network is None else "params"
        return flat(load_weights(self.folder.path, which, network or self.stage, self.step))

    def moments(self, network: str) -> dict | None:
        """Load the optimizer's moments, as `checkpoint.load_moments`."""
        return load_moments(self.folder.path, network, self.step)

    @cached_property
    def others(self) -> tuple[str, ...]:
        """Other networks that trained with the stage's, such as a discriminator."""
        names = stored_networks(self.folder.path, "params", self.step)
        return tuple(name for name in names if name != self.stage)

    @property
    def record(self) -> dict:
        """Facts for the folder of a stage that starts from these weights."""
        record = {"step": self.step, "weights": self.which, "fingerprint": self.fingerprint}
        # a change from a later step on did not affect these weights
        changes = [
            item
            for item in self.folder.amended
            if item["stage"] != self.stage or self.step is None or item["step"] < self.step
        ]
        return record | ({"amended": changes} if changes else {})


@dataclasses.dataclass(frozen=True)
class ExportSource:
    """A network of a folder that ``export-torch`` wrote: its weights alone."""

    exported: Exported
    stage: str
    step = None
    others = ()  # a discriminator's file beside it does not say how it was built
    tokenizer = None

    def __str__(self) -> str:
        return str(self.exported.file)

    @property
    def name(self) -> str:
        return self.exported.name

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint({self.stage: self.exported.arrays()})

    @property
    def fields(self) -> dict:
        return {}  # how it was trained is not in the folder

    @property
    def network_fields(self) -> dict:
        return network_fields(self.exported.section, self.stage)

    def lies_in(self, folder: StageFolder) -> bool:
        del folder
        return False

    def shapes(self, network: str = "") -> dict[str, tuple[int, ...]]:
        del network  # there is one
        abstract = flat(self.exported.network.abstract)
        return {self._ours(path): leaf.shape for path, leaf in abstract.items()}

    def arrays(self, network: str = "") -> dict[str, np.ndarray]:
        del network  # there is one
        return {self._ours(path): x for path, x in flat(self.exported.arrays()).items()}

    def moments(self, network: str) -> None:
        del network

    def _ours(self, path: str) -> str:
        return f"dit/{path}" if self.stage == "diffusion" else path

    @property
    def record(self) -> dict:
        return {"file": self.exported.file.name, "fingerprint": self.fingerprint}


Source = RunSource | ExportSource


def network_fields(config: dict, stage: str) -> dict:
    """The fields that define a stage's network, by dotted path.

    Args:
      config: nested dicts, as a stage's folder records them.
    """
    if stage == "diffusion":
        section = config["diffusion"]
        flow = section.get("flow", {})
        kept = {key: section[key] for key in ("model", "head") if key in section}
        kept["flow"] = {k: flow[k] for k in ("path", "prediction", "geometry") if k in flow}
        if "latent_multiplier" in section:
            kept["latent_multiplier"] = section["latent_multiplier"]
        if section.get("name", "lightningdit") != "ddt":
            kept.pop("head", None)
        return flatten({"diffusion": kept})
    section = config["tokenizer"]
    fields = {"tokenizer": {section_of(section): dict(sizes_of(section))}}
    if "backbone" in made_of(section) and "backbone" in config:
        kind = config["backbone"]["name"]
        fields["backbone"] = {"name": kind, kind: config["backbone"][kind]}
    return flatten(fields)


def open_source(named: str, stage: str) -> Source:
    """Open the source that `init_from` names.

    Args:
      named: a run directory, RUN@STEP for a retained checkpoint, or an export folder; also the
        folder of the stage in a run, of its checkpoints, or of one checkpoint.
      stage: a name in `STAGES`.

    Raises:
      ConfigError: if it does not exist or holds no finished stage of this name; says what can be
        given.
    """
    field = f"{stage}.init_from"
    path, step = Path(named), None
    if not path.exists() and (match := re.fullmatch(r"(.+)@(\d+)", named)):
        path, step = Path(match[1]), int(match[2])
    if not path.exists():
        raise ConfigError(
            f"{field} is {named!r}, but {path} does not exist; give a run directory, RUN@STEP for "
            "a kept checkpoint of it, or a folder that export-torch wrote"
        )
    if path.is_file():
        raise ConfigError(_not_a_file(path, field, stage))
    # the folder of a checkpoint, or of all of them, in that of the stage
    if step is None and path.name.isdigit() and path.parent.name == "checkpoints":
        path, step = path.parent, int(path.name)
    if path.name == "checkpoints" and (path.parent / "config.json").is_file():
        path = path.parent
    if (path / "config.json").is_file() and path.name == stage and not is_export(path):
        path = path.parent  # the folder of the stage
    if is_export(path) and not (path / stage / "config.json").is_file():
        return _of_export(path, stage, step, field)
    return _of_run(path, stage, step, field)


def _not_a_file(path: Path, field: str, stage: str) -> str:
    if is_export(path.parent):
        return f"{field} names the file {path}; give its folder: --config.{field}={path.parent}"
    return (
        f"{field} names the file {path}; make a run of it first, with the same --config: python -m "
        f"gae_jax import-torch --workdir=RUN --config.import_torch.{stage}={path}, then give "
        f"--config.{field}=RUN"
    )


def _of_export(path: Path, stage: str, step: int | None, field: str) -> ExportSource:
    if step is not None:
        raise ConfigError(
            f"{field} asks for step {step} of {path}, an export folder, which has no checkpoints; "
            f"give --config.{field}={path}"
        )
    known = networks_of(path)
    if stage not in known:
        raise ConfigError(
            f"{field} is {path}, an export folder without a {stage}; it holds "
            f"{' and '.join(known) or 'neither tokenizer nor diffusion model'}. Give the run that "
            "it was exported from, or another one"
        )
    return ExportSource(read_export(path, stage), stage)


def _of_run(path: Path, stage: str, step: int | None, field: str) -> RunSource:
    folder = Run(path).stage(stage)
    if not (folder.path / "config.json").is_file():
        others = sorted(
            p.parent.name for p in path.glob("*/config.json") if not is_export(p.parent)
        )
        what = f"it has {', '.join(others)}" if others else "it is no run directory"
        raise ConfigError(
            f"{field} is {path}, which has no {stage}: {what}; give a run that has trained or "
            "imported one, or a folder that export-torch wrote"
        )
    done = folder.done or {}
    kept = kept_steps(folder.path)
    imported = bool(done.get("imported"))
    if step is not None and (imported or step not in kept):
        steps = ", ".join(map(str, kept)) or "none"
        what = "imported and has no steps" if imported else f"not kept; kept checkpoints: {steps}"
        last = f"; for its final weights give --config.{field}={path}" if done else ""
        raise ConfigError(f"{field} asks for step {step} of {folder.path}, which is {what}{last}")
    if step is None and not done:
        start = ""
        if kept:
            start = f", or start from a kept checkpoint: --config.{field}={path}@{kept[-1]}"
        raise ConfigError(
            f"{field} is {path}, but its {stage} is not finished; finish it: "
            f"{Run(path).command(stage)}{start}"
        )
    if imported:
        return RunSource(folder, None, done["weights"])
    if done and step in (None, done.get("step")):
        return RunSource(folder, done.get("step", kept[-1] if kept else None), done["weights"])
    return RunSource(folder, step, averaged_or_not(folder.path, stage, step))
