"""The section ``precision``: the dtypes and kernels that all networks are computed with.

Parameters, optimizers, averages, losses and metrics are float32 in any case.
"""

import copy
import difflib
import logging
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import ml_collections

from gae_jax.config.choices import Choice, choice

PRESETS = {"exact": "float32", "fast": "bfloat16"}  # preset -> the dtype of all networks
DTYPES = tuple(PRESETS.values())
# Field of a network -> its values, the first one the default of `precision_section`.
FIELDS = {
    "dtype": ("auto", *DTYPES),  # of activations
    "matmuls": ("same", "nn.quantized:MATMULS"),
    "remat": ("none", "nn.layers:REMAT"),
    "attention": ("auto", "nn.attention:ATTENTIONS"),
    "kernels": ("auto", "kernels.norm:KERNELS"),
    "precision": ("highest", "high", "default"),  # of convolutions, as of `jax.lax.Precision`
}


class Use(NamedTuple):
    """A network in one of its uses.

    Attributes:
      group: the subsection of ``precision`` that it follows.
      stage: the folder of the stage that computes it and records how.
      defaults: field -> its value where nothing else is set.
      what: for help.
    """

    group: str
    stage: str
    defaults: Mapping[str, str]
    what: str


_TRAINED = dict(dtype="float32", remat="none", attention="auto", kernels="auto")
INFERENCE = dict(dtype="float32", attention="auto", kernels="auto", matmuls="same")
NETWORKS = {
    "teacher": Use("train", "teacher", _TRAINED, "the teacher, in its training"),
    "backbone": Use(
        *("frozen", "teacher", dict(dtype="float32", attention="xla")),
        "the frozen backbone, in the teacher's training",
    ),
    "tokenizer": Use("train", "tokenizer", _TRAINED, "the tokenizer, in its training"),
    "perceptual": Use(
        *("frozen", "tokenizer", dict(dtype="float32", precision="highest")),
        "LPIPS, in the tokenizer's training",
    ),
    "align": Use(
        *("frozen", "tokenizer", dict(dtype="float32")),
        "the frozen backbone and teacher, in the tokenizer's training",
    ),
    "encoder": Use("frozen", "latents", INFERENCE, "the encoder that makes the latents"),
    "diffusion": Use(  # [code] bfloat16
        *("train", "diffusion", _TRAINED | dict(dtype="bfloat16")),
        "the diffusion model, in its training",
    ),
    "sampler": Use("sample", "sample", INFERENCE, "the diffusion model that draws samples"),
    "decoder": Use("sample", "sample", INFERENCE, "the decoder of samples"),
}


def precision_section() -> dict:
    """How all networks are computed. [ours]"""

    def field(name: str) -> Choice:
        return choice(*FIELDS[name])

    return dict(
        # fast: bfloat16 everywhere, see docs/performance.md | exact: float32 everywhere | auto:
        # each network's own default, and on GPUs and TPUs `fast` where training was shown to
        # learn alike (`shown_alike`). --config.precision=fast is short for .preset=fast
        preset=choice("auto", *PRESETS),
        # networks that are trained
        train=dict(
            dtype=field("dtype"),  # of activations; auto: as the preset says
            remat=field("remat"),  # none, or the name of a policy of jax.checkpoint_policies
            # auto: on a GPU in bf16 triton where tokens and heads fit, else cudnn where the heads
            # fit, else xla | xla | cudnn | triton
            attention=field("attention"),
            # norms, gates and SwiGLU: auto: triton on a GPU in bf16 where the sizes fit, else xla
            # | xla | triton
            kernels=field("kernels"),
        ),
        # frozen networks: those that training looks through, and the encoder of `latents`
        frozen=dict(
            dtype=field("dtype"),
            # of the encoder of `latents`. same: in its dtype | fp8 [ours]: in float8_e4m3fn in the
            # large layers, on NVIDIA's Ada, Hopper and later; see docs/performance.md
            matmuls=field("matmuls"),
        ),
        # diffusion model and decoder that draw samples
        sample=dict(
            dtype=field("dtype"),
            matmuls=field("matmuls"),
        ),
        # Texts NETWORK.FIELD=VALUE, such as "diffusion.attention=xla", which override the groups
        # and the preset; the last one counts. Networks and fields: `NETWORKS`. On the command line
        # --config.precision.diffusion.attention=xla appends one
        override=(),
    )


def _overrides(config: ml_collections.ConfigDict) -> Iterator[tuple[str, str]]:
    """Yield ("NETWORK.FIELD", value) of ``precision.override``, in order."""
    for text in config.precision.override:
        path, _, value = str(text).partition("=")
        yield path.strip(), value.strip()


def _given(config: ml_collections.ConfigDict, network: str, field: str) -> str | None:
    """What the config sets a field of a network to; None if it is the network's default."""
    for path, value in reversed(tuple(_overrides(config))):
        if path == f"{network}.{field}":
            if field == "dtype" and value == "auto":
                break
            return value
    if _is_plain(config, network):
        return NETWORKS[network].defaults[field]
    value = config.precision[NETWORKS[network].group].get(field, FIELDS[field][0])
    if value != FIELDS[field][0]:
        return value
    return PRESETS.get(config.precision.preset) if field == "dtype" else None


def _is_plain(config: ml_collections.ConfigDict, network: str) -> bool:
    """Whether a network is computed with its defaults, whatever groups and preset say."""
    return network == "teacher" and config.teacher.kind == "prior"


def settings(config: ml_collections.ConfigDict, network: str) -> dict[str, str]:
    """Return how a network is computed: field -> value.

    Args:
      config: of the whole pipeline.
      network: a name in `NETWORKS`.
    """
    defaults = NETWORKS[network].defaults
    return {field: _given(config, network, field) or own for field, own in defaults.items()}


