"""The part of a loaded run that needs its tokenizer alone."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gae_jax.api.arrays import as_images, as_latents
from gae_jax.api.programs import Programs
from gae_jax.config import precision
from gae_jax.evaluation.judge import Judge
from gae_jax.nn.pixels import as_float, to_uint8
from gae_jax.nn.quantized import with_matmuls
from gae_jax.run.batches import Callback, in_batches
from gae_jax.run.class_names import in_words, recorded_names, recorded_root
from gae_jax.run.judges import STAGES_OF_EXTRACTORS, load_extractor
from gae_jax.run.load import network_of
from gae_jax.run.recorded_config import get_config
from gae_jax.run.run import Run, StageFolder
from gae_jax.run.sampling_config import LIMITS
from gae_jax.run.session import Session
from gae_jax.runtime.errors import UserError
from gae_jax.runtime.keys import stage_key
from gae_jax.runtime.ranges import COUNT, Range
from gae_jax.tokenizers import image_size_of, latent_shape, name_of, sizes_of


class TokenizerRun:
    """A run whose tokenizer and metric networks compute.

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
        self._programs = Programs(self._session.mesh)

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
        network, arrays = self._programs.network(self._tokenizer, self.mesh, **how)

        def encode(arrays, images):
            return network(*arrays).encode(as_float(images)).astype(jnp.float32)

        program = self._programs.jitted(("encode", how), encode)
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
        network, arrays = self._programs.network(self._tokenizer, self.mesh, **how)
        if steps is not None:  # the same weights
            rest = {name: value for name, value in how.items() if name != "matmuls"}
            done = self._tokenizer.require_done()
            network = network_of(self._tokenizer, done, decode_steps=int(steps), **rest)
            network = with_matmuls(network, how["matmuls"])

        def decode(arrays, key, latents, ids):
            keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(ids)
            return to_uint8(network(*arrays).decode(latents, keys))

        program = self._programs.jitted(("decode", how, steps), decode)
        ids = np.arange(len(array), dtype=np.uint32)
        return in_batches(
            program,
            (arrays, stage_key("decode", int(seed))),
            (array, ids),
            **self._batches(batch_size, callback),
        )

    def features(
        self,
        images: Any,
        name: str = "vgg16",
        *,
        batch_size: int | None = None,
        callback: Callback | None = None,
    ) -> np.ndarray:
        """Compute features by which `gae_jax.metrics` compares sets of images: float32 [n, d].

        Args:
          images: uint8 [n, S, S, 3], or a list of PIL images of S x S pixels.
          name: "vgg16" | "inception" | "efficientnet_lite0": networks that the run has imported;
            "judge": the small classifier of ``evaluate``, which is fitted here on the run's
            training images.
          batch_size, callback: as of `encode`; "judge" has no batches.

        Raises:
          UserError: for other images or names, or a network that the run lacks, naming the command
            that imports it.
        """
        known = ("judge", *STAGES_OF_EXTRACTORS)
        if name not in known:
            raise UserError(f"there are no features {name!r}; use one of {', '.join(known)}")
        array = as_images(images, self.image_size)
        if array.dtype != np.uint8:
            raise UserError(
                f"images are {array.dtype}; features are of uint8 images, as `decode` and `sample` "
                "return them"
            )
        if name == "judge":
            return self._judge.features(array).astype(np.float32)
        extractor = self._programs.once(name, lambda: load_extractor(self._session, name))

        def pooled(arrays, images):
            return extractor.run(arrays, images)["pool"]

        program = self._programs.jitted(("features", name), pooled)
        batches = self._batches(batch_size, callback)
        return in_batches(program, (extractor.arrays,), (array,), **batches)

    @cached_property
    def _judge(self) -> Judge:
        names = self._session.source("train").class_names
        if len(names) < 2:
            raise UserError(
                f"features='judge' tells classes apart, but all training images of {self.path} are "
                f"of the class {names[0]!r}; use features of an imported network"
            )
        return Judge(*self._session.images("train", self._session.config.evaluate.probe_images))

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


def _check(name: str, value: Any, allowed: Range) -> None:
    """Raise UserError for a number outside of its range."""
    if problem := allowed.problem(value):
        raise UserError(f"{name} is {value!r}; it must be {problem}")
