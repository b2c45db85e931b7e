"""The semantic teacher: a downsampler on top of a frozen vision backbone.

Algorithm 1 of GAE: an attention layer over the backbone's tokens, then one Linear per window that
mixes its tokens down to ``latent_dim`` channels each. A feature decoder trains it to keep the
backbone's information, and is then dropped. Tables 1 and 2 compare it with simpler ones: without
windows, without the Linear, and a projection on singular vectors that nothing trains.
"""

import math
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from gae_jax.kernels.norm import check_kernels
from gae_jax.nn.attention import Attention
from gae_jax.nn.layers import Buffer, check_remat, linear, rms_norm
from gae_jax.nn.network import Network
from gae_jax.nn.vit import Block, position_table, through_blocks
from gae_jax.pretrained.backbone import backbone_shape
from gae_jax.runtime.mesh import to_host
from gae_jax.tokenizers.pae_prior import PriorTeacher

# Arms of Table 2. The paper does not give the exact form of the first; ours lets the output
# projection of the attention go straight to the latent.
DOWNSAMPLERS = ("attention", "attention_linear", "attention_conv")


def to_windows(x: jax.Array, window: int) -> jax.Array:
    """Split [B, N, C] on a square grid into [B, windows, window^2 * C], row-major inside."""
    grid = math.isqrt(x.shape[1])
    return rearrange(
        x,
        "b (h p w q) c -> b (h w) (p q c)",
        h=grid // window,
        p=window,
        w=grid // window,
        q=window,
    )


