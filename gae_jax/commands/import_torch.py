"""``import-torch``: released checkpoints become the stages of a run directory."""

import dataclasses
import logging
import time
from collections import Counter
from fnmatch import fnmatchcase
from pathlib import Path

import jax
import numpy as np

from gae_jax import tokenizers
from gae_jax.config import plain
from gae_jax.generators.latent_diffusion import diffusion_network
from gae_jax.interop.check import largest_difference, outputs
from gae_jax.interop.convert import (
    ConversionError,
    Mapped,
    computed_names,
    export_torch,
    import_torch,
    mapping,
)
from gae_jax.interop.files import Checkpoint, read_checkpoint, read_state_dict
from gae_jax.interop.known_weights import identities
from gae_jax.interop.known_weights import lines as identity_lines
from gae_jax.interop.packages import digests_of, read_lpips, weights_of
from gae_jax.interop.rae_tables import dino_tensors
from gae_jax.nn.network import Network, fingerprint
from gae_jax.porting import on_encoder, torch_latents
from gae_jax.porting.file_sizes import require_sizes
from gae_jax.porting.import_backbone import encoder_of
from gae_jax.porting.latent_statistics import of_latents
from gae_jax.porting.released import BACKBONE_IN_TEACHER, METRICS, NAMES, Released, released
from gae_jax.pretrained.backbone import backbone_network
from gae_jax.run.load import load_stage, metric_network
from gae_jax.run.session import Session
from gae_jax.runtime.errors import ConfigError, UserError
from gae_jax.tokenizers import latent_shape, made_of, tokenizer_network
from gae_jax.tokenizers.gae_teacher import teacher_network
from gae_jax.train.checkpoint import save_weights

# Where a torch checkpoint of each network has its state dict.
ENTRIES = {"teacher": "model_state_dict"}  # `tokenizers.kind.Counterpart` has those of tokenizers
TOLERANCE = 1e-5  # of the outputs on the fixed batch, relative


@dataclasses.dataclass(frozen=True)
class Source:
    """The tensors of one network, and where they were read; LPIPS comes in two files.

    Attributes:
      files: as the config names them: of parts the index, or the folder.
      entry: of a torch checkpoint, which held them; "" for a plain state dict.
      left_out: names of the tensors that are left aside, and what was set aside by its kind.
      remarks: what was chosen or computed in the place of what the file has, a line each.
      shown: sizes that the file shows otherwise than by its tensors' shapes.
      identities: of a network that metrics take, as `known_weights.identities`.
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


@dataclasses.dataclass(frozen=True)
class Incoming:
    """A network that is ready to become a stage of the run."""

    stage: str
    source: Source
    counterpart: Released
    network: Network
    arrays: tuple[dict, dict]
    facts: dict

    @property
    def which(self) -> str:
        """The weights that later stages use."""
        return "ema" if self.source.entry == "ema" else "params"

    @property
    def fingerprint(self) -> str:
        return fingerprint({self.stage: self.arrays})


def read_sources(session: Session) -> dict[str, Source]:
    """Stage -> its tensors, from the files that the config names.

    A teacher's file that holds its backbone gives both; a backbone named beside it must be equal.
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
        own, backbone = _split_teacher(sources["teacher"])
        sources["teacher"] = own
        if backbone.tensors and "backbone" not in sources:
            sources["backbone"] = backbone
        elif backbone.tensors:
            _require_same(sources["backbone"], backbone)
    return {stage: sources[stage] for stage in NAMES if stage in sources}


def _read(stage: str, whole) -> Source:
    config = whole.import_torch
    with weights_of(config[stage]) as path:
        tensors, entry, remarks = _read_entry(path, stage, whole)
    if on_frozen_encoder(stage, whole):
        tensors = on_encoder.plain_names(tensors)
    patterns = config.leave_out
    left_out = tuple(name for name in tensors if any(fnmatchcase(name, p) for p in patterns))
    kept = {name: tensor for name, tensor in tensors.items() if name not in left_out}
    return Source(kept, (config[stage],), entry, left_out, remarks)


