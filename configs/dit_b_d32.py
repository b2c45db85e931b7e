"""LightningDiT-B/1 on GAE's 32 channels, for small budgets: a fifth of XL/1's parameters.

    python -m gae_jax diffusion --config=configs/dit_b_d32.py --workdir=runs/gae_d32-b

The paper has no run of this size: width, depth and heads are the released preset [code], the
length is ours; all else as configs/dit_xl_d32_80ep.py.
"""

from gae_jax.config import default_config
from gae_jax.generators.dit import SIZES


def get_config():
    config = default_config()
    config.diffusion.model.update(SIZES["B/1"])  # [code]
    config.diffusion.train.steps = 100_000  # [ours] 80 epochs, as the paper's XL/1
    config.sample.sde.update(time_shift=0.4, last_step="reference")  # [paper] [code]
    return config
