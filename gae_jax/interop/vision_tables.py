"""Tables of the frozen vision encoders: names of Hugging Face, and of DINOv2's own files.

Hugging Face keeps query, key and value apart; DINOv2's own files and ours have them fused, in
that order.
"""

import numpy as np

from gae_jax.interop.tables import Row, Table
from gae_jax.models.dinov2 import Dinov2
from gae_jax.models.mae import MAEEncoder


def _both(torch: str, ours: str, weight: str = "linear") -> tuple[Row, ...]:
    """Weight and bias of a Linear or, with "conv", of the patch projection."""
    return (
        Row(f"{torch}.weight", f"{ours}.kernel", weight),
        Row(f"{torch}.bias", f"{ours}.bias", "same"),
    )


def _norm(torch: str, ours: str) -> tuple[Row, ...]:
    return tuple(Row(f"{torch}.{x}", f"{ours}.{x}", "same") for x in ("weight", "bias"))


# What the Hugging Face names of DINOv2 and MAE share.
_HUGGING_FACE = (
    Row("embeddings.cls_token", "cls_token", "same"),
    Row("embeddings.position_embeddings", "pos_embed", "same"),
    *_both("embeddings.patch_embeddings.projection", "patch_embed", "conv"),
    *(
        Row(f"encoder.layer.{{n}}.attention.attention.{name}.{x}", f"blocks.{{n}}.attn.qkv.{y}", t)
        for part, name in (("q", "query"), ("k", "key"), ("v", "value"))
        for x, y, t in (("weight", "kernel", f"linear_{part}"), ("bias", "bias", f"same_{part}"))
    ),
    *_both("encoder.layer.{n}.attention.output.dense", "blocks.{n}.attn.proj"),
    *_norm("layernorm", "norm"),
)

# Dinov2Model and Dinov2WithRegistersModel.
DINOV2 = Table(
    Dinov2,
    (
        *_HUGGING_FACE,
        Row("embeddings.mask_token", "mask_token", "same"),
        Row("embeddings.register_tokens", "register_tokens", "same"),
        *_norm("encoder.layer.{n}.norm1", "blocks.{n}.norm1"),
        *_norm("encoder.layer.{n}.norm2", "blocks.{n}.norm2"),
        Row("encoder.layer.{n}.layer_scale1.lambda1", "blocks.{n}.ls1.gamma", "same"),
        Row("encoder.layer.{n}.layer_scale2.lambda1", "blocks.{n}.ls2.gamma", "same"),
        *_both("encoder.layer.{n}.mlp.fc1", "blocks.{n}.mlp.fc1"),
        *_both("encoder.layer.{n}.mlp.fc2", "blocks.{n}.mlp.fc2"),
        *_both("encoder.layer.{n}.mlp.weights_in", "blocks.{n}.mlp.w12"),
        *_both("encoder.layer.{n}.mlp.weights_out", "blocks.{n}.mlp.w3"),
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
        *_both("patch_embed.proj", "patch_embed", "conv"),
        *(
            row
            for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "mlp.w12", "mlp.w3")
            for row in _both(f"blocks.{{n}}.{name}", f"blocks.{{n}}.{name}")
        ),
        *_norm("blocks.{n}.norm1", "blocks.{n}.norm1"),
        *_norm("blocks.{n}.norm2", "blocks.{n}.norm2"),
        *_norm("norm", "norm"),
    ),
)

# ViTMAEModel; pass checkpoints of ViTMAEForPreTraining through `mae_encoder_tensors` first.
MAE = Table(
    MAEEncoder,
    (
        *_HUGGING_FACE,
        *_norm("encoder.layer.{n}.layernorm_before", "blocks.{n}.norm1"),
        *_norm("encoder.layer.{n}.layernorm_after", "blocks.{n}.norm2"),
        *_both("encoder.layer.{n}.intermediate.dense", "blocks.{n}.mlp.fc1"),
        *_both("encoder.layer.{n}.output.dense", "blocks.{n}.mlp.fc2"),
    ),
)


def mae_encoder_tensors(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors of a MAE checkpoint that are the encoder's, by their names in ViTMAEModel.

    ViTMAEForPreTraining puts ``vit.`` before them. Of the rest only its decoder is left out
    (``decoder.*``); whatever else there is stays, for the import to refuse.
    """
    return {
        name.removeprefix("vit."): tensor
        for name, tensor in tensors.items()
        if not name.startswith("decoder.")
    }