def on_frozen_encoder(stage: str, config) -> bool:
    """Whether a stage is a tokenizer whose frozen encoder is the run's backbone."""
    return stage == "tokenizer" and tokenizers.kind_of(config.tokenizer).backbone == "frozen"


def _read_entry(path: Path, stage: str, whole) -> Checkpoint:
    """The tensors that a file holds under the entry of its kind, or that the config names."""
    config = whole.import_torch
    weights = ("ema", "model") if stage == "diffusion" else ()
    expected = config.diffusion_entry if weights else ENTRIES.get(stage, "")
    if stage == "tokenizer" and (counterpart := tokenizers.kind_of(whole.tokenizer).torch):
        expected = counterpart().entry

    def flag(entry: str) -> str:
        name = "diffusion_entry" if entry in weights else "entry"
        return f"--config.import_torch.{name}={entry}"

    # the average is never taken for the other weights, nor these for it, unless that is asked for
    return read_checkpoint(path, config.entry or expected, rivals=weights, flag=flag)


def _split_teacher(source: Source) -> tuple[Source, Source]:
    """The teacher without its backbone, and the backbone, by names of its own."""
    own, backbone = {}, {}
    for name, tensor in source.tensors.items():
        inner = name.removeprefix(BACKBONE_IN_TEACHER)
        (own if inner == name else backbone)[inner] = tensor
    return dataclasses.replace(source, tensors=own), dataclasses.replace(source, tensors=backbone)


def _require_same(named: Source, inside: Source) -> None:
    other = [
        name
        for name in sorted(named.tensors.keys() | inside.tensors.keys())
        if not np.array_equal(named.tensors.get(name), inside.tensors.get(name))
    ]
    if other:
        raise ConversionError(
            f"the backbone in {named} is not the one inside {inside}: {other[:4]} differ "
            "(names of Hugging Face differ always); name one of the two files only, or leave the "
            f"inner one out with --config.import_torch.leave_out='(\"{BACKBONE_IN_TEACHER}*\",)'"
        )


def convert(session: Session, stage: str, source: Source, earlier=()) -> Incoming:
    """The network of a stage from torch tensors.

    Args:
      earlier: networks that are imported with it; tokenizers on a frozen encoder take
        their backbone from there, or else from the run.

    Raises:
      ConversionError: if they are of another size than the config's network, with the flags that
        bring the config in line; else naming every tensor that does not fit.
    """
    config = session.config
    tensors = source.tensors
    if stage == "backbone":
        source = encoder_of(config.backbone, source)
        tensors = source.tensors
    if stage == "dino":
        tensors = dino_tensors(tensors)
    fixed = stage == "backbone" and config.backbone.name == "efficientnet_lite0"
    if stage not in METRICS and not fixed:
        source = require_sizes(config, stage, source, tensors)
    shape = shape_of_latents(session) if stage == "diffusion" else None
    counterpart = released(stage, config.to_dict(), names=tensors, shape=shape)
    remarks: list[str] = []
    arrays = import_torch(
        counterpart.table,
        tensors,
        counterpart.network,
        may_lack=config.import_torch.leave_out,
        remark=remarks.append,
        **counterpart.sizes,
    )
    if on_frozen_encoder(stage, config):
        backbone = next((one for one in earlier if one.stage == "backbone"), None)
        backbone = backbone.arrays if backbone else on_encoder.backbone_of(session)
        on_encoder.require_same_encoder(config, source, backbone)
        arrays = on_encoder.with_encoder(arrays, backbone, counterpart.key)
    network, arrays, facts = _as_stage(session, stage, arrays)
    known = identities(stage, tensors, source.files) if stage in (*METRICS, "backbone") else {}
    source = dataclasses.replace(  # what the run is to hold
        source,
        tensors=tensors,
        remarks=(*source.remarks, *remarks, *identity_lines(known)),
        identities=known,
    )
    return Incoming(stage, source, counterpart, network, arrays, facts)


