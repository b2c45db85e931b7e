"""Some steps of tokenizers at full size on real photographs: do they train without NaN?

    python launch/photographs.py runs/photographs --size=288
    PYTHONPATH=. python tests/full_size.py --images=runs/photographs --workdir=runs/full_size dgae

The weights of DINOv2 and of LPIPS are random here (they cannot be had everywhere): this shows that
programs of the paper's size compile, fit and stay finite, not that anything good comes of them.
Terms and phases are those of the config, squeezed into the few steps. Writes WORKDIR/results.json.
"""

import argparse
import contextlib
import logging
import shutil
import time
from pathlib import Path

import jax
import numpy as np

from gae_jax.commands.cli import quiet_libraries
from gae_jax.config import load_config
from gae_jax.config.validate import validate
from gae_jax.nn.network import fingerprint
from gae_jax.pretrained.backbone import backbone_network
from gae_jax.run.session import Session
from gae_jax.runtime.files import read_json, write_json
from gae_jax.stages import teacher, tokenizer
from gae_jax.tokenizers import kind_of
from gae_jax.train.checkpoint import save_weights
from gae_jax.train.log import read_metrics

CONFIGS = Path(__file__).parent.parent / "configs"


def squeezed(config, steps: int, batch: int):
    """The config with ``steps`` updates of ``batch`` images; every phase and term has its share."""
    section, first = config.tokenizer, 0
    if section.phases:
        total = sum(phase[0] for phase in section.phases)
        lengths = [max(round(steps * phase[0] / total), 2) for phase in section.phases]
        section.phases = tuple(
            (length, *phase[1:]) for length, phase in zip(lengths, section.phases, strict=True)
        )
        steps = sum(lengths)
        adversarial = ["gan" in phase[2] for phase in section.phases]
        first = sum(lengths[: adversarial.index(True)]) if True in adversarial else 0
    section.train.update(steps=steps, batch_size=batch, log_every=1, save_every=steps, eval_every=0)
    section.gan.update(start=first, discriminator_start=first, ramp=0)
    section.optim.warmup_steps = section.discriminator_optim.warmup_steps = 2
    section.perceptual.name = "lpips_random"
    if section.discriminator.name == "dino":
        section.discriminator.dino.weights = "random"
    section.health.update(pictures=0, probe=0)
    config.evaluate.batch_size = batch  # held-out images, once at the end
    config.teacher.train.update(steps=4, batch_size=batch, log_every=1, save_every=4, eval_every=0)
    return config


def random_backbone(session: Session) -> None:
    """A backbone of the config's size in the run, with the weights that it starts with."""
    folder = session.run.stage("backbone")
    sections = {name: session.config[name] for name in ("seed", "data", "backbone")}
    folder.open(sections, {}, fresh=True)
    network = backbone_network(session.config.backbone)
    arrays = jax.device_get(jax.jit(network.init)(jax.random.key(0)))
    save_weights(folder.path, "params", {"backbone": arrays})
    folder.finish(seconds=0.0, fingerprint=fingerprint(arrays), weights="params", parameters={})


def train(name: str, images: Path, workdir: Path, steps: int, batch: int) -> dict:
    """Trains one config's tokenizer and says what came of it."""
    config = load_config(CONFIGS, name)
    config.data.update(name="folder", root=str(images), holdout=0.1, workers=8)
    config.diffusion.model.num_classes = sum(1 for _ in images.iterdir())
    if config.backbone.name == "vit":
        raise SystemExit(f"{name} has a small ViT for a backbone; name a config of full size")
    squeezed(config, steps, batch)
    validate(config)
    session = Session.start(config, workdir / name.replace(":", "-"), fresh=False)
    asked = set(tokenizer.needs(config.tokenizer))
    if asked & {"backbone", "teacher"} or kind_of(config.tokenizer).backbone:
        random_backbone(session)
    if "teacher" in asked:
        teacher.run(session)
    began, clock = time.monotonic(), []
    with timed(clock):
        folder = tokenizer.run(session)
    if len(clock) < 2:
        raise SystemExit(f"{folder.path} is finished already; give another --workdir")
    done, rows = folder.require_done(), read_metrics(folder.path)
    terms = [key for key, weight in config.tokenizer.losses.items() if weight]
    found = {
        "steps": len(rows),
        "batch": batch,
        "seconds, compilation included": round(time.monotonic() - began),
        # the loop waits for the step before: metrics of every step are fetched
        "ms per step, median of the last ten": round(1e3 * float(np.median(np.diff(clock)[-10:]))),
        "parameters": done["parameters"]["tokenizer"],
        "peak GiB": round((done["peak_memory_bytes"] or 0) / 2**30, 1),
        "first": {term: rows[0].get(term) for term in ("total", *terms)},
        "last": {term: rows[-1].get(term) for term in ("total", *terms)},
    }
    shutil.rmtree(session.run.path)
    return found


@contextlib.contextmanager
def timed(clock: list[float]):
    """Notes when each step begins: the loop asks for its phase then."""
    original = tokenizer.phase_of

    def asked(config, step):
        clock.append(time.monotonic())
        return original(config, step)

    tokenizer.phase_of = asked
    try:
        yield
    finally:
        tokenizer.phase_of = original


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("configs", nargs="+", help="files of configs/, without .py")
    parser.add_argument("--images", type=Path, required=True, help="of launch/photographs.py")
    parser.add_argument("--workdir", type=Path, default=Path("runs/full_size"))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=16)
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", force=True)
    quiet_libraries()
    out = given.workdir / "results.json"
    for name in given.configs:
        found = read_json(out) if out.exists() else {"device": jax.devices()[0].device_kind}
        found[name] = train(name, given.images, given.workdir, given.steps, given.batch)
        print(name, found[name], flush=True)
        write_json(out, found)


if __name__ == "__main__":
    main()
