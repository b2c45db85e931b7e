"""Sampling from a run: its networks, the arguments of its samplers, and images in batches."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from gae_jax.config import bind, plain, precision
from gae_jax.generators.sampling import MAKERS, Networks, excess_of
from gae_jax.nn.network import Loaded
from gae_jax.run.load import load
from gae_jax.run.run import Run
from gae_jax.run.session import Session
from gae_jax.runtime.errors import DataError
from gae_jax.runtime.keys import stage_key
from gae_jax.runtime.mesh import check_batch, put_batch, to_host


def load_networks(
    session: Session,
    weaker: str = "",
    *,
    sampler: Mapping[str, str] = precision.INFERENCE,
    decoder: Mapping[str, str] = precision.INFERENCE,
    load: Callable[..., Loaded] = load,
) -> Networks:
    """Load the networks that sample: the run's diffusion model and tokenizer, on the mesh.

    Args:
      weaker: directory of a run with another diffusion model, for autoguidance.
      sampler, decoder: `precision.settings` of diffusion models and of the tokenizer.
      load: as `run.load.load`, for callers that keep what they have loaded.

    Raises:
      ConfigError: for matmuls that are not available.
      DataError: if they do not belong together.
    """
    done = session.run.stage("diffusion").require_done()
    if done["tokenizer"] != session.fingerprint_of("tokenizer"):
        raise DataError(
            f"the diffusion model was trained on latents of tokenizer {done['tokenizer']}, this "
            f"run's is {session.fingerprint_of('tokenizer')}; make latents and model again with: "
            + " && ".join(session.run.command(name, "--fresh") for name in ("latents", "diffusion"))
        )
    loaded = {
        name: load(session.run.stage(name), session.mesh, **how)
        for name, how in (("diffusion", sampler), ("tokenizer", decoder))
    }
    if weaker:
        other = Run(Path(weaker)).stage("diffusion")
        if (encoder := other.require_done()["tokenizer"]) != done["tokenizer"]:
            raise DataError(
                f"sample.weaker: {other.path} was trained on latents of tokenizer {encoder}, this "
                f"run's is {done['tokenizer']}; a weaker model must know the same latents"
            )
        loaded["weaker"] = load(other, session.mesh, **sampler)
        for name in ("latent_mean", "latent_std"):
            mean_or_std = [loaded[of][1][1][name] for of in ("diffusion", "weaker")]
            if not np.array_equal(mean_or_std[0], mean_or_std[1]):
                raise DataError(
                    f"sample.weaker: {other.path} has a different {name} from this run's "
                    "model; train it on this run's latents"
                )
    return Networks(**loaded)


def sampling_facts(config) -> dict[str, Any]:
    """What a stage of a diffusion model records: the defaults for sampling from the run alone."""
    how = precision.recorded(config, "sample")
    return {"sampling": plain(config.sample), "precision": how}


def bind_sampler(name: str, section) -> dict[str, Any]:
    """Return the arguments of a sampler, "sde" or "ode", from its section of ``sample``."""
    guidance = {key: section[key] for key in section if key.startswith("guidance")}
    rest = {key: section[key] for key in section if key not in guidance}
    scale = {key: value for key, value in guidance.items() if key != "guidance_channels"}
    bind(excess_of, scale, f"sample.{name}")
    return bind(MAKERS[name], rest, f"sample.{name}") | guidance


def batches_of_images(
    session: Session, draw: Callable, arrays: tuple, labels: np.ndarray, size: int
) -> Iterator[tuple[range, Callable]]:
    """Yield (ids, function that draws them) for each batch; the function does the work.

    It returns uint8 images [n, S, S, 3] and the network calls per image. Image i depends on the
    seed, label i and i alone: noise is keyed by i, and the last batch is padded with images that
    are dropped.

    Args:
      draw, arrays: of `sampling.make_draw`, and the arrays that it takes.
      labels: [N], int32.
      size: of a batch; the devices divide it.
    """
    check_batch(size, session.mesh, "sample.batch_size")
    key = stage_key("sample", session.config.seed)

    def draw_batch(first: int):
        ids = np.arange(first, first + size)
        inside = np.minimum(ids, len(labels) - 1)
        batch = put_batch((ids.astype(np.uint32), labels[inside]), session.mesh)
        images, calls = to_host(draw(arrays, key, *batch))
        return images[: len(labels) - first], int(calls)

    for first in range(0, len(labels), size):
        yield range(first, min(first + size, len(labels))), partial(draw_batch, first)
