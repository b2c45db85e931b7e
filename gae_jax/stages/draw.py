"""``sample RUN``: a few images from a run directory alone, as PNG files."""

import argparse
import logging
from pathlib import Path

import numpy as np

from gae_jax.amendments import under_its_name
from gae_jax.arguments import Parser
from gae_jax.config import default_config
from gae_jax.errors import UserError
from gae_jax.files import write_json, write_png
from gae_jax.parallel import jit_on
from gae_jax.run import Run
from gae_jax.stages.sample import (
    MAKERS,
    SETS,
    batches_of_images,
    bind_sampler,
    load_networks,
    make_draw,
)
from gae_jax.stages.sample_files import class_grid
from gae_jax.stages.session import Session
from gae_jax.train.log import Progress
from gae_jax.validation import sample_clashes

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
    """The defaults with the run's model, what it was or should be sampled with, and the options.

    Raises:
      UserError: if the run has no diffusion model, or an option makes no sense.
    """
    config = default_config()
    diffusion, samples = run.stage("diffusion"), run.stage("samples")
    done, trained = diffusion.require_done(), diffusion.config.diffusion
    for name in ("num_classes", "class_dropout_prob"):
        config.diffusion.model[name] = trained.model[name]
    config.diffusion.flow.update(trained.flow)
    recorded = samples.config.sample if samples.done else done.get("sampling", {})
    for name in SETS:
        config.sample[name].update(recorded.get(name, {}))
    config.sample.update(
        weaker=recorded.get("weaker", ""),
        dtype=recorded.get("dtype", "float32"),
        products=recorded.get("products", "same"),
        decode_products=recorded.get("decode_products", "same"),
        sets=(options.sampler,),
        classes=options.classes,
    )
    config.seed = options.seed
    section = config.sample[options.sampler]
    for name in ("steps", "method", "guidance"):
        if (value := getattr(options, name)) is not None:
            section[name] = value
    if options.guidance is not None:
        section.guidance_parts = ()  # one scale takes their place
    problems = sample_clashes(config)
    if options.count < 1:
        problems.append(f"--count is {options.count}; it must be at least 1")
    if problems:
        raise UserError("\n".join(problems))
    return config


def draw(options: argparse.Namespace, *, devices=None) -> Path:
    """Writes the images, a grid of them and what made them; returns their folder.

    Raises:
      UserError: as `config_of`, or if the tokenizer is another than the model was trained for.
    """
    run = Run(options.run)
    config = config_of(run, options)
    session = Session(config, run, devices=devices)
    section = bind_sampler(options.sampler, config.sample[options.sampler])
    classes = options.classes or range(config.diffusion.model.num_classes)
    labels = np.repeat(np.array(classes, np.int32), options.count)
    networks = load_networks(
        session,
        config.sample.weaker,
        dtype=config.sample.dtype,
        products=config.sample.products,
        decode_products=config.sample.decode_products,
        attention=config.sample.attention,
    )
    ways = session.mesh.shape["data"] * session.mesh.shape["fsdp"]
    size = -(-min(len(labels), config.sample.batch_size) // ways) * ways
    sampler = MAKERS[options.sampler](**section)
    scale = "_parts" if section["guidance_parts"] else f"{section['guidance']:g}"
    name = "-".join(
        [
            "class" + "_".join(map(str, options.classes)) if options.classes else "all",
            f"{options.sampler}-{section['method']}-{section['steps']}",
            f"guidance{scale}-seed{options.seed}",
        ]
    )
    folder = options.out or run.path / "drawn" / name
    images = []
    with Progress("sample", len(labels), unit="image") as progress:
        drawn = jit_on(session.mesh)(make_draw(networks, sampler))
        for ids, one in batches_of_images(session, drawn, networks.arrays, labels, size):
            found, calls = one()
            for index, pixels in zip(ids, found, strict=True):
                write_png(folder / f"{index:04d}_class{labels[index]}.png", pixels)
            images.append(found)
            progress.update(len(ids))
    columns = min(len(classes), 10)
    grid = class_grid(np.concatenate(images), labels, options.count, columns)
    write_png(folder / "grid.png", grid)
    facts = {**section, "sampler": options.sampler, "network_calls": calls, "seed": options.seed}
    facts |= under_its_name([run.stage("diffusion").done])
    write_json(folder / "manifest.json", facts | {"labels": labels.tolist()})
    logging.info("sample: %d images in %s", len(labels), folder)
    return folder


def main(argv: list[str]) -> int:
    draw(parse(argv))
    return 0
