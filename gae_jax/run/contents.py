"""The images that a stage read, recorded in its folder, and what happens when they change.

``STAGE/data.json`` has classes, counts and digests of every split that the stage reads;
``data_images.json.gz`` the names and sizes of the images, so that differences can be named.
"""

import gzip
import json
import logging
from pathlib import Path

from gae_jax.data.contents import Contents, Differences, differences
from gae_jax.run.amendments import Wish
from gae_jax.run.run import StageFolder
from gae_jax.runtime import distributed
from gae_jax.runtime.errors import ConfigError, DataError, number_of
from gae_jax.runtime.files import read_json, write_bytes, write_json
from gae_jax.train.checkpoint import latest_step

FILE, NAMES = "data.json", "data_images.json.gz"
BOTH = ("train", "holdout")
# Stage -> splits that it reads; ``diffusion`` reads latents of "train".
READS = {
    "backbone": BOTH,
    "teacher": BOTH,
    "tokenizer": BOTH,
    "latents": ("train",),
    "diffusion": ("train",),
    "evaluate": BOTH,
    "likelihood": BOTH,
    "reference": (),  # reference.split
    "teacher-probe": BOTH,  # of sweeps
    "latent-probe": BOTH,
}
# Stage -> those that it is compared with: the first that the run has.
BUILT_ON = {
    "teacher": ("backbone",),
    "tokenizer": ("teacher", "backbone"),
    "latents": ("tokenizer",),
    "diffusion": ("latents",),
    "evaluate": ("latents", "tokenizer"),
    "likelihood": ("latents", "tokenizer"),
}
TRAINED = ("backbone", "teacher", "tokenizer")
MEASURED = ("evaluate", "likelihood", "reference", "teacher-probe", "latent-probe")
# So many images may be replaced by others of the same name before a training refuses to resume:
# a damaged file can be repaired.
FEW, SHARE = 3, 0.01


def read_contents(folder: StageFolder) -> dict[str, Contents]:
    """Read what a stage recorded: split -> its images; {} if it recorded none."""
    path = folder.path / FILE
    if not path.exists():
        return {}
    try:
        names = json.loads(gzip.decompress((folder.path / NAMES).read_bytes()))
    except (OSError, EOFError, ValueError):  # differences then name no images
        names = {}
    recorded = read_json(path)
    return {
        split: Contents.from_json(value, names.get(value["digest"], {}))
        for split, value in recorded.items()
    }


def write_contents(path: Path, contents: dict[str, Contents]) -> None:
    """Record in a stage's folder what it reads."""
    names = {
        c.digest: {part.name: part.images for part in c.classes if part.images}
        for c in contents.values()
    }
    write_bytes(path / NAMES, gzip.compress(json.dumps(names).encode(), 6, mtime=0))
    write_json(path / FILE, {split: c.to_json() for split, c in contents.items()})


def check_contents(session, folder: StageFolder) -> dict[str, Contents]:
    """Compare the images that a stage is about to read with those that it was begun with.

    They are compared with those of the stage that it is built on, too.

    Args:
      session: with the images.
      folder: of a stage of `READS`; not yet claimed if the stage begins.

    Returns:
      The images to record in the folder, as `read_contents`; {} on all processes but the first.

    Raises:
      DataError: naming the difference, if the stage, or what it is built on, was made of other
        images and cannot resume with these.
    """
    kept: dict[str, Contents] = {}
    distributed.agree(lambda: kept.update(_check(session, folder)))
    return kept


def _check(session, folder: StageFolder) -> dict[str, Contents]:
    name, done = folder.name, not session.fresh and folder.done is not None
    splits = READS[name] or (session.config.reference.split,)
    recorded = {} if session.fresh else read_contents(folder)
    stages = [session.run.stage(stage) for stage in BUILT_ON.get(name, ())]
    base = next((stage for stage in stages if read_contents(stage)), None)
    unknown = not recorded and (done or (not session.fresh and begun(folder)))
    if name == "diffusion":
        unknown = done or not base
    if unknown:  # of an earlier version, or imported
        return {}
    made_of = read_contents(base) if base else {}
    # the latents were made of these
    learned = {"train": made_of["train"]} if name == "diffusion" else {}
    try:
        now = {split: session.source(split).contents for split in splits}
    except DataError as error:
        if not (done or learned):
            raise
        logging.info("%s: the images are not compared: %s", name, error)
        return learned
    if recorded and not learned:
        _compare_own(folder, recorded, now, done, session.wish(name))
    if done:
        return {}
    if base:
        _compare_base(session, folder, base, made_of, now)
    return learned or now


