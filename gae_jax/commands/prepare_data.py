"""``prepare-data``: ImageNet, or any class folders, as ArrayRecord shards, without TensorFlow."""

import argparse
import hashlib
import logging
import multiprocessing
import shlex
import shutil
import signal
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures import ThreadPoolExecutor as Threads
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from gae_jax.commands.arguments import Parser
from gae_jax.data import shards
from gae_jax.data.imagenet import ValLabels, compare_counts, count_by_class, read_val_labels
from gae_jax.data.originals import Originals, from_tars, from_tree
from gae_jax.data.shard_folder import REMEDY, ShardFolder, claimed
from gae_jax.data.sources.folder import split_folders
from gae_jax.runtime import ranges
from gae_jax.runtime.distributed import cores
from gae_jax.runtime.errors import ConfigError, DataError, number_of
from gae_jax.runtime.files import read_json
from gae_jax.runtime.progress import Progress

USAGE = """\
Write images as ArrayRecord shards for data.name=array_record; JPEG files are not re-encoded.

usage: python -m gae_jax prepare-data --source=DIR --out=DIR [options]
       python -m gae_jax prepare-data --train-tar=FILE --val-tar=FILE --out=DIR [options]
       python -m gae_jax prepare-data --verify=DIR

  --source=DIR          DIR/train/CLASS/* with DIR/val/CLASS/* or a flat DIR/val/*, or DIR/CLASS/*;
                        val may be called valid or validation
  --train-tar=FILE      ILSVRC2012_img_train.tar, a tar of one tar per class
  --val-tar=FILE        ILSVRC2012_img_val.tar
  --devkit=FILE         ILSVRC2012_devkit_t12.tar.gz: classes of flat validation images, and the
                        number of training images of each class
  --val-labels=FILE     classes of flat validation images: NAME CLASS in each line, or with --devkit
                        one ILSVRC2012 id in each line (default: the list in tensorflow-datasets)
  --out=DIR             folder for the shards and manifest.json
  --shard-images=N      images in each shard (default: 2048)
  --no-check            do not decode every image once
  --on-corrupt=error    error or skip, for images that cannot be decoded, duplicate names in a tar
                        and missing validation images; skipped ones are named in the log or the
                        manifest
  --workers=N           processes (default: one for each core)
  --fresh               remove what an earlier prepare-data wrote to DIR
  --verify=DIR          compare the shards in DIR with the checksums in its manifest

Run the same command again after an interruption or an error to write the missing shards; finished
ones are kept, even if an image was removed or --on-corrupt=skip was added. docs/data.md describes
the format.
"""

