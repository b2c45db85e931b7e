"""Tables of RAE's networks (bytetriper/RAE): DiT-DH, its LightningDiT, and the discriminator."""

import numpy as np

from gae_jax.generators import ddt
from gae_jax.interop.tables import DIT
from gae_jax.nn.torch_names import Row, Table, biased, same
from gae_jax.objectives import dino_discriminator


def ditdh(depth: tuple[int, int]) -> Table:
    """Return the table of a `DiTwDDTHead` of this depth: its parts differ in heads."""

    def attention(number: int) -> tuple[Row, ...]:
        part, name = int(number >= depth[0]), f"blocks.{number}.attn"
        return (
            Row(f"{name}.qkv.weight", f"{name}.qkv.kernel", f"rope_linear_{part}"),
            Row(f"{name}.qkv.bias", f"{name}.qkv.bias", f"rope_bias_{part}"),
        )

    return Table(
        ddt.DiTwDDTHead,
        (
            *biased("s_embedder.proj", transform="conv"),
            *biased("x_embedder.proj", transform="conv"),
            *biased("s_projector"),
            Row("enc_feat_rope.freqs_cos", "s_embedder.proj.kernel", "rope_cos_0"),
            Row("enc_feat_rope.freqs_sin", "s_embedder.proj.kernel", "rope_sin_0"),
            Row("dec_feat_rope.freqs_cos", "x_embedder.proj.kernel", "rope_cos_1"),
            Row("dec_feat_rope.freqs_sin", "x_embedder.proj.kernel", "rope_sin_1"),
            *_FREQUENCIES,
            *(row for number in range(sum(depth)) for row in attention(number)),
            *(row for row in DIT.rows if not row.torch.startswith(_OWN)),
        ),
    )


_FREQUENCIES = same("t_embedder.W")
# Rows of `DIT` that DiT-DH has otherwise.
_OWN = ("x_embedder.", "feat_rope.", "blocks.{n}.attn.qkv.")

# The trained heads of DinoDisc: torch's spectral_norm keeps weight_orig and two vectors.
DINO_DISC = Table(
    dino_discriminator.DinoDisc,
    tuple(
        row
        for torch, ours in (("0.0", "embed"), ("1.fn.0", "mix"), ("2", "out"))
        for row in (
            Row(f"heads.{{n}}.{torch}.weight_orig", f"heads.{{n}}.{ours}.kernel", "conv_1d"),
            Row(f"heads.{{n}}.{torch}.bias", f"heads.{{n}}.{ours}.bias", "same"),
            Row(f"heads.{{n}}.{torch}.weight_u", f"heads.{{n}}.{ours}.u", "same"),
            Row(f"heads.{{n}}.{torch}.weight_v", f"heads.{{n}}.{ours}.v", "same"),
        )
    )
    + tuple(
        Row(f"heads.{{n}}.{torch}.{x}", f"heads.{{n}}.{ours}.{x}", "same")
        for torch, ours in (("0.1", "embed_norm"), ("1.fn.1", "mix_norm"))
        for x in ("weight", "bias")
    ),
)

# Its frozen DINO; pass DINO's own file through `dino_tensors` first.
DINO = Table(
    dino_discriminator.DinoFeatures,
    (
        *same("cls_token", "pos_embed", "norm.weight", "norm.bias"),
        Row("x_scale", "cls_token", "imagenet_scale"),
        Row("x_shift", "cls_token", "imagenet_shift"),
        *biased("patch_embed.proj", "patch_embed", "conv"),
        *(
            row
            for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
            for row in biased(f"blocks.{{n}}.{name}")
        ),
        *same(*(f"blocks.{{n}}.norm{i}.{x}" for i in (1, 2) for x in ("weight", "bias"))),
    ),
)


def dino_tensors(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Convert DINO's own file (dino_deitsmall8_pretrain.pth) to what RAE's discriminator loads.

    The key part of every bias of q, k and v becomes zero, and the two buffers of the normalisation
    of images are added.
    """
    converted = {
        "x_scale": dino_discriminator.IMAGENET_SCALE.reshape(1, 3, 1, 1),
        "x_shift": dino_discriminator.IMAGENET_SHIFT.reshape(1, 3, 1, 1),
    }
    for name, tensor in tensors.items():
        if name.endswith(".attn.qkv.bias"):
            query, _, value = np.split(tensor, 3)
            tensor = np.concatenate([query, np.zeros_like(query), value])
        converted[name] = tensor
    return converted
