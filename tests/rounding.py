"""What rounding does to samples: the same noise through a network in fp32, in bf16 and in fp8.

    PYTHONPATH=. python tests/rounding.py runs/demo --per_class=100 --out=runs/rounding.json
    PYTHONPATH=. python tests/rounding.py runs/demo --tokenizer --out=runs/rounding.json
    PYTHONPATH=. python tests/rounding.py waves --steps=600 --out=runs/rounding.json

Of a run with a judge (the demo's): distances of velocities and latents from fp32's, how many images
are judged right, Frechet distance from the training images. With --tokenizer, of held-out images
through encoder and decoder: relative distances of latents, those of images from the same latents
(mean, in levels of 255), and PSNR of what comes back. "waves" trains a LightningDiT of moderate
size on the made-up latents of `curves.py` first, and compares with data of that kind.
Another noise in fp32 says how much figures of as many samples vary. A distance is relative for
velocities (norms, between noise and fp32's samples), else the mean absolute one. "fp8 in fp32" has
everything but the fp8 matmuls in fp32.
"""

import argparse
from contextlib import nullcontext
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from curves import SIZES, batches, waves

from gae_jax.benchmark.workloads import timed_workload
from gae_jax.config import default_config
from gae_jax.config.precision import INFERENCE
from gae_jax.evaluation.frechet import frechet_distance
from gae_jax.evaluation.reconstruction import psnr
from gae_jax.generators import samplers
from gae_jax.generators.latent_diffusion import diffusion_network
from gae_jax.generators.sampling import MAKERS
from gae_jax.nn.pixels import to_float, to_uint8
from gae_jax.nn.quantized import weight_quantizer, with_matmuls
from gae_jax.run.generation_judge import GenerationJudge
from gae_jax.run.load import load
from gae_jax.run.recorded_config import get_config
from gae_jax.run.run import Run
from gae_jax.run.sampling import bind_sampler, load_networks
from gae_jax.run.session import Session
from gae_jax.runtime.files import write_json
from gae_jax.runtime.mesh import jit_on, make_mesh, put_batch
from gae_jax.tokenizers import latent_shape
from gae_jax.train.fit import jit_step

VARIANTS = {
    "fp32": dict(dtype="float32", matmuls="same"),
    "fp32, other noise": dict(dtype="float32", matmuls="same"),
    "bf16": dict(dtype="bfloat16", matmuls="same"),
    "fp8 in fp32": dict(dtype="float32", matmuls="fp8"),
    "fp8": dict(dtype="bfloat16", matmuls="fp8"),
}


def draw(loaded, sampler, labels, seed: int, size: int, mesh) -> np.ndarray:
    """Normalised latents [n, h, w, d]."""
    network, arrays = loaded

    @jit_on(mesh)
    def latents(arrays, labels, ids):
        model = network(*arrays)
        keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(ids)
        noise = samplers.noise_for(keys, model.latent_shape)
        return sampler(model, None, model.prior(noise), labels, keys).x

    found = []
    for first in range(0, len(labels), size):
        rows = np.arange(first, first + size)
        ids = np.minimum(rows, len(labels) - 1)
        batch = put_batch((labels[ids], rows.astype(np.uint32)), mesh)
        found.append(np.asarray(latents(arrays, *batch)))
    return np.concatenate(found)[: len(labels)]


def velocities(loaded, latents, labels, mesh) -> np.ndarray:
    """At five times between noise and these latents: [5, n, h, w, d]."""
    network, arrays = loaded
    noise = np.random.default_rng(0).standard_normal(latents.shape).astype(np.float32)

    @jit_on(mesh)
    def of(arrays, x, t, labels):
        return network(*arrays).velocity(x, t, labels)

    times = np.float32([0.05, 0.3, 0.5, 0.7, 0.95])
    return np.stack(
        [of(arrays, (1 - t) * noise + t * latents, jnp.float32(t), labels) for t in times]
    )


def compare(load, sampler, labels, judge, size: int, mesh) -> dict[str, dict]:
    """Figures by variant.

    Args:
      load: (dtype, matmuls) -> (network, arrays).
      judge: (latents, labels) -> more figures.
    """
    result, exact = {}, {}
    for variant, how in VARIANTS.items():
        exactly = variant.startswith("fp32")
        with jax.default_matmul_precision("highest") if exactly else nullcontext():
            loaded = load(**how)
            latents = draw(loaded, sampler, labels, int("other" in variant), size, mesh)
            first = exact.setdefault("latents", latents)
            found = velocities(loaded, first[:size], labels[:size], mesh)
        right = exact.setdefault("velocities", found)
        result[variant] = {
            "velocity": float(np.linalg.norm(found - right) / np.linalg.norm(right)),
            "latents": float(np.abs(latents - first).mean()),
            **judge(latents, labels),
        }
        print(f"{variant:18s}", *(f"{k} {v:.5f}" for k, v in result[variant].items()), flush=True)
    return result


