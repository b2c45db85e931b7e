"""The Geometric Autoencoder; its section is ``tokenizer.model``, see `config.default_config`."""

from gae_jax.tokenizers.base import Kind
from gae_jax.tokenizers.gae_networks import GAE


def build(section, backbone, *, image_size: int, **compute) -> GAE:
    """A `GAE`; its section has the size of the images too."""
    del backbone, image_size
    return GAE(**section, **compute)


def latent_shape(section, backbone, image_size: int) -> tuple[int, int, int]:
    """(h, w, d) of the section."""
    del backbone, image_size
    grid = section["image_size"] // section["patch_size"]
    return grid, grid, section["latent_dim"]


KIND = Kind(
    sizes=dict,
    build=build,
    latent_shape=latent_shape,
    terms=("l1", "perceptual", "gan", "align", "kl"),
    kernels=True,
)