PATHS = ("source", "train-tar", "val-tar", "devkit", "val-labels", "out", "verify")
SHARD_OVERHEAD, RECORD_OVERHEAD = 1 << 17, 100  # bytes, of ArrayRecord's blocks and headers


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser("python -m gae_jax prepare-data --help")
    for name in PATHS:
        parser.add_argument(f"--{name}")
    parser.add_number("--shard-images", ranges.COUNT, default=2048)
    parser.add_argument("--check", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--on-corrupt", choices=("error", "skip"), default="error")
    parser.add_number("--workers", ranges.whole(1, 4096), default=cores())
    parser.add_argument("--fresh", action="store_true")
    options = parser.parse_args(argv)
    for name in PATHS:
        value = getattr(options, attribute := name.replace("-", "_"))
        if value is not None:
            setattr(options, attribute, _local_path(name, value))
    tars = options.train_tar or options.val_tar
    if options.verify:
        return options
    if not options.out or bool(options.source) == bool(tars):
        raise ConfigError(
            "give --out=DIR, and either --source=DIR or --train-tar=FILE with --val-tar=FILE\n"
            "see: python -m gae_jax prepare-data --help"
        )
    return options


def _local_path(name: str, value: str) -> Path:
    """Parse the path of an option.

    Raises:
      ConfigError: if it is empty, or a URL.
    """
    if not value:
        raise ConfigError(f"--{name} is empty; give a path")
    if "://" not in value:
        return Path(value)
    is_bucket, url = value.startswith("gs://"), value.rstrip("/")
    if name != "out":
        copy = f"gcloud storage cp -r {value} DIR"
        get = f"copy it first: {copy}" if is_bucket else "download it, or mount it"
        raise ConfigError(f"--{name} is {value!r}, and prepare-data reads local files only; {get}")
    copy = "copy the folder; training reads local folders and gs:// only"
    if is_bucket:
        copy = f"copy the folder: gcloud storage cp -r DIR/* {url}/ ; training then reads it with "
        copy += f"--config.data.root={url} (pip install gcsfs)"
    raise ConfigError(
        f"--out is {value!r}, and prepare-data writes to local folders only; give --out=DIR, and "
        + copy
    )


def originals_of(options) -> tuple[Originals, ValLabels | None]:
    """List the images that the options name; returns them with the given labels.

    Raises:
      DataError: if they cannot be listed.
    """
    labels, on_corrupt = None, options.on_corrupt
    if options.val_labels or options.devkit:
        labels = read_val_labels(options.val_labels, options.devkit)
    if options.source:
        return from_tree(options.source, labels, on_corrupt=on_corrupt), labels
    tars = (options.train_tar, options.val_tar)
    return from_tars(*tars, labels, on_corrupt=on_corrupt), labels


def identity_of(originals: Originals, options) -> dict[str, Any]:
    """What the shards are made of; recorded, and compared when the command is run again."""
    digest = hashlib.sha256(shards.digest_of_names(originals.class_names))
    for split, examples in originals.splits.items():
        digest.update(f"{split} {shards.listing_of(examples)}\n".encode())
    return {
        "images": {split: len(examples) for split, examples in originals.splits.items()},
        "listing": digest.hexdigest()[:16],
        "shard_images": options.shard_images,
        "check": options.check,
        "on_corrupt": options.on_corrupt,
    }


def prepare(options: argparse.Namespace) -> Path:
    """Write the missing shards; returns the path of the manifest.

    Raises:
      UserError: for what cannot be read or written; finished shards are kept.
    """
    if options.source:
        _check_out(options.source, options.out)
    originals, labels = originals_of(options)
    _compare_with_imagenet(originals, labels)
    with claimed(options.out):
        return _prepare(originals, options)


def _check_out(source: Path, out: Path) -> None:
    """Check that the shards are not written among the class folders, as if they were a class.

    Raises:
      DataError: if they would be.
    """
    if not source.is_dir():  # reported when it is listed
        return
    place = out.resolve()
    for folder in (split_folders(source) or {"train": source}).values():
        if place.is_relative_to(folder.resolve()):
            suggestion = Path(f"{source.resolve()}-shards")
            raise DataError(
                f"--out={out} is inside the images of {folder}; give a folder outside of it, "
                f"such as --out={shlex.quote(str(suggestion))}"
                + (" (move finished shards there)" if (out / "manifest.json").exists() else "")
            )


def _compare_with_imagenet(originals: Originals, labels: ValLabels | None) -> None:
    classes = len(originals.class_names)
    counts = {
        split: count_by_class([example.label for example in examples], classes)
        for split, examples in originals.splits.items()
    }
    for split, of_class in counts.items():
        logging.info(
            "prepare-data: %s: %s of %s, %d to %d of each",
            *(split, number_of(sum(of_class), "image"), number_of(classes, "class", "classes")),
            *(min(of_class), max(of_class)),
        )
    exact = {} if labels is None else labels.train_counts
    for difference in compare_counts(originals.class_names, counts, exact):
        logging.warning("prepare-data: %s", difference)


def _prepare(originals: Originals, options: argparse.Namespace) -> Path:
    origin = {
        name: str(value)
        for name in ("source", "train_tar", "val_tar", "devkit", "val_labels")
        if (value := getattr(options, name))
    }
    plan = plan_of(originals, options.shard_images)
    folder = ShardFolder(options.out, originals.class_names, plan)
    facts = {"made_of": identity_of(originals, options), "origin": origin}
    folder.take_over(facts, fresh=options.fresh)
    todo = [
        (options.out / name, part)
        for parts in plan.values()
        for name, part in parts.items()
        if name not in folder.done
    ]
    total = sum(map(len, originals.splits.values()))
    left = sum(len(part) for _, part in todo)
    logging.info(
        "prepare-data: %s of %s, %d of %d shards to write",
        *(number_of(total, "image"), number_of(len(originals.class_names), "class", "classes")),
        *(len(todo), sum(map(len, plan.values()))),
    )
    check_room(options.out, todo)
    with Progress("prepare-data", total, done=total - left, unit="image") as progress:

        def finished(entry: dict, images: int) -> None:
            folder.add(entry)
            progress.update(images)

        write_shards(todo, finished, options)
    for split, listed in folder.write_manifest()["splits"].items():
        logging.info("prepare-data: %s: %s", split, number_of(listed["count"], "image"))
        for shard in listed["shards"]:
            for name in shard["skipped"]:
                logging.warning("prepare-data: skipped %s", name)
    logging.info("prepare-data: %s", folder.manifest_path)
    return folder.manifest_path


def check_room(folder: Path, todo) -> None:
    """Check the free space on disk.

    Args:
      todo: (path, examples) of each shard.

    Raises:
      DataError: if it is less than the shards need.
    """
    need = sum(
        SHARD_OVERHEAD + sum(max(example.size, 0) + RECORD_OVERHEAD for example in part)
        for _, part in todo
    )
    free = shutil.disk_usage(folder).free
    logging.info("prepare-data: writes %s, %s are free", _readable(need), _readable(free))
    if need > free:
        raise DataError(
            f"the shards need {_readable(need)}, but {folder} has {_readable(free)} free; make "
            "space or choose another --out, and run the command again: finished shards are kept"
        )


def _readable(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def plan_of(originals: Originals, size: int) -> dict[str, dict[str, list[shards.Example]]]:
    """Plan the shards: split -> name of a shard -> its images, ``size`` or fewer in the last."""
    plan = {}
    for split, examples in originals.splits.items():
        parts = [examples[start : start + size] for start in range(0, len(examples), size)]
        plan[split] = {
            shards.shard_name(split, index, len(parts)): part for index, part in enumerate(parts)
        }
    return plan


def write_shards(todo, finished, options) -> None:
    """Write shards in processes.

    Args:
      todo: (path, examples) of each shard.
      finished: called with the manifest entry and the number of images of each finished shard.

    Raises:
      DataError: the first error of a shard, after the shards that had been begun are done.
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
        # submit few at a time: all arguments of waiting shards would be pickled at once
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
                "a process that writes shards was killed, perhaps out of memory: pass fewer "
                "--workers; finished shards are kept"
            ) from broken
        raise broken
    finally:
        pool.shutdown(cancel_futures=True)


def _collect(sizes: dict[Future, int], finished) -> BaseException | None:
    """Wait for finished shards and remove them from ``sizes``; returns the first error, or None."""
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
    """Compare every shard with the size and checksum in the manifest.

    Raises:
      DataError: if any differ; names all of them.
    """
    path = folder / "manifest.json"
    if not path.is_file():
        raise DataError(f"--verify: {folder} has no manifest.json")
    manifest = read_json(path, remedy=REMEDY)
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
            f"{folder}: {len(problems)} of {len(listed)} shards differ from the manifest:\n"
            + "\n".join(problems)
            + "\nremove them and run the prepare-data command that made them again"
        )
    print(f"{folder}: {number_of(len(listed), 'shard')} as in the manifest")


def main(argv: list[str]) -> int:
    options = parse(argv)
    try:
        if options.verify:
            verify(options.verify)
        else:
            print(prepare(options))
    except OSError as error:  # of the manifest, or of a folder
        raise DataError(f"{error}; finished shards are kept: run the command again") from error
    return 0
