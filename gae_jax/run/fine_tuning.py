"""`init_from`: start a tokenizer or a diffusion model from existing weights.

A stage records their fingerprint when it starts. Once it has its first checkpoint, the source is
not needed any more and may be gone.
"""

import logging
import shlex

import numpy as np

from gae_jax.config import flatten, is_operational
from gae_jax.config.precision import fields_of
from gae_jax.generators.latent_diffusion import diffusion_network
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
# which `make_plan` handles, and fields that only training or sampling reads.
MAY_DIFFER = frozenset(
    {
        *("image_size", "input_size", "resolution", "attn_resolutions", "attention_resolutions"),
        *("num_classes", "class_dropout_prob", "rank", "layers", "patch_init"),
        *("noise", "noise_std", "noise_factor", "noise_tau", "angles", "jitter", "detach_z"),
        *("time", "time_mean", "time_std", "sigma_min", "gamma", "decode_steps", "decode_sampler"),
    }
)
# What a diffusion model's input and output mean: training can adapt to it, so it is only logged.
MEANING = frozenset({"path", "prediction", "geometry", "latent_multiplier"})
LISTED = 30  # arrays that do not fit, in an error
COMPUTED_POSITIONS = ("mae",)  # encoders whose position table is not trained


def asked(config, stage: str) -> str:
    """The source that the config names for a stage; "" for random weights."""
    return config[stage].get("init_from", "") if stage in STAGES else ""


def identity(folder: StageFolder, config, *, fresh: bool) -> tuple[str, str] | None:
    """Return (init_from as the stage's folder records it, fingerprint of the source), or None.

    The source of a stage with a checkpoint need not exist. It may be named by another path that
    holds the same weights.

    Raises:
      ConfigError: if the source cannot be used, or is another one than the stage started from.
    """
    named = asked(config, folder.name)
    if not named:
        return None
    recorded = None if fresh else _recorded(folder)
    begun = not fresh and _has_weights(folder)
    if begun:
        if not recorded:
            raise ConfigError(_too_late(folder, named))
        if named == recorded[0]:
            return recorded
    field = f"--config.{folder.name}.init_from"
    try:
        source = open_source(named, folder.name)
    except UserError as error:
        if not recorded:
            raise
        remedy = (
            f"{folder.path} started from {recorded[0]} and does not need it any more; give "
            f"{field}={recorded[0]}"
            if begun
            else f"{folder.path} has no checkpoint yet; bring {recorded[0]} back, or start over "
            f"from other weights with {field}=OTHER --fresh"
        )
        raise ConfigError(f"{error}\n{remedy}") from None
    if recorded and recorded[1] != source.fingerprint:
        same = f"give {field}={recorded[0]}, " if begun else "give those weights, "
        raise ConfigError(
            f"{folder.path} started from {recorded[0]}, fingerprint {recorded[1]}; {named} has the "
            f"fingerprint {source.fingerprint}: {same}another --workdir, or --fresh to start this "
            "stage over"
        )
    return recorded or (named, source.fingerprint)


def _too_late(folder: StageFolder, named: str) -> str:
    return (
        f"{folder.name}.init_from is {named}, but {folder.path} has begun without it, and it is "
        f"read at step 0 alone; leave it empty (--config.{folder.name}.init_from=) to resume, "
        "give another --workdir, or --fresh to start this stage over from these weights"
    )


def _recorded(folder: StageFolder) -> tuple[str, str] | None:
    """Return (init_from, fingerprint) of a stage's config.json; None for random weights."""
    marker = folder.path / "config.json"
    if not marker.exists():
        return None
    content = read_json(marker)
    fingerprint = content.get("inputs", {}).get("init_from")
    return (content["config"][folder.name]["init_from"], fingerprint) if fingerprint else None


def _has_weights(folder: StageFolder) -> bool:
    return folder.done is not None or latest_step(folder.path) is not None


