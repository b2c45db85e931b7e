"""What the names and shapes of a released state dict say about the network's arguments."""

import re
from collections.abc import Callable, Mapping

from gae_jax.interop.heads import MODEL_TYPES, UNSAID, heads_of, parts_of
from gae_jax.nn.torch_names import Shapes, depth_of, edge_of
from gae_jax.tokenizers import TOKENIZERS

# Buffers of RoPE: of LightningDiT, and of the two parts of DiT-DH.
ROPE = {
    "diffusion": "feat_rope.freqs_cos",
    "ddt_backbone": "enc_feat_rope.freqs_cos",
    "ddt_head": "dec_feat_rope.freqs_cos",
}
DDT = ("ddt_backbone", "ddt_head")
HUB_OFFSET = 0.1  # `interpolate_offset` of torch.hub's DINOv2 without registers


def differing(
    stage: str, shapes: Shapes, section: Mapping, path: str, stated: Mapping | None = None
) -> list[str]:
    """Return the flags that bring a section of the config in line with a file.

    Args:
      stage: a key of `READERS` or the name of a tokenizer; each part of DiT-DH (`DDT`) has a
        section of its own.
      shapes: of the file's tensors, by name.
      section: the model's arguments in the config.
      path: where that section is.
      stated: heads of attention, which show in no shape, by field, where something says them.
    """
    sizes = _sizes(stage, shapes, section, path, stated or {})
    return [
        f"--config.{path}.{key}={value}"
        for key, value in sizes.items()
        if key in section and value is not None and section[key] != value
    ]


def questions(
    stage: str, shapes: Shapes, section: Mapping, path: str, stated: Mapping | None = None
) -> list[str]:
    """List what neither file nor section says and the network depends on; as `differing`."""
    sizes = _sizes(stage, shapes, section, path, stated or {})
    asked = [
        f"{key} shows in no tensor and does not follow from the width: pass --config.{path}.{key}=N"
        f" (if it is {UNSAID}: with the config.json of the network next to the file)"
        for key, value in sizes.items()
        if value is None
    ]
    if stage in ROPE and section.get("use_rope") and ROPE[stage] not in shapes:
        pattern = "feat_rope.*" if stage == "diffusion" else "*feat_rope.*"
        asked.append(
            f"the file has no buffers {pattern}, by which one sees RoPE: if the network was "
            f"trained without, pass --config.{path}.use_rope=False; if they were taken out of the "
            f"file, say so with --config.import_torch.leave_out='(\"{pattern}\",)'"
        )
    return asked


def _sizes(stage: str, shapes: Shapes, section: Mapping, path: str, stated: Mapping) -> dict:
    """Return the sizes that a file shows, and heads of attention; None for unknown ones."""
    sizes = _reader(stage)(shapes, section)
    kind = path.rpartition(".")[-1] if stage == "backbone" else stage
    heads = heads_of(kind, sizes, section, {**_shown_heads(stage, shapes), **stated})
    sizes |= heads
    if stage in TOKENIZERS:
        kv_heads = TOKENIZERS[stage].counterpart.kv_heads
        sizes |= kv_heads(shapes, section, heads.get("num_heads"))
    return sizes


def unshown(kind: str, shapes: Shapes, section: Mapping, stated: Mapping) -> list[str]:
    """Return a line for each thing that the network depends on and only the config says.

    Args:
      kind: as `heads_of`.
    """
    stage = "backbone" if kind in MODEL_TYPES else kind
    sizes = _reader(stage)(shapes, section)
    stated = {**_shown_heads(stage, shapes), **stated}
    remarks = []
    for place in parts_of(kind):
        width = sizes[place.width or "width"]
        if place.field not in stated:
            heads = section[place.field]
            why = "as published" if width in place.published else "as the config says"
            remarks.append(
                f"{place.field} shows in no tensor: {heads} for a width of {width}, {why}"
            )
    hub = "patch_embed.proj.weight" in shapes
    offset = section.get("interpolate_offset", 0)
    if kind == "dinov2" and not sizes["num_register_tokens"] and bool(offset) != hub:
        remarks.append(
            f"positions are interpolated with interpolate_offset {offset}; "
            + ("torch.hub has 0.1" if hub else "transformers has 0.0, torch.hub 0.1")
        )
    return remarks


