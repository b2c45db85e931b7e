"""Kills a training again and again at random moments, and compares what it comes to.

    PYTHONPATH=. python tests/kills.py FOLDER [--kills=100] [--seed=0]

The stage ``diffusion`` of tests/small.py trains with a checkpoint every few steps. It is killed
(SIGKILL) at moments drawn evenly over the time that an undisturbed session takes, start and
saving included, and begun again each time. After every kill the newest checkpoint that orbax lists
has to be whole: it is read in full. In the end parameters, moving average, optimizer and the rows
of metrics.csv have to be those of an undisturbed run, bit for bit. Prints a JSON object.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
import orbax.checkpoint as ocp

from gae_jax.train.checkpoint import latest_step
from gae_jax.train.log import read_metrics

ROOT = Path(__file__).parents[1]
NEEDED = ("backbone", "teacher", "tokenizer", "latents")


def command(workdir: Path, steps: int, every: int) -> list[str]:
    train = "--config.diffusion.train"
    return [
        *(sys.executable, "-m", "gae_jax", "diffusion", "--config=tests/small.py"),
        *(f"--workdir={workdir}", f"{train}.steps={steps}", f"{train}.save_every={every}"),
        *(f"{train}.log_every={every}", f"{train}.keep=2"),
    ]


def read_state(folder: Path):
    """(step, everything in the newest checkpoint), or None where there is no checkpoint yet."""
    step = latest_step(folder)
    if step is None:
        return None
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        state = reader.restore(folder / "checkpoints" / str(step) / "state")
    meta = json.loads((folder / "checkpoints" / str(step) / "meta" / "metadata").read_text())
    if int(state["step"]) != step or "batches" not in meta:
        raise AssertionError(f"checkpoint {step} holds step {state['step']} and {meta}")
    return step, state


def run_to_end(arguments: list[str]) -> float:
    """Seconds; raises if the command fails."""
    start = time.monotonic()
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise AssertionError(done.stderr)
    return time.monotonic() - start


def kill_often(
    stages: Path, folder: Path, *, kills: int, seed: int, steps: int = 150, every: int = 3
) -> dict:
    """What came of it.

    Args:
      stages: a run directory with the finished stages that a diffusion model is built on.
      folder: for the two runs.

    Raises:
      AssertionError: if a checkpoint is not whole, or the ends differ.
    """
    runs = [folder / "undisturbed", folder / "killed"]
    for run in runs:
        for name in NEEDED:
            shutil.copytree(stages / name, run / name)
    whole, broken = runs
    run_to_end(command(whole, steps, every))  # compiles
    shutil.rmtree(whole / "diffusion")
    session = run_to_end(command(whole, steps, every))
    draw, found = random.Random(seed), {"before": 0, "training": 0, "saving": 0}
    killed, starts, progress = 0, 0, []
    checkpoints = broken / "diffusion" / "checkpoints"
    while killed < kills:
        arguments = command(broken, steps, every)
        process = subprocess.Popen(
            arguments, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        starts += 1
        try:
            _, said = process.communicate(timeout=draw.uniform(0.3, 1.0) * session)
        except subprocess.TimeoutExpired:
            saving = any(checkpoints.glob("*tmp*"))
            process.send_signal(signal.SIGKILL)
            process.communicate()
            killed += 1
            state = read_state(broken / "diffusion")
            kind = "before" if state is None else ("saving" if saving else "training")
            found[kind] += 1
            progress.append(state[0] if state else 0)
            if sys.stderr.isatty() or killed % 10 == 0:
                print(f"{killed} kills, at step {progress[-1]}", file=sys.stderr)
        else:
            if process.returncode:
                raise AssertionError(said)
            # it came to its end: the next kills hit another run of the same
            compare(whole, broken)
            shutil.rmtree(broken / "diffusion")
    run_to_end(command(broken, steps, every))
    compare(whole, broken)
    return {
        "kills": killed,
        "sessions": starts + 1,
        "kills_before_the_first_checkpoint": found["before"],
        "kills_while_a_checkpoint_was_written": found["saving"],
        "other_kills": found["training"],
        "steps": steps,
        "save_every": every,
        "undisturbed_seconds": round(session, 1),
        "every_checkpoint_whole": True,
        "final_state_equal": True,
    }


def compare(one: Path, other: Path) -> None:
    """Raises AssertionError unless two finished runs are the same, bit for bit."""
    (step, state), (other_step, other_state) = (
        read_state(run / "diffusion") for run in (one, other)
    )
    assert step == other_step
    assert jax.tree.structure(state) == jax.tree.structure(other_state)
    jax.tree.map(np.testing.assert_array_equal, state, other_state)
    prints = [json.loads((run / "diffusion/done.json").read_text()) for run in (one, other)]
    assert prints[0]["fingerprint"] == prints[1]["fingerprint"]
    rows = [
        [{name: row[name] for name in row if name != "data_wait"} for row in read_metrics(path)]
        for path in (one / "diffusion", other / "diffusion")
    ]
    assert rows[0] == rows[1]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    stages = options.folder / "stages"
    run = [sys.executable, "-m", "gae_jax"]
    for name in ("backbone", "teacher", "tokenizer", "latents"):
        run_to_end([*run, name, "--config=tests/small.py", f"--workdir={stages}"])
    found = kill_often(stages, options.folder, kills=options.kills, seed=options.seed)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
