"""Eight fake CPU devices, and a small run that the tests of stages share."""

import fcntl
import functools
import gc
import hashlib
import os
import pickle
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
# A program that is not split for threads takes a third off compiling, and both cores are busy with
# a test process each; XLA's preset for fast compilation takes another fifth off. Fusions compiled
# the older way take a third off the tests' time, but XLA ends on a flag that it does not know, and
# jaxlib 0.11 has lost that one.
FLAGS = [
    "--xla_cpu_parallel_codegen_split_count=1",
    "--xla_cpu_opt_preset=CPU_OPT_PRESET_FAST_COMPILE",
]
if version("jaxlib").startswith("0.10."):
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")
if version("jaxlib").startswith(("0.10.", "0.11.")):
    given = os.environ.get("XLA_FLAGS", "").split()
    os.environ["XLA_FLAGS"] = " ".join([*given, *(flag for flag in FLAGS if flag not in given)])
# Two test processes keep two cores busy; scikit-learn's threads would only wait for each other.
os.environ["OPENBLAS_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = "1"

import jax
import pytest
from absl import flags
from jax._src.interpreters import mlir
from small import get_config

jax.config.update("jax_num_cpu_devices", 8)
flags.FLAGS.mark_as_parsed()
# Making an MLIR context takes 6 ms of the 30 that compiling a single operation takes. One context
# serves all programs of a test process. It is not public: a JAX without it is only slower.
if hasattr(mlir, "make_ir_context"):
    mlir.make_ir_context = functools.cache(mlir.make_ir_context)

ROOT = Path(__file__).parents[1]


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """Put files that need `small_run` last, but for the first of them.

    While one process makes that run, the others have enough to do.
    """
    needing = [item.path for item in items if "small_run" in getattr(item, "fixturenames", ())]
    last = set(needing) - set(needing[:1])
    items.sort(key=lambda item: item.path in last)


@pytest.fixture
def config():
    return get_config()


@pytest.fixture(scope="session")
def shared(tmp_path_factory, worker_id):
    """A directory that all processes of a test session have in common."""
    base = tmp_path_factory.getbasetemp()
    return base if worker_id == "master" else base.parent


@pytest.fixture(scope="session", autouse=True)
def judges_are_fitted_once(shared):
    """A judge is fitted in four seconds; the same images and labels give the same judge."""
    from gae_jax.evaluation.judge import Judge
    from gae_jax.runtime.files import write_bytes

    fit = Judge.__init__

    def fit_once(self, images, labels):
        digest = hashlib.sha256(repr((images.shape, images.dtype)).encode())
        digest.update(images.tobytes())
        digest.update(pickle.dumps(labels))
        path = shared / f"judge-{digest.hexdigest()}"
        if path.exists():
            self.__dict__.update(pickle.loads(path.read_bytes()))
            return
        fit(self, images, labels)
        write_bytes(path, pickle.dumps(self.__dict__), own=True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Judge, "__init__", fit_once)
        yield


@pytest.fixture(scope="session")
def small_run(shared):
    """A run directory in which every stage of `small.py` is finished; do not change it."""
    from gae_jax.commands.cli import run_command
    from gae_jax.run.run import Run
    from gae_jax.run.session import Session

    path = shared / "small"  # the first process that asks makes it for all of them
    run = Run(path, f"--config=tests/small.py --workdir={path}")
    session = Session(get_config(), run, devices=tuple(jax.devices()[:1]))
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