def _compare_own(folder: StageFolder, recorded: dict, now: dict, done: bool, wish: Wish) -> None:
    """Compare a stage's images with those that it was begun with."""
    again = folder.run.command(folder.name, "--fresh")
    changed = _changed(recorded, now)
    if not changed:
        return
    if folder.name in MEASURED:
        if done:
            raise DataError(
                f"{folder.path} was made of other images: {in_words(changed)}; put them back, or "
                "remove this folder and run the same command again"
            )
        return
    train = changed.get("train", Differences())
    if done and folder.name == "latents" and train.classes:
        raise DataError(
            f"{folder.path} was made of other classes: {in_words(changed)}; put the classes back, "
            f"or make the latents again with: {again}"
        )
    if done:
        logging.warning(
            "%s: finished on other images: %s; it stays as it is. To make it again: %s",
            *(folder.name, in_words(changed), again),
        )
        return
    if not begun(folder):
        return
    few = train.replaced <= max(FEW, SHARE * now["train"].count)
    if (train.classes or train.names or not few) and not (wish.trains and wish.amend):
        refuse_changed_images(folder, train, trains=wish.trains)
    logging.warning("%s: resumes with other images: %s", folder.name, in_words(changed))


def _changed(before: dict, now: dict) -> dict[str, Differences]:
    """The splits of ``now`` that differ from those of ``before``."""
    compared = {split: differences(before[split], now[split]) for split in now if split in before}
    return {split: difference for split, difference in compared.items() if difference}


def begun(folder: StageFolder) -> bool:
    """Whether an unfinished stage has results of the images that it was begun with."""
    if folder.name == "latents":
        return any(folder.path.glob("shard-*.json"))
    return latest_step(folder.path) is not None


def refuse_changed_images(folder: StageFolder, changed: Differences, *, trains: bool) -> None:
    """Raise the error of a stage that cannot resume because its training images changed.

    Args:
      trains: whether it has checkpoints to resume from.

    Raises:
      DataError: naming the differences.
    """
    amend = (
        ", pass --amend to resume from its last checkpoint with these (their order is another one: "
        "some images of this epoch may come again, others not)"
    )
    raise DataError(
        f"the training images changed since {folder.path} was begun: {changed}; put them back"
        f"{amend if trains else ''}, give another --workdir, or --fresh to start this stage over"
    )


def _compare_base(
    session, folder: StageFolder, stage: StageFolder, made_of: dict, now: dict
) -> None:
    """Compare a stage's images with those of a stage that it is built on."""
    changed = _changed(made_of, now)
    # held-out images have the labels of the training images, whether those are read here or not
    classes = changed.get("train", Differences()).classes
    resumes = not session.fresh and begun(folder)
    if classes and stage.name == "latents" and not (folder.name == "diffusion" and resumes):
        count = len(now["train"].classes)
        model = session.config.diffusion.model.num_classes
        flags = [] if count == model else [f"--config.diffusion.model.num_classes={count}"]
        again = session.run.command("latents", "--fresh", *flags)
        raise DataError(
            f"the classes changed since {stage.path} was made: {'; '.join(classes)}; put them "
            f"back, or make the latents, and what is built on them, again: {again}"
        )
    if changed:
        logging.warning(
            "%s: the images changed since %s was made: %s",
            *(folder.name, stage.path, in_words(changed)),
        )


def same_images(session, folder: StageFolder) -> bool:
    """Whether a stage, maybe of another run, read the images of this session.

    If it is of an earlier version, which did not record them: whether ``data.root`` is the same.
    """
    if folder.name not in READS or folder.name == "diffusion":  # made of its inputs alone
        return True
    recorded = read_contents(folder)
    if not recorded:
        return folder.config.data.root == session.config.data.root
    return all(
        contents.digest == session.source(split).contents.digest
        for split, contents in recorded.items()
    )


def in_words(changed: dict[str, Differences]) -> str:
    """The differences of splits as text; equal ones once."""
    texts = {split: str(difference) for split, difference in changed.items()}
    if len(set(texts.values())) == 1:
        return next(iter(texts.values()))
    return "; ".join(f"{split}: {text}" for split, text in texts.items())


def explain_classes(session, stages: tuple[str, ...]) -> str:
    """Say how the classes changed since the run's stages were made; "" if they did not.

    Args:
      stages: about to run.
    """
    for name in (*stages, "latents", "tokenizer", "backbone"):
        stage = session.run.stage(name)
        made_of = read_contents(stage).get("train")
        if made_of is None or (session.fresh and name in stages):
            continue
        classes = differences(made_of, session.source("train").contents).classes
        return f"since {stage.path} was made, {'; '.join(classes)}" if classes else ""
    return ""


def check_number_of_classes(session) -> None:
    """Raise ConfigError if the diffusion model has another number of classes than the latents."""
    latents = session.run.stage("latents")
    made_of = read_contents(latents).get("train")
    model = session.config.diffusion.model.num_classes
    if made_of is None or len(made_of.classes) == model:
        return
    names, count = made_of.class_names, len(made_of.classes)
    shown = ", ".join(names[:5]) + (", ..." if count > 5 else "")
    raise ConfigError(
        f"{latents.path} was made of {number_of(count, 'class', 'classes')} ({shown}), but "
        "diffusion.model.num_classes is "
        f"{model}; pass --config.diffusion.model.num_classes={count}, or, if the classes changed "
        f"since, make the latents again with: {session.run.command('latents', '--fresh')}"
    )
