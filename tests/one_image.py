"""Can a diffusion model overfit one image of wide latents? RAE's bound, at its width.

    PYTHONPATH=. python tests/one_image.py --out=runs/one_image.json

A network of width d cannot give back noise of n > d channels: the mean squared error of its
velocity stays above about (n - d) / n, however long it learns (arXiv 2510.11690). The image is
16 x 16 tokens of 768 normal numbers. Each size is trained on it alone, in bf16; printed is the mean
over the last 50 steps.
"""

import argparse
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gae_jax.generators import flow
from gae_jax.generators.latent_diffusion import LatentDiffusion
from gae_jax.nn.network import Network
from gae_jax.runtime.files import write_json

CHANNELS, GRID = 768, 16
SIZES = {
    "LightningDiT 384": dict(hidden_size=384, num_heads=6),
    "LightningDiT 768": dict(hidden_size=768, num_heads=12),
    "DiT-DH 384, head 2048": dict(
        hidden_size=384, num_heads=6, name="ddt",
        head=dict(hidden_size=2048, depth=2, num_heads=16),
    ),
}  # fmt: skip


def fit(
    sizes: dict, *, channels=CHANNELS, grid=GRID, steps=1200, batch=8, rate=5e-4,
    dtype="bfloat16", last=50,
) -> float:  # fmt: skip
    """Mean squared error of the velocity of one image, over the last steps of the training.

    Args:
      sizes: of the network, as `LatentDiffusion` takes them.
      rate: of Adam at the first step, from where it falls to nothing by a cosine.
    """
    network = Network(
        lambda rngs: LatentDiffusion(
            mean=np.zeros(channels), std=np.ones(channels), input_size=grid, in_channels=channels,
            num_classes=1, class_dropout_prob=0.0, dtype=dtype, **sizes, rngs=rngs,
        )
    )  # fmt: skip
    image = jax.random.normal(jax.random.key(1), (1, grid, grid, channels))
    image = jnp.broadcast_to(image, (batch, *image.shape[1:]))
    labels = jnp.zeros(batch, jnp.int32)
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps))

    @jax.jit
    def train(key):
        params, rest = network.init(key)

        def loss(params, key):
            noise_key, time_key = jax.random.split(key)
            noise = jax.random.normal(noise_key, image.shape)
            t = jax.random.uniform(time_key, (batch,), maxval=0.9)
            x = flow.interpolate(noise, image, t)
            found = network(params, rest).output(x, t, labels)
            return jnp.mean(jnp.square(found - flow.target_velocity(noise, image, t)))

        def step(carry, key):
            value, grads = jax.value_and_grad(loss)(carry[0], key)
            updates, state = optimizer.update(grads, carry[1])
            return (optax.apply_updates(carry[0], updates), state), value

        keys = jax.random.split(jax.random.key(2), steps)
        return jax.lax.scan(step, (params, optimizer.init(params)), keys)[1]

    return float(jnp.mean(train(jax.random.key(0))[-last:]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--out", type=Path, default=Path("runs/one_image.json"))
    given = parser.parse_args()
    found = {"device": jax.devices()[0].device_kind, "steps": given.steps, "depth": given.depth}
    for name, sizes in SIZES.items():
        began = time.monotonic()
        found[name] = fit(sizes | {"depth": given.depth}, steps=given.steps)
        print(f"{name}: {found[name]:.4f} in {time.monotonic() - began:.0f} s", flush=True)
        given.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(given.out, found)


if __name__ == "__main__":
    main()
