"""Moments of features against numpy in float64: on one device, on eight, over two processes."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gae_jax.evaluation import statistics
from gae_jax.evaluation.frechet import frechet
from gae_jax.evaluation.statistics import Accumulator, Moments, gather, gather_float64
from gae_jax.runtime.errors import ConfigError, UserError
from gae_jax.runtime.mesh import make_mesh, put_batch

ROOT = Path(__file__).parents[2]
COUNT, DIMENSIONS, BATCH = 1000, 24, 48  # 20 batches and 40 rows: a ragged last one


def features(count=COUNT, seed=0):
    """As pooled activations are: not negative, far from 0, of different scales."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(DIMENSIONS, DIMENSIONS)) * rng.uniform(0.05, 1, DIMENSIONS)
    return np.abs(rng.normal(size=(count, DIMENSIONS)) @ mix + 5).astype(np.float32)


def batches(x, size=BATCH):
    """(rows, valid), the last one padded with what would spoil any sum."""
    for first in range(0, len(x), size):
        part = x[first : first + size]
        pad = np.full((size - len(part), x.shape[1]), np.nan, x.dtype)
        yield np.concatenate([part, pad]), np.arange(size) < len(part)


def assert_moments(got, x, rtol=1e-6):
    x = x.astype(np.float64)
    assert got.count == len(x)
    assert got.mean.dtype == got.covariance.dtype == np.float64
    np.testing.assert_allclose(got.mean, x.mean(axis=0), rtol=rtol)
    covariance = np.cov(x.T)
    np.testing.assert_allclose(got.covariance, covariance, rtol=0, atol=rtol * covariance.max())


def test_moments_are_numpys():
    x = features()
    assert_moments(Moments.of(x), x, rtol=1e-13)


def test_moments_do_not_cancel_far_from_zero():
    x = features().astype(np.float64)
    np.testing.assert_allclose(
        Moments.of(x + 1e6).covariance, np.cov(x.T), rtol=0, atol=1e-9 * np.cov(x.T).max()
    )


def test_merging_is_the_whole():
    x = features()
    parts = [Moments.of(part) for part in np.split(x, [1, 37, 600])]
    total = parts[0]
    for part in parts[1:]:
        total = total.merge(part)
    assert_moments(total, x, rtol=1e-12)
    with pytest.raises(UserError, match="of 24 and 23 dimensions cannot be merged"):
        total.merge(Moments.of(x[:, 1:]))


@pytest.mark.parametrize("devices", [None, 1, 2, 8])
def test_accumulated_batches_are_numpys(devices):
    x, other = features(), Moments.of(features(900, 1))
    mesh = devices and make_mesh(devices=jax.devices()[:devices])
    accumulator = Accumulator(mesh)
    for rows, valid in batches(x):
        if mesh:
            rows, valid = put_batch((rows, valid), mesh)
        accumulator.add(rows, valid)
    got = accumulator.moments(expected=COUNT)
    assert_moments(got, x)
    assert abs(frechet(got, other).total - frechet(Moments.of(x), other).total) < 1e-6


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 1, 8), (4, 2, 1)])
def test_every_row_counts_once_on_any_mesh(shape):
    """Also where several devices hold the same rows, or the dimensions are split."""
    x, mesh = features(), make_mesh(*shape)
    for layout in (jax.P(("data", "fsdp")), jax.P(), jax.P(("data", "fsdp"), "tensor")):
        accumulator = Accumulator(mesh)
        for rows, valid in batches(x):
            rows = jax.device_put(rows, jax.NamedSharding(mesh, layout))
            accumulator.add(rows, valid)
        assert_moments(accumulator.moments(expected=COUNT), x)


def test_half_precision_features_are_widened_first():
    x = jnp.asarray(features()).astype(jnp.bfloat16)
    accumulator = Accumulator()
    accumulator.add(x)
    assert_moments(accumulator.moments(), np.asarray(x.astype(jnp.float32)))


def test_the_host_adds_in_float64_every_sixteen_batches(monkeypatch):
    """And what was sent is only waited for when the next sums follow."""
    received = []
    accumulator = Accumulator()
    send = accumulator._send
    monkeypatch.setattr(accumulator, "_send", lambda: received.append(1) or send())
    for rows, valid in batches(features()):
        accumulator.add(rows, valid)
    assert len(received) == len(range(0, COUNT, BATCH)) // statistics.FLUSH
    assert accumulator._total == 0.0  # the first sums are still on their way
    accumulator.add(features()[:BATCH])
    assert accumulator.moments().count == COUNT + BATCH
    assert accumulator._total.dtype == np.float64


