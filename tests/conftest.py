"""Eight fake CPU devices, and a small run that the tests of stages share."""

import fcntl
import gc
import os
import tempfile
from importlib.metadata import version
from pathlib import Path

# Tracing makes millions of objects that all live on; looking for garbage among them took 6 % of it.
gc.set_threshold(200_000, 50, 100)
os.environ["JAX_PLATFORMS"] = "cpu"
# What one test compiled, another one and the processes that tests start need not compile again;
# a worker finds the cache of the process that started it.
if "GAE_JAX_TEST_CACHE" not in os.environ:
    CACHE = tempfile.TemporaryDirectory(prefix="gae_jax-tests-")
    os.environ["GAE_JAX_TEST_CACHE"] = CACHE.name
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ["GAE_JAX_TEST_CACHE"]
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
# The tests compile a lot and compute little: without XLA's dearer passes they take half the time.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
# The older way to compile fusions takes a third off the tests' time. XLA ends on a flag that it
# does not know, and jaxlib 0.11 has this one no more.
OLD_FUSIONS = "--xla_cpu_use_fusion_emitters=false"
if version("jaxlib").startswith("0.10.") and OLD_FUSIONS not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {OLD_FUSIONS}".strip()
# Two test processes keep two cores busy; scikit-learn's threads would only wait for each other.
os.environ["OPENBLAS_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = "1"

import jax
import pytest
from absl import flags
from small import get_config

jax.config.update("jax_num_cpu_devices", 8)
flags.FLAGS.mark_as_parsed()

ROOT = Path(__file__).parents[1]


@pytest.fixture
def config():
    return get_config()


@pytest.fixture(scope="session")
def small_run(tmp_path_factory, worker_id):
    """A run directory in which every stage of `small.py` is finished; do not change it."""
    from gae_jax.__main__ import run_command
    from gae_jax.run import Run
    from gae_jax.stages.session import Session

    shared = tmp_path_factory.getbasetemp()
    if worker_id != "master":  # the first process that asks makes it for all of them
        shared = shared.parent
    path = shared / "small"
    session = Session(
        get_config(), Run(path), config_file="tests/small.py", devices=tuple(jax.devices()[:1])
    )
    with (shared / "small.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (path / "report.html").exists():
            run_command("demo", session)
    return path


@pytest.fixture
def plain_config(config):
    """`config` for a tokenizer of L1 and alignment alone: its step is soon compiled."""
    config.tokenizer.losses.update(gan=0.0, perceptual=0.0)
    config.tokenizer.health.update(pictures=0, probe=0)
    return config
