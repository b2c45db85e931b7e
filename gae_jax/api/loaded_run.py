"""A finished run as an object that encodes, decodes and samples."""

import dataclasses
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gae_jax.api.arrays import as_images, as_latents, as_times
from gae_jax.api.tokenizer_run import TokenizerRun
from gae_jax.config import precision
from gae_jax.generators.likelihood import check_geometry, make_score
from gae_jax.generators.sampling import MAKERS, make_draw
from gae_jax.nn.network import Loaded
from gae_jax.run.batches import Callback, bucket_of, in_batches
from gae_jax.run.class_names import NO_CLASS
from gae_jax.run.run import StageFolder
from gae_jax.run.sampling import batches_of_images, load_networks
from gae_jax.run.sampling_config import (
    BATCH_SIZE,
    SamplingOptions,
    class_numbers,
    labels_of,
    require_null_class,
    sampler_section,
    sampling_config,
)
from gae_jax.runtime.errors import UserError, number_of
from gae_jax.runtime.keys import stage_key

ClassId = int | str  # number or name
Labels = ClassId | Sequence[ClassId] | np.ndarray


def load(path: str | Path, *, devices: Sequence[jax.Device] | None = None) -> "LoadedRun":
    """Load a run directory; its networks are read when they are first needed.

    Args:
      path: of the directory, such as "runs/demo".
      devices: that compute, each a share of every batch; None: all devices.

    Raises:
      UserError: if it is no run directory, or its records are damaged.
    """
    text = str(path)
    advice = "give a run directory, such as runs/demo"
    if "://" in text:
        raise UserError(f"{text}: only runs on this machine's disks can be loaded; {advice}")
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise UserError(f"{text} is no directory; {advice}")
    if _is_export(folder):
        raise UserError(
            f"{text} is a folder of exported weights, which cannot be loaded yet; give the run "
            "that they were exported from, or a run that they were imported into with: python -m "
            "gae_jax import-torch --help"
        )
    return LoadedRun(folder, devices=devices)


def _is_export(folder: Path) -> bool:
    try:
        described = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return False
    return isinstance(described, dict) and "gae_jax" in described


