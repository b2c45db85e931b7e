"""`init_from`: a tokenizer or a diffusion model that starts from weights that exist.

A stage records at its start which weights these were, by their fingerprint. Once it has a
checkpoint of its own it needs the source no more, and nobody asks where that lies.
"""

import logging
from collections.abc import Mapping

import numpy as np

from gae_jax.config import flatten, is_operational
from gae_jax.config.precision import fields_of
from gae_jax.generators.latent_diffusion import diffusion_network
from gae_jax.run.amendments import in_words
from gae_jax.run.run import StageFolder
from gae_jax.run.weight_source import STAGES, Source, network_fields, open_source
from gae_jax.runtime.errors import ConfigError, UserError
from gae_jax.runtime.files import read_json, write_json
from gae_jax.runtime.mesh import to_host
from gae_jax.tokenizers import kind_of, latent_shape, tokenizer_network
from gae_jax.train.carry import (
    Classes,
    Plan,
    carried,
    flat,
    labels_line,
    make_plan,
    with_arrays,
    with_moments,
)
from gae_jax.train.checkpoint import latest_step, load_weights
from gae_jax.train.state import TrainState

RECORD = "started_from.json"
TAKEN = "taken along, batch statistics included"
# Fields of a network that may differ from the source's: sizes of images and numbers of classes,
# which `make_plan` sees to, and what training or sampling alone reads.
MAY_DIFFER = frozenset(
    {
        *("image_size", "input_size", "resolution", "attn_resolutions", "attention_resolutions"),
        *("num_classes", "class_dropout_prob", "rank", "layers", "patch_init"),
        *("noise", "noise_std", "noise_factor", "noise_tau", "angles", "jitter", "detach_z"),
        *("time", "time_mean", "time_std", "sigma_min", "gamma", "decode_steps", "decode_sampler"),
    }
)
# What a diffusion model's output and input mean: training can mend it, so it is only said.
MEANING = frozenset({"path", "prediction", "geometry", "latent_multiplier"})
LISTED = 30  # arrays that do not fit, in an error
COMPUTED_POSITIONS = ("mae",)  # encoders whose position table no training has made


def asked(config, stage: str) -> str:
    """What a stage is to start from; "" for random weights."""
    return config[stage].get("init_from", "") if stage in STAGES else ""


def identity(folder: StageFolder, config, *, fresh: bool) -> tuple[str, str] | None:
    """(init_from as the stage's folder records it, fingerprint of the source); None without one.

    A stage that has a checkpoint of its own is not asked for its source, which may be gone. It may
    be named by another path, if that holds the same weights.

    Raises:
      ConfigError: if the source cannot be used, or is another one than the stage started from.
    """
    named = asked(config, folder.name)
    if not named:
        return None
    there = None if fresh else _recorded(folder)
    begun = not fresh and _has_weights(folder)
    if begun and not there:
        raise ConfigError(_too_late(folder, named))
    if begun and named == there[0]:
        return there
    field = f"--config.{folder.name}.init_from"
    try:
        source = open_source(named, folder.name)
    except UserError as error:
        if not there:
            raise
        remedy = (
            f"{folder.path} started from {there[0]} and does not need it any more; give "
            f"{field}={there[0]}"
            if begun
            else f"{folder.path} has no checkpoint of its own yet; bring {there[0]} back, or start "
            f"over from other weights with {field}=OTHER --fresh"
        )
        raise ConfigError(f"{error}\n{remedy}") from None
    if there and there[1] != source.fingerprint:
        same = f"give {field}={there[0]}, " if begun else "give those weights, "
        raise ConfigError(
            f"{folder.path} started from {there[0]}, fingerprint {there[1]}; {named} has the "
            f"fingerprint {source.fingerprint}: {same}another --workdir, or --fresh to start this "
            "stage over"
        )
    return there or (named, source.fingerprint)


def _too_late(folder: StageFolder, named: str) -> str:
    return (
        f"{folder.name}.init_from is {named}, but {folder.path} has begun without it, and it "
        f"counts at step 0 alone; leave it empty (--config.{folder.name}.init_from=) to go on, "
        "give another --workdir, or --fresh to start this stage over from these weights"
    )


