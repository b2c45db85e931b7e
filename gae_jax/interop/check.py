"""Compare a network before and after conversion of its weights, by outputs on a fixed batch."""

from functools import singledispatch

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gae_jax.generators.latent_diffusion import LatentDiffusion
from gae_jax.nn.network import Arrays, Network
from gae_jax.objectives.dino_discriminator import DinoFeatures
from gae_jax.pretrained.backbone import VisionBackbone
from gae_jax.pretrained.efficientnet import EfficientNetBackbone, EfficientNetLite0
from gae_jax.pretrained.inception import FIDInception
from gae_jax.pretrained.lpips import LPIPS
from gae_jax.tokenizers.conv import ConvTokenizer
from gae_jax.tokenizers.gae import GAE
from gae_jax.tokenizers.gae_teacher import SemanticTeacher
from gae_jax.tokenizers.pae import PAETokenizer
from gae_jax.tokenizers.rae import RAE

BATCH = 2


def outputs(network: Network, arrays: Arrays) -> dict[str, np.ndarray]:
    """Compute name -> output of the network on its fixed batch, which never changes."""
    run = jax.jit(lambda arrays: _on_fixed_batch(network(*arrays)))
    return jax.device_get(run(arrays))


def largest_difference(before: dict, after: dict) -> dict[str, float]:
    """Return per output the largest absolute difference, over the largest value before."""
    differences = {}
    for name, old in before.items():
        difference = np.max(np.abs(after[name].astype(np.float64) - old.astype(np.float64)))
        scale = max(float(np.max(np.abs(old))), float(np.finfo(np.float32).tiny))
        differences[name] = float(difference) / scale if np.isfinite(difference) else np.inf
    return differences


def _numbers(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).uniform(-1, 1, shape), jnp.float32)


@singledispatch
def _on_fixed_batch(model: nnx.Module) -> dict[str, jax.Array]:
    raise TypeError(f"no fixed batch for {type(model).__name__}")


@_on_fixed_batch.register
def _(model: GAE):
    size = model.foundation_encoder.image_size
    latents = model.encode(_numbers(BATCH, size, size, 3))
    return {"latents": latents, "images": model.decode(latents)}


@_on_fixed_batch.register
def _(model: PAETokenizer):
    size = model.latent_shape[0] * model.pae.decoder.patch_size
    latents = model.encode(_numbers(BATCH, size, size, 3))
    return {"latents": latents, "images": model.decode(latents)}


@_on_fixed_batch.register
def _(model: RAE):
    size = model.decoder.grid * model.decoder.patch_size
    latents = model.encode(_numbers(BATCH, size, size, 3))
    return {"latents": latents, "images": model.decode(latents)}


@_on_fixed_batch.register
def _(model: ConvTokenizer):
    latents = model.encode(_numbers(BATCH, model.image_size, model.image_size, 3))
    return {"latents": latents, "images": model.decode(latents)}


@_on_fixed_batch.register
def _(model: SemanticTeacher):
    tokens, width = model.pos_embed_pro.shape[1:]
    latents = model.downsample(_numbers(BATCH, tokens, width))
    return {"latents": latents, "features": model.reconstruct(latents)}


@_on_fixed_batch.register
def _(model: LatentDiffusion):
    x = model.normalize(_numbers(BATCH, *model.latent_shape))
    t = jnp.linspace(0.2, 0.8, BATCH)
    labels = jnp.arange(BATCH) % model.dit.num_classes
    return {"velocity": model.output(x, t, labels), "latents": model.denormalize(x)}


@_on_fixed_batch.register
def _(model: VisionBackbone):
    return {"features": model.features(_numbers(BATCH, model.input_size, model.input_size, 3))}


@_on_fixed_batch.register
def _(model: EfficientNetBackbone):
    images = _numbers(BATCH, model.input_size, model.input_size, 3)
    return {"features": model.features(images), "logits": model.class_logits(images)}


@_on_fixed_batch.register
def _(model: EfficientNetLite0):
    return {"logits": model(_numbers(BATCH, 224, 224, 3))}


@_on_fixed_batch.register
def _(model: FIDInception):
    return model(jnp.asarray(127.5 + 127.5 * _numbers(BATCH, 64, 64, 3), jnp.uint8))


@_on_fixed_batch.register
def _(model: DinoFeatures):
    return {"maps": jnp.stack(model.maps(_numbers(BATCH, 64, 64, 3)))}


@_on_fixed_batch.register
def _(model: LPIPS):
    a, b = jnp.split(_numbers(2 * BATCH, 64, 64, 3), 2)
    return {"distances": model(a, b)}