def width_of(stage: str, shapes: Shapes, section: Mapping) -> int | None:
    """Return the width of the tokens of a backbone."""
    return _reader(stage)(shapes, section).get("hidden_size")


def _shown_heads(stage: str, shapes: Shapes) -> dict:
    """Read the heads of a diffusion model from the width of its RoPE or of its q and k norms."""
    if stage not in ROPE:
        return {}
    embedder = "s_embedder" if stage == "ddt_backbone" else "x_embedder"
    width = shapes[f"{embedder}.proj.weight"][0]
    block = depth_of(shapes, "blocks") - 1 if stage == "ddt_head" else 0
    names = (ROPE[stage], f"blocks.{block}.attn.q_norm.weight")
    shown = (shapes[name] for name in names if name in shapes)
    head = next(shown, None)
    return {"num_heads": width // head[-1]} if head else {}


def _diffusion(shapes: Shapes, section: Mapping, embedder: str = "x_embedder") -> dict:
    width, _, _, patch = shapes[f"{embedder}.proj.weight"]
    sizes = dict(
        hidden_size=width,
        patch_size=patch,
        depth=depth_of(shapes, "blocks"),
        use_qknorm="blocks.0.attn.q_norm.weight" in shapes,
        use_swiglu="blocks.0.mlp.w12.weight" in shapes,
        use_rmsnorm="blocks.0.norm1.weight" in shapes,
    )
    if ROPE["diffusion"] in shapes or ROPE["ddt_backbone"] in shapes:
        sizes["use_rope"] = True
    null = section["class_dropout_prob"] > 0
    sizes["num_classes"] = shapes["y_embedder.embedding_table.weight"][0] - null
    if modulation := shapes.get("blocks.0.adaLN_modulation.1.weight"):
        sizes["wo_shift"] = modulation[0] == 4 * width
    return sizes


def _ddt_backbone(shapes: Shapes, section: Mapping) -> dict:
    """Read the backbone of DiT-DH; ``section`` also has the head's depth as ``other_depth``."""
    depth = _ddt_depths(shapes, section["depth"], section["other_depth"])[0]
    return _diffusion(shapes, section, "s_embedder") | dict(depth=depth)


def _ddt_head(shapes: Shapes, section: Mapping) -> dict:
    """Read the head of DiT-DH; ``section`` also has the backbone's depth as ``other_depth``."""
    width = shapes["x_embedder.proj.weight"][0]
    depth = _ddt_depths(shapes, section["other_depth"], section["depth"])[1]
    return dict(hidden_size=width, depth=depth)


def _ddt_depths(shapes: Shapes, backbone: int, head: int) -> tuple[int | None, int | None]:
    """Count the blocks of backbone and head, which follow each other under one name.

    The width of the blocks tells them apart, or that of the norms of q and k; where both parts are
    alike, what the config says if it has as many blocks in all, and None else.
    """
    total = depth_of(shapes, "blocks")
    for name in ("attn.proj.weight", "attn.q_norm.weight"):
        if f"blocks.0.{name}" in shapes:
            of_block = [shapes[f"blocks.{i}.{name}"] for i in range(total)]
            if of_block[0] != of_block[-1]:
                first = of_block.index(of_block[-1])
                return first, total - first
    return (backbone, head) if backbone + head == total else (None, None)


def _teacher(shapes: Shapes, section: Mapping) -> dict:
    latent = shapes["recon_head.weight"][1]
    width = shapes["recon_head.weight"][0]
    sizes: dict[str, int | str] = dict(
        width=width, latent_dim=latent, decoder_layers=depth_of(shapes, "decoder_layers")
    )
    rows, columns = shapes["projector_block.attn.proj.weight"]
    if rows == latent != columns:
        return {**sizes, "downsampler": "attention"}
    window = edge_of(shapes["to_latent.weight"][0] // latent)
    # a Linear for every token is one for every window of one token
    if window > 1 or section.get("downsampler") != "attention_linear":
        sizes |= {"downsampler": "attention_conv", "window_size": window}
    return sizes


def _backbone(shapes: Shapes, section: Mapping) -> dict:
    """Read DINOv2 by its own names or Hugging Face's, the others by the latter."""
    if "embeddings.patch_embeddings.weight" in shapes:
        return _dinov3(shapes)
    if "embeddings.patch_embedding.weight" in shapes:
        return _siglip(shapes)
    hub = "patch_embed.proj.weight" in shapes
    root = "" if hub else "embeddings."
    blocks = "blocks" if hub else "encoder.layer"
    projection = "patch_embed.proj" if hub else "embeddings.patch_embeddings.projection"
    table = "pos_embed" if hub else "embeddings.position_embeddings"
    width, _, _, patch = shapes[f"{projection}.weight"]
    registers = shapes.get(f"{root}register_tokens", (1, 0))[1]
    sizes: dict[str, float] = dict(
        hidden_size=width,
        num_hidden_layers=depth_of(shapes, blocks),
        patch_size=patch,
        image_size=edge_of(shapes[table][1] - 1) * patch,
        num_register_tokens=registers,
        use_swiglu_ffn=any(re.search(r"\.0\.mlp\.(w12|weights_in)\.weight$", n) for n in shapes),
    )
    if intermediate := shapes.get("encoder.layer.0.intermediate.dense.weight"):
        sizes["intermediate_size"] = intermediate[0]
    elif (hidden := _hidden(shapes, blocks)) and int(width * section["mlp_ratio"]) != hidden:
        sizes["mlp_ratio"] = hidden / width
    if registers:  # both places where they were released interpolate so
        sizes["interpolate_offset"] = 0.0
    elif hub and section.get("num_register_tokens"):  # the section was one for registers
        sizes["interpolate_offset"] = HUB_OFFSET
    return sizes


def _hidden(shapes: Shapes, blocks: str) -> int:
    """Return the width inside the MLP of DINOv2; 0 for SwiGLU, which does not show the ratio."""
    return shapes.get(f"{blocks}.0.mlp.fc1.weight", (0,))[0]


def _dinov3(shapes: Shapes) -> dict:
    width, _, _, patch = shapes["embeddings.patch_embeddings.weight"]
    return dict(
        hidden_size=width,
        num_hidden_layers=depth_of(shapes, "layer"),
        intermediate_size=shapes["layer.0.mlp.up_proj.weight"][0],
        patch_size=patch,
        num_register_tokens=shapes.get("embeddings.register_tokens", (1, 0))[1],
        use_gated_mlp="layer.0.mlp.gate_proj.weight" in shapes,
        qkv_bias="layer.0.attention.q_proj.bias" in shapes,
    )


def _siglip(shapes: Shapes) -> dict:
    width, _, _, patch = shapes["embeddings.patch_embedding.weight"]
    return dict(
        hidden_size=width,
        num_hidden_layers=depth_of(shapes, "encoder.layers"),
        intermediate_size=shapes["encoder.layers.0.mlp.fc1.weight"][0],
        patch_size=patch,
        image_size=edge_of(shapes["embeddings.position_embedding.weight"][0]) * patch,
    )


READERS: dict[str, Callable[[Shapes, Mapping], dict]] = {
    "backbone": _backbone,
    "teacher": _teacher,
    "diffusion": _diffusion,
    "ddt_backbone": _ddt_backbone,
    "ddt_head": _ddt_head,
}


def _reader(kind: str) -> Callable[[Shapes, Mapping], dict]:
    """Return the function that reads sizes, of `READERS` or of a tokenizer."""
    return READERS[kind] if kind in READERS else TOKENIZERS[kind].counterpart.read_sizes
