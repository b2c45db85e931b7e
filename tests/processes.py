"""One of several processes of a test: ``python tests/processes.py TASK FOLDER``.

Its peers are named by JAX's environment variables, see `gae_jax.runtime.distributed.start`; without
them it is alone. The stages are imported where they are needed: most tests start many processes
that need none.
"""

import dataclasses
import importlib
import itertools
import os
import sys
import time
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"

import grain
import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx
from small import get_config

from gae_jax.commands.cli import leave
from gae_jax.data.batches import Batches
from gae_jax.data.latents import LatentSet
from gae_jax.nn.layers import linear
from gae_jax.nn.network import Network
from gae_jax.run.run import Run
from gae_jax.run.session import Session
from gae_jax.runtime import distributed, sharding
from gae_jax.runtime.errors import Preempted, UserError
from gae_jax.runtime.files import write_json, write_npz
from gae_jax.runtime.keys import stage_key
from gae_jax.runtime.mesh import make_mesh, to_host
from gae_jax.train.feed import Feed
from gae_jax.train.fit import Stage, fit, init_state, jit_step
from gae_jax.train.optim import make_optimizer
from gae_jax.train.state import apply_gradients, make_state

STEPS, EXAMPLES, BATCH = 80, 48, 16


def make_stage(name, session):
    make = importlib.import_module(f"gae_jax.stages.{name}").make_stage
    if name == "diffusion":
        return make(session, LatentSet.open(session.run.path / "latents"))
    return make(session)


def config_of(mesh):
    config = get_config()
    config.mesh.update(mesh)
    return config


def steps(folder: Path) -> None:
    """Two steps of every stage, on a mesh with every axis; writes metrics and weights."""
    session = Session(config_of(dict(data=2, fsdp=2, tensor=2)), Run(folder))
    for name in ("backbone", "teacher", "tokenizer", "diffusion"):
        stage = make_stage(name, session)
        step, shardings = jit_step(stage, session.mesh)
        state = init_state(stage, shardings, 0)
        batches = Feed(stage.batches(BATCH), session.mesh)
        found = {}
        # the last phase of the tokenizer has every term
        phase = stage.phase(100)
        for index, batch in enumerate(itertools.islice(batches, 2)):
            found[f"label/{index}"] = batch["label"]
            state, scalars = step(state, batch, stage_key(name, 0), stage.frozen, phase)
            found |= {f"metric/{index}/{key}": value for key, value in scalars.items()}
        batches.close()
        for path, leaf in jax.tree_util.tree_flatten_with_path(state.params)[0]:
            found[f"weight/{sharding.path_of(path)}"] = leaf
        write_npz(folder / f"steps-{distributed.count()}" / f"{name}.npz", to_host(found))


def stages(folder: Path) -> None:
    """The stages that write files of their own: latents and samples."""
    from gae_jax.stages import latents, sample

    session = Session(config_of(dict(data=-1)), Run(folder))
    latents.run(session)
    sample.run(session)


def counting_stage() -> Stage:
    """A stage whose state counts how often it has seen every example."""
    network = Network(
        lambda rngs: nnx.Dict(head=linear(EXAMPLES, EXAMPLES, dtype=jnp.float32, rngs=rngs))
    )
    optimizer = make_optimizer(
        100, learning_rate=1e-2, end_learning_rate=1e-2, warmup_steps=0, b1=0.9, b2=0.9,
        weight_decay=0.0, clip_norm=0.0,
    )  # fmt: skip

    def init(key):
        state = make_state(key, {"linear": network}, {"linear": optimizer})
        return dataclasses.replace(state, rest={"linear": {"count": jnp.zeros(EXAMPLES, int)}})

    def step(state, batch, key, frozen, phase):
        rows = jax.nn.one_hot(batch["number"], EXAMPLES)

        def loss_fn(params):
            return jnp.mean((rows @ params["head"]["kernel"]) ** 2)

        loss, grads = jax.value_and_grad(loss_fn)(state.params["linear"])
        new = apply_gradients(state, "linear", grads, optimizer)
        seen = state.rest["linear"]["count"].at[batch["number"]].add(1)
        rest = {"linear": {"count": seen}}
        return dataclasses.replace(new, step=state.step + 1, rest=rest), {"loss": loss}

    def batches(size):
        ds = grain.MapDataset.range(EXAMPLES).seed(3).shuffle().repeat()

        def slow(number):  # so that a signal comes in the middle
            time.sleep(float(os.environ.get("TEST_SECONDS_PER_EXAMPLE", "0")))
            return {"number": np.int32(number)}

        return Batches(ds.map(slow), size, 1, "numbers")

    return Stage(name="counting", init=init, step=step, batches=batches)


