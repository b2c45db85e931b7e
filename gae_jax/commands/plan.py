"""``plan``: what every stage asks of a machine, compiled ahead of time, without that machine."""

import dataclasses
import gc
import logging
import math
from pathlib import Path
from typing import Any

import jax

from gae_jax.benchmark import ahead, flops, schedule
from gae_jax.benchmark.steps import STEPS, TRAINED, batch_size_of, images_of, output_of, steps_of
from gae_jax.benchmark.table import aligned
from gae_jax.benchmark.targets import Target, target_of
from gae_jax.benchmark.workloads import Work, arguments_of, plain
from gae_jax.run.session import Session
from gae_jax.runtime.errors import ConfigError, UserError
from gae_jax.runtime.files import write_json
from gae_jax.runtime.mesh import check_batch

ASSUMPTION = (
    "ESTIMATE: every rate of the chip reached in full and all at once (bf16 products, HBM, links); "
    "the longest of the three binds. Not measured."
)
STAND_IN = (
    "compiled by XLA for CPU devices in the place of the chips: state, parameters and FLOPs are "
    "exact, temporaries and collectives are another compiler's"
)


def names_of(config) -> tuple[str, ...]:
    """The works to plan.

    Raises:
      ConfigError: for a name that there is not, or that this config has no step of.
    """
    known = steps_of(config)
    if odd := [name for name in config.plan.works if name not in known]:
        raise ConfigError(f"plan.works has {odd}; this config has {', '.join(known)}")
    return tuple(config.plan.works) or known


def check(session: Session) -> None:
    """Finds out before minutes of compiling what cannot be planned."""
    names_of(session.config)
    if session.config.plan.batch_size < 0:
        raise ConfigError(
            f"plan.batch_size is {session.config.plan.batch_size}; give 1 or more, or 0 for each "
            "stage's own"
        )


def config_for(config, target: Target):
    """A copy as a run on the target has it, and the fields that its preset sets.

    Raises:
      ConfigError: if the attention is one that the target has not.
    """
    config = config.copy_and_resolve_references()
    recommended = dict(target.machine.compute) if target.machine else {}
    for path, value in recommended.items():
        config.update_from_flattened_dict({path: value})
    if not target.here:
        trained = ("teacher", "tokenizer", "diffusion")
        sections = {f"{name}.compute": config[name].compute for name in trained}
        only_called = {"teacher.backbone": config.teacher.backbone, "sample": config.sample}
        for name, section in {**sections, **only_called}.items():
            only = {"cudnn": "gpu", "mosaic": "tpu"}.get(section.attention)
            if only and (only == "tpu") != (target.compiler == "tpu"):
                raise ConfigError(
                    f"{name}.attention is {section.attention!r}, which is for {only.upper()}s; use "
                    "'auto' or 'xla'"
                )
            # "auto" would ask the devices of this machine
            if section.attention != "mosaic":
                section.attention = "xla"
        for section in sections.values():
            section.kernels = "xla"
    return config, recommended


def count_flops(work: Work) -> int:
    """Of one step on all devices."""
    arguments = arguments_of(work)
    return flops.count(lambda *arrays: work.step(*arrays, work.phase), *arguments)


