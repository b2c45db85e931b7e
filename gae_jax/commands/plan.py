"""``plan``: what every stage needs on a target machine, compiled ahead of time without it."""

import logging
import math
from functools import partial
from pathlib import Path
from typing import Any

import jax

from gae_jax.benchmark import ahead, flops
from gae_jax.benchmark.rows import failure, make_rows, table_of
from gae_jax.benchmark.targets import Target, target_of
from gae_jax.benchmark.workloads import (
    TRAINED,
    Workload,
    arguments_of,
    batch_size_of,
    make_workload,
    plain,
    stages_of,
)
from gae_jax.config import precision
from gae_jax.config.tools import set_field
from gae_jax.run.session import Session
from gae_jax.runtime.errors import ConfigError, UserError
from gae_jax.runtime.mesh import check_batch

ASSUMPTION = (
    "ESTIMATE: every rate of the chip reached in full and all at once (bf16 matmuls, HBM, links); "
    "the longest of the three binds. Not measured."
)
STAND_IN = (
    "compiled by XLA for CPU devices instead of the chips: state, parameters and FLOPs are "
    "exact, temporaries and collectives are a different compiler's"
)


def names_of(config) -> tuple[str, ...]:
    """The stages to plan.

    Raises:
      ConfigError: for a name that is unknown, or a stage that this config has no step of.
    """
    known = stages_of(config)
    if unknown := [name for name in config.plan.works if name not in known]:
        raise ConfigError(f"plan.works has {unknown}; this config has {', '.join(known)}")
    return tuple(config.plan.works) or known


def check(session: Session) -> None:
    """Refuse what cannot be planned before minutes of compiling."""
    names_of(session.config)
    if session.config.plan.batch_size < 0:
        raise ConfigError(
            f"plan.batch_size is {session.config.plan.batch_size}; give 1 or more, or 0 for each "
            "stage's own"
        )


def config_for(config, target: Target):
    """Adapt a copy of the config to the target; returns it with the fields that the preset sets.

    Raises:
      ConfigError: if the target does not have the attention that the config asks for.
    """
    platform = target.compiler if target.here or target.compiler == "tpu" else "gpu"
    config = precision.settle(config, platform, {}).copy_and_resolve_references()
    recommended = dict(target.machine.compute) if target.machine else {}
    for path, value in recommended.items():
        set_field(config, path, value)
    if not target.here:
        chosen = {
            path: value
            for path, value in precision.fields_of(config).items()
            if path.endswith((".attention", ".kernels"))
        }
        for path, value in chosen.items():
            if value == "cudnn" and target.compiler == "tpu":
                raise ConfigError(f"{path} is 'cudnn', which is for GPUs; use 'auto' or 'xla'")
        # "auto" would ask the devices of this machine
        precision.override(config, dict.fromkeys(chosen, "xla"))
    return config, recommended


def count_flops(workload: Workload) -> int:
    """Count the operations of one step on all devices."""
    arguments = arguments_of(workload)
    return flops.count(lambda *arrays: workload.step(*arrays, workload.phase), *arguments)


