"""A finished run as an object that encodes, decodes and samples."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from gae_jax.api.arrays import as_images, as_latents
from gae_jax.api.batches import Callback, bucket_of, in_batches
from gae_jax.config import precision
from gae_jax.generators.sampling import MAKERS, make_draw
from gae_jax.nn.network import Loaded
from gae_jax.nn.pixels import to_float, to_uint8
from gae_jax.nn.quantized import with_matmuls
from gae_jax.run.class_names import in_words, recorded_names, recorded_root
from gae_jax.run.load import load as load_network
from gae_jax.run.load import network_of
from gae_jax.run.recorded_config import get_config
from gae_jax.run.run import Run, StageFolder
from gae_jax.run.sampling import batches_of_images, load_networks
from gae_jax.run.sampling_config import (
    BATCH_SIZE,
    LIMITS,
    SamplingOptions,
    labels_of,
    sampler_section,
    sampling_config,
)
from gae_jax.run.session import Session
from gae_jax.runtime.errors import UserError
from gae_jax.runtime.keys import stage_key
from gae_jax.runtime.mesh import BATCH, jit_on
from gae_jax.runtime.ranges import COUNT, Range
from gae_jax.tokenizers import image_size_of, latent_shape, name_of, sizes_of

PROGRAMS = 32  # compiled functions that a run keeps; the oldest is dropped

ClassId = int | str


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


class LoadedRun:
    """A run whose finished stages compute; make it with `gae_jax.load`.

    Batches may have any size: they are padded to a few sizes (`batch_size`), for each of which a
    function is compiled once, and split over the devices. Networks are loaded at first use, in the
    precision that the run's stages record, and kept.

    Args:
      path: of the run directory.
      devices: as of `load`.

    Raises:
      UserError: if it is no run directory, or its records are damaged.
    """

    def __init__(self, path: Path, *, devices: Sequence[jax.Device] | None = None):
        config = get_config(str(path))
        some = None if devices is None else tuple(devices)
        self._session = Session(config, Run(path), devices=some)
        self._networks: dict[Any, Loaded] = {}
        self._programs: dict[Any, Callable[..., Any]] = {}

    def __repr__(self) -> str:
        return f"gae_jax.load({str(self.path)!r})"

    @property
    def path(self) -> Path:
        """The run directory."""
        return self._session.run.path

    @property
    def mesh(self) -> Mesh:
        """The devices that compute."""
        return self._session.mesh

    @cached_property
    def _tokenizer(self) -> StageFolder:
        folder = self._session.run.stage("tokenizer")
        folder.require_done()
        return folder

    @property
    def image_size(self) -> int:
        """Edge of the images in pixels."""
        return image_size_of(self._tokenizer.config)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(h, w, d) of the latents."""
        return latent_shape(self._tokenizer.config)

    @cached_property
    def class_names(self) -> list[str]:
        """Names of the classes in the order of their numbers; empty if the run records none."""
        run = self._session.run
        return in_words(recorded_names(run), recorded_root(run))

    def encode(
        self, images: Any, *, batch_size: int | None = None, callback: Callback | None = None
    ) -> np.ndarray:
        """Encode images -> latents, as the stage ``latents`` does: float32 [B, h, w, d].

        Args:
          images: uint8 [B, S, S, 3]; or floats of this shape in [-1, 1]; or a list of PIL images
            of S x S pixels. S is `image_size`.
          batch_size: images at once, over all devices; None: a power of two that holds them, at
            most 256.
          callback: called as callback(done, total) after each batch.

        Raises:
          UserError: for images of another shape, dtype or range, or if the run has no finished
            tokenizer.
        """
        array = as_images(images, self.image_size)
        how = precision.settings(self._session.config, "encoder")
        network, arrays = self._network(self._tokenizer, self.mesh, **how)

        def encode(arrays, images):
            images = to_float(images) if images.dtype == jnp.uint8 else images
            return network(*arrays).encode(images).astype(jnp.float32)

        program = self._program(("encode", how), encode)
        return in_batches(program, (arrays,), (array,), **self._batches(batch_size, callback))

    def decode(
        self,
        latents: Any,
        *,
        seed: int = 0,
        steps: int | None = None,
        batch_size: int | None = None,
        callback: Callback | None = None,
    ) -> np.ndarray:
        """Decode latents -> uint8 images [B, S, S, 3].

        Args:
          latents: floats [B, h, w, d], as `encode` returns them.
          seed: of the noise of a decoder that draws (DGAE); image i depends on the seed and i.
            Other decoders have none.
          steps: network calls of a decoder that draws; None: the run's.
          batch_size, callback: as of `encode`.

        Raises:
          UserError: for latents of another shape, or steps of a decoder that does not draw.
        """
        array = as_latents(latents, self.latent_shape, "latents")
        _check("seed", seed, LIMITS["seed"])
        if steps is not None:
            self._check_decoder_steps(steps)
        how = precision.settings(self._session.config, "decoder")
        network, arrays = self._network(self._tokenizer, self.mesh, **how)
        if steps is not None:  # the same weights
            rest = {name: value for name, value in how.items() if name != "matmuls"}
            done = self._tokenizer.require_done()
            network = network_of(self._tokenizer, done, decode_steps=int(steps), **rest)
            network = with_matmuls(network, how["matmuls"])

        def decode(arrays, key, latents, ids):
            keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(ids)
            return to_uint8(network(*arrays).decode(latents, keys))

        program = self._program(("decode", how, steps), decode)
        ids = np.arange(len(array), dtype=np.uint32)
        return in_batches(
            program,
            (arrays, stage_key("decode", int(seed))),
            (array, ids),
            **self._batches(batch_size, callback),
        )

    def sample(
        self,
        class_id: ClassId | Sequence[ClassId],
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
        depends on the seed, its class and i; another batch size changes it by rounding alone.

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
            session, weaker, sampler=of_model, decoder=of_decoder, load=self._network
        )
        draw = make_draw(networks, MAKERS[sampler](**section))
        key = ("sample", sampler, section, weaker, of_model, of_decoder)
        program = self._program(key, draw, batch=False)
        size = bucket_of(len(labels), batch_size, self.mesh)
        images = []
        for ids, draw_batch in batches_of_images(session, program, networks.arrays, labels, size):
            images.append(draw_batch()[0])
            if callback:
                callback(ids.stop, len(labels))
        return np.concatenate(images)

    def _check_decoder_steps(self, steps: int) -> None:
        _check("steps", steps, COUNT)
        section = self._tokenizer.config.tokenizer
        if "decode_steps" not in sizes_of(section):
            raise UserError(
                f"steps is {steps}, but the decoder of tokenizer {name_of(section)!r} is one call "
                "of a network; leave it out"
            )

    def _batches(self, batch_size: int | None, callback: Callback | None) -> dict[str, Any]:
        return {"mesh": self.mesh, "batch_size": batch_size, "callback": callback}

    def _network(self, folder: StageFolder, mesh: Mesh, **how) -> Loaded:
        """As `run.load.load`, once for each network and precision."""
        key = folder.path, repr(sorted(how.items()))
        if key not in self._networks:
            self._networks[key] = load_network(folder, mesh, **how)
        return self._networks[key]

    def _program(
        self, key: tuple, function: Callable[..., Any], *, batch: bool = True
    ) -> Callable[..., Any]:
        """Return ``function`` jitted on the mesh, the same for the same key.

        Args:
          key: of everything that ``function`` depends on besides its arguments.
          batch: whether its result is an array [B, ...].
        """
        if (text := repr(key)) not in self._programs:
            if len(self._programs) >= PROGRAMS:
                del self._programs[next(iter(self._programs))]
            rows = {"out_shardings": NamedSharding(self.mesh, BATCH)} if batch else {}
            self._programs[text] = jit_on(self.mesh, **rows)(function)
        return self._programs[text]


def _as_classes(given: ClassId | Sequence[ClassId]) -> tuple[ClassId, ...]:
    """Return one class or a list of them as a tuple; an array counts as a list."""
    if isinstance(given, np.ndarray):
        return tuple(given.ravel().tolist())
    if isinstance(given, list | tuple | range):
        return tuple(given)
    return (given,)  # type: ignore[return-value]


def _check(name: str, value: Any, allowed: Range) -> None:
    """Raise UserError for a number outside of its range."""
    if problem := allowed.problem(value):
        raise UserError(f"{name} is {value!r}; it must be {problem}")
