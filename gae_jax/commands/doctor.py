"""``doctor``: what a long run needs, tried on every host before it starts."""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import logging
import math
import os
import platform
import shutil
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gae_jax import __version__
from gae_jax.benchmark.timing import time_workload
from gae_jax.benchmark.workloads import TRAINED, make_workload, stages_of
from gae_jax.config import plain
from gae_jax.nn.attention import attention_implementation
from gae_jax.run.session import Session
from gae_jax.runtime import distributed
from gae_jax.runtime.distributed import cores
from gae_jax.runtime.errors import ConfigError, UserError, number_of
from gae_jax.runtime.files import write_bytes, write_json
from gae_jax.runtime.progress import duration

READ_SECONDS = 0.5  # that images are read for, at least
# What has to be the same on every host.
SAME = ("versions", "commit", "config", "devices", "data")
ROOT = Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True)
class Check:
    """A line of the report; ``ok`` is None where nothing is asked, only told."""

    name: str
    ok: bool | None
    text: str


def commit() -> str:
    """Which code this is: GAE_JAX_COMMIT, which launch scripts set, or what git says."""
    if given := os.environ.get("GAE_JAX_COMMIT"):
        return given
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def versions() -> str:
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain")
    found = [f"{name} {importlib.metadata.version(name)}" for name in packages]
    return ", ".join([f"python {platform.python_version()}", f"gae_jax {__version__}", *found])


def devices_here() -> str:
    local = jax.local_devices()
    limit = (local[0].memory_stats() or {}).get("bytes_limit")
    size = f", {limit / 2**30:.1f} GiB each" if limit else ""
    return f"{len(local)} x {local[0].device_kind}{size}"


def disk_here(folder: Path, megabytes: int) -> dict[str, float]:
    """Free space, and the speed of writing and reading one file of this host's own."""
    folder.mkdir(parents=True, exist_ok=True)
    path, block = folder / f".doctor-{distributed.index()}", os.urandom(2**20)
    try:
        start = time.monotonic()
        write_bytes(path, block * megabytes, own=True)
        written = time.monotonic()
        path.read_bytes()
        read = time.monotonic()
    finally:
        path.unlink(missing_ok=True)
    return {
        "free_gib": shutil.disk_usage(folder).free / 2**30,
        "write_mb_per_second": megabytes / max(written - start, 1e-9),
        "read_mb_per_second": megabytes / max(read - written, 1e-9),
    }


def data_here(session: Session) -> dict[str, Any]:
    """What the images are, and how fast this process makes training batches of them.

    They are decoded, also where a cache would spare that; the start of workers does not count.
    """
    sources = {split: session.source(split) for split in ("train", "holdout")}
    size, images = min(32, session.config.doctor.images), session.config.doctor.images
    data = dataclasses.replace(session.data, cache="none")
    batches = data.training_batches(sources["train"], size, session.config.seed)
    iterator, seen = iter(batches.read()), 0
    with contextlib.closing(iterator):
        for _ in range(1 + 2 * batches.processes):  # until all workers are at work
            next(iterator)
        start = time.monotonic()
        while seen < images or time.monotonic() - start < READ_SECONDS:
            seen += len(next(iterator)["label"])
        seconds = time.monotonic() - start
    return {
        "what": "; ".join(f"{split}: {source!r}" for split, source in sources.items()),
        "images_per_second": seen / seconds,
        "classes": len(sources["train"].class_names),
    }


def host(session: Session) -> dict[str, Any]:
    """What this host says of itself; a part that fails says why instead."""
    config = session.config
    text = json.dumps(plain(config), sort_keys=True)
    found: dict[str, Any] = {
        "host": socket.gethostname(),
        "versions": versions(),
        "commit": commit(),
        "config": hashlib.sha256(text.encode()).hexdigest()[:12],
        "devices": devices_here(),
        "memory_gib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30,
        "cpus": cores(),
        "errors": {},
    }
    parts = {
        "disk": lambda: disk_here(session.run.path, config.doctor.disk_megabytes),
        "data": lambda: data_here(session),
    }
    for name, make in parts.items():
        try:
            found[name] = make()
        except (UserError, OSError) as error:
            found[name], found["errors"][name] = None, str(error)
    if found["data"]:  # the speed may differ
        found["data_speed"] = found["data"]["images_per_second"]
        found["classes"] = found["data"]["classes"]
        found["data"] = found["data"]["what"]
    return found


