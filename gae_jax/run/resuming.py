"""Resume training with changes (``--amend``) or from an earlier step (``--from-step``).

`prepare` first checks that it can, then records it and removes later checkpoints.
"""

import logging
from collections.abc import Mapping

import jax

from gae_jax.run.amendments import DATA, in_words
from gae_jax.run.run import StageFolder
from gae_jax.runtime import distributed
from gae_jax.runtime.errors import CheckpointError
from gae_jax.train import relayout
from gae_jax.train.checkpoint import read_meta
from gae_jax.train.fit import Stage
from gae_jax.train.optim import learning_rate_at


def prepare(folder: StageFolder, stage: Stage, section: Mapping) -> None:
    """Record the change of course that the folder has pending, if any.

    Args:
      section: of the stage, in the config.

    Raises:
      CheckpointError: if the checkpoint cannot resume this way; nothing is changed then.
    """
    if not folder.pending:
        return
    step = folder.pending["step"]
    abstract = jax.eval_shape(stage.init, jax.random.key(0))
    identity = stage.batches(section["train"]["batch_size"]).identity
    kept = folder.path / "checkpoints" / str(step)

    def look() -> list[dict]:
        problems = relayout.misfits(abstract, kept / "state")
        if problems:
            others = f"\n  and {len(problems) - 5} more" if len(problems) > 5 else ""
            raise CheckpointError(
                f"--amend: the state is another one than that of {kept}:\n  "
                + "\n  ".join(problems[:5])
                + f"{others}\nwith the old values it resumes as before; --fresh starts it over"
            )
        # the images of an amendment at this very step count, not those before it
        read = _accepted(folder, step) or read_meta(folder.path, step).get("batches")
        return [{"field": DATA, "old": read, "new": identity}] if read != identity else []

    data = distributed.all_well(look)
    rates = _rates(folder, section, step)
    folder.change_course(data, **({"learning_rate": rates} if rates else {}))
    if not folder.amended or folder.amended[-1]["stage"] != folder.name:
        return  # --amend, and nothing differs
    logging.warning("amended: %s", in_words(folder.amended[-1]))
    if data:
        logging.warning(
            "%s: the new data have another order, of which batch %d comes next: in this epoch some "
            "images may come again, and others not",
            *(folder.name, step + 1),
        )
    for name, (before, after) in rates.items():
        logging.warning(
            "%s: %s is %.3g at the next step, it was %.3g", folder.name, name, after, before
        )


def _rates(folder: StageFolder, section: Mapping, step: int) -> dict[str, list[float]]:
    """Learning rates that change: name -> [before, after] at the next update."""
    old = folder.marker["config"][folder.name]
    rates = {}
    for name in ("optim", "discriminator_optim"):
        if name not in section or name not in old:
            continue
        before, after = (
            # at the end of a training, the rate that it ended with
            learning_rate_at(
                min(step, config["train"]["steps"]),
                config["train"]["steps"],
                config[name],
                tuple(phase[0] for phase in config.get("phases", ())),
            )
            for config in (old, section)
        )
        if before != after:
            rates[f"{name}.learning_rate"] = [before, after]
    return rates


def accepted(folder: StageFolder) -> str | None:
    """Return the identity of the data with which the latest checkpoint resumes after a change.

    "" stands for the data that the checkpoint was made of; None: no change begins at it.
    """
    return distributed.agree(lambda: _accepted(folder, folder.steps[-1]) if folder.steps else None)


def _accepted(folder: StageFolder, step: int) -> str | None:
    """As `accepted`, for the checkpoint of a step."""
    changes = [
        change
        for item in folder.amended
        if item["stage"] == folder.name and item["step"] == step
        for change in item["changes"]
    ]
    data = [change["new"] for change in changes if change["field"] == DATA]
    return (data[-1] if data else "") if changes else None


def after_nan(config, name: str) -> str:
    """Advise, with flags, what to do if a metric of a training is not finite."""
    flags = []
    for part in ("optim", "discriminator_optim"):
        if part not in config[name] or (part != "optim" and not config[name].losses.gan):
            continue
        section, path = config[name][part], f"--config.{name}.{part}"
        rates = [f"{path}.{key}={section[key] / 10:g}" for key in RATES]
        clip = section.clip_norm / 2 if section.clip_norm else 1.0
        flags += [" ".join(rates), f"{path}.clip_norm={clip:g}"]
    return (
        "Run the same command again with --amend and one of these lines, or several:\n  "
        + "\n  ".join(flags)
        + "\nIt resumes from that checkpoint"
    )


RATES = ("learning_rate", "end_learning_rate")  # the end too: it must not lie above the peak
