"""GAE with 32 latent channels and LightningDiT-XL/1, at the paper's size (80-epoch setting).

    python -m gae_jax import-torch --config=configs/gae_d32.py --workdir=runs/released \
        --config.import_torch.tokenizer=gae_d32_inference.ckpt \
        --config.import_torch.diffusion=0100000.pt \
        --config.import_torch.statistics=latents_stats.pt

Every field and where its value comes from is in gae_jax/config.py; nothing differs here.
"""

from gae_jax.config import default_config


def get_config():
    return default_config()