def plan_stage(config, name: str, target: Target) -> dict[str, Any]:
    """Make the row of figures of one stage; nothing is computed.

    Raises:
      UserError: if its batch does not divide over the devices.
    """
    mesh, chip = target.mesh, target.chip
    size = config.plan.batch_size or batch_size_of(config, name)
    check_batch(size, mesh, f"plan: batch size of {name}")
    if name in ("teacher", "tokenizer", "diffusion"):
        parts = config[name].train.accumulate
        check_batch(size // parts, mesh, f"plan: batch size of {name} / accumulate {parts} =")
    workload = make_workload(config, name, size)
    state, _, _, frozen = ahead.placed(workload, mesh)
    counted = count_flops(workload) / mesh.size
    row = {
        "images_per_step": size,
        **ahead.count_parameters(state, frozen),
        "state": ahead.layout(state),
        "frozen": ahead.layout(frozen),
        "model_tflop_per_step": count_flops(make_workload(plain(config), name, size)) / 1e12,
        "counted_tflop_per_device": counted / 1e12,
        **hours_of(config, name, size),
        **disk_of(config, name, workload, state),
    }
    try:
        program = ahead.compile_step(workload, mesh)
    except Exception as error:  # every compiler has its own errors for what is too large
        if (needed := ahead.too_large(error)) is None:
            raise
        total, capacity = needed
        spare = {"capacity": capacity, "fits": False, "spare": capacity - total}
        return row | {"memory": {"total": total, **spare}}
    cost = program.compiled.cost_analysis() or {}
    row |= {
        "trace_seconds": program.trace_seconds,
        "compile_seconds": program.seconds,
        "memory": ahead.memory(program.compiled, chip),
        "donated": donated(program.compiled, row["state"]["bytes_per_device"]),
        "xla_tflop_per_device": cost.get("flops", 0.0) / 1e12,
        "accessed_bytes_per_device": cost.get("bytes accessed", 0.0),
        **ahead.traffic(program.compiled, mesh),
    }
    if chip:
        row["estimate"] = ahead.estimate(
            flops=counted,
            xla_flops=cost.get("flops", 0.0),
            accessed=row["accessed_bytes_per_device"],
            sent=row["sent_bytes_per_device"],
            images=size,
            chip=chip,
        )
        rate = row["estimate"]["images_per_second"]
        row["estimate"]["hours"] = row["images"] / rate / 3600
    return row


def donated(compiled, state_bytes: int) -> bool | None:
    """Whether the new state takes the memory of the old one; None without a state.

    Arrays that the step returns unchanged, such as tables, may be left out.
    """
    if not state_bytes:
        return None
    return compiled.memory_analysis().alias_size_in_bytes >= 0.99 * state_bytes


def images_of(config, name: str, size: int, images: int) -> int:
    """The number of images that a stage works on in all.

    Args:
      size: its global batch.
      images: in the training set.
    """
    if name in TRAINED:
        return config[name].train.steps * size
    if name == "latents":
        return images
    classes = len(config.sample.classes) or config.diffusion.model.num_classes
    return config.sample.per_class * classes


def hours_of(config, name: str, size: int) -> dict[str, Any]:
    """Images and steps of the stage, and its hours at a throughput that the user gave."""
    images = images_of(config, name, size, config.plan.images)
    rate = config.plan.throughput[name.replace("-", "_")]
    return {
        "images": images,
        "steps": math.ceil(images / size),
        "hours_at_throughput": images / rate / 3600 if rate else None,
    }


def disk_of(config, name: str, workload: Workload, state) -> dict[str, Any]:
    """Bytes on disk: of the latents, or of the checkpoints that a training retains.

    Checkpoints count without compression; while one is written, there is one more.
    """
    if name == "latents":
        arguments = arguments_of(workload)
        _, latents = jax.eval_shape(lambda *x: workload.step(*x, workload.phase), *arguments)
        of_image = math.prod(latents.shape[1:]) * latents.dtype.itemsize
        return {"disk_bytes": config.plan.images * of_image}
    if name not in TRAINED:
        return {"disk_bytes": None}
    kept = config[name].train.keep
    if name == "tokenizer" and config.tokenizer.losses.gan > 0 and config.tokenizer.gan.start:
        kept += 1  # a milestone
    return {"disk_bytes": kept * ahead.layout(state)["bytes"]}


GIB = 2**-30
COLUMNS = (
    # title, path in a row, factor, format
    ("batch", "images_per_step", 1, "d"),
    ("compile s", "compile_seconds", 1, ".0f"),
    ("model TFLOP", "model_tflop_per_step", 1, ".1f"),
    ("state GiB", "state.bytes_per_device", GIB, ".2f"),
    ("replicated %", "state.unsharded_share", 100, ".2f"),
    ("HBM GiB", "memory.total", GIB, ".2f"),
    ("spare GiB", "memory.spare", GIB, ".2f"),
    ("fits", "memory.fits", 1, ""),
    ("donated", "donated", 1, ""),
    ("sent GiB", "sent_bytes_per_device", GIB, ".2f"),
    ("est. images/s", "estimate.images_per_second", 1, ".0f"),
    ("bound by", "estimate.bound", 1, ""),
    ("est. hours", "estimate.hours", 1, ".1f"),
    ("hours", "hours_at_throughput", 1, ".1f"),
    ("disk GiB", "disk_bytes", GIB, ".1f"),
)


def details(rows: list[dict[str, Any]]) -> str:
    """A line with the parameters of each stage, and one for every kind of collective."""
    lines = []
    for row in rows:
        if row["error"]:
            continue
        sizes = [f"{name} {n / 1e6:.1f} M" for name, n in row["parameters"].items()]
        sizes += [f"{name} {n / 1e6:.1f} M (read)" for name, n in row["frozen_parameters"].items()]
        lines.append(f"{row['work']}: {', '.join(sizes)}")
        lines += [
            f"  {item['kind']} over {' and '.join(item['axes']) or '?'}: {item['count']}, "
            f"{item['sent'] / 1e9:.3f} GB sent by each device"
            for item in row.get("collectives", ())
        ]
        if row.get("unknown_loops"):
            lines.append(f"  {row['unknown_loops']} loops of unknown length, counted once")
    return "\n".join(lines)


def facts(target: Target, recommended: dict[str, Any]) -> dict[str, Any]:
    """The facts that the figures depend on."""
    chip = target.chip
    return {
        "topology": target.name,
        "devices": target.mesh.size,
        "device": target.mesh.devices.flat[0].device_kind,
        "compiler": target.compiler,
        "mesh": dict(target.mesh.shape),
        "preset_fields": recommended,
        "jax": jax.__version__,
        "chip": chip and {key: getattr(chip, key) for key in chip.__dataclass_fields__},
        "assumption": ASSUMPTION,
    }


def flags_of(target: Target, recommended: dict[str, Any]) -> str:
    """The flags that a run on the target needs for its mesh and the preset's fields."""
    sizes = {f"mesh.{name}": size for name, size in target.mesh.shape.items()}
    return " ".join(f"--config.{path}={value}" for path, value in (sizes | recommended).items())


def run(session: Session) -> dict[str, Any]:
    """Compile the stages, print a table and write it as JSON.

    Returns:
      The contents of the file.

    Raises:
      UserError: at the end, if a stage failed; one that does not fit is reported, and no failure.
    """
    section = session.config.plan
    target = target_of(section.topology, session.config.mesh)
    config, recommended = config_for(session.config, target)
    result = facts(target, recommended)
    stands_in = not target.here and target.compiler == "cpu" and target.chip is not None
    result["stand_in"] = STAND_IN if stands_in else None
    path = Path(section.out) if section.out else session.run.path / "plan.json"
    logging.info("plan: %d x %s, mesh %s", result["devices"], result["device"], result["mesh"])

    def make(name):
        logging.info("plan: %s: compiling; large models take minutes", name)
        return plan_stage(config, name, target)

    makers = ((name, partial(make, name)) for name in names_of(config))
    failed = make_rows("plan", makers, result, path)
    print(table_of(result["rows"], COLUMNS))  # of one device, but batch, model TFLOP and disk
    print(details(result["rows"]))
    print(f"a run there: {flags_of(target, recommended)}")
    print("\n".join(text for text in (ASSUMPTION, result["stand_in"]) if text))
    if failed:
        raise UserError(failure("plan", failed, len(result["rows"])))
    return result
