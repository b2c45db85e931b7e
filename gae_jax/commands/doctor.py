"""``doctor``: check on every host what a long run needs, before it starts."""

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
from gae_jax.config import plain, precision
from gae_jax.nn.attention import attention_implementation
from gae_jax.run.session import Session
from gae_jax.runtime import distributed
from gae_jax.runtime.distributed import cores
from gae_jax.runtime.errors import ConfigError, UserError, number_of
from gae_jax.runtime.files import write_bytes, write_json
from gae_jax.runtime.progress import duration

READ_SECONDS = 0.5  # least time of reading images
# Facts that must be equal on all hosts.
SAME = ("versions", "commit", "config", "devices", "data")
ROOT = Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True)
class Check:
    """A line of the report; ``ok`` is None for information."""

    name: str
    ok: bool | None
    text: str


def commit() -> str:
    """The commit of the code: GAE_JAX_COMMIT, which launch scripts set, or what git says."""
    if given := os.environ.get("GAE_JAX_COMMIT"):
        return given
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    described = subprocess.run(command, capture_output=True, text=True, check=False)
    return described.stdout.strip() or "unknown"


def versions() -> str:
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain")
    of_packages = [f"{name} {importlib.metadata.version(name)}" for name in packages]
    python = f"python {platform.python_version()}"
    return ", ".join([python, f"gae_jax {__version__}", *of_packages])


def devices_here() -> str:
    local = jax.local_devices()
    limit = (local[0].memory_stats() or {}).get("bytes_limit")
    size = f", {limit / 2**30:.1f} GiB each" if limit else ""
    return f"{len(local)} x {local[0].device_kind}{size}"


