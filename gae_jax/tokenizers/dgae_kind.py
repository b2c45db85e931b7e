"""DGAE as the pipeline knows it."""

import math
from collections.abc import Mapping

from gae_jax.tokenizers import conv_kind
from gae_jax.tokenizers.kind import Kind

# Decoders of epsilon-VAE by its names, as arguments of `UNetModel`.
DECODERS = {
    "B": dict(model_channels=64, num_res_blocks=2),
    "M": dict(model_channels=96, num_res_blocks=2),
    "L": dict(model_channels=128, num_res_blocks=2),
    "XL": dict(model_channels=128, num_res_blocks=4),
    "H": dict(model_channels=256, num_res_blocks=2),
}
# Downsampling factor -> channels of the latent, levels of the encoder.
LATENTS = {
    "f8": dict(latent_dim=4, ch_mult=(1, 2, 4, 4)),
    "f16": dict(latent_dim=16, ch_mult=(1, 1, 2, 2, 4)),
    "f32": dict(latent_dim=32, ch_mult=(1, 1, 2, 2, 4, 4)),
}
DECODE_SAMPLERS = ("euler", "euler_maruyama")
# Convolutions of encoder and U-Net: their outputs are split. Those of one row come before the rules
# of Linear layers with the same names.
RULES = (
    *conv_kind.RULES,
    (r"(put_blocks/\d+|middle_block)/1/(qkv|proj_out)/kernel$", (None, None, "fsdp")),
    (r"put_blocks/\d+/\d(/op|/conv|)/kernel$", (None, None, None, "fsdp")),
    (r"((in|out)_layers/\d|skip_connection|/out/2)/kernel$", (None, None, None, "fsdp")),
    (r"(time_embed/\d|emb_layers/1)/kernel$", ("fsdp", None)),  # outputs are split in two
)


def kl_weight(latent_shape: tuple[int, int, int], image_size: int, weight: float = 1e-6) -> float:
    """Return the weight of `losses.gaussian_kl` that equals ``weight`` by LDM's rule.

    LDM (arXiv 2112.10752) weighs a KL that is summed over an image's latent against an error that
    is summed over its pixels. Here both are means, so it is weight * h w d / (3 image_size^2):
    1e-6 becomes 2.08e-8 at f8 with 4 channels and at f16 with 16, 1.04e-8 at f32 with 32.
    """
    return weight * math.prod(latent_shape) / (3 * image_size**2)


def shape_of(
    image_size: int, latent_dim: int, encoder: Mapping, decoder: Mapping
) -> tuple[int, int, int]:
    """Return (h, w, d) of the latents; arguments as `DGAE`.

    Raises:
      ValueError: if the levels of encoder or decoder do not halve the images evenly.
    """
    factor, of_decoder = (2 ** (len(m) - 1) for m in (encoder["ch_mult"], decoder["channel_mult"]))
    for name, shrink in (("encoder.ch_mult", factor), ("decoder.channel_mult", of_decoder)):
        if image_size % shrink:
            raise ValueError(
                f"images of {image_size} pixels are no multiple of {shrink}, by which {name} "
                "shrinks them; take away levels or resize the images"
            )
    return image_size // factor, image_size // factor, latent_dim


def sizes() -> dict:
    """Return the defaults of ``tokenizer.dgae``. [second hand]: epsilon-VAE's, not the paper's."""
    return dict(
        latent_dim=16,  # [ours] half of what GAE and VA-VAE have at f16
        encoder=dict(  # SD-VAE's design
            ch=128,  # [paper] of SD-VAE
            ch_mult=(1, 1, 2, 2, 4),  # f16
            num_res_blocks=2,  # [paper] of SD-VAE
            attn_resolutions=(),  # [paper] of SD-VAE: in the middle only
        ),
        decoder=dict(  # L of epsilon-VAE
            model_channels=128,  # [second hand]
            channel_mult=(1, 1, 2, 2, 4),  # [second hand]
            num_res_blocks=2,  # [second hand]
            attention_resolutions=(16,),  # [second hand] factors: 16 x 16 places of 256 pixels
            num_head_channels=64,  # [ours] as ADM
            use_scale_shift_norm=True,  # [second hand] as ADM
            resblock_updown=True,  # [ours] as ADM
        ),
        time="logit_normal",  # [second hand] logit_normal | uniform, as DiTo
        time_mean=0.0,  # [second hand]
        time_std=1.0,  # [second hand]
        sigma_min=0.0,  # 1e-5: as DiTo
        gamma=1.0,  # 0.6: epsilon-VAE's noisier inputs
        decode_steps=10,  # [second hand] epsilon-VAE's best with LPIPS, without a GAN
        decode_sampler="euler",  # [second hand] euler | euler_maruyama
    )


def build(section, backbone, *, image_size: int, decode_steps: int = 0, **compute):
    """Build a `DGAE`; ``decode_steps`` replaces the section's value unless it is 0."""
    from gae_jax.tokenizers.dgae import DGAE

    del backbone
    section = {**section, "decode_steps": decode_steps or section["decode_steps"]}
    return DGAE(image_size=image_size, **section, **compute)


def latent_shape(section, backbone, image_size: int) -> tuple[int, int, int]:
    """Return (h, w, d) of the section; raises as `shape_of`."""
    del backbone
    return shape_of(image_size, *(section[k] for k in ("latent_dim", "encoder", "decoder")))


KIND = Kind(
    sizes=sizes,
    build=build,
    latent_shape=latent_shape,
    # [second hand] velocity, perceptual and kl; the others are ours, and no discriminator is served
    terms=("velocity", "perceptual", "kl", "l1", "align"),
    training_fields=("time", "time_mean", "time_std", "decode_steps", "decode_sampler"),
    choices={"time": ("logit_normal", "uniform"), "decode_sampler": DECODE_SAMPLERS},
    rules=RULES,
)
