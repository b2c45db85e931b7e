"""Does the fast way of computing learn as fp32 does? Some hundred steps of both on the same data.

    PYTHONPATH=. python tests/curves.py dit-train tokenizer-train --steps=300 --out=runs/curves.json
    PYTHONPATH=. python tests/curves.py dit-train --width=864 --out=runs/curves-72.json

Trains LightningDiT and GAE of moderate size with the steps of their stages, on made-up latents and
images that have something to learn, in fp32 (matmuls at full precision), in bf16 by XLA and cuDNN,
in bf16 the fast way, and in fp32 with another seed, which says what noise is. Start, data and noise
are otherwise the same. LightningDiT has heads of 64 channels, rotated inside attention's kernel, or
with a width of 864 heads of 72, as XL's, whose rotation has a kernel of its own. Writes and prints
the mean loss of windows of 50 steps.
"""

import argparse
import contextlib
from pathlib import Path

import jax
import numpy as np

from gae_jax.benchmark.workloads import timed_workload
from gae_jax.config import default_config
from gae_jax.config.precision import override
from gae_jax.runtime.files import write_json
from gae_jax.runtime.mesh import make_mesh, put_batch
from gae_jax.runtime.sharding import place
from gae_jax.train.fit import jit_step

WINDOW = 50
SIZES = {
    "diffusion.model.hidden_size": 768,
    "diffusion.model.depth": 8,
    "diffusion.model.num_heads": 12,
    "bench.dit_train.batch_size": 32,
    "tokenizer.model.embed_dim": 512,
    "tokenizer.model.num_layers": 4,
    "tokenizer.model.num_heads": 8,
    "bench.tokenizer_train.batch_size": 8,
    # else the warm-up would not be over
    "tokenizer.optim.warmup_steps": 50,
    # its term has no lower bound, and drowns the others with a perceptual term of random weights
    "tokenizer.losses.gan": 0.0,
}
STAGES = ("tokenizer", "diffusion")
VARIANTS = {
    "fp32": dict(dtype="float32", attention="xla", kernels="xla"),
    "fp32, other seed": dict(dtype="float32", attention="xla", kernels="xla"),
    "bf16": dict(dtype="bfloat16", attention="cudnn", kernels="xla"),
    "fast": dict(dtype="bfloat16", attention="auto", kernels="auto"),
}


def waves(random: np.random.Generator, classes: np.ndarray, channels: int, side: int) -> np.ndarray:
    """Smooth fields [n, side, side, channels], of which every class has its own directions."""
    own = np.random.default_rng(1).standard_normal((10, 4, channels))
    at = np.arange(side) / side
    phase = random.random((len(classes), 4, 2))
    number = np.array([1, 1, 2, 2])[None, :, None]
    y = np.cos(2 * np.pi * (number * at + phase[..., :1]))
    x = np.cos(2 * np.pi * (number * at + phase[..., 1:]))
    return np.einsum("nky,nkx,nkc->nyxc", y, x, own[classes], optimize=True)


def batches(work: str, like: dict, steps: int):
    """Endless data with the shapes of a work's batch."""
    random = np.random.default_rng(0)
    for _ in range(steps):
        if work == "dit-train":
            n, side, _, channels = like["latent"].shape
            labels = random.integers(0, 10, n, dtype=np.int32)
            latent = waves(random, labels, channels, side)
            latent += 0.3 * random.standard_normal(latent.shape)
            yield {"latent": latent.astype(np.float32), "label": labels}
            continue
        n, side = like["image"].shape[:2]
        fields = waves(random, random.integers(0, 10, n), 3, side)
        edges = waves(random, random.integers(0, 10, n), 3, side) > 0.5
        image = np.clip(128 + 50 * fields + 40 * edges, 0, 255).astype(np.uint8)
        found = {"image": image}
        if "target" in like:
            _, tokens, width = like["target"].shape
            grid = round(tokens**0.5)
            patches = image.reshape(n, grid, side // grid, grid, side // grid, 3).mean((2, 4))
            directions = np.random.default_rng(2).standard_normal((3, width)) / 64
            found["target"] = np.float32((patches.reshape(n, tokens, 3) - 128) @ directions)
        yield found


def curve(name: str, variant: str, sizes: dict, steps: int) -> list[float]:
    """The loss of every step."""
    config = default_config()
    fields = VARIANTS[variant]
    changes = {f"precision.{s}.{key}": value for s in STAGES for key, value in fields.items()}
    changes["precision.perceptual.dtype"] = "bfloat16" if variant == "fast" else "float32"
    config.update_from_flattened_dict(sizes)
    override(config, changes)
    work, mesh = timed_workload(config, name), make_mesh()
    step, shardings = jit_step(work, mesh)
    seed = 1 if "seed" in variant else 0
    state = jax.jit(work.init, out_shardings=shardings)(jax.random.key(seed))
    frozen = {}
    for key, network in work.frozen.items():
        params, rest = network.init(jax.random.key(7))
        # heads of LPIPS weigh squared differences and are never negative
        heads = {part: value for part, value in params.items() if part.startswith("lin")}
        frozen[key] = place((params | jax.tree.map(abs, heads), rest), mesh)
    exact = fields["dtype"] == "float32"
    losses = []
    with jax.default_matmul_precision("highest") if exact else contextlib.nullcontext():
        for batch in batches(name, work.batch(np.random.default_rng(0)), steps):
            batch = put_batch(batch, mesh)
            state, figures = step(state, batch, jax.random.key(seed + 10), frozen, work.phase)
            losses.append(figures["loss" if "loss" in figures else "total"])
    return [float(loss) for loss in jax.device_get(losses)]


def main() -> None:
    """Trains all of it and writes the curves."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("works", nargs="+", choices=("dit-train", "tokenizer-train"))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--width", type=int, default=768, help="of LightningDiT, with 12 heads")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--out", default="runs/curves.json")
    options = parser.parse_args()
    sizes = SIZES | {"diffusion.model.hidden_size": options.width}
    result = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "sizes": sizes}
    for name in options.works:
        found = {
            variant: curve(name, variant, sizes, options.steps) for variant in options.variants
        }
        result[name] = found
        Path(options.out).parent.mkdir(parents=True, exist_ok=True)
        write_json(Path(options.out), result)
        for variant, losses in found.items():
            cut = losses[: len(losses) // WINDOW * WINDOW] or losses
            means = np.reshape(cut, (-1, min(WINDOW, len(cut)))).mean(1)
            line = [f"{name:16s} {variant:18s}", *(f"{mean:.5f}" for mean in means)]
            if "fp32" in found:
                apart = np.abs(np.subtract(losses, found["fp32"])[-WINDOW:]).mean()
                line.append(f"| step by step from fp32 in the last {WINDOW}: {apart:.5f}")
            print(*line, flush=True)


if __name__ == "__main__":
    main()
