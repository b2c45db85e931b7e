"""Turn released networks into finished stages of a run."""

import dataclasses
import time
from pathlib import Path

import jax
import numpy as np

from gae_jax.generators.latent_diffusion import diffusion_network
from gae_jax.interop.check import largest_difference, outputs
from gae_jax.interop.convert import (
    ConversionError,
    computed_names,
    export_torch,
    import_torch,
    mapping,
)
from gae_jax.interop.known_weights import identities
from gae_jax.interop.known_weights import lines as identity_lines
from gae_jax.interop.packages import digests_of
from gae_jax.interop.rae_tables import dino_tensors
from gae_jax.nn.network import Network, fingerprint
from gae_jax.porting import encoders
from gae_jax.porting.comparison import TOLERANCE, difference_line, mapping_table
from gae_jax.porting.file_sizes import require_sizes
from gae_jax.porting.latent_statistics import of_latents
from gae_jax.porting.released import METRICS, Released, released
from gae_jax.porting.sources import Source
from gae_jax.pretrained.backbone import backbone_network
from gae_jax.run.load import load_stage, metric_network
from gae_jax.run.sampling import sampling_facts
from gae_jax.run.session import Session
from gae_jax.runtime.errors import ConfigError, UserError
from gae_jax.tokenizers import latent_shape, made_of, sizes_of, tokenizer_network
from gae_jax.tokenizers.gae_teacher import teacher_network
from gae_jax.train.checkpoint import save_weights


@dataclasses.dataclass(frozen=True)
class Incoming:
    """A converted network that has not been written yet."""

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


def convert(session: Session, stage: str, source: Source, earlier=()) -> Incoming:
    """Convert torch tensors to the network of a stage.

    Args:
      earlier: networks that are imported with it; tokenizers on a frozen encoder take
        their backbone from there, or else from the run.

    Raises:
      ConversionError: if the config's network has other sizes (names the flags that fit the
        file), or a tensor does not fit (names all of them).
    """
    config = session.config
    tensors = source.tensors
    if stage == "backbone":
        source = encoders.encoder_of(config.backbone, source)
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
    if encoders.on_frozen_encoder(stage, config):
        imported = [network.arrays for network in earlier if network.stage == "backbone"]
        backbone = imported[0] if imported else encoders.backbone_of(session)
        encoders.require_same_encoder(config, source, backbone)
        arrays = encoders.with_encoder(arrays, backbone, counterpart.key)
    network, arrays, facts = _as_stage(session, stage, arrays)
    known = identities(stage, tensors, source.files) if stage in (*METRICS, "backbone") else {}
    source = dataclasses.replace(
        source,
        tensors=tensors,
        remarks=(*source.remarks, *remarks, *identity_lines(known)),
        identities=known,
    )
    return Incoming(stage, source, counterpart, network, arrays, facts)


def _as_stage(session: Session, stage: str, arrays) -> tuple[Network, tuple[dict, dict], dict]:
    """Make (the stage's network, its arrays, facts to record) from the released module's arrays."""
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
        **sampling_facts(config),
    }
    return network, ({"dit": params}, rest), facts


def shape_of_latents(session: Session, what: str = "a diffusion model") -> tuple[int, int, int]:
    """(h, w, d) of the latents of the tokenizer that is imported, or that the run has.

    Args:
      what: that needs the tokenizer, for the error.

    Raises:
      UserError: if there is no tokenizer.
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
    """Read mean and std of the latents, as `latent_statistics.of_latents`.

    Raises:
      ConfigError: if the config names no file of them.
    """
    name = session.config.import_torch.statistics
    if not name:
        raise ConfigError(
            "a diffusion model needs mean and std of the latents that it was trained on: pass "
            "--config.import_torch.statistics=FILE (latents_stats.pt of the released code; of RAE "
            "stat.pt)"
        )
    return of_latents(Path(name), shape)


def write_stage(session: Session, incoming: Incoming, tokenizer: str | None) -> None:
    """Write a stage, read it back and compare; only then mark it as finished.

    Args:
      tokenizer: fingerprint of the tokenizer of a diffusion model.

    Raises:
      ConversionError: as `compare`.
    """
    start, stage = time.monotonic(), incoming.stage
    folder = session.run.stage(stage)
    needed = {"teacher": ("backbone", "teacher"), "tokenizer": made_of(session.config.tokenizer)}
    needed = needed.get(stage, (stage,))
    sections = {} if stage in METRICS else session.made_of(needed)
    if stage == "tokenizer" and "image_size" not in sizes_of(session.config.tokenizer):
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
            files={
                file: digest for name in source.files for file, digest in digests_of(name).items()
            },
            entry=source.entry,
            left_out=list(source.left_out),
            remarks=list(source.remarks),
            identities=source.identities,
        ),
        **facts,
    )
    network, after = load_stage(folder, session.mesh, done)
    compare(incoming, network, after)
    done["fingerprint"] = incoming.fingerprint
    folder.finish(seconds=time.monotonic() - start, **done)


def compare(incoming: Incoming, network: Network, after) -> None:
    """Print how tensors were mapped, and compare the file with what the run now holds.

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
    differences = largest_difference(before, outputs(network, after))
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
    print(difference_line(differences))
    print(f"  tensors that differ when exported again: {len(changed)}")
    if changed or max(differences.values()) > TOLERANCE:
        raise ConversionError(f"{where}: the run does not hold what the file holds: {changed[:8]}")
