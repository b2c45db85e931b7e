"""LightningDiT-XL/1 on GAE's 64 channels; see configs/dit_xl_d32_80ep.py and configs/gae_d64.py.

    python -m gae_jax diffusion --config=configs/dit_xl_d64.py --workdir=runs/gae_d64

The argument behind a colon is the number of epochs of the paper's runs, 80 where none is given:
``dit_xl_d64.py:800``. The paper samples these without guidance.
"""

from gae_jax.config import default_config, preset

STEPS = {"80": 100_000, "160": 200_000, "800": 1_000_000}  # [paper]


def get_config(epochs="80"):
    config = default_config()
    config.teacher.model.latent_dim = config.tokenizer.model.latent_dim = 64  # [paper]
    config.diffusion.train.steps = preset(STEPS, epochs, "number of epochs")
    # [code] on at 800 epochs with 32 channels; nothing is said of 64
    config.diffusion.model.use_qknorm = epochs == "800"
    config.sample.sets = ("sde",)  # [paper]
    config.sample.sde.update(time_shift=0.5, last_step="reference")  # [paper] [code]
    return config
