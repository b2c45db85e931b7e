"""Changes with which a stage was resumed: what changed, and from which step.

A record is a JSON value: the stage, the step of the checkpoint that training resumed from, the
time, the changed fields (old and new), the learning rates where they jump (before and after), and
the later checkpoints that were removed. Records are in ``config.json`` and ``done.json`` of the
stage and of all that is built on it.
"""

import dataclasses
import datetime
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gae_jax.config import default_config, flatten, is_operational, precision, why_fixed
from gae_jax.runtime.errors import UserError

# The name of a change of the images: no field says what a folder holds.
DATA = "the data"


@dataclasses.dataclass(frozen=True)
class Wish:
    """How the command line asks to resume a stage that has begun.

    Attributes:
      trains: whether the stage leaves checkpoints that training resumes from.
      amend: resume with changed fields.
      from_step: resume from this earlier checkpoint.
    """

    trains: bool = False
    amend: bool = False
    from_step: int | None = None


@dataclasses.dataclass(frozen=True)
class Situation:
    """The state of a stage's folder.

    Attributes:
      name: of the stage.
      path: of its folder.
      done: whether it is finished.
      steps: of the retained checkpoints, ascending.
      wanted: the number of steps that the config asks for; None if it has none.
    """

    name: str
    path: Any
    done: bool
    steps: Sequence[int]
    wanted: int | None


def differences(old: Mapping, new: Mapping) -> list[dict]:
    """The fields whose change alters the training, as a record has them.

    Args:
      old, new: sections of a config; fields that the old one lacks have their defaults.
    """
    old, new = flatten(old), flatten(new)
    # the default of a field that came with a later version is what was done before
    default = default_config()
    known = flatten(default) | precision.fields_of(default)
    old = {k: v for k, v in known.items() if k in new} | old
    return [
        {"field": key, "old": old.get(key, "(absent)"), "new": new.get(key, "(absent)")}
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not is_operational(key)
    ]


def config_at(step: int, config: Mapping, records: Iterable[dict], name: str) -> dict[str, Any]:
    """The fields of a stage's config, by dotted path, when it reached a step.

    Args:
      config: of the stage now, after the changes in the records.
      name: of the stage.
    """
    fields = flatten(config)
    for item in reversed([r for r in records if r["stage"] == name and r["step"] > step]):
        for change in item["changes"]:
            if change["field"] in fields:
                fields[change["field"]] = change["old"]
    return fields


def listed(changes: Iterable[dict]) -> str:
    """The changes, one a line."""
    return "\n".join(f"  {c['field']}: {c['old']!r} there, {c['new']!r} asked for" for c in changes)


def obstacle(changes: Sequence[dict], situation: Situation, wish: Wish) -> str:
    """Why the stage cannot resume with the changes, with the remedy; "" if it can."""
    fixed = [f"  {c['field']}: {why}" for c in changes if (why := why_fixed(c["field"]))]
    over = "--fresh starts this stage over"
    if not wish.trains:
        return f"{situation.name} does not train, so it has no step to resume from; {over}"
    if fixed:
        return "a training cannot resume with other values of\n" + "\n".join(fixed) + f"\n{over}"
    if not situation.steps:
        return f"{situation.path}/checkpoints holds no checkpoint; {over}"
    reached = situation.steps[-1] if wish.from_step is None else wish.from_step
    if situation.wanted is not None and situation.wanted < reached:
        earlier = [step for step in situation.steps if step <= situation.wanted]
        back = f", or go back with --from-step={earlier[-1]}" if earlier else ""
        return (
            f"{situation.name}.train.steps is {situation.wanted}, but the checkpoint is at step "
            f"{reached}; give --config.{situation.name}.train.steps={reached} or more{back}"
        )
    if situation.done and wish.from_step is None and situation.wanted in (None, reached):
        back = ", ".join(f"--from-step={step}" for step in situation.steps[:-1])
        return (
            f"{situation.name} is finished at step {reached} and has nothing left to train; give "
            f"more steps (--amend --config.{situation.name}.train.steps={2 * reached}, say)"
            + (f", or go back (--amend with {back})" if back else "")
        )
    return ""