def _recorded(folder: StageFolder) -> tuple[str, str] | None:
    """(init_from, fingerprint) in a stage's config.json; None if it started from nothing."""
    marker = folder.path / "config.json"
    if not marker.exists():
        return None
    content = read_json(marker)
    fingerprint = content.get("inputs", {}).get("init_from")
    return (content["config"][folder.name]["init_from"], fingerprint) if fingerprint else None


def _has_weights(folder: StageFolder) -> bool:
    return folder.done is not None or latest_step(folder.path) is not None


def check(session, stage: str) -> None:
    """Finds out before any work whether a stage can start from what its config names.

    Raises:
      ConfigError: if it cannot; names arrays that do not fit, and the remedy.
    """
    config, folder = session.config, session.run.stage(stage)
    named = asked(config, stage)
    if not named:
        return
    if not session.fresh and (folder.done or {}).get("imported"):
        raise ConfigError(
            f"{stage}.init_from is {named}, but {folder.path} was imported and is finished; train "
            "in another --workdir"
        )
    if not session.fresh and _recorded(folder) and _has_weights(folder):
        return  # it resumes from its own checkpoint
    source = open_source(named, stage)
    if source.lies_in(folder):
        raise ConfigError(
            f"{stage}.init_from is {named}, which is this run's own {stage}; train in another "
            "--workdir"
        )
    if not session.fresh and _has_weights(folder):
        raise ConfigError(_too_late(folder, named))
    _require_same_kind(config, source)
    if config[stage].init_optimizer and source.moments(stage) is None:
        raise ConfigError(
            f"{stage}.init_optimizer is True, but {source} holds no optimizer; leave it out, or "
            "start from the run that trained these weights"
        )
    if stage == "tokenizer":
        network = tokenizer_network(config)
    else:
        beside = session.run.stage("tokenizer")
        grid = latent_shape(beside.config if beside.done else config)
        network = diffusion_network(config.diffusion, grid)
    _require_fit(config, source, _plan(config, source, network.abstract))


def _require_same_kind(config, source: Source) -> None:
    stage, kind = source.stage, config[source.stage].name
    if source.name != kind:
        raise ConfigError(
            f"{stage}.init_from: {source} is of the kind {source.name!r}, but {stage}.name is "
            f"{kind!r}; pass --config.{stage}.name={source.name} with the source's sizes, or start "
            f"from a {kind!r}"
        )


def _plan(config, source: Source, arrays: tuple[dict, dict]) -> Plan:
    """What becomes of the arrays, (parameters, rest), of the new network."""
    stage, fixed = source.stage, set(flat(({}, arrays[1])))
    encoder = stage == "tokenizer" and bool(kind_of(config.tokenizer).backbone)

    def computed(path: str) -> bool:
        if encoder and path.startswith("encoder/"):  # it may be frozen, but it has been trained
            return config.backbone.name in COMPUTED_POSITIONS
        return path in fixed

    classes = None
    if stage == "diffusion":
        here = dict(config.diffusion.model)
        prefix = "diffusion.model."
        there = here | {k.removeprefix(prefix): v for k, v in source.network_fields.items()}
        classes = tuple(
            Classes(model["num_classes"], model["class_dropout_prob"] > 0)
            for model in (there, here)
        )
    shapes = {path: leaf.shape for path, leaf in flat(arrays).items()}
    return make_plan(shapes, source.shapes(), computed=computed, classes=classes)


def _differing(config, source: Source) -> dict[str, tuple]:
    """Field of the network -> (value in the source, value here), where they differ."""
    there, here = source.network_fields, network_fields(config.to_dict(), source.stage)
    return {k: (there[k], v) for k, v in here.items() if k in there and there[k] != v}