def count(folder: Path) -> None:
    """Trains `counting_stage`, from where an earlier session left it."""
    fitted = fit(
        counting_stage(), folder, make_mesh(), seed=0, steps=STEPS, batch_size=BATCH,
        log_every=5, eval_every=0, save_every=5, keep=2,
    )  # fmt: skip
    state = to_host(fitted.state)
    kernel = state.params["linear"]["head"]["kernel"]
    state_arrays = {"kernel": kernel, "count": state.rest["linear"]["count"]}
    write_npz(folder / "state.npz", state_arrays)


def agree(folder: Path) -> None:
    """What every process holds after the helpers of `distributed`."""
    index = distributed.index()
    found = {
        "gathered": distributed.gather({"index": index, "text": "x" * index}),
        "agreed": distributed.agree(lambda: {"from": index}),
    }

    def fails_on_the_last():
        if index == distributed.count() - 1:
            raise UserError("no disk")

    for name, call in (("all_well", fails_on_the_last), ("agree", lambda: bad())):
        try:
            getattr(distributed, name)(call)
        except UserError as error:
            found[name] = str(error)
    found["attempts"] = [attempted(name) for name in ("on_all", "on_the_last", "nowhere", "alone")]
    found["cores"] = [distributed.cores(), len(os.sched_getaffinity(0))]
    mesh = make_mesh(-1, 2, slices=2)
    found["slices"] = [[d.process_index for d in row.flat] for row in mesh.devices]
    found["doctor"] = examine(folder)
    write_json(folder / f"process-{index}.json", found, own=True)
    write_json(folder / "first.json", index)


def attempted(fails: str) -> str:
    """What comes of an attempt that fails so; "alone": the others do not come out of theirs."""
    last = distributed.index() == distributed.count() - 1

    def function():
        if fails == "on_all" or (last and fails in ("on_the_last", "alone")):
            raise ValueError(f"here ({distributed.index()})")
        if fails == "alone":
            time.sleep(3)
        return "done"

    try:
        return distributed.attempt(function, fails, within=1 if fails == "alone" else 60)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def examine(folder: Path) -> str:
    """What `doctor` says of hosts that run different commits."""
    from gae_jax.commands import doctor

    os.environ["GAE_JAX_COMMIT"] = f"commit{distributed.index()}"
    config = get_config()
    config.doctor.update(steps=0, disk_megabytes=1, images=8)
    try:
        doctor.run(Session(config, Run(folder / "doctor")))
    except UserError as error:
        return str(error)
    return "all well"


def end(folder: Path) -> None:
    """Is asked to stop; all but the first process come to it later."""
    time.sleep(1.5 * distributed.index())
    raise Preempted("asked to stop")


def bad():
    raise UserError("the folder was made by another config")


def main(task: str, folder: str) -> int:
    flags.FLAGS.mark_as_parsed()
    if "JAX_NUM_PROCESSES" in os.environ:
        distributed.start(heartbeat_seconds=10)
    try:
        tasks = {"steps": steps, "stages": stages, "count": count, "agree": agree, "end": end}
        tasks[task](Path(folder))
    except Preempted as notice:
        print(notice, file=sys.stderr)
        return leave(notice.status)
    except Exception as error:
        print(f"{type(error).__name__}: {str(error)[:500]}", file=sys.stderr)
        return leave(1)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
