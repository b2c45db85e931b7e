"""GAE with 64 latent channels; size and fields as configs/gae_d32.py.

python -m gae_jax tokenizer --config=configs/gae_d64.py --config.data.root=IMAGENET
"""

from gae_jax.config import default_config, preset
from gae_jax.tokenizers.gae_kind import SIZES


def get_config(size="L"):
    config = default_config()
    config.teacher.model.latent_dim = 64  # [paper]
    config.tokenizer.model.update(preset(SIZES, size, "autoencoder"), latent_dim=64)  # [paper]
    config.sample.sde.time_shift = 0.5  # [paper]
    config.sample.ode.time_shift = 0.5  # [paper]
    return config