def _require_fit(config, source: Source, plan: Plan) -> None:
    """Raises ConfigError unless the network is that of the source, up to what may differ."""
    stage = source.stage
    wrong = {
        key: values
        for key, values in _differing(config, source).items()
        if key.split(".")[-1] not in MAY_DIFFER | MEANING
    }
    lines = [
        f"{key}: {here!r} here, {there!r} in the source" for key, (there, here) in wrong.items()
    ]
    lines += plan.problems[:LISTED]
    if not lines:
        return
    if len(plan.problems) > LISTED:
        lines.append(f"and {len(plan.problems) - LISTED} more arrays")
    flags = [f"--config.{key}={_shell(there)}" for key, (there, _) in wrong.items()]
    if flags:
        remedy = "pass these, or start from a network of this config's sizes:\n  "
        remedy += "\n  ".join(flags)
    elif any("x_embedder" in line for line in plan.problems):
        remedy = "start from a diffusion model on latents of as many channels as this tokenizer's"
    else:
        remedy = "start from a network of this config's sizes, or give the config the source's"
    raise ConfigError(
        f"{stage}.init_from: the network of {source} is another one than this config's:\n  "
        + "\n  ".join(lines)
        + f"\n{remedy}"
    )


def _shell(value) -> str:
    """A value of a field as the command line takes it."""
    return f"'{tuple(value)}'" if isinstance(value, list) else str(value)


def start(session, stage: str, state: TrainState) -> TrainState:
    """The state at step 0 with the weights of the source, the moving average included.

    What was taken, interpolated, new or left is said in the log and recorded in the stage's folder.

    Raises:
      ConfigError: if the source does not fit.
    """
    config = session.config
    source = open_source(asked(config, stage), stage)
    arrays = state.params[stage], state.rest[stage]
    plan = _plan(config, source, arrays)
    _require_fit(config, source, plan)
    fresh = flat(arrays)
    values = carried(plan, source.arrays(), lambda path: np.asarray(to_host(fresh[path])))
    state = with_arrays(state, stage, values)
    _tell(config, source, plan)
    record = {"path": asked(config, stage), **source.record, **_record(plan)}
    whole = {stage: plan.taken}  # network -> parameters whose moments fit
    for name in state.params.keys() - {stage} | set(source.others):
        state, words = _take_along(state, source, name)
        record[name] = words
        logging.info("%s: %s: %s", stage, name, words)
        if words == TAKEN:
            whole[name] = tuple(flat((state.params[name], {})))
    record["optimizers"] = "new"
    if config[stage].init_optimizer:
        for name, paths in whole.items():
            state = with_moments(state, name, source.moments(name), paths)
        record["optimizers"] = f"moments of {', '.join(sorted(whole))} taken along"
    logging.info("%s: optimizers: %s", stage, record["optimizers"])
    write_json(session.run.stage(stage).path / RECORD, record)
    return state


def _take_along(state: TrainState, source: Source, name: str) -> tuple[TrainState, str]:
    """The state with a network that trained beside the source's, and what became of it."""
    if name not in state.params:
        return state, "left, this config has none"
    if name not in source.others:
        return state, f"new, {source} has none"
    arrays = flat((state.params[name], state.rest[name]))
    shapes = {path: leaf.shape for path, leaf in arrays.items()}, source.shapes(name)
    if shapes[0] == shapes[1]:
        return with_arrays(state, name, source.arrays(name)), TAKEN
    odd = min(
        p for p in shapes[0].keys() | shapes[1].keys() if shapes[0].get(p) != shapes[1].get(p)
    )
    here, there = (list(of[odd]) if odd in of else "absent" for of in shapes)
    return state, f"new, the source's does not fit: {odd} is {here} here, {there} there"


def _record(plan: Plan) -> dict:
    return {
        "taken": len(plan.taken),
        "interpolated": {path: list(map(list, pair)) for path, pair in plan.resized.items()},
        "new": plan.new | {path: labels_line(*pair) for path, pair in plan.labels.items()},
        "left": plan.left,
    }


