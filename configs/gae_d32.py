"""GAE with 32 latent channels and LightningDiT-XL/1, at the paper's size (80-epoch setting).

    python -m gae_jax tokenizer --config=configs/gae_d32.py --config.data.root=IMAGENET

The argument behind a colon is the autoencoder's size in the paper's Table 8, L where none is given:
``--config=configs/gae_d32.py:B``. Every field and where its value comes from is in
gae_jax/config/.
"""

from gae_jax.config import default_config, preset
from gae_jax.tokenizers.gae_kind import SIZES


def get_config(size="L"):
    config = default_config()
    config.tokenizer.model.update(preset(SIZES, size, "autoencoder"))  # [paper]
    return config
