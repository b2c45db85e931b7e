"""The session that every stage is given: config, run directory, mesh and data."""

import dataclasses
import functools
import logging
import shlex
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import jax
import ml_collections
import numpy as np
from clu import parameter_overview
from jax.sharding import Mesh

from gae_jax.config import bind, default_config, flatten, precision
from gae_jax.config.validate import validate
from gae_jax.data.drawing import order_of
from gae_jax.data.pipeline import ImageData
from gae_jax.data.sources import Source
from gae_jax.nn.network import fingerprint
from gae_jax.run import contents, fine_tuning, resuming
from gae_jax.run.amendments import Wish
from gae_jax.run.recorded_config import (
    recorded_precision,
    run_of,
    unrecorded,
    without_recorded_precision,
)
from gae_jax.run.run import Run, StageFolder
from gae_jax.run.weight_source import STAGES
from gae_jax.runtime import sharding
from gae_jax.runtime.errors import ConfigError, number_of
from gae_jax.runtime.files import write_bytes
from gae_jax.runtime.mesh import check_batch, make_mesh, to_host
from gae_jax.runtime.progress import duration
from gae_jax.tokenizers import without_other_sizes
from gae_jax.train.checkpoint import averaged_or_not, load_weights
from gae_jax.train.fit import Stage, fit
from gae_jax.train.state import TrainState


