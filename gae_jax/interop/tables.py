"""Name tables of the released modules of GAE's code besides its autoencoder."""

from gae_jax.generators import dit
from gae_jax.nn.torch_names import Row, Table, biased, linear, same
from gae_jax.objectives.patchgan import PatchGAN
from gae_jax.tokenizers import gae_teacher
from gae_jax.tokenizers.gae_torch import vit_blocks

TEACHER = Table(
    gae_teacher.SemanticTeacher,
    (
        *same("pos_embed_pro"),
        *linear("projector_block.attn.qkv", "projector_block.attn.proj", "to_latent"),
        *same("pos_embed_dec"),
        *vit_blocks("decoder_layers"),
        *linear("recon_head"),
    ),
)

DIT = Table(
    dit.LightningDiT,
    (
        Row("x_embedder.proj.weight", "x_embedder.proj.kernel", "conv"),
        *same("x_embedder.proj.bias"),
        *biased("t_embedder.mlp.{n}"),
        Row("y_embedder.embedding_table.weight", "y_embedder.embedding_table.embedding", "same"),
        *same("pos_embed"),
        Row("feat_rope.freqs_cos", "pos_embed", "rope_cos"),
        Row("feat_rope.freqs_sin", "pos_embed", "rope_sin"),
        *same("blocks.{n}.norm1.weight", "blocks.{n}.norm2.weight"),
        Row("blocks.{n}.attn.qkv.weight", "blocks.{n}.attn.qkv.kernel", "rope_linear"),
        Row("blocks.{n}.attn.qkv.bias", "blocks.{n}.attn.qkv.bias", "rope_bias"),
        *(
            Row(f"blocks.{{n}}.attn.{name}", f"blocks.{{n}}.attn.{name}", "rope_norm")
            for name in ("q_norm.weight", "q_norm.bias", "k_norm.weight", "k_norm.bias")
        ),
        *biased("blocks.{n}.attn.proj"),
        *(
            row
            for name in ("w12", "w3", "fc1", "fc2")
            for row in biased(f"blocks.{{n}}.mlp.{name}")
        ),
        *biased("blocks.{n}.adaLN_modulation.1", "blocks.{n}.adaLN_modulation.linear"),
        *same("final_layer.norm_final.weight"),
        *biased("final_layer.linear"),
        *biased("final_layer.adaLN_modulation.1", "final_layer.adaLN_modulation.linear"),
    ),
)

PATCHGAN = Table(
    PatchGAN,
    (
        Row("main.{n}.weight", "main.{n}.kernel", "conv"),
        *same(*(f"main.{{n}}.{x}" for x in ("weight", "bias", "running_mean", "running_var"))),
        Row("main.{n}.num_batches_tracked", "main.{n}.running_mean", "batch_count"),
    ),
)
