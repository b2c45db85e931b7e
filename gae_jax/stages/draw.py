"""``sample RUN``: a few images from a run directory alone, as PNG files."""

import argparse
import io
import logging
from pathlib import Path

import numpy as np
from PIL import Image

from gae_jax.arguments import Parser
from gae_jax.config import default_config
from gae_jax.errors import UserError
from gae_jax.run import Run, write_bytes, write_json
from gae_jax.stages.sample import (
    MAKERS,
    SETS,
    batches_of_images,
    bind_sampler,
    class_grid,
    load_networks,
)
from gae_jax.stages.session import Session
from gae_jax.train.log import Progress

USAGE = """\
Draws images of some classes from a run's diffusion model; no config is needed.

usage: python -m gae_jax sample RUN [--class=C,C] [--count=N] [--sampler=ode|sde] [--steps=N]
                                [--method=NAME] [--guidance=W] [--seed=S] [--out=DIR]

  RUN               run directory: architecture, statistics, tokenizer and the sampler's defaults
                    are found in it
  --class=C,C       classes by number (default: all)
  --count=N         images of each class (default: 4)
  --sampler=NAME    ode or sde (default: ode)
  --steps, --method, --guidance
                    in the place of the run's own; --guidance=1 is none
  --seed=S          other images (default: 0)
  --out=DIR         where to (default: RUN/drawn/NAME, NAME telling what was asked for)
"""


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def parse(argv: list[str]) -> argparse.Namespace:
    """Options of a command line behind ``sample``."""
    parser = Parser("python -m gae_jax sample --help")
    parser.add_argument("run", type=Path)
    parser.add_argument("--class", type=numbers, dest="classes", default=())
    parser.add_argument("--count", type=int, default=4)
    parser.add_argument("--sampler", choices=SETS, default="ode")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--method")
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    return parser.parse_args(argv)


def config_of(run: Run, options: argparse.Namespace):
    """The defaults with what the run was sampled with, or was made to be, and the options."""
    config = default_config()
    done = run.stage("diffusion").require_done()
    samples = run.stage("samples")
    recorded = samples.config.sample if samples.done else done.get("sampling", {})
    for name in SETS:
        config.sample[name].update(recorded.get(name, {}))
    config.sample.weaker = recorded.get("weaker", "")
    config.seed = options.seed
    section = config.sample[options.sampler]
    for name in ("steps", "method", "guidance"):
        if (value := getattr(options, name)) is not None:
            section[name] = value
    return config


def check(config, options: argparse.Namespace, classes: int) -> None:
    from gae_jax.validation import sample_clashes

    config.sample.classes = options.classes
    config.diffusion.model.num_classes = classes
    problems = sample_clashes(config)
    if options.count < 1:
        problems.append(f"--count is {options.count}; it must be at least 1")
    if problems:
        raise UserError("\n".join(problems))


def draw(options: argparse.Namespace, *, devices=None) -> Path:
    """Writes the images, a grid of them and what made them; returns their folder.

    Raises:
      UserError: if the run has no diffusion model, its tokenizer is another than the model was
        trained for, or an option makes no sense.
    """
    run = Run(options.run)
    config = config_of(run, options)
    trained = run.stage("diffusion").config.diffusion
    model = trained.model
    config.diffusion.model.class_dropout_prob = model.class_dropout_prob
    config.diffusion.flow.update(trained.flow)
    config.sample.sets = (options.sampler,)
    check(config, options, model.num_classes)
    session = Session(config, run, devices=devices)
    section = bind_sampler(options.sampler, config.sample[options.sampler])
    classes = options.classes or range(model.num_classes)
    labels = np.repeat(np.array(classes, np.int32), options.count)
    networks = load_networks(session, config.sample.weaker)
    ways = session.mesh.shape["data"] * session.mesh.shape["fsdp"]
    size = -(-min(len(labels), config.sample.batch_size) // ways) * ways
    sampler = MAKERS[options.sampler](**section)
    name = "-".join(
        [
            "class" + "_".join(map(str, options.classes)) if options.classes else "all",
            f"{options.sampler}-{section['method']}-{section['steps']}",
            f"guidance{section['guidance']:g}-seed{options.seed}",
        ]
    )
    folder = options.out or run.path / "drawn" / name
    images = []
    with Progress("sample", len(labels), unit="image") as progress:
        for ids, one in batches_of_images(session, networks, labels, sampler, size):
            found, calls = one()
            for index, pixels in zip(ids, found, strict=True):
                save(folder / f"{index:04d}_class{labels[index]}.png", pixels)
            images.append(found)
            progress.update(len(ids))
    columns = min(len(classes), 10)
    save(folder / "grid.png", class_grid(np.concatenate(images), labels, options.count, columns))
    facts = {**section, "sampler": options.sampler, "network_calls": calls, "seed": options.seed}
    write_json(folder / "manifest.json", facts | {"labels": labels.tolist()})
    logging.info("sample: %d images in %s", len(labels), folder)
    return folder


def save(path: Path, pixels: np.ndarray) -> None:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    write_bytes(path, buffer.getvalue())
