"""Fields of older versions: what they are called now.

Runs that older versions recorded are read with it; commands, config files and sweeps that set an
old field are told the new one.
"""

import copy
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

_TRAINED = ("teacher", "tokenizer", "diffusion")
_INFERENCE = ("encoder", "sampler", "decoder")
_COMPUTE = ("dtype", "remat", "attention", "kernels")
# Old dotted path -> new ones, all of which have its value.
RENAMED: dict[str, tuple[str, ...]] = {
    **{
        f"{name}.compute.{field}": (f"precision.{name}.{field}",)
        for name in _TRAINED
        for field in _COMPUTE
    },
    **{f"{name}.compute.accumulate": (f"{name}.train.accumulate",) for name in _TRAINED},
    "teacher.backbone.dtype": ("precision.backbone.dtype",),
    "teacher.backbone.attention": ("precision.backbone.attention",),
    "tokenizer.perceptual.dtype": ("precision.perceptual.dtype",),
    "tokenizer.perceptual.precision": ("precision.perceptual.precision",),
    "tokenizer.align.dtype": ("precision.align.dtype",),
    "latents.encode_dtype": ("precision.encoder.dtype",),
    "latents.encode_products": ("precision.encoder.matmuls",),
    "sample.dtype": ("precision.sampler.dtype", "precision.decoder.dtype"),
    "sample.products": ("precision.sampler.matmuls",),
    "sample.decode_products": ("precision.decoder.matmuls",),
    "sample.attention": ("precision.sampler.attention",),
    "bench.dtype": tuple(f"precision.{name}.dtype" for name in _INFERENCE),
    "bench.products": tuple(f"precision.{name}.matmuls" for name in _INFERENCE),
    # they did nothing: these stages have no phases
    **{f"{name}.optim.restart": () for name in ("backbone", "teacher", "diffusion")},
    "import_torch.diffusion_entry": ("import_torch.entry",),
    **{f"make_reference.{name}": (f"reference.{name}",) for name in ("split", "images", "dinov2")},
    "plan.throughput.teacher_backbone": ("plan.throughput.backbone",),
    "precision.frozen.products": ("precision.frozen.matmuls",),
    "precision.sample.products": ("precision.sample.matmuls",),
    "precision.sample.attention": ("precision.sampler.attention",),
}


def hint(path: str) -> str:
    """What an old field is called now, as a sentence for an error; "" for other paths."""
    old = path if path in RENAMED else next((x for x in RENAMED if x.startswith(f"{path}.")), "")
    if not old:
        return ""
    if old != path:  # a section
        olds = [other for other in RENAMED if other.startswith(f"{path}.")]
        return "\n".join([f"{path} is gone; of its fields", *map(_now, olds)])
    return _now(old)


def _now(old: str) -> str:
    """An old field, and how its new ones are set on the command line and in a file."""
    new = RENAMED[old]
    if not new:
        return f"{old} is gone, it did nothing; leave it out"
    flags = " and ".join(f"--config.{path}=VALUE" for path in new)
    texts = [path.removeprefix("precision.") for path in new if _is_network(path)]
    if not texts:
        return f"{old} is now {' and '.join(new)} ({flags})"
    listed = " ".join(f'"{text}=VALUE",' for text in texts)
    return f"{old} is now set by {flags}; in a file: config.precision.override += ({listed})"


def _is_network(path: str) -> bool:
    head, name, *_ = path.split(".")
    return head == "precision" and name not in ("train", "frozen", "sample")


def hint_for_lines(lines: str, error: str) -> str:
    """As `hint`, for lines of a config file that failed: of all old fields that they may name.

    Args:
      error: what the config said, which names the part of the field that it does not have.
    """
    words, missing = (set(re.findall(r"\w+", text)) for text in (lines, error))
    ends = {old: old.split(".")[1:] for old in RENAMED}
    named = [old for old, end in ends.items() if words.issuperset(end) and missing & {*end}]
    # the section may be in a variable, but if it is named, it is that one
    exact = [old for old in named if old.split(".")[0] in words]
    return "\n".join(map(_now, exact or [old for old in named if len(ends[old]) > 1]))


def lines_of(path: Path | str, first: int | None, last: int | None) -> str:
    """Lines of a text file, counted from 1; "" if they are not known or cannot be read."""
    try:
        return "\n".join(Path(path).read_text().splitlines()[first - 1 : last]) if first else ""
    except (OSError, UnicodeDecodeError):
        return ""


def modern(sections: Mapping[str, Any]) -> dict[str, Any]:
    """Sections of a config as an older version recorded them, with the fields of this one.

    Args:
      sections: nested dicts of JSON values; they are not changed.
    """
    renamed: dict[str, Any] = copy.deepcopy(dict(sections))
    for old, new in RENAMED.items():
        *parents, leaf = old.split(".")
        chain: list[Any] = [renamed]
        for name in parents:
            chain.append(chain[-1].get(name) if isinstance(chain[-1], dict) else None)
        if not isinstance(chain[-1], dict) or leaf not in chain[-1]:
            continue
        value = chain[-1].pop(leaf)
        for above, name in zip(chain[-2::-1], parents[::-1], strict=True):
            if not above[name]:  # nothing is left of the section
                del above[name]
        for path in new:
            *parents, leaf = path.split(".")
            section = renamed
            for name in parents:
                section = section.setdefault(name, {})
            section[leaf] = value
    return renamed


def modern_changes(records: Iterable[Mapping]) -> list[dict]:
    """Records of amendments with the fields of this version."""
    return [
        {
            **item,
            "changes": [
                {**change, "field": path}
                for change in item["changes"]
                for path in RENAMED.get(change["field"], (change["field"],))
            ],
        }
        for item in records
    ]
