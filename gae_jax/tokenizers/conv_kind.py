"""The convolutional autoencoder, VA-VAE's or SD-VAE's, as the pipeline knows it."""

from gae_jax.tokenizers.kind import Kind

# The released networks at 256 pixels, as arguments of `ConvEncoder` and `ConvDecoder`.
PRESETS = {
    # Stable Diffusion's, f8; attention in the middle only
    "sdvae": dict(ch_mult=(1, 2, 4, 4), attn_resolutions=(), z_channels=4, embed_dim=4),
    # f16, 32 channels; attention at 16 x 16 as well
    "vavae": dict(ch_mult=(1, 1, 2, 2, 4), attn_resolutions=(16,), z_channels=32, embed_dim=32),
}
# Convolutions of encoder and decoder: their outputs are split. Those of one pixel come before the
# rules of Linear layers with the same names.
RULES = (
    (r"/attn(_1|/\d+)/(q|k|v|proj_out)/kernel$", (None, None, None, "fsdp")),
    (
        r"(quant_conv|/conv(_in|_out|[12])|nin_shortcut|(down|up)sample/conv)/kernel$",
        (None, None, None, "fsdp"),
    ),
)


def factor(ch_mult, image_size: int) -> int:
    """Return the downsampling factor f of these levels; ValueError if it does not divide images."""
    f = 2 ** (len(ch_mult) - 1)
    if image_size % f:
        raise ValueError(
            f"ch_mult has {len(ch_mult)} levels, which shrink images {f} times, but "
            f"data.image_size is {image_size}; use a multiple of {f} or fewer levels"
        )
    return f


def sizes() -> dict:
    """Return the defaults of ``tokenizer.conv``, VA-VAE's; `PRESETS` has SD-VAE's too."""
    return dict(
        ch=128,  # [code]
        ch_mult=(1, 1, 2, 2, 4),  # [code] f = 2^(levels - 1)
        num_res_blocks=2,  # [code]
        # [code] edges of maps with attention, for images of resolution pixels
        attn_resolutions=(16,),
        resolution=256,  # [code]
        z_channels=32,  # [code] between the networks and the 1x1 convolutions at the latent
        embed_dim=32,  # [code] channels of the latent
    )


def build(section, backbone, *, image_size, dtype, remat, attention, rngs):
    """Build a `ConvTokenizer`; ``attention`` is ignored: maps with one wide head use XLA's."""
    from gae_jax.tokenizers.conv import ConvTokenizer

    del backbone, attention
    return ConvTokenizer(**section, image_size=image_size, dtype=dtype, remat=remat, rngs=rngs)


def latent_shape(section, backbone, image_size: int) -> tuple[int, int, int]:
    """Return (h, w, d) of the latents."""
    del backbone
    grid = image_size // factor(section["ch_mult"], image_size)
    return grid, grid, section["embed_dim"]


def counterpart():
    """Return the autoencoder of LDM and LightningDiT."""
    from gae_jax.tokenizers.conv_torch import COUNTERPART

    return COUNTERPART


KIND = Kind(
    sizes=sizes,
    build=build,
    latent_shape=latent_shape,
    terms=("l1", "perceptual", "gan", "align", "kl"),
    encoder_last="encoder/encoder/conv_out/kernel",
    rules=RULES,
    torch=counterpart,
)