def check(session, stage: str) -> None:
    """Check before any work that a stage can start from the source that its config names.

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
        trained = session.run.stage("tokenizer")
        shape = latent_shape(trained.config if trained.done else config)
        network = diffusion_network(config.diffusion, shape)
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
    """Plan what happens to the arrays, (parameters, rest), of the new network."""
    stage, fixed = source.stage, set(flat(({}, arrays[1])))
    encoder = stage == "tokenizer" and bool(kind_of(config.tokenizer).backbone)

    def computed(path: str) -> bool:
        if encoder and path.startswith("encoder/"):  # maybe frozen now, but trained before
            return config.backbone.name in COMPUTED_POSITIONS
        return path in fixed

    classes = None
    if stage == "diffusion":
        new = dict(config.diffusion.model)
        prefix = "diffusion.model."
        old = new | {k.removeprefix(prefix): v for k, v in source.network_fields.items()}
        of_old, of_new = (
            Classes(model["num_classes"], model["class_dropout_prob"] > 0) for model in (old, new)
        )
        classes = of_old, of_new
    shapes = {path: leaf.shape for path, leaf in flat(arrays).items()}
    return make_plan(shapes, source.shapes(), computed=computed, classes=classes)


def _differing(config, source: Source) -> dict[str, tuple]:
    """Fields of the network that differ: path -> (value in the source, value here)."""
    old, new = source.network_fields, network_fields(config.to_dict(), source.stage)
    return {k: (old[k], v) for k, v in new.items() if k in old and old[k] != v}


def _require_fit(config, source: Source, plan: Plan) -> None:
    """Raise ConfigError unless the network is that of the source, up to what may differ."""
    stage = source.stage
    wrong = {
        key: values
        for key, values in _differing(config, source).items()
        if key.split(".")[-1] not in MAY_DIFFER | MEANING
    }
    lines = [f"{key}: {new!r} here, {old!r} in the source" for key, (old, new) in wrong.items()]
    lines += plan.problems[:LISTED]
    if not lines:
        return
    if len(plan.problems) > LISTED:
        lines.append(f"and {len(plan.problems) - LISTED} more arrays")
    # lists were tuples
    values = {key: tuple(old) if isinstance(old, list) else old for key, (old, _) in wrong.items()}
    flags = [f"--config.{key}={shlex.quote(str(value))}" for key, value in values.items()]
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


def start(session, stage: str, state: TrainState) -> TrainState:
    """Put the weights of the source into the state at step 0, the moving average included.

    What was taken, interpolated, new or left is logged and recorded in the stage's folder.

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
    _log(config, source, plan)
    record = {"path": asked(config, stage), **source.record, **_record(plan)}
    fitting = {stage: plan.taken}  # network -> parameters whose moments fit
    for name in state.params.keys() - {stage} | set(source.others):
        state, words = _take_along(state, source, name)
        record[name] = words
        logging.info("%s: %s: %s", stage, name, words)
        if words == TAKEN:
            fitting[name] = tuple(flat((state.params[name], {})))
    record["optimizers"] = "new"
    if config[stage].init_optimizer:
        for name, paths in fitting.items():
            if moments := source.moments(name):
                state = with_moments(state, name, moments, paths)
        record["optimizers"] = f"moments of {', '.join(sorted(fitting))} taken along"
    logging.info("%s: optimizers: %s", stage, record["optimizers"])
    write_json(session.run.stage(stage).path / RECORD, record)
    return state


def _take_along(state: TrainState, source: Source, name: str) -> tuple[TrainState, str]:
    """Put a network that trained beside the source's into the state; returns what happened too."""
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
    new, old = (list(of[odd]) if odd in of else "absent" for of in shapes)
    return state, f"new, the source's does not fit: {odd} is {new} here, {old} there"


def _record(plan: Plan) -> dict:
    return {
        "taken": len(plan.taken),
        "interpolated": {path: list(map(list, pair)) for path, pair in plan.resized.items()},
        "new": plan.new | {path: labels_line(*pair) for path, pair in plan.labels.items()},
        "left": plan.left,
    }


def _log(config, source: Source, plan: Plan) -> None:
    """Log what happens to every array, and which fields differ."""
    lines = [f"starts from {source}, fingerprint {source.fingerprint}"]
    count = sum(map(len, (plan.taken, plan.resized, plan.labels, plan.new)))
    lines.append(f"{len(plan.taken)} of {count} arrays are taken as they are")
    lines += [
        f"{path}: interpolated bicubically from {old[1]} to {new[1]} positions"
        for path, (old, new) in plan.resized.items()
    ]
    lines += [f"{path}: {labels_line(*pair)}" for path, pair in plan.labels.items()]
    lines += [f"{path}: new, {why}" for path, why in plan.new.items()]
    lines += [f"{path} of the source: left, {why}" for path, why in plan.left.items()]
    lines += [
        f"{key} is {new!r}, {old!r} in the source"
        for key, (old, new) in _fields(config, source).items()
    ]
    for line in lines:
        logging.info("%s: %s", source.stage, line)
    for key, (old, new) in _differing(config, source).items():
        if key.split(".")[-1] in MEANING:
            logging.warning(
                "%s: %s is %r, the source was trained with %r: it has to learn this anew",
                *(source.stage, key, new, old),
            )


def _fields(config, source: Source) -> dict[str, tuple]:
    """All fields of the stage and its network that differ from the source's, as `_differing`."""
    old, stage = source.fields, source.stage
    return _differing(config, source) | {
        key: (old[key], value)
        for key, value in (flatten(config) | fields_of(config)).items()
        if key.startswith((f"{stage}.", f"precision.{stage}."))
        and not key.startswith(f"{stage}.init_")
        and not is_operational(key)
        and key in old
        and old[key] != value
    }


def warn_of_encoder(session, state: TrainState) -> None:
    """Warn if a tokenizer's frozen encoder is not the run's backbone, where the run has one."""
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
    """Warn if a diffusion model starts on latents encoded by a different tokenizer.

    Args:
      tokenizer: fingerprint of the one that encoded this run's latents.
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
    """Facts for done.json: the source that a stage started from, if it had one."""
    # the record may be of a session that ended before the first checkpoint
    started = _recorded(folder) is not None
    return {"started_from": read_json(folder.path / RECORD)} if started else {}
