"""The weight of the alignment by gradients at the encoder's last layer, as in VA-VAE's training.

weight = losses.align * |g_rec| / (|g_align| + 1e-4), the ratio at most 1e8 and a constant to the
gradient; g are the gradients of the reconstruction (L1 and perceptual term, weighted) and of the
alignment at the kernel of the last layer that `Kind.encoder_last` names. The formula is that of
hustvl/LightningDiT (calculate_adaptive_weight_vf), known from copies of it. There the
reconstruction is a sum over an image and here a mean: gradient and weight shrink alike, so the sum
of the terms is the same but for a factor of all of them.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from gae_jax.nn import losses
from gae_jax.nn.network import Params
from gae_jax.tokenizers import kind_of

LARGEST = 1e8  # of the ratio


def adapts(config: Mapping, terms: tuple[str, ...]) -> bool:
    """Return whether the weight follows gradients in a step with these terms.

    Args:
      config: the section ``tokenizer``.
    """
    return "align" in terms and config["align"]["weight"] == "adaptive"


def vjp_by_parts(function: Callable, params: Params) -> tuple[Any, Callable, Any]:
    """Compute `jax.vjp` with ``has_aux`` of a function with several outputs.

    The way back also takes one output's gradient alone, ``back(gradient, index)``, and then nothing
    is computed for the others: a gradient of zeros would go all the way.
    """
    outputs, push, aux = jax.linearize(function, params, has_aux=True)

    def back(on: Any, index: int | None = None) -> tuple[Params]:
        def part(tangent):
            return push(tangent) if index is None else push(tangent)[index]

        return jax.linear_transpose(part, params)(on)

    return outputs, back, aux


def align_scale(
    config: Mapping, by_pixels: Params, by_tokens: Params
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return (weight of the alignment, metrics).

    Args:
      config: the section ``tokenizer``.
      by_pixels, by_tokens: gradients of the reconstruction and of the alignment without its weight,
        by the tokenizer's parameters. One leaf is read; under jit the others are not computed.
    """
    norms = []
    for leaf in (by_pixels, by_tokens):
        for name in kind_of(config).encoder_last.split("/"):
            leaf = leaf[name]
        norms.append(jnp.linalg.norm(leaf))
    weight = config["losses"]["align"] * losses.adaptive_weight(*norms, largest=LARGEST)
    figures = {
        "align_weight": weight,
        "encoder_last_layer/reconstruction": norms[0],
        "encoder_last_layer/align": weight * norms[1],
    }
    return weight, figures
