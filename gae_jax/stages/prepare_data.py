"""``prepare-data``: ImageNet, or any class folders, as ArrayRecord shards, without TensorFlow."""

import argparse
import hashlib
import logging
import multiprocessing
import os
import signal
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures import ThreadPoolExecutor as Threads
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from gae_jax import ranges
from gae_jax.arguments import Parser
from gae_jax.data import shards
from gae_jax.data.originals import Originals, from_tars, from_tree, read_val_labels
from gae_jax.errors import ConfigError, DataError, UserError
from gae_jax.files import read_json, write_json
from gae_jax.train.log import Progress

USAGE = """\
Writes images as ArrayRecord shards for data.name=array_record; JPEG files stay as they are.

usage: python -m gae_jax prepare-data --source=DIR --out=DIR [options]
       python -m gae_jax prepare-data --train-tar=FILE --val-tar=FILE --out=DIR [options]
       python -m gae_jax prepare-data --verify=DIR

  --source=DIR          DIR/train/CLASS/* with DIR/val/CLASS/* or a flat DIR/val/*, or DIR/CLASS/*
  --train-tar=FILE      ILSVRC2012_img_train.tar, a tar of one tar per class
  --val-tar=FILE        ILSVRC2012_img_val.tar
  --devkit=FILE         ILSVRC2012_devkit_t12.tar.gz: the classes of flat validation images
  --val-labels=FILE     the same: NAME CLASS in each line; or, with --devkit, one ILSVRC2012 id
                        (default: the list that comes with tensorflow-datasets)
  --out=DIR             where the shards and manifest.json go
  --shard-images=N      images in each shard (default: 2048)
  --no-check            do not decode every image once
  --on-corrupt=error    what an image that cannot be decoded does: error, or skip (named in the
                        manifest)
  --workers=N           processes (default: one for each core)
  --fresh               throw away what another such command left in DIR
  --verify=DIR          compare the shards in DIR with the checksums in its manifest

Run again after an interruption, it makes the shards that are missing. docs/data.md has the format.
"""


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser("python -m gae_jax prepare-data --help")
    for name in ("source", "train-tar", "val-tar", "devkit", "val-labels", "out", "verify"):
        parser.add_argument(f"--{name}", type=Path)
    parser.add_number("--shard-images", ranges.COUNT, default=2048)
    parser.add_argument("--check", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--on-corrupt", choices=("error", "skip"), default="error")
    parser.add_number("--workers", ranges.whole(1, 4096), default=os.cpu_count())
    parser.add_argument("--fresh", action="store_true")
    options = parser.parse_args(argv)
    tars = options.train_tar or options.val_tar
    if options.verify:
        return options
    if not options.out or bool(options.source) == bool(tars):
        raise ConfigError(
            "give --out=DIR, and either --source=DIR or --train-tar=FILE with --val-tar=FILE\n"
            "see: python -m gae_jax prepare-data --help"
        )
    return options


def originals_of(options) -> Originals:
    """The images that the options name.

    Raises:
      DataError: if they cannot be listed.
    """
    labels = None
    if options.val_labels or options.devkit:
        labels = read_val_labels(options.val_labels, options.devkit)
    if options.source:
        return from_tree(options.source, labels)
    return from_tars(options.train_tar, options.val_tar, labels)


def identity_of(originals: Originals, options) -> dict[str, Any]:
    """What makes shards those of this command: recorded, and compared when it is run again."""
    digest = hashlib.sha256()
    for split, examples in originals.splits.items():
        for label, name, _, _, size in examples:
            digest.update(f"{split}/{originals.class_names[label]}/{name} {size}\n".encode())
    return {
        "images": {split: len(examples) for split, examples in originals.splits.items()},
        "listing": digest.hexdigest()[:16],
        "shard_images": options.shard_images,
        "check": options.check,
        "on_corrupt": options.on_corrupt,
    }


def finished_shards(folder: Path, identity: dict[str, Any], *, fresh: bool) -> dict[str, dict]:
    """Name -> entry of the shards that an earlier session listed and that are still whole.

    Raises:
      UserError: if the folder was made of other images or with other options.
    """
    path = folder / "manifest.json"
    strays = sorted(folder.glob("*.array_record"))
    if strays and not path.exists():
        raise UserError(
            f"{folder} has shards, such as {strays[0].name}, but no manifest.json; choose another "
            "--out, or remove them yourself"
        )
    if fresh:
        for stray in [*strays, path]:
            stray.unlink(missing_ok=True)
    if not path.exists():
        return {}
    manifest = read_json(path)
    there = manifest.get("made_of", {})
    if differing := [
        f"  {key}: {there.get(key)!r} there, {value!r} asked for"
        for key, value in identity.items()
        if there.get(key) != value
    ]:
        raise UserError(
            f"{folder} was made of other images or with other options:\n"
            + "\n".join(differing)
            + "\nchoose another --out, or --fresh to start over"
        )
    listed = [shard for split in manifest["splits"].values() for shard in split["shards"]]
    return {
        shard["name"]: shard
        for shard in listed
        if (file := folder / shard["name"]).exists() and file.stat().st_size == shard["bytes"]
    }


def prepare(options: argparse.Namespace) -> Path:
    """Writes the shards that are not there yet; returns the path of the manifest.

    Raises:
      UserError: saying what cannot be read or written; what was finished stays.
    """
    originals = originals_of(options)
    options.out.mkdir(parents=True, exist_ok=True)
    identity, path = identity_of(originals, options), options.out / "manifest.json"
    done = finished_shards(options.out, identity, fresh=options.fresh)
    for leftover in options.out.glob(".*.array_record.partial"):
        leftover.unlink()
    plan = plan_of(originals, options.shard_images)
    names = {split: list(parts) for split, parts in plan.items()}
    todo = [
        (options.out / name, part)
        for parts in plan.values()
        for name, part in parts.items()
        if name not in done
    ]
    origin = {
        name: str(value)
        for name in ("source", "train_tar", "val_tar", "devkit", "val_labels")
        if (value := getattr(options, name))
    }

    def list_what_is_done() -> dict[str, Any]:
        manifest = shards.manifest_of(
            originals.class_names, names, done, made_of=identity, origin=origin
        )
        write_json(path, manifest)
        return manifest

    total = sum(map(len, originals.splits.values()))
    left = sum(len(part) for _, part in todo)
    logging.info(
        "prepare-data: %d images of %d classes, %d of %d shards to be written",
        *(total, len(originals.class_names), len(todo), sum(map(len, names.values()))),
    )
    list_what_is_done()
    with Progress("prepare-data", total, done=total - left, unit="image") as progress:

        def finished(entry: dict, images: int) -> None:
            done[entry["name"]] = entry
            list_what_is_done()
            progress.update(images)

        write_shards(todo, finished, options)
    manifest = list_what_is_done()
    for split, facts in manifest["splits"].items():
        logging.info("prepare-data: %s: %d images", split, facts["count"])
        for shard in facts["shards"]:
            for name in shard["skipped"]:
                logging.warning("prepare-data: skipped %s", name)
    logging.info("prepare-data: %s", path)
    return path


def plan_of(originals: Originals, size: int) -> dict[str, dict[str, list[shards.Example]]]:
    """Split -> name of a shard -> its images, ``size`` of them and fewer in the last."""
    plan = {}
    for split, examples in originals.splits.items():
        parts = [examples[start : start + size] for start in range(0, len(examples), size)]
        plan[split] = {
            shards.shard_name(split, index, len(parts)): part for index, part in enumerate(parts)
        }
    return plan


def write_shards(todo, finished, options) -> None:
    """Writes shards in processes.

    Args:
      todo: (path, examples) of each.
      finished: called with the manifest's entry of each, and its number of images.

    Raises:
      DataError: the first error of a shard, when those that had been begun are done.
    """
    how = {"check": options.check, "on_corrupt": options.on_corrupt}
    if options.workers == 1 or len(todo) < 2:
        for path, examples in todo:
            finished(shards.write_shard(path, examples, **how), len(examples))
        return
    context = multiprocessing.get_context("spawn")  # JAX's threads do not survive a fork
    pool = ProcessPoolExecutor(
        min(options.workers, len(todo)), mp_context=context, initializer=_ignore_interrupts
    )
    sizes: dict[Future, int] = {}
    try:
        left, broken = iter(todo), None
        # few at a time: what waits would be pickled all at once
        while broken is None:
            for path, examples in left:
                sizes[pool.submit(shards.write_shard, path, examples, **how)] = len(examples)
                if len(sizes) >= 2 * options.workers:
                    break
            if not sizes:
                return
            broken = _collect(sizes, finished)
        for future in [future for future in sizes if future.cancel()]:
            del sizes[future]
        while sizes:
            _collect(sizes, finished)
        if isinstance(broken, BrokenProcessPool):
            raise DataError(
                "a process that writes shards was killed, for want of memory perhaps: pass fewer "
                "--workers; finished shards stay"
            ) from broken
        raise broken
    finally:
        pool.shutdown(cancel_futures=True)


def _collect(sizes: dict[Future, int], finished) -> BaseException | None:
    """Waits for a shard or more and takes them out; the first error, if there is one."""
    done, _ = wait(sizes, return_when=FIRST_COMPLETED)
    first = None
    for future in done:
        images = sizes.pop(future)
        if error := future.exception():
            first = first or error
        else:
            finished(future.result(), images)
    return first


def _ignore_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent waits for shards that were begun


def verify(folder: Path) -> None:
    """Compares every shard with the manifest's size and checksum.

    Raises:
      DataError: naming all that differ.
    """
    path = folder / "manifest.json"
    if not path.is_file():
        raise DataError(f"--verify: {folder} holds no manifest.json")
    manifest = read_json(path)
    shards.check_manifest(manifest, path)
    listed = [shard for split in manifest["splits"].values() for shard in split["shards"]]

    def problem_of(shard) -> str:
        file = folder / shard["name"]
        if not file.is_file():
            return "is missing"
        if (size := file.stat().st_size) != shard["bytes"]:
            return f"has {size} bytes, not {shard['bytes']}"
        return "" if shards.sha256(file) == shard["sha256"] else "has another checksum"

    problems = []
    with (
        Progress("prepare-data --verify", len(listed), unit="shard") as progress,
        Threads() as pool,
    ):
        for shard, problem in zip(listed, pool.map(problem_of, listed), strict=True):
            if problem:
                problems.append(f"  {shard['name']} {problem}")
            progress.update()
    if problems:
        raise DataError(
            f"{folder}: {len(problems)} of {len(listed)} shards are not what the manifest says:\n"
            + "\n".join(problems)
            + "\nremove them and run the prepare-data command that made them again"
        )
    print(f"{folder}: {len(listed)} shards are as the manifest says")


def main(argv: list[str]) -> int:
    options = parse(argv)
    try:
        if options.verify:
            verify(options.verify)
        else:
            print(prepare(options))
    except OSError as error:  # of the manifest, or of a folder
        raise DataError(f"{error}; finished shards stay: run the command again") from error
    return 0
