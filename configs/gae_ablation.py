"""GAE as in the paper's ablations: half the epochs and less noise; size as configs/gae_d32.py.

    python -m gae_jax tokenizer --config=configs/gae_ablation.py --workdir=runs/no-align \\
        --config.data.root=IMAGENET --config.tokenizer.losses.align=0

Every arm of the ablations is one field or two:

    Table 1   tokenizer.align.point=pre | post | latent; teacher.kind=svd
    Table 2   teacher.model.downsampler=attention | attention_linear | attention_conv
    Table 4   tokenizer.model.noise_std; both latent_dim
    Table 6   tokenizer.losses.align=0 | 0.5 | 1 | 2
    Table 7   tokenizer.losses.align=0 and tokenizer.model.bottleneck=kl, tokenizer.losses.kl=0.1
    Table 8   configs/gae_ablation.py:S | :B | :L
    Table 11  backbone.name=dinov2 | mae
"""

from gae_jax.config import default_config, preset
from gae_jax.tokenizers.gae_kind import SIZES


def get_config(size="L"):
    config = default_config()
    config.tokenizer.model.update(preset(SIZES, size, "autoencoder"), noise_std=0.1)  # [paper]
    config.tokenizer.train.steps = 125_000  # [paper] 100 epochs
    config.sample.ode.update(time_shift=0.7, guidance=1.0)  # [paper]
    return config
