"""Read the tensors of released networks from the files that ``import_torch`` names."""

import dataclasses
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np

from gae_jax import tokenizers
from gae_jax.interop.convert import ConversionError
from gae_jax.interop.files import Checkpoint, read_checkpoint, read_state_dict
from gae_jax.interop.packages import read_lpips, weights_of
from gae_jax.porting.encoders import on_frozen_encoder, plain_names
from gae_jax.porting.released import BACKBONE_IN_TEACHER, NAMES
from gae_jax.run.session import Session
from gae_jax.runtime.errors import ConfigError

# The entry of a torch checkpoint that holds the state dict; those of tokenizers are in
# `tokenizers.kind.Counterpart`.
ENTRIES = {"teacher": "model_state_dict", "diffusion": "ema"}


@dataclasses.dataclass(frozen=True)
class Source:
    """The tensors of one network, and the files that they were read from; LPIPS has two.

    Attributes:
      files: as the config names them; of a file in parts its index or folder.
      entry: of the torch checkpoint that held them; "" for a plain state dict.
      left_out: names of the tensors that are left out.
      remarks: what was chosen or computed instead of read, a line each.
      shown: sizes that the file states other than by the shapes of its tensors.
      identities: as `known_weights.identities`, of a network for metrics.
    """

    tensors: dict[str, np.ndarray]
    files: tuple[str, ...]
    entry: str
    left_out: tuple[str, ...]
    remarks: tuple[str, ...] = ()
    shown: dict[str, int] = dataclasses.field(default_factory=dict)
    identities: dict[str, dict[str, str]] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        return " and ".join(self.files)


def read_sources(session: Session) -> dict[str, Source]:
    """Read the files that the config names: stage -> its tensors.

    A teacher's file that holds its backbone gives both; a backbone that is named too must be equal.

    Raises:
      ConfigError: if no file is named, or files that do not go together.
      ConversionError: if a backbone differs from that in the teacher's file.
    """
    config = session.config.import_torch
    sources = {}
    if bool(config.vgg) != bool(config.lpips_heads):
        raise ConfigError(
            "LPIPS is VGG16 and its heads: pass both --config.import_torch.vgg=FILE (torchvision) "
            "and --config.import_torch.lpips_heads=FILE (lpips/weights/v0.1/vgg.pth)"
        )
    if config.lpips and config.vgg:
        raise ConfigError(
            "import_torch.lpips and import_torch.vgg both name an LPIPS; leave one of them empty"
        )
    if config.lpips:
        with weights_of(config.lpips) as path:
            sources["lpips"] = Source(read_lpips(path), (config.lpips,) * 2, "", ())
    if config.vgg:
        files = (config.vgg, config.lpips_heads)
        tensors = {k: x for file in files for k, x in read_state_dict(Path(file)).items()}
        sources["lpips"] = Source(tensors, files, "", ())
    for stage in NAMES:
        if config.get(stage) and stage != "lpips":
            sources[stage] = _read(stage, session.config)
    if not sources and not config.latents:
        known = [f"--config.import_torch.{name}=FILE" for name in config if name in NAMES]
        known.append("--config.import_torch.latents=DIR")
        raise ConfigError(f"nothing to import; name at least one: {', '.join(known)}")
    if "teacher" in sources:
        sources["teacher"], backbone = _split_teacher(sources["teacher"])
        if backbone.tensors and "backbone" not in sources:
            sources["backbone"] = backbone
        elif backbone.tensors:
            _require_same(sources["backbone"], backbone)
    return {stage: sources[stage] for stage in NAMES if stage in sources}


def _read(stage: str, config) -> Source:
    files = config.import_torch
    with weights_of(files[stage]) as path:
        tensors, entry, remarks = _read_entry(path, stage, config)
    if on_frozen_encoder(stage, config):
        tensors = plain_names(tensors)
    patterns = files.leave_out
    left_out = tuple(name for name in tensors if any(fnmatchcase(name, p) for p in patterns))
    kept = {name: tensor for name, tensor in tensors.items() if name not in left_out}
    return Source(kept, (files[stage],), entry, left_out, remarks)


def _read_entry(path: Path, stage: str, config) -> Checkpoint:
    """Read a checkpoint's state dict: the entry of its kind, or that which the config names."""
    weights = ("ema", "model") if stage == "diffusion" else ()
    asked = config.import_torch
    expected = ENTRIES.get(stage, "")
    if stage == "tokenizer" and (counterpart := tokenizers.kind_of(config.tokenizer).torch):
        expected = counterpart().entry
    # averaged and raw weights are never exchanged silently
    return read_checkpoint(path, asked.entry or expected, rivals=weights)


def _split_teacher(source: Source) -> tuple[Source, Source]:
    """Split a file into the teacher and its backbone, by the backbone's own names."""
    teacher, backbone = {}, {}
    for name, tensor in source.tensors.items():
        inner = name.removeprefix(BACKBONE_IN_TEACHER)
        (teacher if inner == name else backbone)[inner] = tensor
    return tuple(dataclasses.replace(source, tensors=part) for part in (teacher, backbone))


def _require_same(named: Source, inside: Source) -> None:
    unequal = [
        name
        for name in sorted(named.tensors.keys() | inside.tensors.keys())
        if not np.array_equal(named.tensors.get(name), inside.tensors.get(name))
    ]
    if unequal:
        raise ConversionError(
            f"the backbone in {named} is not the one inside {inside}: {unequal[:4]} differ "
            "(names of Hugging Face always differ); name one of the two files only, or leave the "
            f"inner one out with --config.import_torch.leave_out='(\"{BACKBONE_IN_TEACHER}*\",)'"
        )
