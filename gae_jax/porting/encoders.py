"""The frozen encoder of a run, from a file of its own, and the tokenizers that are built on it.

The run has the encoder as its backbone. PAE's checkpoint holds it too: there it is compared, never
taken. RAE's file is the decoder alone.
"""

import dataclasses

import numpy as np

from gae_jax import tokenizers
from gae_jax.interop.convert import ConversionError, export_torch
from gae_jax.interop.vision_files import encoder_tensors, kind_of_names, set_aside, shown_heads
from gae_jax.interop.vision_tables import TABLES
from gae_jax.pretrained.backbone import RELEASED
from gae_jax.runtime.errors import ConfigError, UserError, number_of
from gae_jax.train.checkpoint import load_weights


def on_frozen_encoder(stage: str, config) -> bool:
    """Whether a stage is a tokenizer whose frozen encoder is the run's backbone."""
    return stage == "tokenizer" and tokenizers.kind_of(config.tokenizer).backbone == "frozen"


WRAPPERS = ("module.", "_orig_mod.")  # prefixes of DistributedDataParallel and torch.compile
# By the names in transformers: the first tensor of every encoder, and its last norm.
FIRST = ("embeddings.cls_token", "embeddings.position_embedding.weight")
LAST_NORM = {
    "dinov2": "layernorm",
    "dinov3": "norm",
    "mae": "layernorm",
    "siglip": "post_layernorm",
}


def plain_names(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Remove the prefixes that training's wrappers put before names."""

    def plain(name: str) -> str:
        while wrapper := next((w for w in WRAPPERS if name.startswith(w)), ""):
            name = name.removeprefix(wrapper)
        return name

    return {plain(name): tensor for name, tensor in tensors.items()}


def backbone_of(session) -> tuple[dict, dict]:
    """Load (params, rest) of the run's backbone.

    Raises:
      UserError: if the run has none.
    """
    folder = session.run.stage("backbone")
    if not folder.done:
        raise UserError(
            f"{session.config.tokenizer.name!r} is imported on its frozen encoder: pass "
            "--config.import_torch.backbone=FILE with it, or import the backbone into this run "
            "first"
        )
    return load_weights(folder.path, folder.done["weights"], "backbone", folder.done.get("step"))


def with_encoder(arrays, backbone: tuple[dict, dict], key: str) -> tuple[dict, dict]:
    """Combine (params, rest) of the released module and of the backbone to the tokenizer's.

    Args:
      key: the released module's name in the tokenizer.
    """
    params, rest = arrays
    inner = {key: rest} if rest else {}
    learned, fixed = (part.get("encoder", {}) for part in backbone)  # fixed both in the tokenizer
    return {key: params}, inner | {"encoder": {"encoder": learned | fixed}}


def require_same_encoder(config, source, backbone: tuple[dict, dict]) -> None:
    """Compare the encoder inside a checkpoint with the run's backbone; print what was compared.

    Args:
      source: the checkpoint, as `sources.Source`.

    Raises:
      ConversionError: if they differ.
    """
    inside = {name: x for name, x in source.tensors.items() if name.startswith("encoder.")}
    starts = (n.removesuffix(first) for n in inside for first in FIRST if n.endswith(first))
    start = next(starts, None)
    if start is None:
        print(
            f"\n{source}: has no encoder that could be compared with the run's backbone "
            f"({len(inside)} tensors are called encoder.*)"
        )
        return
    kind = config.backbone.name
    sizes = {k: v for k, v in config.backbone[kind].items() if k != "input_size"}
    params, rest = backbone
    inside = {name.removeprefix(start): tensor for name, tensor in inside.items()}
    expected, ignored = {}, set()
    if kind in TABLES:  # a small ViT is never inside
        expected = export_torch(TABLES[kind], params["encoder"], rest.get("encoder", {}), **sizes)
        inside = encoder_tensors(kind, inside, num_heads=sizes["num_attention_heads"])
        # without effect on the tokens: PAE drops the weights of the last norm
        ignored = {f"{LAST_NORM[kind]}.{x}" for x in ("weight", "bias")} | {"embeddings.mask_token"}
    names = (expected.keys() | inside.keys()) - ignored
    unequal = [n for n in sorted(names) if not np.array_equal(inside.get(n), expected.get(n))]
    if unequal:
        raise ConversionError(
            f"the encoder inside {source} is not the run's backbone: {unequal[:4]} differ; import "
            "the one that it was trained on (its names there are those of transformers)"
        )
    print(f"\n{source}: its encoder is the run's backbone, {number_of(len(names), 'tensor')}")


def encoder_of(config, source):
    """Select the encoder in a file; other tensors are recorded as left out.

    Args:
      config: the section ``backbone``.
      source: the file's tensors, as `sources.Source`.

    Raises:
      ConfigError: if the section names no released encoder.
      ConversionError: if the file holds a different encoder than the section names.
    """
    kind, holds = config.name, kind_of_names(source.tensors)
    if kind == "vit":
        raise ConfigError(
            "backbone.name is 'vit', which is trained here; to import a backbone pass "
            f"--config.backbone.name={holds or ' or '.join(RELEASED)}"
        )
    if holds and holds != kind:
        raise ConversionError(
            f"{source} holds the encoder {holds!r} by the names of its tensors, but backbone.name "
            f"is {kind!r}; pass --config.backbone.name={holds}"
        )
    if kind == "efficientnet_lite0":
        return source
    left_out = tuple(
        f"{part}* ({number_of(count, 'tensor')})" if part.endswith(".") else part
        for part, count in set_aside(kind, source.tensors).items()
    )
    shown = shown_heads(kind, source.tensors)
    heads = shown or config[kind].num_attention_heads
    tensors = encoder_tensors(kind, source.tensors, num_heads=heads)
    return dataclasses.replace(
        source,
        tensors=tensors,
        left_out=(*source.left_out, *left_out),
        shown={"num_attention_heads": shown} if shown else {},
    )
