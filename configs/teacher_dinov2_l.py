"""The semantic teacher alone: DINOv2-L and the downsampler that is distilled from it.

    python -m gae_jax import-torch --config=configs/teacher_dinov2_l.py \\
        --config.import_torch.backbone=dinov2_vitl14_pretrain.pth --config.data.root=IMAGENET
    python -m gae_jax teacher --config=configs/teacher_dinov2_l.py --config.data.root=IMAGENET

The argument behind a colon is the latents' width: ``teacher_dinov2_l.py:64``; 32 where none is
given. The tokenizer of the same run then takes this teacher; all its fields are those of
configs/gae_d32.py or gae_d64.py.
"""

from gae_jax.config import default_config, preset

WIDTHS = {"32": 32, "64": 64}  # [paper]


def get_config(latent_dim="32"):
    config = default_config()
    width = preset(WIDTHS, latent_dim, "teacher")
    config.teacher.model.latent_dim = width
    config.tokenizer.model.latent_dim = width
    return config
