"""``sample RUN``: a few images from a run directory alone, as PNG files."""

import argparse
import hashlib
import math
from pathlib import Path

import numpy as np

from gae_jax.commands.arguments import Parser
from gae_jax.config import precision
from gae_jax.evaluation.sample_files import class_grid, shown_classes
from gae_jax.generators.sampling import MAKERS, SETS, make_draw
from gae_jax.run.amendments import history
from gae_jax.run.class_names import NO_CLASS
from gae_jax.run.run import Run
from gae_jax.run.sampling import batches_of_images, load_networks
from gae_jax.run.sampling_config import (
    BATCH_SIZE,
    LIMITS,
    SamplingOptions,
    is_interval,
    labels_of,
    sampler_section,
    sampling_config,
)
from gae_jax.run.session import Session
from gae_jax.runtime.errors import UserError, WriteError, number_of
from gae_jax.runtime.files import png, read_json, write_bytes, write_json, writing
from gae_jax.runtime.mesh import batch_of, jit_on
from gae_jax.runtime.progress import Progress

USAGE = """\
Draw images of some classes from a run's diffusion model; no config is needed.

usage: python -m gae_jax sample RUN [--class=C,C] [--count=N] [--sampler=ode|sde] [--steps=N]
                                [--method=NAME] [--guidance=W] [--interval=LOW,HIGH] [--seed=S]
                                [--batch-size=N] [--out=DIR]

  RUN               run directory, with architecture, statistics, tokenizer and the sampler's
                    defaults
  --class=C,C       classes by number or by name, such as 7 or golden_retriever; none: without a
                    class (default: all classes). If a name is also the number of another class:
                    number:7 or name:7
  --count=N         images of each class (default: 4)
  --sampler=NAME    ode or sde (default: ode)
  --steps, --method steps and solver instead of the run's
  --guidance=W      guidance scale instead of the run's: u + W (c - u), where c is the velocity with
                    the class and u the one without. 1: no guidance; 0: without a class, as
                    --class=none; more than 1: guided towards the class
  --interval=LOW,HIGH
                    times at which guidance acts, from 0 (noise) to 1 (data) (default: the run's);
                    at other times the scale is 1, also with --guidance=0
  --seed=S          a different seed gives different images (default: 0)
  --batch-size=N    images at once, over all devices (default: 256)
  --out=DIR         output folder (default: RUN/drawn/NAME, where NAME lists the options)

DIR receives the images, grid.png and manifest.json, which lists them. Images that this command
wrote there before are removed, other files are not. evaluate-samples --samples=DIR reads the
folder.
"""