def from_windows(x: jax.Array, window: int, grid: int) -> jax.Array:
    """Join [B, windows, window^2 * D] into [B, grid^2, D]; the inverse of `to_windows`."""
    return rearrange(x, "b (h w) (p q d) -> b (h p w q) d", h=grid // window, p=window, q=window)


class SemanticTeacher(nnx.Module):
    """Downsampler and feature decoder; the backbone stays outside.

    ``takes`` says which of the backbone's features it takes, as arguments of their method.

    Args:
      feature_dim: width C of the backbone's tokens.
      latent_dim: channels d of the semantic latent.
      decoder_layers: blocks of the feature decoder.
      num_patches: tokens N of the backbone, a square number.
      downsampler: "attention" (from C channels to d), "attention_linear" (attention, then one
        Linear for every token) or "attention_conv" (attention, then one Linear for every window).
      window_size: edge w of the windows of "attention_conv", the only one to have any; must divide
        the grid.
      heads: attention heads.
      remat: of the decoder's blocks, as `layers.REMAT`.
      attention: as `Attention`.
      kernels: how the decoder's norms are computed, as `kernels.KERNELS`.
    """

    takes: ClassVar[dict] = {}

    def __init__(
        self,
        *,
        feature_dim: int,
        latent_dim: int,
        decoder_layers: int,
        num_patches: int,
        downsampler: str = "attention_conv",
        window_size: int,
        heads: int,
        remat: str = "none",
        attention: str = "xla",
        kernels: str = "xla",
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        if downsampler not in DOWNSAMPLERS:
            raise ValueError(
                f"downsampler is {downsampler!r}; use one of {', '.join(DOWNSAMPLERS)}"
            )
        window_size = window_size if downsampler == "attention_conv" else 1
        self.downsampler, self.window_size = downsampler, window_size
        self.remat, self.kernels = check_remat(remat), check_kernels(kernels)
        self.grid = math.isqrt(num_patches)
        if self.grid**2 != num_patches or self.grid % window_size:
            raise ValueError(
                f"teacher: {num_patches} patches do not form a square grid that windows of "
                f"{window_size} x {window_size} tile"
            )
        make = partial(linear, dtype=dtype, rngs=rngs)
        common = dict(attention=attention, dtype=dtype, rngs=rngs)
        self.pos_embed_pro = position_table(rngs, num_patches, feature_dim)
        straight = latent_dim if downsampler == "attention" else None
        self.projector_block = nnx.Dict(
            attn=Attention(feature_dim, heads, features_out=straight, **common)
        )
        if not straight:
            area = window_size**2
            self.to_latent = make(area * feature_dim, area * latent_dim)
        self.recon_head = make(latent_dim, feature_dim)
        self.pos_embed_dec = position_table(rngs, num_patches, feature_dim)
        self.decoder_layers = nnx.List(
            Block(feature_dim, heads, **common) for _ in range(decoder_layers)
        )

    def downsample(self, features: jax.Array) -> jax.Array:
        """Map backbone tokens [B, N, C] -> semantic latents [B, N, d] with mean square 1."""
        x = rms_norm(features)
        x = x + self.pos_embed_pro[...].astype(x.dtype)
        x = rms_norm(self.projector_block["attn"](rms_norm(x)))
        if self.downsampler == "attention":
            return x
        x = self.to_latent(to_windows(x, self.window_size))
        return rms_norm(from_windows(x, self.window_size, self.grid))

    def reconstruct(self, latents: jax.Array) -> jax.Array:
        """Map semantic latents [B, N, d] -> features [B, N, C] with mean square 1."""
        x = self.recon_head(latents)
        x = x + self.pos_embed_dec[...].astype(x.dtype)
        return through_blocks(self.decoder_layers, x, remat=self.remat, kernels=self.kernels)


class SVDTeacher(nnx.Module):
    """The untrained teacher of Table 1: a projection on principal directions.

    Args:
      feature_dim: width C of the backbone's tokens.
      latent_dim: channels d of the semantic latent, at most C.
      num_patches: tokens N of the backbone.
    """

    takes: ClassVar[dict] = {}

    def __init__(self, *, feature_dim: int, latent_dim: int, num_patches: int, rngs: nnx.Rngs):
        del rngs  # nothing random: `svd_projection` gives the values
        if latent_dim > feature_dim:
            raise ValueError(f"teacher: {feature_dim} channels have no {latent_dim} directions")
        self.num_patches = num_patches
        self.projection = Buffer(jnp.zeros((feature_dim, latent_dim), jnp.float32))

    def downsample(self, features: jax.Array) -> jax.Array:
        """Map backbone tokens [B, N, C] -> semantic latents [B, N, d] with mean square 1."""
        return rms_norm(rms_norm(features) @ self.projection[...])

    def reconstruct(self, latents: jax.Array) -> jax.Array:
        """Map semantic latents [B, N, d] -> features [B, N, C] with mean square 1."""
        return rms_norm(latents @ self.projection[...].T)


@jax.jit
def _second_moment(features: jax.Array, valid: jax.Array) -> jax.Array:
    tokens = rms_norm(features.astype(jnp.float32)) * valid[:, None, None]
    return jnp.einsum("bnc,bnd->cd", tokens, tokens, precision=jax.lax.Precision.HIGHEST)


class SecondMoment:
    """Sum of t t^T over the tokens t = rms(features) of any number of images.

    A batch is summed on the device in fp32, the batches on the host in float64.

    Args:
      dim: width C of the tokens.
    """

    def __init__(self, dim: int):
        self.total = np.zeros((dim, dim), np.float64)
        self.images = 0

    def add(self, features: jax.Array, valid: np.ndarray | None = None) -> None:
        """Add a batch of tokens [B, N, C]; images [B] that are not ``valid`` are ignored."""
        valid = np.ones(len(features), bool) if valid is None else valid
        self.total += to_host(_second_moment(features, valid)).astype(np.float64)
        self.images += int(np.sum(valid))


def svd_projection(second_moment: np.ndarray, latent_dim: int) -> np.ndarray:
    """Compute the first right singular vectors of the tokens, [C, latent_dim], not centred.

    They are the eigenvectors of the `SecondMoment` [C, C], largest first. The component of each
    that is largest in size is positive.
    """
    _, vectors = np.linalg.eigh(second_moment)
    top = vectors[:, ::-1][:, :latent_dim]
    largest = np.take_along_axis(top, np.argmax(np.abs(top), axis=0)[None], axis=0)
    return top * np.sign(largest)


def teacher_sizes(model, backbone) -> dict:
    """Return all arguments of `SemanticTeacher` for the backbone of a section."""
    grid, width = backbone_shape(backbone)
    return dict(**model, feature_dim=width, num_patches=grid**2)


def teacher_network(model, backbone, kind: str = "learned", **compute) -> Network:
    """Return the network of a teacher.

    Args:
      kind: "learned"; "svd", which has ``latent_dim`` only; "prior".
      compute: dtype, remat, attention and kernels, of a learned one only.
    """
    sizes = teacher_sizes(model, backbone)
    if kind == "prior":
        unused = ("downsampler", "window_size")
        sizes = {key: value for key, value in sizes.items() if key not in unused}
        return Network(lambda rngs: PriorTeacher(**sizes, rngs=rngs))
    if kind == "svd":
        sizes = {key: sizes[key] for key in ("feature_dim", "latent_dim", "num_patches")}
        return Network(lambda rngs: SVDTeacher(**sizes, rngs=rngs))
    return Network(lambda rngs: SemanticTeacher(**sizes, **compute, rngs=rngs))
