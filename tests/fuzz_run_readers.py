"""More kinds of `fuzz_readers`: what runs, sweeps, samplers and configs leave on the disk."""

import contextlib
import shutil
from pathlib import Path

import numpy as np
from fuzz_readers import kind

RESULT = {"tokenizer": {"psnr": 20.5, "rfid": {"fid": 1.5}}, "generation": {"sde": {"count": 3}}}


def _run(folder: Path) -> None:
    from gae_jax.config import default_config, plain
    from gae_jax.runtime.files import write_json
    from gae_jax.train.log import read_metrics

    config = plain(default_config())
    for stage in ("tokenizer", "evaluate"):
        sections = {name: config[name] for name in ("data", stage) if name in config}
        write_json(folder / stage / "config.json", {"config": sections, "inputs": {"a": "1"}})
        write_json(folder / stage / "done.json", {"fingerprint": "abc", "seconds": 1.5})
    write_json(folder / "evaluate/result.json", RESULT)
    metrics = folder / "tokenizer/metrics.csv"
    metrics.write_text("step,loss,lr\n1,0.5,1e-4\n2,0.25,1e-4\n")
    assert len(read_metrics(folder / "tokenizer")) == 2


@kind(_run)
def run(folder: Path) -> None:
    from gae_jax.commands.compare import read_result
    from gae_jax.config import default_config
    from gae_jax.run.recorded_config import get_config
    from gae_jax.run.run import Run
    from gae_jax.sweep.definition import Metric
    from gae_jax.sweep.outcomes import figure
    from gae_jax.train.log import read_metrics

    found, stage = Run(folder), Run(folder).stage("tokenizer")
    get_config(str(folder))
    stage.config  # noqa: B018
    stage.require_done()["fingerprint"]
    found.stage("evaluate").require_done()
    config = default_config()
    sections = {name: config[name] for name in ("data", "tokenizer")}
    stage.open(sections, {"a": "1"}, fresh=False)
    read_metrics(stage.path)
    read_result(folder / "evaluate")
    figure(found, Metric("FID", "tokenizer.rfid.fid|generation.sde.count"))


CONFIGS = Path(__file__).parents[1] / "configs"


@kind(lambda folder: shutil.copy(CONFIGS / "demo.py", folder / "small.py"))
def config_file(folder: Path) -> None:
    from gae_jax.commands.parsing import parse
    from gae_jax.config.validate import validate
    from gae_jax.runtime.errors import ConfigError

    _, config, _, _ = parse(["gae_jax", "demo", f"--config={folder / 'small.py'}"])
    with contextlib.suppress(ConfigError):  # of fields, which may be the command line's
        validate(config)


SWEEP = """\
from gae_jax.sweep import Metric, Point, Sweep


def get_sweep():
    return Sweep(
        title="Weights of the alignment",
        config="configs/demo.py",
        points=[Point(f"align{x}", {"tokenizer.losses.align": x}) for x in (0.0, 0.5)],
        metrics=[Metric("PSNR", "tokenizer.psnr")],
        commands=("tokenizer", "evaluate"),
        seeds=(0,),
    )
"""


@kind(lambda folder: (folder / "weights.py").write_text(SWEEP))
def sweep_file(folder: Path) -> None:
    from gae_jax.runtime.errors import UserError
    from gae_jax.sweep.definition import configs_of, load_sweep

    sweep = load_sweep(folder / "weights.py")
    with contextlib.suppress(UserError):  # of its points and of the config that they change
        configs_of(sweep)


def _drawn(folder: Path) -> None:
    from gae_jax.evaluation.archives import write_samples
    from gae_jax.evaluation.sample_files import part_of
    from gae_jax.runtime.files import write_json, write_npz

    pixels = np.zeros((4, 8, 8, 3), np.uint8)
    for first in (0, 2):
        ids = range(first, first + 2)
        part = {"images": pixels[:2], "labels": np.arange(2), "calls": np.array(7)}
        write_npz(part_of(folder, ids), part)
    write_samples(folder / "sde/samples.npz", pixels, np.arange(4))
    write_json(folder / "sde/manifest.json", {"count": 4})
    np.save(folder / "labels.npy", np.arange(4))
    (folder / "labels.txt").write_text("0\n1\n2\n3\n")


@kind(_drawn)
def drawn_samples(folder: Path) -> None:
    from gae_jax.evaluation.sample_files import assemble, finished_parts, load_set
    from gae_jax.stages.sample import read_labels

    wanted = np.array([0, 1, 0, 1])
    finished_parts(folder, wanted, 2)
    assemble(folder, wanted, png=False)
    load_set(folder, "sde")
    for name in ("labels.npy", "labels.txt"):
        read_labels(folder / name, 4)


def _sampled(folder: Path) -> None:
    from gae_jax.runtime.files import write_json, write_png

    names = [f"{index:06}_class1.png" for index in range(3)]
    for name in names:
        write_png(folder / name, np.zeros((8, 8, 3), np.uint8))
    write_json(folder / "manifest.json", {"files": names, "labels": [1, 1, 1], "finished": True})


@kind(_sampled)
def sampled_images(folder: Path) -> None:
    """What ``sample RUN`` leaves."""
    from gae_jax.evaluation.archives import open_samples

    for _ in open_samples(folder).batches(2):
        pass


def _bench(folder: Path) -> None:
    from gae_jax.runtime.files import write_json

    rows = [{"work": "gae", "images_per_second": 3.5, "error": ""}]
    write_json(folder / "bench.json", {"rows": rows})


@kind(_bench)
def bench_result(folder: Path) -> None:
    from gae_jax.commands.bench import read_other

    read_other(str(folder / "bench.json"))


def _toy():
    """A network of one matrix with its state at a step, as `fit` keeps it."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from gae_jax.nn.layers import linear
    from gae_jax.nn.network import Network
    from gae_jax.train.optim import make_optimizer
    from gae_jax.train.state import make_state

    network = Network(lambda rngs: nnx.Dict(head=linear(4, 4, dtype=jnp.float32, rngs=rngs)))
    rates = dict(learning_rate=1e-2, end_learning_rate=1e-2, warmup_steps=0, b1=0.9, b2=0.9)
    optimizer = make_optimizer(10, **rates, weight_decay=0.0, clip_norm=0.0)
    return jax.jit(lambda key: make_state(key, {"toy": network}, {"toy": optimizer}))


def _checkpoints(folder: Path) -> None:
    import jax

    from gae_jax.train.checkpoint import Checkpoints

    checkpoints = Checkpoints(folder, keep=2)
    for step in (3, 6):
        checkpoints.save(step, _toy()(jax.random.key(step)), {"seconds": 1.0, "batches": "toy"})
    checkpoints.wait()
    checkpoints.close()


@kind(_checkpoints, whole="checkpoints/*")
def checkpoints(folder: Path) -> None:
    """What a resume, a change of course, and every command that takes a stage's weights read."""
    import jax

    from gae_jax.train import relayout
    from gae_jax.train.checkpoint import Checkpoints, load_weights, read_meta, stored_networks

    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here),
        jax.eval_shape(_toy(), jax.random.key(0)),
    )
    manager = Checkpoints(folder, keep=2)
    try:
        for step in manager.steps:
            _, meta = manager.restore(abstract, step)
            assert float(meta["seconds"]) >= 0
            str(read_meta(folder, step).get("batches"))
            stored_networks(folder, "params", step)
            relayout.misfits(abstract, manager.folder / str(step) / "state")
            load_weights(folder, "params", "toy", step)
            relayout.restore(abstract, manager.folder / str(step) / "state", lambda: None)
    finally:
        manager.close()
