"""Changes with which a stage was resumed: what changed, and from which step.

A record is a JSON value: the stage, the step of the checkpoint that the training went on from, the
time, the changed fields (old and new), the learning rates where they jump (before and after), and
the later checkpoints that were removed. Records lie in ``config.json`` and ``done.json`` of the
stage and of all that is built on it.
"""

import dataclasses
import datetime
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gae_jax.config import default_config, flatten, is_operational, precision, why_fixed
from gae_jax.runtime.errors import UserError

# What a change of the images is called: no field says what lies in a folder.
DATA = "the data"


@dataclasses.dataclass(frozen=True)
class Wish:
    """What the command line asks of a stage that has begun.

    Attributes:
      trains: whether the stage leaves checkpoints that training resumes from.
      amend: go on with changed fields.
      from_step: go on from an earlier checkpoint.
    """

    trains: bool = False
    amend: bool = False
    from_step: int | None = None


@dataclasses.dataclass(frozen=True)
class Situation:
    """What a stage's folder holds.

    Attributes:
      name: of the stage.
      path: of its folder.
      done: whether it is finished.
      steps: of the checkpoints that are kept, ascending.
      wanted: the number of steps that the config asks for; None if it has none.
    """

    name: str
    path: Any
    done: bool
    steps: Sequence[int]
    wanted: int | None

    @property
    def kept(self) -> str:
        return ", ".join(map(str, self.steps)) or "none"


def differences(old: Mapping, new: Mapping) -> list[dict]:
    """The fields whose change is another course, as a record has them.

    Args:
      old, new: sections of a config; what the old one lacks has its default.
    """
    old, new = flatten(old), flatten(new)
    # a field that came with a later version: its default is what was done before
    default = default_config()
    known = flatten(default) | precision.fields_of(default)
    old = {k: v for k, v in known.items() if k in new} | old
    return [
        {"field": key, "old": old.get(key, "(absent)"), "new": new.get(key, "(absent)")}
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not is_operational(key)
    ]


def config_at(step: int, config: Mapping, records: Iterable[dict], name: str) -> dict[str, Any]:
    """The fields of a stage's config, by dotted path, that its checkpoint of a step was made with.

    Args:
      config: that the stage has now, after the changes in the records.
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
    """Why the stage cannot go on with the changes, with the remedy; "" if it can."""
    fixed = [f"  {c['field']}: {why}" for c in changes if (why := why_fixed(c["field"]))]
    over = "--fresh starts this stage over"
    if not wish.trains:
        return f"{situation.name} does not train, so it has no step to go on from; {over}"
    if fixed:
        return "a training cannot go on with other values of\n" + "\n".join(fixed) + f"\n{over}"
    if not situation.steps:
        return f"{situation.path}/checkpoints keeps no checkpoint; {over}"
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
    """Raises UserError unless the checkpoint that ``wish`` names is kept; the others are listed."""
    if wish.from_step is None or wish.from_step in situation.steps:
        return
    some = f"use --from-step={situation.steps[-1]}, say" if situation.steps else "leave it out"
    raise UserError(
        f"--from-step={wish.from_step}: {situation.path}/checkpoints does not keep this step; "
        f"kept: {situation.kept}; {some}, or --fresh to start this stage over"
    )


def refusal(changes: Sequence[dict], situation: Situation, wish: Wish) -> str:
    """The error for a stage that was made by another config."""
    why = obstacle(changes, situation, wish)
    head = f"{situation.path} was made by another config:\n{listed(changes)}\n"
    if wish.amend:
        return f"{head}--amend: {why}; the old values go on as before"
    ways = "give the old values, another --workdir, or --fresh to start this stage over"
    if why:
        return f"{head}{ways}" + (f"\n(--amend alone does not help: {why})" if wish.trains else "")
    step = situation.steps[-1] if wish.from_step is None else wish.from_step
    note = ""
    if any(c["field"].endswith(".train.steps") for c in changes):
        note = "; the learning rate then follows the schedule of the new number of steps"
    return f"{head}{ways}; or pass --amend to go on from step {step} with the new values{note}"


def record(stage: str, step: int, changes: Sequence[dict], removed: Sequence[int], **facts) -> dict:
    """What is written down of a change of course."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    more = {"removed": list(removed)} if removed else {}
    return {"stage": stage, "step": step, "time": now, "changes": list(changes), **more, **facts}


def merged(*lists: Iterable[dict]) -> list[dict]:
    """The records of several stages, each once, in order."""
    found: list[dict] = []
    for item in (item for part in lists for item in part):
        if item not in found:
            found.append(item)
    return found


def in_words(item: dict) -> str:
    """One record as text."""
    changes = [f"{c['field']} {c['old']} -> {c['new']}" for c in item["changes"]]
    for name, (before, after) in item.get("learning_rate", {}).items():
        changes.append(f"{name} of the next step {before:.3g} -> {after:.3g}")
    if removed := item.get("removed"):
        changes.insert(0, f"back from step {max(removed)}")
    return f"{item['stage']}, from step {item['step']} on: {'; '.join(changes)}"


def texts(items: Iterable[dict]) -> dict[str, str]:
    """Stage -> its records as text."""
    found: dict[str, list[str]] = {}
    for item in items:
        found.setdefault(item["stage"], []).append(in_words(item).split(", ", 1)[1])
    return {stage: " | ".join(lines) for stage, lines in found.items()}


def under_its_name(stages: Iterable[dict | None]) -> dict[str, dict[str, str]]:
    """``{"amended": texts}`` of what finished stages recorded; {} if they were not amended."""
    found = texts(merged(*((done or {}).get("amended", []) for done in stages)))
    return {"amended": found} if found else {}