def compare(hosts: list[dict[str, Any]]) -> list[Check]:
    """What has to be the same everywhere, and what every host could not do."""
    checks = []
    for name in SAME:
        failed = {h["host"]: h["errors"][name] for h in hosts if name in h["errors"]}
        values: dict[str, list[str]] = {}
        for own in hosts:
            values.setdefault(str(own[name]), []).append(own["host"])
        if failed:
            checks.append(Check(name, False, _of_hosts(failed)))
        elif len(values) > 1:
            text = "; ".join(f"{', '.join(names)}: {value}" for value, names in values.items())
            checks.append(Check(name, False, f"not the same on all hosts: {text}"))
        else:
            checks.append(Check(name, True, next(iter(values))))
    return checks


def _of_hosts(found: dict[str, str]) -> str:
    return "; ".join(f"{name}: {text}" for name, text in found.items())


def check_directory(session: Session) -> Check:
    """Whether every host sees what the first one writes to the run directory."""
    path = session.run.path / f".doctor-shared-{os.getpid() if distributed.is_first() else 0}"
    path = Path(distributed.gather(str(path))[0])
    write_bytes(path, b"seen")
    distributed.barrier("doctor wrote")
    try:
        distributed.await_file(path, within=30)
        blind = False
    except UserError:
        blind = True
    seen = distributed.gather({"host": socket.gethostname(), "blind": blind})
    distributed.barrier("doctor saw")
    if distributed.is_first():
        path.unlink(missing_ok=True)
    if hosts := [own["host"] for own in seen if own["blind"]]:
        text = f"{session.run.path} is not one directory for all: not seen by {', '.join(hosts)}"
        return Check("directory", False, f"{text}; mount a shared file system there")
    return Check(
        "directory",
        True,
        f"{session.run.path}, seen by all {number_of(len(seen), 'process', 'processes')}",
    )


def check_network(session: Session) -> Check:
    """A sum over all devices, and how long one of 64 MiB takes."""
    mesh = session.mesh
    split = NamedSharding(mesh, P(mesh.axis_names))
    rows = (mesh.size, 2**24)
    make = jax.jit(lambda: jnp.ones(rows, jnp.float32), out_shardings=split)
    total = jax.jit(lambda x: x.sum(0), out_shardings=NamedSharding(mesh, P()))
    ones = make()
    found = float(np.asarray(total(ones)[0].addressable_data(0)))
    start = time.monotonic()
    jax.block_until_ready(total(ones))
    seconds = time.monotonic() - start
    text = f"sum over {number_of(mesh.size, 'device')}, 64 MiB each: {1e3 * seconds:.1f} ms"
    return Check("network", found == mesh.size, text)


def check_feeding(rates: dict[str, float], speeds: list[float], session: Session) -> Check:
    """Whether the images are read as fast as the steps take them, and how many cores are missing.

    Args:
      rates: name of a step -> images/s that it takes, on all devices.
      speeds: images/s that each process reads.
    """
    said, short = [], False
    for name, rate in rates.items():
        cores_needed = max(rate / len(speeds) / speed for speed in speeds) * cores()
        missing = math.ceil(cores_needed) - cores()
        short = short or missing > 0
        lack = f"{number_of(missing, 'core')} missing" if missing > 0 else "enough"
        said.append(
            f"{name} takes {rate / len(speeds):.0f} images/s of each process, the slowest reads "
            f"{min(speeds):.0f} with {number_of(cores(), 'core')}: {lack}"
        )
    if short and session.data.cache == "none":
        said.append("data.cache=disk decodes images once")
    return Check("feeding", None, "; ".join(said))


