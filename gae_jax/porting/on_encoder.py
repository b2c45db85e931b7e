"""A released tokenizer on a frozen encoder, PAE or RAE, as that of a run.

The run has the encoder as its backbone, from a file of the encoder's own. PAE's checkpoint holds it
too: that is compared, never taken. RAE's file is the decoder alone.
"""

import numpy as np

from gae_jax.interop.convert import ConversionError, export_torch
from gae_jax.interop.vision_files import encoder_tensors
from gae_jax.interop.vision_tables import TABLES
from gae_jax.runtime.errors import UserError, number_of
from gae_jax.train.checkpoint import load_weights

WRAPPERS = ("module.", "_orig_mod.")  # what DistributedDataParallel and torch.compile put before
# Of encoders, by their names in transformers: a tensor that each has, and the last norm.
FIRST = ("embeddings.cls_token", "embeddings.position_embedding.weight")
LAST_NORM = {
    "dinov2": "layernorm",
    "dinov3": "norm",
    "mae": "layernorm",
    "siglip": "post_layernorm",
}


def plain_names(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors without what training's wrappers put before their names."""

    def plain(name: str) -> str:
        while wrapper := next((w for w in WRAPPERS if name.startswith(w)), ""):
            name = name.removeprefix(wrapper)
        return name

    return {plain(name): tensor for name, tensor in tensors.items()}


def backbone_of(session) -> tuple[dict, dict]:
    """(params, rest) of the run's backbone.

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
    """(params, rest) of the tokenizer, from those of the released module and of the backbone.

    Args:
      key: under which the tokenizer has the released module.
    """
    params, rest = arrays
    inner = {key: rest} if rest else {}
    return {key: params}, inner | {"encoder": {"encoder": _all(*backbone)}}


def _all(params: dict, rest: dict) -> dict:
    """The encoder's arrays, which are all fixed in the tokenizer."""
    return params["encoder"] | rest.get("encoder", {})


def require_same_encoder(config, source, backbone: tuple[dict, dict]) -> None:
    """Prints what was compared.

    Args:
      source: of the checkpoint, as `import_torch.Source`.

    Raises:
      ConversionError: if the encoder inside of the checkpoint is another one.
    """
    found = {n: t for n, t in source.tensors.items() if n.startswith("encoder.")}
    starts = (n.removesuffix(first) for n in found for first in FIRST if n.endswith(first))
    start = next(starts, None)
    if start is None:
        print(
            f"\n{source}: has no encoder that could be compared with the run's backbone "
            f"({len(found)} tensors are called encoder.*)"
        )
        return
    kind = config.backbone.name
    sizes = {k: v for k, v in config.backbone[kind].items() if k != "input_size"}
    params, rest = backbone
    inside = params["encoder"], rest.get("encoder", {})
    own = {name.removeprefix(start): tensor for name, tensor in found.items()}
    expected, ignored = {}, set()
    if kind in TABLES:  # a stand-in is not what is inside
        expected = export_torch(TABLES[kind], *inside, **sizes)
        own = encoder_tensors(kind, own, num_heads=sizes["num_attention_heads"])
        # without effect on the tokens: PAE drops the weights of the last norm
        ignored = {f"{LAST_NORM[kind]}.{x}" for x in ("weight", "bias")} | {"embeddings.mask_token"}
    names = (expected.keys() | own.keys()) - ignored
    other = [n for n in sorted(names) if not np.array_equal(own.get(n), expected.get(n))]
    if other:
        raise ConversionError(
            f"the encoder inside {source} is not the run's backbone: {other[:4]} differ; import "
            "the one that it was trained on (its names there are those of transformers)"
        )
    print(f"\n{source}: its encoder is the run's backbone, {number_of(len(names), 'tensor')}")
