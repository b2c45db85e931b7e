"""LightningDiT-XL/1 on GAE's 32 channels for 800 epochs; see configs/dit_xl_d32_80ep.py.

python -m gae_jax diffusion --config=configs/dit_xl_d32_800ep.py --workdir=runs/gae_d32-800ep
"""

from gae_jax.config import default_config


def get_config():
    config = default_config()
    config.diffusion.model.use_qknorm = True  # [code]
    config.diffusion.train.steps = 1_000_000  # [paper] 800 epochs
    config.sample.sde.update(time_shift=0.4, last_step="reference")  # [paper] [code]
    config.sample.ode.update(time_shift=0.4, guidance=3.3, guidance_start=0.3)  # [paper]
    return config
