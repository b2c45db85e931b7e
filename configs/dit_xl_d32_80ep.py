"""LightningDiT-XL/1 on GAE's 32 channels for 80 epochs, and the paper's samplers.

    python -m gae_jax diffusion --config=configs/dit_xl_d32_80ep.py --workdir=runs/gae_d32
    python -m gae_jax sample --config=configs/dit_xl_d32_80ep.py --workdir=runs/gae_d32

The run directory is that of the tokenizer and its latents, see configs/gae_d32.py. For a batch of
1,024 on few devices set diffusion.train.accumulate. The defaults are this setting; each has its
source in gae_jax/config/. Repeated here is what the paper's longer and wider runs change.
"""

from gae_jax.config import default_config


def get_config():
    config = default_config()
    config.diffusion.model.use_qknorm = False  # [code]
    config.diffusion.train.steps = 100_000  # [paper] 80 epochs
    config.sample.sde.update(time_shift=0.4, last_step="reference")  # [paper] [code]
    config.sample.ode.update(time_shift=0.4, guidance=2.5, guidance_start=0.25)  # [paper]
    return config