def _tell(config, source: Source, plan: Plan) -> None:
    """Says in the log what becomes of every array, and which fields differ."""
    lines = [f"starts from {source}, fingerprint {source.fingerprint}"]
    count = sum(map(len, (plan.taken, plan.resized, plan.labels, plan.new)))
    lines.append(f"{len(plan.taken)} of {count} arrays are taken as they are")
    lines += [
        f"{path}: interpolated bicubically from {there[1]} to {here[1]} positions"
        for path, (there, here) in plan.resized.items()
    ]
    lines += [f"{path}: {labels_line(*pair)}" for path, pair in plan.labels.items()]
    lines += [f"{path}: new, {why}" for path, why in plan.new.items()]
    lines += [f"{path} of the source: left, {why}" for path, why in plan.left.items()]
    lines += [
        f"{key} is {here!r}, {there!r} in the source"
        for key, (there, here) in _fields(config, source).items()
    ]
    for line in lines:
        logging.info("%s: %s", source.stage, line)
    for key, (there, here) in _differing(config, source).items():
        if key.split(".")[-1] in MEANING:
            logging.warning(
                "%s: %s is %r, the source was trained with %r: it has to learn this anew",
                *(source.stage, key, here, there),
            )


def _fields(config, source: Source) -> dict[str, tuple]:
    """All fields of the stage and its network that differ from the source's, as `_differing`."""
    there = source.fields
    here = flatten(config) | fields_of(config)
    names = [
        key
        for key in here
        if key.startswith((f"{source.stage}.", f"precision.{source.stage}."))
        and key in there
        and not is_operational(key)
        and not key.startswith((f"{source.stage}.init_",))
    ]
    return _differing(config, source) | {
        key: (there[key], here[key]) for key in names if there[key] != here[key]
    }


def warn_of_encoder(session, state: TrainState) -> None:
    """Warns if a tokenizer's frozen encoder is not the run's backbone, where the run has one."""
    folder = session.run.stage("backbone")
    if kind_of(session.config.tokenizer).backbone != "frozen" or not folder.done:
        return
    done = folder.done
    lent = flat(load_weights(folder.path, done["weights"], "backbone", done.get("step")))
    held = flat(({}, state.rest["tokenizer"]))
    pairs = (
        (lent[p.removeprefix("encoder/")], x)
        for p, x in held.items()
        if p.startswith("encoder/") and p.removeprefix("encoder/") in lent
    )
    if any(a.shape == b.shape and not np.array_equal(a, to_host(b)) for a, b in pairs):
        logging.warning(
            "tokenizer: its frozen encoder is the source's, not this run's backbone in %s; terms "
            "that compare with the backbone compare two encoders",
            folder.path,
        )


def warn_of_tokenizer(session, tokenizer: str) -> None:
    """Warns if a diffusion model starts on latents of another tokenizer than its source had.

    Args:
      tokenizer: the fingerprint of the one that made this run's latents.
    """
    source = open_source(asked(session.config, "diffusion"), "diffusion")
    if source.tokenizer == tokenizer:
        return
    known = (
        f"tokenizer {source.tokenizer}" if source.tokenizer else "a tokenizer not recorded there"
    )
    origin = ((session.run.stage("tokenizer").done or {}).get("started_from") or {}).get(
        "fingerprint"
    )
    logging.warning(
        "diffusion: %s was trained on latents of %s, this run's latents are of %s%s; what the "
        "channels mean may differ",
        *(source, known, tokenizer),
        ", which was fine-tuned from it" if origin and origin == source.tokenizer else "",
    )


def provenance(folder: StageFolder) -> dict:
    """Facts for done.json: what a stage started from, if from anything."""
    # the record may be of a session that ended before there was a checkpoint
    started = _recorded(folder) is not None
    return {"started_from": read_json(folder.path / RECORD)} if started else {}


def under_its_name(stages: Mapping[str, dict | None]) -> dict[str, dict[str, str]]:
    """``{"started_from": {stage: words}}`` of what finished stages recorded; {} if none did.

    Args:
      stages: name -> what it recorded, or None.
    """
    records = {name: (done or {}).get("started_from") for name, done in stages.items()}
    found = {name: words(record) for name, record in records.items() if record}
    return {"started_from": found} if found else {}


def words(record: dict) -> str:
    """What a stage started from, as a part of a sentence."""
    step = "" if record.get("step") is None else f", step {record['step']}"
    changes = "".join(f"; amended there: {in_words(item)}" for item in record.get("amended", []))
    return f"started from {record['path']}{step} (fingerprint {record['fingerprint']}{changes})"