def recorded(config: ml_collections.ConfigDict, stage: str) -> dict[str, dict[str, str]]:
    """Return network -> its `settings`, of the networks that a stage computes and records."""
    return {name: settings(config, name) for name, use in NETWORKS.items() if use.stage == stage}


def fields_of(config: ml_collections.ConfigDict) -> dict[str, str]:
    """Return the settings of all networks by dotted path, such as precision.diffusion.dtype."""
    return {
        f"precision.{network}.{field}": value
        for network in NETWORKS
        for field, value in settings(config, network).items()
    }


def is_override(path: str, section: Mapping) -> bool:
    """Whether a dotted path names a network of the section ``precision``, or none that it has."""
    head, *rest = path.split(".")
    return head == "precision" and len(rest) > 1 and rest[0] not in section


def override(config: ml_collections.ConfigDict, changes: Mapping[str, str]) -> None:
    """Set fields of networks in a config.

    Args:
      changes: "precision.NETWORK.FIELD" -> value.
    """
    texts = [f"{path.removeprefix('precision.')}={value}" for path, value in changes.items()]
    config.precision.override = (*config.precision.override, *texts)


def fill(config: ml_collections.ConfigDict, values: Mapping[str, str]) -> ml_collections.ConfigDict:
    """Set those fields of networks that a config leaves at their defaults, so that they stay so.

    Args:
      values: "precision.NETWORK.FIELD" -> value; other paths are left aside.

    Returns:
      The config itself if nothing changes, else a changed copy.
    """
    changes = {
        path: values[path]
        for path in fields_of(config)
        if path in values and _given(config, *path.split(".")[1:]) is None
    }
    if changes:
        config = copy.deepcopy(config)
        override(config, changes)
    return config


def shown_alike(config: ml_collections.ConfigDict) -> tuple[str, ...]:
    """Return the networks that learn in bfloat16 as in float32.

    The curves are in docs/performance.md. Encoding, sampling and other tokenizers than GAE have
    none, and keep their defaults.
    """
    teacher = ("teacher", "backbone") if config.teacher.kind == "learned" else ()
    tokenizer = ("tokenizer", "perceptual", "align") if config.tokenizer.name == "gae" else ()
    return ("diffusion", *teacher, *tokenizer)


def settle(
    config: ml_collections.ConfigDict, platform: str, kept: Mapping[str, str]
) -> ml_collections.ConfigDict:
    """Replace the preset "auto" by the dtypes that it means for this run and device.

    Args:
      platform: of the devices, as `jax.default_backend` names it.
      kept: "precision.NETWORK.FIELD" -> value, of stages that have begun. They keep their numbers
        wherever they are resumed.

    Returns:
      The config itself if nothing changes, else a changed copy.
    """
    alike = shown_alike(config) if platform in ("gpu", "tpu") else ()
    return fill(config, {f"precision.{name}.dtype": "bfloat16" for name in alike} | {**kept})


def precision_clashes(config: ml_collections.ConfigDict) -> list[str]:
    """What is wrong with ``precision.override``, with the networks and fields that there are."""
    problems = []
    for text in config.precision.override:
        path, equals, value = str(text).partition("=")
        network, _, field = path.strip().partition(".")
        known = NETWORKS[network].defaults if network in NETWORKS else {}
        where = f"precision.override has {text!r}"
        if not equals or not field:
            problems.append(
                f"{where}; give NETWORK.FIELD=VALUE, with the networks and fields {_table()}"
            )
        elif not known:
            near = difflib.get_close_matches(network, NETWORKS, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            problems.append(f"{where}, but there is no network {network!r}{hint}; use {_table()}")
        elif field not in known:
            problems.append(f"{where}; {network} has the fields {', '.join(known)}")
        elif value.strip() not in (names := names_of(field)):
            problems.append(f"{where}; use one of {', '.join(names)}")
    if not problems:
        problems = [
            f"precision.{path} is {value!r}, but teacher.kind 'prior' is computed plainly; leave "
            f"it at {NETWORKS['teacher'].defaults[path.partition('.')[2]]!r}"
            for path, value in _overrides(config)
            if _is_plain(config, path.partition(".")[0])
            and value not in (NETWORKS["teacher"].defaults[path.partition(".")[2]], "auto")
        ]
    return problems


def names_of(field: str) -> tuple[str, ...]:
    """The values that a field of a network can have."""
    return choice(*FIELDS[field]).names()


def _table() -> str:
    """The networks with their fields, in words."""
    return "; ".join(f"{name}: {', '.join(use.defaults)}" for name, use in NETWORKS.items())


def log(config: ml_collections.ConfigDict, platform: str) -> None:
    """Log the dtype of every network."""
    dtypes = {name: settings(config, name)["dtype"] for name in NETWORKS}
    by_dtype = {dtype: [n for n, own in dtypes.items() if own == dtype] for dtype in DTYPES}
    said = "; ".join(f"{dtype}: {', '.join(names)}" for dtype, names in by_dtype.items() if names)
    logging.info("precision %s on %s: %s", config.precision.preset, platform, said)


def entries(text: str) -> tuple[str, ...]:
    """The overrides in the value of ``--config.precision.override=...``, which commas separate."""
    parts = (part.strip(" '\"") for part in text.strip("()[] ").split(","))
    return tuple(part for part in parts if part)


Recorded = Mapping[str, Mapping[str, Any]]  # network -> field -> value, as a stage records them


def flat(networks: Recorded) -> dict[str, str]:
    """What a stage records of its networks, by dotted path as of `fields_of`."""
    return {
        f"precision.{network}.{field}": value
        for network, fields in networks.items()
        for field, value in fields.items()
    }