def plan_work(config, name: str, target: Target) -> dict[str, Any]:
    """A row of figures of one work; nothing is computed.

    Raises:
      UserError: if its batch does not divide over the devices.
    """
    mesh, chip = target.mesh, target.chip
    size = config.plan.batch_size or batch_size_of(config, name)
    check_batch(size, mesh, f"plan: batch size of {name}")
    if name in ("teacher", "tokenizer", "diffusion"):
        parts = config[name].compute.accumulate
        check_batch(size // parts, mesh, f"plan: batch size of {name} / accumulate {parts} =")
    work = STEPS[name](config, size)
    state, _, _, frozen = ahead.placed(work, mesh)
    counted = count_flops(work) / mesh.size
    row = {
        "images_per_step": size,
        **ahead.count_parameters(state, frozen),
        "state": ahead.layout(state),
        "frozen": ahead.layout(frozen),
        "model_tflop_per_step": count_flops(STEPS[name](plain(config), size)) / 1e12,
        "counted_tflop_per_device": counted / 1e12,
        **hours_of(config, name, size),
        **disk_of(config, name, work, state),
    }
    try:
        found = ahead.compile_step(work, mesh)
    except Exception as error:  # compilers say with errors of their own what is too large
        if (needed := ahead.too_large(error)) is None:
            raise
        total, capacity = needed
        spare = {"capacity": capacity, "fits": False, "spare": capacity - total}
        return row | {"memory": {"total": total, **spare}}
    cost = found.compiled.cost_analysis() or {}
    row |= {
        "trace_seconds": found.trace_seconds,
        "compile_seconds": found.seconds,
        "memory": ahead.memory(found.compiled, chip),
        "donated": donated(found.compiled, row["state"]["bytes_per_device"]),
        "xla_tflop_per_device": cost.get("flops", 0.0) / 1e12,
        "accessed_bytes_per_device": cost.get("bytes accessed", 0.0),
        **ahead.traffic(found.compiled, mesh),
    }
    if target.compiler == "tpu":
        reading = schedule.read(found.compiled.as_text(), mesh.size)
        row["schedule"] = dataclasses.asdict(reading)
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
    """Whether the new state lies where the old one was; None without a state.

    What the step hands through unchanged, such as tables, need not be among it.
    """
    if not state_bytes:
        return None
    return compiled.memory_analysis().alias_size_in_bytes >= 0.99 * state_bytes


def hours_of(config, name: str, size: int) -> dict[str, Any]:
    """Images of the whole stage, its steps, and its hours at a throughput that the user knows."""
    images = images_of(config, name, size, config.plan.images)
    rate = config.plan.throughput[name.replace("-", "_")]
    return {
        "images": images,
        "steps": math.ceil(images / size),
        "hours_at_throughput": images / rate / 3600 if rate else None,
    }


def disk_of(config, name: str, work: Work, state) -> dict[str, Any]:
    """Bytes on disk: of a set of latents, or of the checkpoints that a training keeps.

    Checkpoints count in full; they are compressed, and one more lies there while it is written.
    """
    if name == "latents":
        found = output_of(work)
        one = math.prod(found.shape[1:]) * found.dtype.itemsize
        return {"disk_bytes": config.plan.images * one}
    if name not in TRAINED:
        return {"disk_bytes": None}
    kept = config[TRAINED[name]].train.keep
    if name == "tokenizer" and config.tokenizer.losses.gan > 0 and config.tokenizer.gan.start:
        kept += 1  # a milestone
    return {"disk_bytes": kept * ahead.layout(state)["bytes"]}


def attempt(config, name: str, target: Target) -> dict[str, Any]:
    """The row, or what went wrong: the other works are planned all the same."""
    try:
        row = {"work": name, "error": None, **plan_work(config, name, target)}
    except Exception as error:  # whatever the compiler raises
        logging.debug("plan: %s", name, exc_info=True)
        text = next(iter(str(error).splitlines()), "")
        row = {"work": name, "error": f"{type(error).__name__}: {text}"[:300]}
    gc.collect()  # programs of hundreds of MB
    return row


GIB = 2**-30
COLUMNS = (
    # title, path in a row, factor, format
    ("batch", "images_per_step", 1, "d"),
    ("compile s", "compile_seconds", 1, ".0f"),
    ("model TFLOP", "model_tflop_per_step", 1, ".1f"),
    ("state GiB", "state.bytes_per_device", GIB, ".2f"),
    ("whole %", "state.unsharded_share", 100, ".2f"),
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


def value_at(row: dict[str, Any], path: str) -> Any:
    for key in path.split("."):
        row = (row or {}).get(key)
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as text: figures of one device, but for batch, model TFLOP, images and disk."""

    def cell(row, path, factor, form):
        value = value_at(row, path)
        if value is None:
            return "-"
        if isinstance(value, bool):
            return "yes" if value else "NO"
        return format(value if factor == 1 else value * factor, form)

    columns = [c for c in COLUMNS if any(value_at(row, c[1]) is not None for row in rows)]
    cells = [[cell(row, *column[1:]) for column in columns] for row in rows]
    found = [(row["work"], own, row["error"]) for row, own in zip(rows, cells, strict=True)]
    return aligned(["work", *(title for title, *_ in columns)], found)


def details(rows: list[dict[str, Any]]) -> str:
    """A line of each work's parameters, and one of every kind of collective."""
    lines = []
    for row in rows:
        if row["error"]:
            continue
        sizes = [f"{name} {n / 1e6:.1f} M" for name, n in row["parameters"].items()]
        sizes += [f"{name} {n / 1e6:.1f} M (read)" for name, n in row["frozen_parameters"].items()]
        lines.append(f"{row['work']}: {', '.join(sizes)}")
        lines += [
            f"  {found['kind']} over {' and '.join(found['axes']) or '?'}: {found['count']}, "
            f"{found['sent'] / 1e9:.3f} GB sent by each device"
            for found in row.get("collectives", ())
        ]
        if read := row.get("schedule"):
            lines.append(f"  the compiler's ESTIMATE: {said_of(read)}")
        if row.get("unknown_loops"):
            lines.append(f"  {row['unknown_loops']} loops of unknown length, counted once")
    return "\n".join(lines)


def said_of(read: dict[str, Any]) -> str:
    """A `schedule.Reading` in words."""
    cycles = ", ".join(f"{kind} {n / 1e6:.1f}" for kind, n in read["cycles"].items())
    total = sum(read["cycles"].values())
    return (
        f"{total / 1e6:.1f} million cycles of a device ({cycles}; "
        f"computed again {read['recomputed'] / 1e6:.1f}) and {read['kernels']} kernels that it "
        f"cannot look into; {read['padding']:.1%} of what is written is padding; "
        f"{read['exposed'] / 1e9:.3f} GB sent with no work beside, {read['hidden'] / 1e9:.3f} with"
    )


def facts(target: Target, recommended: dict[str, Any]) -> dict[str, Any]:
    """What the figures depend on."""
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
    """What a run on the target is given for its mesh and the preset's fields."""
    sizes = {f"mesh.{name}": size for name, size in target.mesh.shape.items()}
    return " ".join(f"--config.{path}={value}" for path, value in (sizes | recommended).items())


def run(session: Session) -> dict[str, Any]:
    """Compiles the works, prints a table and writes it as JSON.

    Returns:
      What the file holds.

    Raises:
      UserError: at the end, if a work failed; one that does not fit is told, and no failure.
    """
    section = session.config.plan
    target = target_of(section.topology, session.config.mesh)
    config, recommended = config_for(session.config, target)
    result = facts(target, recommended)
    stands_in = not target.here and target.compiler == "cpu" and target.chip is not None
    result["stand_in"] = STAND_IN if stands_in else None
    result["rows"] = []
    path = Path(section.out) if section.out else session.run.path / "plan.json"
    logging.info("plan: %d x %s, mesh %s", result["devices"], result["device"], result["mesh"])
    for name in names_of(config):
        logging.info("plan: %s: compiling; large models take minutes", name)
        row = attempt(config, name, target)
        if row["error"]:
            logging.info("plan: %s: %s", name, row["error"])
        result["rows"].append(row)
        write_json(path, result)  # what is compiled stays, whatever comes
    print(table(result["rows"]))
    print(details(result["rows"]))
    print(f"a run there: {flags_of(target, recommended)}")
    print("\n".join(text for text in (ASSUMPTION, result["stand_in"]) if text))
    logging.info("plan: %s", path)
    if failed := [row["work"] for row in result["rows"] if row["error"]]:
        raise UserError(
            f"plan: {len(failed)} of {len(result['rows'])} works failed: {', '.join(failed)}; the "
            "table says why"
        )
    return result