def _as_stage(session: Session, stage: str, arrays) -> tuple[Network, tuple[dict, dict], dict]:
    """(the stage's network, its arrays, what the stage records) from those of the released one."""
    config = session.config
    params, rest = arrays
    if stage in METRICS:
        return metric_network(stage), arrays, {}
    if stage == "backbone":
        inner = {"encoder": rest} if rest else {}
        return backbone_network(config.backbone), ({"encoder": params}, inner), {}
    if stage == "teacher":
        return teacher_network(config.teacher.model, config.backbone), arrays, {}
    if stage == "tokenizer":
        return tokenizer_network(config), arrays, {}
    shape = shape_of_latents(session)
    mean, std = read_statistics(session, shape)
    network = diffusion_network(config.diffusion, shape, mean=mean, std=std)
    rest = {"dit": rest, "latent_mean": mean, "latent_std": std}
    facts = {
        "latent_shape": list(shape),
        "statistics": "element" if mean.ndim == 3 else "channel",
        "sampling": plain(config.sample),
    }
    return network, ({"dit": params}, rest), facts


def shape_of_latents(session: Session, what: str = "a diffusion model") -> tuple[int, int, int]:
    """[h, w, d] of the latents: of the tokenizer that is imported, or that the run has.

    Args:
      what: needs the tokenizer, for the message where there is none.
    """
    folder, config = session.run.stage("tokenizer"), session.config
    if config.import_torch.tokenizer:
        return latent_shape(config)
    if folder.done:
        return latent_shape(folder.config)
    raise UserError(
        f"{what} is imported together with its tokenizer: pass "
        "--config.import_torch.tokenizer=FILE, or train the tokenizer in this run first"
    )


