"""``sample``: class-uniform images, by the SDE without and by the ODE with guidance."""

import io
import json
import logging
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from PIL import Image

from gae_jax import flow, samplers
from gae_jax.config import bind
from gae_jax.data.images import to_uint8
from gae_jax.errors import DataError
from gae_jax.parallel import check_batch, put_batch
from gae_jax.run import StageFolder, Stopwatch, write_bytes, write_json
from gae_jax.stages.load import load
from gae_jax.stages.session import Session
from gae_jax.train.fit import stage_key
from gae_jax.train.log import Progress, duration

SETS = ("sde", "ode")


def sde_sampler(*, steps: int, start: float, time_shift: float, last_step: float) -> Callable:
    """Unguided Euler-Maruyama sampling; ``steps`` calls of the network.

    The grid ends at 1 - last_step before it is shifted, and one deterministic step leads from
    where it really ends to 1. (The released sampler stops short of 1.)
    """
    grid = flow.time_grid(steps, start=start, end=1 - last_step, shift=time_shift)

    def sample(dit, x, labels, keys):
        def velocity(x, t):
            return dit(x, jnp.full(len(x), t), labels)

        return samplers.euler_maruyama(
            velocity,
            x,
            grid,
            noise=lambda index: samplers.noise_for(keys, x.shape[1:], index + 1),
            last_step=1 - grid[-1],
        )

    return sample


def ode_sampler(
    *, steps: int, time_shift: float, guidance: float, guidance_start: float, guidance_end: float
) -> Callable:
    """Euler on ``steps`` points with classifier-free guidance in [guidance_start, guidance_end].

    A guidance of 1 is none: only then may the model lack a null class.
    """
    grid = flow.time_grid(steps, shift=time_shift)

    def sample(dit, x, labels, keys):
        del keys

        def conditional(x, t):
            return dit(x, jnp.full(len(x), t), labels)

        def both(x, t):
            twice = jnp.concatenate([labels, jnp.full_like(labels, dit.num_classes)])
            found = dit(jnp.concatenate([x, x]), jnp.full(2 * len(x), t), twice)
            return jnp.split(found, 2)

        if guidance == 1:
            return samplers.euler(conditional, x, grid)
        velocity = samplers.guided(
            conditional, both, scale=guidance, start=guidance_start, end=guidance_end
        )
        return samplers.euler(velocity, x, grid)

    return sample


MAKERS = {"sde": sde_sampler, "ode": ode_sampler}


def generate(session: Session, labels: np.ndarray, sampler: Callable, what: str) -> np.ndarray:
    """uint8 images [n, S, S, 3], one per label; image i depends on the seed and i alone."""
    batch_size = session.config.sample.batch_size
    check_batch(batch_size, session.mesh, "sample.batch_size")
    diffusion, diffusion_arrays = load(session.run.stage("diffusion"), session.mesh)
    tokenizer, tokenizer_arrays = load(session.run.stage("tokenizer"), session.mesh)
    key = stage_key("sample", session.config.seed)

    @jax.jit
    def draw(diffusion_arrays, tokenizer_arrays, ids, labels):
        model, decoder = diffusion(*diffusion_arrays), tokenizer(*tokenizer_arrays)
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(ids)
        noise = samplers.noise_for(keys, decoder.latent_shape)
        latents = model.denormalize(sampler(model.dit, noise, labels, keys))
        return to_uint8(decoder.decode(latents))

    images = []
    with Progress(what, len(labels), unit="image") as progress:
        for first in range(0, len(labels), batch_size):
            ids = np.arange(first, first + batch_size)
            batch = put_batch(
                (ids.astype(np.uint32), labels[np.minimum(ids, len(labels) - 1)]), session.mesh
            )
            found = jax.device_get(draw(diffusion_arrays, tokenizer_arrays, *batch))
            count = min(batch_size, len(labels) - first)
            images.append(found[:count])
            progress.update(count)
    return np.concatenate(images)


def save_set(folder: Path, images: np.ndarray, labels: np.ndarray, facts: dict) -> None:
    """``samples.npz`` in the ADM evaluator's format, and what made it; whole or absent."""
    buffer = io.BytesIO()
    np.savez(buffer, arr_0=images, arr_1=labels)
    write_bytes(folder / "samples.npz", buffer.getvalue())
    write_json(folder / "manifest.json", facts)


def load_set(folder: StageFolder, name: str) -> tuple[np.ndarray, np.ndarray, dict]:
    """(images uint8, labels, manifest) of one set of samples."""
    with np.load(folder.path / name / "samples.npz") as file:
        images, labels = file["arr_0"], file["arr_1"]
    return images, labels, json.loads((folder.path / name / "manifest.json").read_text())


def class_grid(images: np.ndarray, labels: np.ndarray, rows: int, gap: int = 2) -> np.ndarray:
    """One column per class, with white lines between the images."""
    columns = [images[labels == label][:rows] for label in np.unique(labels)]
    padded = np.pad(
        np.stack(columns), ((0, 0), (0, 0), (0, gap), (0, gap), (0, 0)), constant_values=255
    )
    grid = rearrange(padded, "classes rows h w c -> (rows h) (classes w) c")
    return grid[:-gap, :-gap]


def run(session: Session) -> StageFolder:
    """Draws both sets, unless the run has them; a finished set is not drawn again."""
    folder = session.open("samples", sections=("seed", "sample"), inputs=("tokenizer", "diffusion"))
    if folder.done:
        return folder
    watch, config = Stopwatch(), session.config.sample
    done = session.run.stage("diffusion").require_done()
    made_for, weights = done["tokenizer"], done["weights"]
    if made_for != session.fingerprint_of("tokenizer"):
        raise DataError(
            f"the diffusion model was trained on latents of tokenizer {made_for}, this run's is "
            f"{session.fingerprint_of('tokenizer')}; make both again with --fresh: latents, "
            "diffusion"
        )
    classes = session.run.stage("diffusion").config.diffusion.model.num_classes
    labels = np.repeat(np.arange(classes, dtype=np.int32), config.per_class)
    # Metrics that read samples in file order must not see them sorted by class.
    labels = np.random.default_rng(session.config.seed).permutation(labels)
    for name in SETS:
        if (folder.path / name / "manifest.json").exists():
            continue
        section = bind(MAKERS[name], config[name], f"sample.{name}")
        images = generate(session, labels, MAKERS[name](**section), f"sample {name}")
        facts = {**section, "sampler": name, "weights": weights, "seed": session.config.seed}
        save_set(folder.path / name, images, labels, facts)
        Image.fromarray(class_grid(images, labels, 8)).save(folder.path / name / "grid.png")
    folder.finish(
        seconds=watch.seconds, count=len(labels), fingerprint=session.fingerprint_of("diffusion")
    )
    logging.info("sample: %d images twice in %s", len(labels), duration(watch.seconds))
    return folder
