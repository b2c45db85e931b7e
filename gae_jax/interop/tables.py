"""Which released tensor is which of our arrays: one table per architecture.

A row is (torch name, our path, transform), where ``{n}`` stands for the number of a block or
layer and the transform is one of `gae_jax.interop.convert`. A row applies to a network that has
an array at the path, so rows of options that are off (q and k norms) are passed over. Rows with a
derived transform say which torch buffer follows from the shape of the array at the path and the
sizes of the network, if these ask for one.
"""

from typing import NamedTuple

from flax import nnx

from gae_jax.generators import dit
from gae_jax.objectives import patchgan as discriminator
from gae_jax.tokenizers import gae_networks as gae
from gae_jax.tokenizers import gae_teacher as teacher


class Row(NamedTuple):
    torch: str
    ours: str
    transform: str


class Table(NamedTuple):
    module: type[nnx.Module]
    rows: tuple[Row, ...]


def _linear(*names: str) -> tuple[Row, ...]:
    """Linear layers without bias that both sides call the same."""
    return tuple(Row(f"{name}.weight", f"{name}.kernel", "linear") for name in names)


def _same(*names: str) -> tuple[Row, ...]:
    return tuple(Row(name, name, "same") for name in names)


def _biased(torch: str, ours: str | None = None) -> tuple[Row, ...]:
    """A Linear layer with bias."""
    ours = ours or torch
    return (
        Row(f"{torch}.weight", f"{ours}.kernel", "linear"),
        Row(f"{torch}.bias", f"{ours}.bias", "same"),
    )


def _vit_blocks(prefix: str) -> tuple[Row, ...]:
    layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.gate", "mlp.fc2")
    return _linear(*(f"{prefix}.{{n}}.{layer}" for layer in layers))


GAE = Table(
    gae.GAE,
    (
        Row(
            "foundation_encoder.patch_embed.weight",
            "foundation_encoder.patch_embed.kernel",
            "conv",
        ),
        *_same("foundation_encoder.pos_embed"),
        *_vit_blocks("foundation_encoder.blocks"),
        *_linear("foundation_encoder.proj_out", "adapter.model", "decoder.z_proj"),
        *_same("decoder.pos_embed"),
        *_vit_blocks("decoder.blocks"),
        *_linear("decoder.linear_out"),
        Row("loss.*", "", "unused"),  # discriminator and LPIPS of a training's file
    ),
)

TEACHER = Table(
    teacher.SemanticTeacher,
    (
        *_same("pos_embed_pro"),
        *_linear("projector_block.attn.qkv", "projector_block.attn.proj", "to_latent"),
        *_same("pos_embed_dec"),
        *_vit_blocks("decoder_layers"),
        *_linear("recon_head"),
    ),
)

DIT = Table(
    dit.LightningDiT,
    (
        Row("x_embedder.proj.weight", "x_embedder.proj.kernel", "conv"),
        *_same("x_embedder.proj.bias"),
        *_biased("t_embedder.mlp.{n}"),
        Row("y_embedder.embedding_table.weight", "y_embedder.embedding_table.embedding", "same"),
        *_same("pos_embed"),
        Row("feat_rope.freqs_cos", "pos_embed", "rope_cos"),
        Row("feat_rope.freqs_sin", "pos_embed", "rope_sin"),
        *_same("blocks.{n}.norm1.weight", "blocks.{n}.norm2.weight"),
        Row("blocks.{n}.attn.qkv.weight", "blocks.{n}.attn.qkv.kernel", "rope_linear"),
        Row("blocks.{n}.attn.qkv.bias", "blocks.{n}.attn.qkv.bias", "rope_bias"),
        *(
            Row(f"blocks.{{n}}.attn.{name}", f"blocks.{{n}}.attn.{name}", "rope_norm")
            for name in ("q_norm.weight", "q_norm.bias", "k_norm.weight", "k_norm.bias")
        ),
        *_biased("blocks.{n}.attn.proj"),
        *(
            row
            for name in ("w12", "w3", "fc1", "fc2")
            for row in _biased(f"blocks.{{n}}.mlp.{name}")
        ),
        *_biased("blocks.{n}.adaLN_modulation.1", "blocks.{n}.adaLN_modulation.linear"),
        *_same("final_layer.norm_final.weight"),
        *_biased("final_layer.linear"),
        *_biased("final_layer.adaLN_modulation.1", "final_layer.adaLN_modulation.linear"),
    ),
)

PATCHGAN = Table(
    discriminator.PatchGAN,
    (
        Row("main.{n}.weight", "main.{n}.kernel", "conv"),
        *_same(*(f"main.{{n}}.{x}" for x in ("weight", "bias", "running_mean", "running_var"))),
        Row("main.{n}.num_batches_tracked", "main.{n}.running_mean", "batch_count"),
    ),
)