ROWS, COLUMNS = 16, 10  # of the grid, at most
LISTED = 8  # classes in the folder's name, at most


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse the command line after ``sample``."""
    parser = Parser("python -m gae_jax sample --help")
    parser.add_argument("run", type=Path)
    parser.add_argument("--class", type=_texts, dest="classes", default=())
    parser.add_number("--count", LIMITS["count"], default=4)
    parser.add_argument("--sampler", choices=SETS, default="ode")
    parser.add_number("--steps", LIMITS["steps"])
    parser.add_argument("--method")
    parser.add_number("--guidance", LIMITS["guidance"])
    parser.add_argument("--interval", type=_interval)
    parser.add_number("--seed", LIMITS["seed"], default=0)
    parser.add_number("--batch-size", LIMITS["batch_size"], default=BATCH_SIZE, dest="batch_size")
    parser.add_argument("--out", type=Path)
    return parser.parse_args(argv)


def _texts(text: str) -> tuple[str, ...]:
    classes = tuple(part.strip() for part in text.split(","))
    if not all(classes):
        raise argparse.ArgumentTypeError(f"{text!r} names an empty class; give C or C,C")
    return classes


def _interval(text: str) -> tuple[float, float]:
    try:
        low, high = map(float, text.split(","))
    except ValueError:
        low, high = math.nan, math.nan
    if not is_interval(low, high):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no interval; give LOW,HIGH with 0 <= LOW <= HIGH <= 1, 0 being noise"
        )
    return low, high


def name_of(classes: list[int], none: int, options: argparse.Namespace, section) -> str:
    """The name of the output folder, made of the options."""
    parts = []
    if all(c == none for c in classes):
        parts = ["noclass", f"{options.sampler}-{section['method']}-{section['steps']}"]
        return "-".join([*parts, f"seed{options.seed}"])
    texts = [NO_CLASS if c == none else str(c) for c in classes]
    if not options.classes:
        parts = ["all"]
    elif len(texts) <= LISTED:
        parts = ["class" + "_".join(texts)]
    else:  # names of folders have at most 255 bytes
        digest = hashlib.sha256(" ".join(texts).encode()).hexdigest()[:8]
        parts = [f"{len(texts)}_classes_{digest}"]
    scale = "_parts" if section["guidance_parts"] else f"{section['guidance']:g}"
    if options.interval:
        scale += "_from{:g}_to{:g}".format(*options.interval)
    parts += [f"{options.sampler}-{section['method']}-{section['steps']}", f"guidance{scale}"]
    return "-".join([*parts, f"seed{options.seed}"])


def earlier_files(folder: Path) -> list[str]:
    """The files that an earlier `draw` wrote to a folder, by its manifest."""
    path = folder / "manifest.json"
    if not path.is_file():
        return []
    made = read_json(path)
    if not isinstance(made, dict):
        return []
    if not isinstance(made.get("files"), list):
        return []
    names = [*made["files"], "grid.png"]
    return [name for name in names if isinstance(name, str) and Path(name).name == name]


def claim(folder: Path, files: list[str], facts: dict) -> None:
    """Prepare a folder: remove what an earlier `draw` wrote to it, keep other files.

    The manifest is written before the images, so that those of a killed process are listed too.

    Raises:
      UserError: if the folder cannot be written, or holds files of the same names by others.
    """
    before = set(earlier_files(folder))
    foreign = [n for n in (*files, "grid.png") if n not in before and (folder / n).exists()]
    if (folder / "manifest.json").exists() and not before:
        foreign.append("manifest.json")
    if foreign:
        raise UserError(
            f"{folder} has a file {foreign[0]} that `sample RUN` did not write; give another --out"
        )
    try:
        with writing(folder):
            write_json(folder / "manifest.json", facts | {"finished": False})
            for name in before - {*files}:
                (folder / name).unlink(missing_ok=True)
    except WriteError as error:
        raise WriteError(f"{error}, or give another --out=DIR") from None


def describe(section: dict, options: argparse.Namespace, labels: np.ndarray, none: int) -> str:
    """Describe what is drawn in one line."""
    classes = len(np.unique(labels[labels != none]))
    what = number_of(len(labels), "image")
    if classes:
        what += f" of {number_of(classes, 'class', 'classes')}"
    if (labels == none).any():
        what += f", {np.sum(labels == none)} of them without a class" if classes else (
            " without a class"
        )  # fmt: skip
    if section["guidance_parts"]:
        scale = "guidance in parts"
    elif section["guidance"] == 1:
        scale = "no guidance"
    else:
        span = f"[{section['guidance_start']:g}, {section['guidance_end']:g}]"
        scale = f"guidance {section['guidance']:g} for t in {span}"
    how = (
        f"{options.sampler} ({section['method']}, {number_of(section['steps'], 'point')}, {scale})"
    )
    return f"sample: {what}, {how}, seed {options.seed}"


def draw(options: argparse.Namespace, *, devices=None) -> Path:
    """Write the images, a grid of them and a manifest; returns their folder.

    Raises:
      UserError: as `sampling_config`, or if the diffusion model was trained on latents of a
        different tokenizer, or the folder cannot be written.
    """
    run = Run(options.run)
    given = {name: x for name, x in vars(options).items() if name not in ("run", "out")}
    asked = SamplingOptions(**given, flags=True)
    config = sampling_config(run, asked)
    none, labels = config.diffusion.model.num_classes, labels_of(run, config, asked)
    section = sampler_section(config, asked, labels)
    session = Session(config, run, devices=devices)
    sampler, decoder = (precision.settings(config, name) for name in ("sampler", "decoder"))
    networks = load_networks(session, config.sample.weaker, sampler=sampler, decoder=decoder)
    size = batch_of(config.sample.batch_size, len(labels), session.mesh)
    classes = labels[:: options.count].tolist()
    folder = options.out or run.path / "drawn" / name_of(classes, none, options, section)
    files = [f"{i:04d}_class{c}.png" if c != none else f"{i:04d}.png" for i, c in enumerate(labels)]
    facts = {**section, "sampler": options.sampler, "seed": options.seed}
    facts |= {"labels": [None if c == none else int(c) for c in labels], "files": files}
    made_by = {name: run.stage(name).done for name in ("tokenizer", "diffusion")}
    facts |= history(made_by)
    claim(folder, files, facts)
    print(f"{describe(section, options, labels, none)}\nsample: to {folder}", flush=True)
    in_grid = _grid_ids(labels)
    shown, most, kept = [], 0, 0
    try:
        with Progress("sample", len(labels), unit="image") as progress:
            drawn = jit_on(session.mesh)(make_draw(networks, MAKERS[options.sampler](**section)))
            for ids, draw_batch in batches_of_images(session, drawn, networks.arrays, labels, size):
                images, calls = draw_batch()
                for index, pixels in zip(ids, images, strict=True):
                    write_bytes(folder / files[index], png(pixels))
                    kept += 1
                    if index in in_grid:
                        shown.append(pixels)
                most = max(most, calls)
                progress.update(len(ids))
        grid = class_grid(np.stack(shown), labels[sorted(in_grid)], ROWS, COLUMNS)
        write_bytes(folder / "grid.png", png(grid))
        write_json(folder / "manifest.json", facts | {"network_calls": most, "finished": True})
    except WriteError as error:
        raise WriteError(f"{error}\n{kept} of {len(labels)} images are in {folder}") from None
    print(f"sample: {number_of(len(labels), 'image')}\n{folder / 'grid.png'}")
    return folder


def _grid_ids(labels: np.ndarray) -> set[int]:
    """The numbers of the images in the grid; only these stay in memory."""
    shown = [np.flatnonzero(labels == c)[:ROWS] for c in shown_classes(labels, COLUMNS)]
    return set(np.concatenate(shown).tolist())


def main(argv: list[str]) -> int:
    draw(parse(argv))
    return 0