def disk_here(folder: Path, megabytes: int) -> dict[str, float]:
    """Measure free space, and the speed of writing and reading a file of this host."""
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
    """Describe the images, and measure how fast this process makes training batches of them.

    They are decoded even if there is a cache; the start of workers does not count.
    """
    sources = {split: session.source(split) for split in ("train", "holdout")}
    size, images = min(32, session.config.doctor.images), session.config.doctor.images
    data = dataclasses.replace(session.data, cache="none")
    batches = data.training_batches(sources["train"], size, session.config.seed)
    iterator: Any = iter(batches.read())  # which can be closed
    seen = 0
    with contextlib.closing(iterator):
        for _ in range(1 + 2 * batches.processes):  # until all workers are busy
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
    """Collect the facts of this host; a part that fails has its error instead."""
    config = session.config
    text = json.dumps(plain(config), sort_keys=True)
    facts: dict[str, Any] = {
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
            facts[name] = make()
        except (UserError, OSError) as error:
            facts[name], facts["errors"][name] = None, str(error)
    if data := facts["data"]:  # the speed may differ between hosts
        facts |= {"data_speed": data["images_per_second"], "classes": data["classes"]}
        facts["data"] = data["what"]
    return facts


def compare(hosts: list[dict[str, Any]]) -> list[Check]:
    """Compare the facts of all hosts that must be equal; report their errors."""
    checks = []
    for name in SAME:
        failed = {h["host"]: h["errors"][name] for h in hosts if name in h["errors"]}
        values: dict[str, list[str]] = {}
        for facts in hosts:
            values.setdefault(str(facts[name]), []).append(facts["host"])
        if failed:
            checks.append(Check(name, False, _of_hosts(failed)))
        elif len(values) > 1:
            text = "; ".join(f"{', '.join(names)}: {value}" for value, names in values.items())
            checks.append(Check(name, False, f"not the same on all hosts: {text}"))
        else:
            checks.append(Check(name, True, next(iter(values))))
    return checks


def _of_hosts(texts: dict[str, str]) -> str:
    return "; ".join(f"{host}: {text}" for host, text in texts.items())


def check_directory(session: Session) -> Check:
    """Check that every host sees what the first one writes to the run directory."""
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
    if hosts := [facts["host"] for facts in seen if facts["blind"]]:
        text = f"{session.run.path} is not shared by all hosts: not seen by {', '.join(hosts)}"
        return Check("directory", False, f"{text}; mount a shared file system there")
    return Check(
        "directory",
        True,
        f"{session.run.path}, seen by all {number_of(len(seen), 'process', 'processes')}",
    )


def check_network(session: Session) -> Check:
    """Check a sum over all devices, and time one of 64 MiB."""
    mesh = session.mesh
    split = NamedSharding(mesh, P(mesh.axis_names))
    rows = (mesh.size, 2**24)
    make = jax.jit(lambda: jnp.ones(rows, jnp.float32), out_shardings=split)
    total = jax.jit(lambda x: x.sum(0), out_shardings=NamedSharding(mesh, P()))
    ones = make()
    result = float(np.asarray(total(ones)[0].addressable_data(0)))
    start = time.monotonic()
    jax.block_until_ready(total(ones))
    seconds = time.monotonic() - start
    text = f"sum over {number_of(mesh.size, 'device')}, 64 MiB each: {1e3 * seconds:.1f} ms"
    return Check("network", result == mesh.size, text)


def check_feeding(rates: dict[str, float], speeds: list[float], session: Session) -> Check:
    """Compare the speed of reading images with that of the steps; say how many cores are missing.

    Args:
      rates: name of a step -> images/s that it needs, on all devices.
      speeds: images/s that each process reads.
    """
    lines, short = [], False
    for name, rate in rates.items():
        cores_needed = max(rate / len(speeds) / speed for speed in speeds) * cores()
        missing = math.ceil(cores_needed) - cores()
        short = short or missing > 0
        lack = f"{number_of(missing, 'core')} missing" if missing > 0 else "enough"
        lines.append(
            f"{name} needs {rate / len(speeds):.0f} images/s of each process, the slowest reads "
            f"{min(speeds):.0f} with {number_of(cores(), 'core')}: {lack}"
        )
    if short and session.data.cache == "none":
        lines.append("data.cache=disk decodes images once")
    return Check("feeding", None, "; ".join(lines))


def check_steps(session: Session, speeds: list[float]) -> list[Check]:
    """Measure time and memory of the config's steps on random data; estimate the training time.

    Args:
      speeds: images/s that each process reads; empty: unknown.
    """
    section = session.config.doctor
    known = stages_of(session.config)
    names = tuple(section.works) or tuple(name for name in known if name in TRAINED)
    config = session.config.copy_and_resolve_references()
    config.bench.update(warmup=1, repeats=1, batches=1)
    quick = dataclasses.replace(session, config=config)
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    checks, rates = [], {}
    for name in names:
        logging.info("doctor: %s: compiling; large models take minutes", name)
        try:
            workload = make_workload(config, name)
            row = time_workload(quick, workload, None, steps=section.steps)
        except (jax.errors.JaxRuntimeError, UserError) as error:  # out of memory among them
            text = next(iter(str(error).splitlines()), "")[:200]
            saves = name in precision.NETWORKS
            see = f"; see precision.{name}.remat and {name}.train.accumulate" if saves else ""
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
            steps = config[name].train.steps
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
    """dtype, attention and remat of the stages that train large models."""
    texts = []
    for name, heads in (("tokenizer", "embed_dim"), ("diffusion", "hidden_size")):
        compute, model = precision.settings(session.config, name), session.config[name].model
        how, width = compute["attention"], model[heads] // model.num_heads
        how = attention_implementation(how, jnp.dtype(compute["dtype"]), width)
        texts.append(f"{name}: {compute['dtype']}, attention {how}, remat {compute['remat']}")
    return "; ".join(texts)


def check(session: Session) -> None:
    """Raise ConfigError for an unknown workload, before minutes of compiling."""
    known = stages_of(session.config)
    if unknown := [name for name in session.config.doctor.works if name not in known]:
        raise ConfigError(f"doctor.works has {unknown}; this config has {', '.join(known)}")


def run(session: Session) -> list[Check]:
    """Make all checks, print them and write ``doctor.json``.

    Raises:
      UserError: at the end, if a check failed.
    """
    hosts = distributed.gather(host(session))
    names = sorted({facts["host"] for facts in hosts})
    checks = [
        Check(
            "hosts",
            None,
            f"{number_of(len(hosts), 'process', 'processes')} on {len(names)}: {', '.join(names)}",
        )
    ]
    checks += compare(hosts)
    disk = [facts["disk"] for facts in hosts if facts["disk"]]
    failed = {
        facts["host"]: facts["errors"]["disk"] for facts in hosts if "disk" in facts["errors"]
    }
    if failed:
        checks.append(Check("disk", False, _of_hosts(failed)))
    else:
        slowest = {key: min(speeds[key] for speeds in disk) for key in disk[0]}
        text = (
            "{free_gib:.1f} GiB free, {write_mb_per_second:.0f} MB/s written, "
            "{read_mb_per_second:.0f} MB/s read (maybe from memory), of the slowest host"
        )
        checks.append(Check("disk", True, text.format(**slowest)))
    speeds = [facts["data_speed"] for facts in hosts if "data_speed" in facts]
    if speeds:
        text = f"{min(speeds):.0f} images/s decoded and cropped, slowest process"
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
    lines = [dataclasses.asdict(check) for check in checks]
    write_json(session.run.path / "doctor.json", {"checks": lines, "hosts": hosts})
    if distributed.is_first():
        marks = {True: "ok", False: "FAILED", None: ""}
        print("\n".join(f"{marks[line.ok]:<7} {line.name:<16}  {line.text}" for line in checks))
    if failures := [line.name for line in checks if line.ok is False]:
        raise UserError(f"doctor: {', '.join(failures)} failed; see the lines above")
    return checks