def of_run(path: str, per_class: int) -> dict[str, dict]:
    """Of the sets that the run's config names."""
    config = get_config(path)
    session = Session(config, Run(Path(path)))
    labels = np.tile(np.arange(config.diffusion.model.num_classes, dtype=np.int32), per_class)
    networks, judged = load_networks(session), GenerationJudge(session)
    model, decoder = networks.diffusion[0](*networks.diffusion[1]), networks.tokenizer

    @jit_on(session.mesh)
    def decode(arrays, latents):
        return to_uint8(decoder[0](*arrays).decode(model.denormalize(latents)))

    def judge(latents, labels):
        parts = np.split(latents, range(500, len(latents), 500))
        images = np.concatenate([decode(decoder[1], part) for part in parts])
        figures = judged(images, labels)
        return {key: figures[key] for key in ("accuracy", "fd")}

    def load(**how):
        return load_networks(session, sampler=INFERENCE | how).diffusion

    size, result = min(config.sample.batch_size, len(labels)), {}
    for name in config.sample.sets:
        print(f"{path}: {name}, {len(labels)} images")
        sampler = MAKERS[name](**bind_sampler(name, config.sample[name].to_dict()))
        result[name] = compare(load, sampler, labels, judge, size, session.mesh)
    return result


def coders(network, mesh):
    """(arrays, uint8 images) -> latents, and back."""
    encode = jit_on(mesh)(lambda arrays, x: network(*arrays).encode(to_float(x)))
    return encode, jit_on(mesh)(lambda arrays, z: to_uint8(network(*arrays).decode(z)))


def of_tokenizer(path: str, count: int) -> dict[str, dict]:
    """Of a run's tokenizer on held-out images."""
    session = Session(get_config(path), Run(Path(path)))
    images, mesh = session.images("holdout", count)[0], session.mesh
    result, exact = {}, {}
    for variant, how in VARIANTS.items():
        if "noise" in variant:
            continue
        with jax.default_matmul_precision("highest") if variant == "fp32" else nullcontext():
            how = INFERENCE | how
            network, arrays = load(session.run.stage("tokenizer"), mesh, **how)
            encode, decode = coders(network, mesh)
            latents = np.asarray(encode(arrays, images))
            first = exact.setdefault("latents", latents)
            shown = np.asarray(decode(arrays, first), np.float32)
            returned = decode(arrays, latents)
        right = exact.setdefault("images", shown)
        result[variant] = {
            "latents": float(np.linalg.norm(latents - first) / np.linalg.norm(first)),
            "levels": float(np.abs(shown - right).mean()),
            "psnr": float(np.mean(psnr(returned, images))),
        }
        print(f"{variant:18s}", *(f"{k} {v:.5f}" for k, v in result[variant].items()), flush=True)
    return {"tokenizer": result}


def of_waves(steps: int, per_class: int, points: int) -> dict[str, dict]:
    """Trains first; by the SDE of the paper with so many points, unguided."""
    config = default_config()
    config.update_from_flattened_dict(SIZES)
    config.diffusion.train.steps = steps
    config.diffusion.ema_decay = 0.99
    config.sample.sde.steps = points
    work, mesh = timed_workload(config, "dit-train"), make_mesh()
    step, shardings = jit_step(work, mesh)
    state = jax.jit(work.init, out_shardings=shardings)(jax.random.key(0))
    for batch in batches("dit-train", work.batch(np.random.default_rng(0)), steps):
        state, figures = step(state, put_batch(batch, mesh), jax.random.key(10), {}, work.phase)
    print(f"waves: loss {float(figures['loss']):.4f} after {steps} steps")
    arrays = state.ema["diffusion"], state.rest["diffusion"]
    labels = np.tile(np.arange(10, dtype=np.int32), per_class)
    shape, random = latent_shape(config), np.random.default_rng(5)
    data = waves(random, labels, shape[-1], shape[0])
    data += 0.3 * random.standard_normal(data.shape)

    def pooled(latents):
        half = shape[0] // 2
        blocks = latents.reshape(len(latents), 2, half, 2, half, shape[-1])
        return blocks.mean((2, 4)).reshape(len(latents), -1).astype(np.float64)

    def load(dtype, matmuls):
        network = diffusion_network(
            config.diffusion, shape, dtype=dtype, attention="auto", kernels="auto"
        )
        found = with_matmuls(network, matmuls)
        return found, weight_quantizer(network, found, mesh)(arrays)

    sampler = MAKERS["sde"](**bind_sampler("sde", config.sample.sde.to_dict()))

    def judge(latents, labels):
        del labels
        return {"fd": float(frechet_distance(pooled(latents), pooled(data)))}

    return {"sde": compare(load, sampler, labels, judge, min(256, len(labels)), mesh)}


def main() -> None:
    """Prints and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", help="run directory, or waves")
    parser.add_argument("--per_class", type=int, default=50)
    parser.add_argument("--steps", type=int, default=600, help="that waves trains for")
    parser.add_argument("--tokenizer", action="store_true", help="of encoder and decoder")
    parser.add_argument("--images", type=int, default=256, help="held-out ones, of the tokenizer")
    parser.add_argument("--points", type=int, default=250, help="of the SDE's grid, of waves")
    parser.add_argument("--out", default="runs/rounding.json")
    options = parser.parse_args()
    if options.tokenizer:
        found = of_tokenizer(options.run, options.images)
    elif options.run == "waves":
        found = of_waves(options.steps, options.per_class, options.points)
    else:
        found = of_run(options.run, options.per_class)
    facts = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, **vars(options)}
    out = Path(facts.pop("out"))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, facts | {"figures": found})


if __name__ == "__main__":
    main()