class LoadedRun(TokenizerRun):
    """A run whose tokenizer and diffusion model compute; `gae_jax.load` makes it."""

    def sample(
        self,
        class_id: Labels,
        count: int = 4,
        *,
        guidance: float | None = None,
        steps: int | None = None,
        seed: int = 0,
        sampler: str = "ode",
        method: str | None = None,
        interval: tuple[float, float] | None = None,
        batch_size: int | None = None,
        callback: Callback | None = None,
    ) -> np.ndarray:
        """Draw images of classes -> uint8 [n, S, S, 3], class by class, ``count`` of each.

        They are the images of ``python -m gae_jax sample RUN`` with the same options. Image i
        depends on the seed, its class and i; another batch size changes it by rounding alone
        (with "dopri5", which chooses its steps for the batch, by its tolerance).

        Args:
          class_id: the number of a class, its name ("goldfish", a synset), or a list of these.
            "none": without a class.
          count: of images of each class.
          guidance: scale w of u + w (c - u), where c is the velocity with the class and u the one
            without; 1: no guidance, 0: without a class; None: the run's.
          steps: points of the sampler's time grid, at least 2; None: the run's.
          seed: a different seed gives different images.
          sampler: "ode" or "sde".
          method: solver, such as "heun"; None: the run's.
          interval: times (low, high), from 0 (noise) to 1 (data), at which guidance acts; None:
            the run's.
          batch_size, callback: as of `encode`.

        Raises:
          UserError: for an unknown class, naming the nearest, an option outside of its range, or
            guidance of a model that was trained without a null class; or if the run has no
            finished diffusion model.
        """
        classes = _as_classes(class_id)
        if not classes:
            raise UserError("class_id is empty; give a class, or 'none' for none")
        options = SamplingOptions(
            classes=classes,
            count=count,
            sampler=sampler,
            steps=steps,
            method=method,
            guidance=guidance,
            interval=interval,
            seed=seed,
            batch_size=BATCH_SIZE if batch_size is None else batch_size,
        )
        config = sampling_config(self._session.run, options)
        labels = labels_of(self._session.run, config, options)
        section = sampler_section(config, options, labels)
        session = dataclasses.replace(self._session, config=config)
        of_model, of_decoder = (precision.settings(config, x) for x in ("sampler", "decoder"))
        weaker = config.sample.weaker
        networks = load_networks(
            session, weaker, sampler=of_model, decoder=of_decoder, load=self._programs.network
        )
        draw = make_draw(networks, MAKERS[sampler](**section))
        key = ("sample", sampler, section, weaker, of_model, of_decoder)
        program = self._programs.jitted(key, draw, batch=False)
        size = bucket_of(len(labels), batch_size, self.mesh)
        images = []
        for ids, draw_batch in batches_of_images(session, program, networks.arrays, labels, size):
            images.append(draw_batch()[0])
            if callback:
                callback(ids.stop, len(labels))
        return np.concatenate(images)

    def normalize(self, latents: Any, *, batch_size: int | None = None) -> np.ndarray:
        """Normalise latents of `encode` for the diffusion model: float32 [B, h, w, d].

        Noise, at t = 0 of its flow, is normal with mean 0 and std 1.

        Raises:
          UserError: as `velocity`.
        """
        return self._of_model("normalize", latents, batch_size)

    def denormalize(self, x: Any, *, batch_size: int | None = None) -> np.ndarray:
        """Invert `normalize`: latents that `decode` takes, float32 [B, h, w, d]."""
        return self._of_model("denormalize", x, batch_size)

    def velocity(
        self,
        x: Any,
        t: Any,
        labels: Labels | None = None,
        *,
        batch_size: int | None = None,
        callback: Callback | None = None,
    ) -> np.ndarray:
        """Compute the velocity of the diffusion model's flow at x and t: float32 [B, h, w, d].

        Data x1 and noise x0 are joined by x_t; on the linear path x_t = t x1 + (1 - t) x0, and the
        velocity estimates x1 - x0. There is no guidance.

        Args:
          x: states of the flow, floats [B, h, w, d]; latents of `encode` as `normalize` returns
            them.
          t: times from 0 (noise) to 1 (data), one or [B].
          labels: classes as of `sample`, one for all or one per row; None: without a class.
          batch_size, callback: as of `encode`.

        Raises:
          UserError: for arrays of another shape, times where the model has no velocity, an unknown
            class, or if the run has no finished diffusion model.
        """
        array = as_latents(x, self._model_shape, "x")
        times = as_times(t, len(array))
        rows = self._labels(labels, len(array))
        how, (network, arrays) = self._model
        start, end = network(*network.abstract).time_range
        if outside := [float(time) for time in times if not start <= time <= end]:
            raise UserError(
                f"t is {outside[0]:g}; this model has velocities for t in [{start}, {end}]"
            )

        def velocity(arrays, x, t, labels):
            return network(*arrays).velocity(x, t, labels).astype(jnp.float32)

        program = self._programs.jitted(("velocity", how), velocity)
        columns = array, times, rows
        return in_batches(program, (arrays,), columns, **self._batches(batch_size, callback))

    def log_likelihood(
        self,
        images: Any,
        labels: Labels | None = None,
        *,
        batch_size: int | None = None,
        callback: Callback | None = None,
    ) -> np.ndarray:
        """Compute log p(latents | class) of images in nats, as the command ``likelihood``.

        Steps, seed and precision are those that the run records for ``likelihood``, or the
        defaults. Image i depends on i too, by the signs of Hutchinson's estimate.

        Args:
          images: as of `encode`.
          labels: as of `velocity`.
          batch_size: as of `encode`, but at most ``likelihood.batch_size`` if None.
          callback: as of `encode`.

        Returns:
          float64 [B].

        Raises:
          UserError: as `encode` and `velocity`, or for a model on a sphere, which has no density.
        """
        array = as_images(images, self.image_size)
        rows = self._labels(labels, len(array))
        check_geometry(self._diffusion.config.diffusion.flow.geometry)
        config = self._session.config
        networks = load_networks(self._session, load=self._programs.network)
        how = dict(steps=config.likelihood.steps, time_shift=config.likelihood.time_shift)
        program = self._programs.jitted(("likelihood", how), make_score(networks, **how))
        return in_batches(
            program,
            ((networks.diffusion[1], networks.tokenizer[1]), stage_key("likelihood", config.seed)),
            (array, rows, np.arange(len(array), dtype=np.uint32)),
            most=config.likelihood.batch_size,
            **self._batches(batch_size, callback),
        ).astype(np.float64)

    @cached_property
    def _diffusion(self) -> StageFolder:
        folder = self._session.run.stage("diffusion")
        folder.require_done()
        return folder

    @property
    def _model_shape(self) -> tuple[int, ...]:
        return tuple(self._diffusion.require_done()["latent_shape"])

    @property
    def _model(self) -> tuple[dict[str, str], Loaded]:
        """The diffusion model and the settings that it is computed with."""
        how = precision.settings(self._session.config, "sampler")
        return how, self._programs.network(self._diffusion, self.mesh, **how)

    def _of_model(self, method: str, x: Any, batch_size: int | None) -> np.ndarray:
        """Call a method of the diffusion model that takes and returns [B, h, w, d]."""
        array = as_latents(x, self._model_shape, "latents" if method == "normalize" else "x")
        how, (network, arrays) = self._model

        def call(arrays, x):
            return getattr(network(*arrays), method)(x)

        program = self._programs.jitted((method, how), call)
        return in_batches(program, (arrays,), (array,), **self._batches(batch_size, None))

    def _labels(self, labels: Labels | None, count: int) -> np.ndarray:
        """Return int32 [count] of one class, one per row, or None: without a class."""
        config = self._diffusion.config
        classes = config.diffusion.model.num_classes
        if labels is None:
            require_null_class(config, self._session.run, "labels=None")
            return np.full(count, classes, np.int32)
        given = _as_classes(labels)
        numbers = class_numbers(self._session.run, classes, given, "labels")
        if None in numbers:
            require_null_class(config, self._session.run, f"labels={NO_CLASS}")
        if len(given) not in (1, count):
            raise UserError(
                f"labels has {number_of(len(given), 'class', 'classes')} for "
                f"{number_of(count, 'row')}; give one for all, or one per row"
            )
        rows = np.array([classes if number is None else number for number in numbers], np.int32)
        return np.broadcast_to(rows, (count,))


def _as_classes(given: Any) -> tuple[ClassId, ...]:
    """Return one class or a list of them as a tuple; an array counts as a list."""
    if hasattr(given, "__array__"):
        return tuple(np.asarray(given).ravel().tolist())
    if isinstance(given, list | tuple | range):
        return tuple(given)
    return (given,)