def check_from_step(situation: Situation, wish: Wish) -> None:
    """Raise UserError, listing the checkpoints, unless they include the one that ``wish`` names."""
    if wish.from_step is None or wish.from_step in situation.steps:
        return
    kept = ", ".join(map(str, situation.steps)) or "none"
    some = f"use --from-step={situation.steps[-1]}, say" if situation.steps else "leave it out"
    raise UserError(
        f"--from-step={wish.from_step}: {situation.path}/checkpoints does not keep this step; "
        f"kept: {kept}; {some}, or --fresh to start this stage over"
    )


def refusal(changes: Sequence[dict], situation: Situation, wish: Wish) -> str:
    """The text of the error for a stage that was made by another config."""
    why = obstacle(changes, situation, wish)
    head = f"{situation.path} was made by another config:\n{listed(changes)}\n"
    if wish.amend:
        return f"{head}--amend: {why}; with the old values it resumes as before"
    ways = "give the old values, another --workdir, or --fresh to start this stage over"
    if why:
        return f"{head}{ways}" + (f"\n(--amend alone does not help: {why})" if wish.trains else "")
    step = situation.steps[-1] if wish.from_step is None else wish.from_step
    note = ""
    if any(c["field"].endswith(".train.steps") for c in changes):
        note = "; the learning rate then follows the schedule of the new number of steps"
    return f"{head}{ways}; or pass --amend to resume from step {step} with the new values{note}"


def record(stage: str, step: int, changes: Sequence[dict], removed: Sequence[int], **facts) -> dict:
    """The record of a change of course."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    removals = {"removed": list(removed)} if removed else {}
    return dict(stage=stage, step=step, time=now, changes=list(changes), **removals, **facts)


def merged(*lists: Iterable[dict]) -> list[dict]:
    """The records of several stages, each once, in order."""
    records: list[dict] = []
    for item in itertools.chain(*lists):
        if item not in records:
            records.append(item)
    return records


def in_words(item: dict) -> str:
    """One record as text."""
    changes = [f"{c['field']} {c['old']} -> {c['new']}" for c in item["changes"]]
    for name, (before, after) in item.get("learning_rate", {}).items():
        changes.append(f"{name} of the next step {before:.3g} -> {after:.3g}")
    if removed := item.get("removed"):
        changes.insert(0, f"back from step {max(removed)}")
    return f"{item['stage']}, from step {item['step']} on: {'; '.join(changes)}"


def started_from(record: dict) -> str:
    """The weights that a stage started from, as its ``done.json`` says, as part of a sentence."""
    step = "" if record.get("step") is None else f", step {record['step']}"
    changes = "".join(f"; amended there: {in_words(item)}" for item in record.get("amended", []))
    return f"started from {record['path']}{step} (fingerprint {record['fingerprint']}{changes})"


def history(stages: Mapping[str, dict | None]) -> dict[str, dict[str, str]]:
    """How the training of finished stages was resumed and started, as text.

    Args:
      stages: name -> what it recorded, or None.

    Returns:
      ``{"amended": {stage: text}, "started_from": {stage: text}}``, without what is empty.
    """
    amended: dict[str, str] = {}
    for item in merged(*((done or {}).get("amended", []) for done in stages.values())):
        text = in_words(item).split(", ", 1)[1]
        name = item["stage"]
        amended[name] = f"{amended[name]} | {text}" if name in amended else text
    records = {name: (done or {}).get("started_from") for name, done in stages.items()}
    started = {name: started_from(record) for name, record in records.items() if record}
    parts = {"amended": amended, "started_from": started}
    return {name: part for name, part in parts.items() if part}