def test_moments_may_be_read_in_between():
    x, accumulator = features(), Accumulator()
    accumulator.add(x[:300])
    assert_moments(accumulator.moments(), x[:300])
    accumulator.add(x[300:])
    assert_moments(accumulator.moments(), x)


def test_wrong_features_are_refused():
    x = features(64)
    with pytest.raises(UserError, match="no features were added"):
        Accumulator().moments()
    accumulator = Accumulator()
    accumulator.add(x)
    with pytest.raises(UserError, match=r"64 features were added, expected 50; mask rows"):
        accumulator.moments(expected=50)
    with pytest.raises(UserError, match="of 23 dimensions after 24"):
        accumulator.add(x[:, 1:])
    with pytest.raises(UserError, match=r"\[64, 24\] with valid \[63\]"):
        accumulator.add(x, np.ones(63, bool))
    with pytest.raises(ConfigError, match="a batch of features of size 63 does not divide over 8"):
        Accumulator(make_mesh()).add(x[:63])
    nothing = Accumulator()
    nothing.add(x, np.zeros(64, bool))
    with pytest.raises(UserError, match="0 features were added, expected at least one"):
        nothing.moments()
    for value in (np.nan, np.inf):
        for first in (True, False):
            spoilt = x.copy()
            spoilt[5, 3] = value
            accumulator = Accumulator()
            for rows in (spoilt, x) if first else (x, spoilt):
                accumulator.add(rows)
            with pytest.raises(UserError, match="features have a NaN or an infinity"):
                accumulator.moments()
    with pytest.raises(UserError, match="row 5 has a NaN or an infinity"):
        Moments.of(spoilt)
    with pytest.raises(UserError, match="moments of 0 rows"):
        Moments.of(x[:0])


def test_one_process_gathers_itself():
    moments = Moments.of(features())
    again = gather(moments)
    assert again.count == moments.count
    np.testing.assert_array_equal(again.mean, moments.mean)
    np.testing.assert_array_equal(again.m2, moments.m2)
    assert gather_float64(np.pi)[0] == np.pi


def process(port, index, path):
    """One of two processes, of two devices each; what it found goes to a file."""
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", 2, index, heartbeat_timeout_seconds=10)
    x, found = features(), {}
    # each has its own rows, and not as many as the other
    own = Accumulator()
    for rows, valid in batches(x[:620] if index == 0 else x[620:]):
        own.add(jnp.asarray(rows), valid)
    # both have part of every batch
    mesh = make_mesh(2, 1, 2)
    shared = Accumulator(mesh)
    for rows, valid in batches(x):
        shared.add(*put_batch((rows, valid), mesh))
    for name, accumulator in (("own", own), ("shared", shared)):
        moments = accumulator.moments(expected=COUNT)
        found |= {f"{name}_mean": moments.mean, f"{name}_m2": moments.m2}
    # what each computed in float64
    moments = gather(Moments.of(x[:620] if index == 0 else x[620:]))
    found |= {"exact_mean": moments.mean, "exact_m2": moments.m2}
    found["wide"] = gather_float64(wide(index))
    np.savez(path, **found)
    jax.distributed.shutdown()


def wide(index):
    return np.random.default_rng(index).normal(size=50) * 10.0 ** np.arange(-25, 25)


def test_two_processes_find_the_moments_of_all(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    code = "import sys, test_statistics as t; t.process(sys.argv[1], int(sys.argv[2]), sys.argv[3])"
    paths = [tmp_path / f"{index}.npz" for index in range(2)]
    folders = (ROOT, ROOT / "tests", ROOT / "tests" / "evaluation")
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, folders))}
    env.pop("XLA_FLAGS", None)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(port), str(index), str(path)],
            env=env,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index, path in enumerate(paths)
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)
    x = features()
    exact = Moments.of(x)
    found = [np.load(path) for path in paths]
    for name in found[0].files:
        np.testing.assert_array_equal(found[0][name], found[1][name], err_msg=name)
    for name in ("own", "shared"):
        assert_moments(Moments(COUNT, found[0][f"{name}_mean"], found[0][f"{name}_m2"]), x)
    np.testing.assert_allclose(found[0]["exact_mean"], exact.mean, rtol=1e-12)
    np.testing.assert_allclose(found[0]["exact_m2"], exact.m2, rtol=0, atol=1e-12 * exact.m2.max())
    np.testing.assert_allclose(found[0]["wide"], [wide(0), wide(1)], rtol=1e-12)