@dataclasses.dataclass(frozen=True)
class Session:
    """One invocation: a config, a run directory and a mesh.

    Attributes:
      config: of the whole pipeline.
      run: the directory that the stages leave their folders in.
      fresh: start over the stages that are run.
      amend: stages that train resume with fields that changed.
      from_step: the retained checkpoint that the stage resumes from.
      config_file: where the config came from.
      devices: what the mesh is made of; None: all devices.
    """

    config: ml_collections.ConfigDict
    run: Run
    fresh: bool = False
    config_file: str = ""
    devices: tuple[jax.Device, ...] | None = None
    amend: bool = False
    from_step: int | None = None

    @classmethod
    def start(
        cls, config, workdir: str | Path, *, platform: str = "", arguments: str = "", **more
    ) -> "Session":
        """Start a session of the command line; ``precision.preset`` "auto" is settled here.

        Args:
          platform: of the devices, as `jax.default_backend` names it; empty: this process's.
          arguments: as of `Run`.
          more: fresh, amend, from_step, config_file.
        """
        run = Run(Path(workdir), arguments)
        if "precision" in config:  # else validation refuses it
            platform = platform or jax.default_backend()
            kept: dict[str, str] = {}
            if own := run_of(more.get("config_file", "")):
                # what the user asks for besides counts, before what the run records
                kept = recorded_precision(Run(Path(own)))
                config = without_recorded_precision(config, own)
            elif not more.get("fresh"):
                kept = {k: v for k, v in recorded_precision(run).items() if k.endswith(".dtype")}
            config = precision.settle(config, platform, kept)
            if config.precision.preset in ("auto", *precision.PRESETS):  # validation refuses others
                precision.log(config, platform)
        return cls(config, run, **more)

    @cached_property
    def mesh(self) -> Mesh:
        return make_mesh(**bind(make_mesh, self.config.mesh, "mesh"), devices=self.devices)

    @property
    def kept(self) -> Path:
        """Folder of results that several commands need; if removed, they are computed again."""
        return self.run.path / "kept"

    @cached_property
    def data(self) -> ImageData:
        return ImageData(**bind(ImageData, self.config.data, "data"))

    @cached_property
    def _sources(self) -> dict[str, Source]:
        return {}

    @cached_property
    def _contents(self) -> dict[str, dict]:
        return {}

    def source(self, split: str) -> Source:
        """Open the images of a split; a directory is listed once per invocation."""
        if split not in self._sources:
            self._sources[split] = self.data.source(split)
        return self._sources[split]

    def images(self, split: str, most: int) -> tuple[np.ndarray, np.ndarray]:
        """Load up to ``most`` images of a split, as `batches`: (uint8 [n, S, S, 3], labels [n])."""
        rows = [
            (batch["image"][batch["valid"]], batch["label"][batch["valid"]])
            for batch in self.batches(split, most)
        ]
        images, labels = (np.concatenate(column) for column in zip(*rows, strict=True))
        return images, labels

    def batches(self, split: str, most: int, crop: str = "adm") -> Iterator[dict[str, np.ndarray]]:
        """Yield batches of up to ``most`` readable images that represent a split.

        They are drawn from the split, stratified by class and the same in every run, and come in
        its order. Images that cannot be read are replaced by others.

        Args:
          crop: as `ImageData.ordered`, whose batches these are.
        """
        source, size = self.source(split), self.config.evaluate.batch_size
        order = order_of(source) if most < len(source) else np.arange(len(source))
        at, left = 0, most
        while left > 0 and at < len(order):
            indices = np.sort(order[at : at + left])
            at += len(indices)
            for batch in self.data.ordered(source, size, crop, indices=indices):
                left -= int(batch["valid"].sum())
                yield batch

    def check(self, stages: tuple[str, ...]) -> None:
        """Check before any work is done or deleted that these stages can run.

        Args:
          stages: folder names.

        Raises:
          UserError: if the images cannot be found, their classes do not fit the model, or a batch
            does not divide over the devices.
        """
        sizes = flatten(self.config)
        for name in stages:
            for path in (f"{name}.train.batch_size", f"{name}.batch_size"):
                if path in sizes:
                    check_batch(sizes[path], self.mesh, path)
            if (parts := sizes.get(f"{name}.train.accumulate", 1)) > 1:
                what = f"{name}.train.batch_size / {name}.train.accumulate ="
                size = sizes[f"{name}.train.batch_size"] // parts
                check_batch(size, self.mesh, what)
        if "reference" in stages:
            self.source(self.config.reference.split)
        if (contents.READS.keys() - {"reference", "diffusion"}) & set(stages):
            classes = len(self.source("train").class_names)
            self.source("holdout")
            wanted = self.config.diffusion.model.num_classes
            if classes != wanted and ("diffusion" in stages or self.states_classes):
                changed = contents.explain_classes(self, stages)
                raise ConfigError(
                    f"the data has {number_of(classes, 'class', 'classes')}, but "
                    f"diffusion.model.num_classes is {wanted}; "
                    + (f"{changed}; put the classes back, or " if changed else "")
                    + f"pass --config.diffusion.model.num_classes={classes}"
                )

    @property
    def states_classes(self) -> bool:
        """Whether the config says how many classes the images have.

        The config of a run without a diffusion model does not, unless the command line does.
        """
        run, model = run_of(self.config_file), self.config.diffusion.model
        is_default = model.num_classes == default_config().diffusion.model.num_classes
        return not (run and is_default and unrecorded(run, ("diffusion",)))

    def require_trainable(self, name: str) -> None:
        """Raise ConfigError if a command would only train a stage that was imported.

        The error has the command that trains from these weights, or instead of them.
        """
        folder = self.run.stage(name)
        if self.fresh or not (folder.done or {}).get("imported"):
            return
        if name in STAGES:
            what, flag = (
                "fine-tune them",
                f" --config.{name}.init_from={shlex.quote(str(self.run.path))}",
            )
        elif name == "backbone" and self.config.backbone.name != "vit":
            what, flag = "train a small ViT instead", " --config.backbone.name=vit"
        else:
            what, flag = f"train another {name} instead", ""
        raise ConfigError(
            f"the weights in {folder.path} were imported and are finished: there is nothing to "
            f"train. The other commands use them as they are; to {what}, in a new run: "
            f"python -m gae_jax {name} {self.config_flag} --workdir=NEW{flag}"
        )

    @property
    def config_flag(self) -> str:
        """The argument that gives a new run this config: a flag, or the run that records it."""
        if not (run := run_of(self.config_file)):
            return f"--config={self.config_file}"
        try:
            validate(self.config)
        except ConfigError:  # the defaults of sections that no stage records may not fit
            return "--config=FILE"
        return shlex.quote(run)

    def fingerprint_of(self, stage: str) -> str:
        """The fingerprint of a finished stage's weights or latents."""
        return self.run.stage(stage).require_done()["fingerprint"]

    def made_of(self, sections: tuple[str, ...]) -> dict:
        """Select sections of the config, without the sizes of tokenizers that it does not name."""
        selected = {key: self.config[key] for key in sections}
        if "tokenizer" in selected:
            selected["tokenizer"] = without_other_sizes(selected["tokenizer"])
        return selected

    def identity(
        self, name: str, sections: tuple[str, ...], inputs: tuple[str, ...]
    ) -> tuple[dict, dict]:
        """Return (sections of the config, fingerprints) that identify a stage made of these.

        Of ``precision`` they are the settings of the stage's networks.
        """
        made_of = self.made_of(sections)
        if networks := precision.recorded(self.config, name):
            made_of["precision"] = networks
        fingerprints = {stage: self.fingerprint_of(stage) for stage in inputs}
        if origin := fine_tuning.identity(self.run.stage(name), self.config, fresh=self.fresh):
            made_of[name] = {**made_of[name], "init_from": origin[0]}
            fingerprints["init_from"] = origin[1]
        return made_of, fingerprints

    def open(self, name: str, *, sections: tuple[str, ...], inputs: tuple[str, ...]) -> StageFolder:
        """Claim the stage's folder for this config and these finished stages.

        An imported stage is finished, whatever the config says about its training.
        """
        folder = self.run.stage(name)
        if not self.fresh and (folder.done or {}).get("imported"):
            logging.info("%s: imported, %s", name, folder.path)
            return folder
        claim = functools.partial(
            folder.open,
            *self.identity(name, sections, inputs),
            fresh=self.fresh,
            wish=self.wish(name),
        )
        # a new stage that cannot be made of these images must not claim its folder
        if begun := not self.fresh and (folder.path / "config.json").exists():
            claim()
        made_of = contents.check_contents(self, folder) if name in contents.READS else {}
        if not begun:
            claim()
        if folder.pending:  # whether the stage can resume with these is not known yet
            self._contents[name] = made_of
        elif made_of:
            contents.write_contents(folder.path, made_of)
        if folder.done:
            logging.info("%s: finished before, %s", name, folder.path)
        return folder

    def wish(self, name: str) -> Wish:
        """Return how the command line asks to resume a stage that has begun."""
        section = self.config.get(name, {})
        trains = "train" in section and section.get("kind") != "svd"
        return Wish(trains, self.amend, self.from_step if trains else None)

    def warn_of_emulation(self, name: str) -> None:
        """Warn if a stage trains in bfloat16 on CPUs."""
        use, platform = precision.NETWORKS.get(name), self.mesh.devices.flat[0].platform
        if not use or use.group != "train":
            return  # the backbone in this table is the frozen one
        if platform == "cpu" and precision.settings(self.config, name)["dtype"] == "bfloat16":
            logging.warning(
                "%s: trains in bfloat16, which CPUs emulate: it is several times slower there than "
                "float32; for a new run pass --config.precision=exact",
                name,
            )

    def train(
        self, folder: StageFolder, stage: Stage, *, keep: tuple[str, ...], which: str, **facts
    ) -> TrainState:
        """Train a stage and mark its folder as finished.

        Args:
          keep: networks whose weights are the stage's result.
          which: "params" or "ema": the weights that later stages use.
        """
        section = self.config[folder.name].train
        how_long = {name: section[name] for name in section if name != "accumulate"}
        abstract = jax.eval_shape(stage.init, jax.random.key(0))
        share, path, shape = sharding.unsharded(abstract, self.mesh)
        if share > 0.02 and path:
            logging.warning(
                "%s: %.0f %% of the state's bytes are replicated on every device, for example %s "
                "%s, which does not divide over mesh.fsdp=%d and mesh.tensor=%d; choose divisors",
                *(folder.name, 100 * share, path, list(shape)),
                *(self.mesh.shape["fsdp"], self.mesh.shape["tensor"]),
            )
        self.warn_of_emulation(folder.name)
        resuming.prepare(folder, stage, self.config[folder.name])
        if made_of := self._contents.pop(folder.name, None):
            contents.write_contents(folder.path, made_of)
        fitted = fit(
            stage,
            folder.path,
            self.mesh,
            seed=self.config.seed,
            amended=resuming.accepted(folder),
            remedy=resuming.after_nan(self.config, folder.name),
            **bind(fit, how_long, f"{folder.name}.train"),
        )
        state = fitted.state
        asked, which = which, averaged_or_not(folder.path, keep[0], fitted.step)
        if (asked, which) == ("params", "ema"):  # the average ended after the best step
            logging.info(
                "%s: the result is the moving average of step %d, which was evaluated",
                *(folder.name, fitted.step),
            )
            weights = {name: load_weights(folder.path, which, name, fitted.step) for name in keep}
        else:  # at the best step the average may not have begun
            weights = to_host(
                {name: (getattr(state, asked)[name], state.rest[name]) for name in keep}
            )
        tables = [
            f"{name}\n{parameter_overview.get_parameter_overview(weights[name][0])}"
            for name in keep
        ]
        write_bytes(folder.path / "parameters.txt", "\n\n".join(tables).encode())
        memory = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
        folder.finish(
            seconds=fitted.seconds,
            step=fitted.step,
            peak_memory_bytes=memory,  # of one device; None on the CPU, which does not count
            fingerprint=fingerprint(weights),
            weights=which,
            parameters={
                name: int(parameter_overview.count_parameters(weights[name][0])) for name in keep
            },
            **fine_tuning.provenance(folder),
            **facts,
        )
        logging.info("%s: done in %s", folder.name, duration(fitted.seconds))
        return state
