"""The section ``latents``."""

from gae_jax.config.choices import choice


def latents_section() -> dict:
    """How the training set is encoded, and what is kept of it."""
    return dict(
        batch_size=256,
        shard_size=8_192,  # images
        # that they are kept in; bfloat16 is half the size
        dtype=choice("float32", "data.latent_files:DTYPES"),
        # what mean and std for the diffusion model are of: a channel | an element, as RAE's,
        # of every channel at every position
        statistics=choice("channel", "element"),
        variance_only=False,  # the mean is left in, as RAE's released statistics do
    )