def read_statistics(session: Session, shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of the latents, as `latent_statistics.of_latents`."""
    name = session.config.import_torch.statistics
    if not name:
        raise ConfigError(
            "a diffusion model needs mean and std of the latents that it was trained on: pass "
            "--config.import_torch.statistics=FILE (latents_stats.pt of the released code; of RAE "
            "stat.pt)"
        )
    return of_latents(Path(name), shape)


def adopt(session: Session, incoming: Incoming, tokenizer: str | None) -> None:
    """Writes a stage, reads it back and compares; only then it counts as finished."""
    start, stage = time.monotonic(), incoming.stage
    folder = session.run.stage(stage)
    needed = {"teacher": ("backbone", "teacher"), "tokenizer": made_of(session.config.tokenizer)}
    needed = needed.get(stage, (stage,))
    sections = {} if stage in METRICS else session.made_of(needed)
    if stage == "tokenizer" and "image_size" not in tokenizers.sizes_of(session.config.tokenizer):
        sections["data"] = {"image_size": session.config.data.image_size}
    folder.open(sections, {}, fresh=session.fresh)
    save_weights(folder.path, incoming.which, {stage: incoming.arrays})
    facts = dict(incoming.facts)
    if stage == "diffusion":
        facts["tokenizer"] = tokenizer
    source = incoming.source
    done = dict(
        weights=incoming.which,
        parameters={stage: sum(x.size for x in jax.tree.leaves(incoming.arrays[0]))},
        imported=dict(
            files={file: of for name in source.files for file, of in digests_of(name).items()},
            entry=source.entry,
            left_out=list(source.left_out),
            remarks=list(source.remarks),
            identities=source.identities,
        ),
        **facts,
    )
    network, after = load_stage(folder, session.mesh, done)
    report(incoming, network, after)
    done["fingerprint"] = incoming.fingerprint
    folder.finish(seconds=time.monotonic() - start, **done)


def report(incoming: Incoming, network: Network, after) -> None:
    """Prints what was mapped, and compares the file with what the run now holds.

    Raises:
      ConversionError: if outputs or re-exported tensors differ.
    """
    counterpart, source = incoming.counterpart, incoming.source
    where = f"{source}, {source.entry or 'plain state dict'}"
    lines = mapping(counterpart.table, counterpart.network, **counterpart.sizes)
    print(f"\n{incoming.stage}: {where}\n{mapping_table(lines)}")
    for name in source.left_out:
        print(f"  left out: {name}")
    for line in source.remarks:
        print(f"  {line}")
    before = outputs(incoming.network, incoming.arrays)
    found = largest_difference(before, outputs(network, after))
    again = export_torch(
        counterpart.table,
        *counterpart.inside(jax.device_get(after)),
        **counterpart.sizes,
    )
    computed = computed_names(counterpart.table, counterpart.network, **counterpart.sizes)
    changed = [
        name
        for name, tensor in source.tensors.items()
        if name in again
        and name not in computed
        and not np.array_equal(again[name], tensor.astype(again[name].dtype))
    ]
    print(difference_line(found))
    print(f"  tensors that differ when exported again: {len(changed)}")
    if changed or max(found.values()) > TOLERANCE:
        raise ConversionError(f"{where}: the run does not hold what the file holds: {changed[:8]}")


def mapping_table(rows: list[Mapped]) -> str:
    """Lines of text: torch name, ours, transform, number of tensors and their shapes."""
    cells = [("torch", "here", "transform", "tensors")]
    for row in rows:
        counts = Counter(row.shapes)
        sizes = ", ".join(f"{count} x {list(shape)}" for shape, count in counts.items())
        cells.append((row.torch, row.ours, row.transform, sizes))
    wide = [max(len(row[i]) for row in cells) for i in range(4)]
    return "\n".join(
        "  " + "  ".join(f"{cell:<{w}}" for cell, w in zip(row, wide, strict=True)).rstrip()
        for row in cells
    )


def difference_line(found: dict[str, float]) -> str:
    pairs = ", ".join(f"{name} {value:.3g}" for name, value in found.items())
    return f"  largest difference on a fixed batch, before and after, relative: {pairs}"


def survey_latents(session: Session) -> torch_latents.Released | None:
    """The released latents that the config names, if any."""
    if not (path := session.config.import_torch.latents):
        return None
    what = "a set of latents, which does not say who made it,"
    return torch_latents.survey(Path(path), shape_of_latents(session, what))


def run(session: Session) -> None:
    """Imports all files that the config names, or none of them."""
    incoming = []
    for item in read_sources(session).items():
        incoming.append(convert(session, *item, incoming))
    prints = {network.stage: network.fingerprint for network in incoming}
    there = {stage: session.run.stage(stage).done for stage in prints}
    for stage, done in there.items():
        if done and not session.fresh and done["fingerprint"] != prints[stage]:
            raise UserError(
                f"{session.run.path} has another {stage} already ({done['fingerprint']}, the "
                f"file's is {prints[stage]}); give another --workdir, or --fresh to replace it"
            )
    latents = survey_latents(session)
    if (latents or "diffusion" in prints) and "tokenizer" not in prints:
        prints["tokenizer"] = session.fingerprint_of("tokenizer")
    if latents and torch_latents.is_there(session, latents, prints["tokenizer"]):
        logging.info("import-torch: %s has these already", session.run.stage("latents").path)
        latents = None
    for network in incoming:
        folder = session.run.stage(network.stage)
        if there[network.stage] and not session.fresh:
            logging.info("import-torch: %s has these weights already", folder.path)
            continue
        adopt(session, network, prints.get("tokenizer"))
        logging.info("import-torch: %s, %s", network.stage, folder.path)
    if latents:
        torch_latents.adopt(session, latents, prints["tokenizer"])
        logging.info("import-torch: latents, %s", session.run.stage("latents").path)