def check_steps(session: Session, speeds: list[float]) -> list[Check]:
    """Time and memory of the config's steps on random data, and hours of the whole training.

    Args:
      speeds: images/s that each process reads; empty: not known.
    """
    section = session.config.doctor
    known = stages_of(session.config)
    names = tuple(section.works) or tuple(name for name in known if name in TRAINED)
    config = session.config.copy_and_resolve_references()
    config.bench.update(warmup=1, repeats=1, batches=1)
    own = dataclasses.replace(session, config=config)
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    checks, rates = [], {}
    for name in names:
        logging.info("doctor: %s: compiling; large models take minutes", name)
        try:
            workload = make_workload(config, name)
            row = time_workload(own, workload, None, steps=section.steps)
        except (jax.errors.JaxRuntimeError, UserError) as error:  # out of memory among them
            text = next(iter(str(error).splitlines()), "")[:200]
            section = TRAINED.get(name, "")
            path = f"{section}.compute"
            saves = "compute" in config.get(section, {})
            see = f"; see {path}.remat and {path}.accumulate" if saves else ""
            checks.append(Check(name, False, text + see))
            continue
        seconds = row["ms_per_step"] / 1e3
        text = (
            f"{1 / seconds:.3g} steps/s, {row['images_per_second']:.1f} images/s, compiled in "
            f"{row['compile_seconds']:.0f} s"
        )
        if memory := row["program_memory_bytes"]:
            of = f" of {limit / 2**30:.1f}" if limit else ""
            text += f", {memory / 2**30:.2f}{of} GiB per device"
        if name in TRAINED:
            steps = config[TRAINED[name]].train.steps
            text += (
                f", {duration(steps * seconds)} for {number_of(steps, 'step')} without reading data"
            )
            if name != "diffusion":  # it reads latents
                rates[name] = row["images_per_second"]
        checks.append(Check(name, True, text))
    if rates and speeds:
        checks.append(check_feeding(rates, speeds, session))
    return checks


def compute_of(session: Session) -> str:
    """dtype and attention of the stages that train large models."""
    said = []
    for name, heads in (("tokenizer", "embed_dim"), ("diffusion", "hidden_size")):
        compute, model = session.config[name].compute, session.config[name].model
        how, width = compute.attention, model[heads] // model.num_heads
        if how != "mosaic":
            how = attention_implementation(how, jnp.dtype(compute.dtype), width)
        said.append(f"{name}: {compute.dtype}, attention {how}, remat {compute.remat}")
    return "; ".join(said)


def check(session: Session) -> None:
    """Raises ConfigError for a work that there is not, before minutes of compiling."""
    known = stages_of(session.config)
    if odd := [name for name in session.config.doctor.works if name not in known]:
        raise ConfigError(f"doctor.works has {odd}; this config has {', '.join(known)}")


def run(session: Session) -> list[Check]:
    """Tries everything, prints a table and writes ``doctor.json``.

    Raises:
      UserError: at the end, if something would stop or spoil a run.
    """
    hosts = distributed.gather(host(session))
    names = sorted({own["host"] for own in hosts})
    checks = [
        Check(
            "hosts",
            None,
            f"{number_of(len(hosts), 'process', 'processes')} on {len(names)}: {', '.join(names)}",
        )
    ]
    checks += compare(hosts)
    disk = [own["disk"] for own in hosts if own["disk"]]
    failed = {own["host"]: own["errors"]["disk"] for own in hosts if "disk" in own["errors"]}
    if failed:
        checks.append(Check("disk", False, _of_hosts(failed)))
    else:
        slowest = {key: min(own[key] for own in disk) for key in disk[0]}
        text = (
            "{free_gib:.1f} GiB free, {write_mb_per_second:.0f} MB/s written, "
            "{read_mb_per_second:.0f} MB/s read (maybe from memory), of the slowest host"
        )
        checks.append(Check("disk", True, text.format(**slowest)))
    speeds = [own["data_speed"] for own in hosts if "data_speed" in own]
    if speeds:
        text = f"{min(speeds):.0f} images/s decoded and cut, slowest process"
        checks.append(Check("reading", None, f"{text}; {hosts[0]['cpus']} CPUs"))
        wanted = session.config.diffusion.model.num_classes
        if (classes := hosts[0]["classes"]) != wanted and session.states_classes:
            text = f"the data has {classes}, diffusion.model.num_classes is {wanted}"
            checks.append(Check("classes", False, text))
    try:
        checks.append(Check("mesh", True, str(dict(session.mesh.shape))))
    except ConfigError as error:
        checks.append(Check("mesh", False, str(error)))
    else:
        checks.append(check_directory(session))
        checks.append(check_network(session))
        checks.append(Check("compute", None, compute_of(session)))
        if session.config.doctor.steps:
            checks += check_steps(session, speeds)
    lines = [dataclasses.asdict(one) for one in checks]
    write_json(session.run.path / "doctor.json", {"checks": lines, "hosts": hosts})
    if distributed.is_first():
        marks = {True: "ok", False: "FAILED", None: ""}
        print("\n".join(f"{marks[one.ok]:<7} {one.name:<16}  {one.text}" for one in checks))
    if bad := [one.name for one in checks if one.ok is False]:
        raise UserError(f"doctor: {', '.join(bad)} would stop or spoil a run; see the lines above")
    return checks
