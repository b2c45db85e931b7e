"""Workloads: steps as the stages have them, on random weights and data.

``bench`` times them, ``doctor`` tries them, ``plan`` compiles them ahead of time. Nothing is
computed here: a `Workload` says how its arrays are made and what a step does with them, and can be
traced without a device.
"""

import dataclasses
from collections.abc import Callable, Hashable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gae_jax.config import precision
from gae_jax.config.precision import settings
from gae_jax.data.latent_files import DTYPES
from gae_jax.generators.latent_diffusion import diffusion_network
from gae_jax.generators.sampling import MAKERS, Networks, make_draw
from gae_jax.nn.network import Network
from gae_jax.nn.pixels import to_float, to_uint8
from gae_jax.nn.quantized import with_matmuls
from gae_jax.objectives.discriminator import dino_network, looks_through_dino
from gae_jax.objectives.targets import compares_images, judges_of, targets_by
from gae_jax.pretrained.backbone import backbone_network, backbone_shape
from gae_jax.run.load import metric_network
from gae_jax.run.sampling import bind_sampler
from gae_jax.stages import backbone, diffusion, teacher, tokenizer
from gae_jax.tokenizers import aligns, latent_shape, tokenizer_network
from gae_jax.tokenizers.gae_teacher import teacher_network
from gae_jax.train.fit import Step


class Input(NamedTuple):
    """An array of a batch, and how random values of it are drawn."""

    shape: tuple[int, ...]
    dtype: Any
    draw: Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Workload:
    """A step, and how its arguments are made.

    Attributes:
      images: number of images of one step.
      init: key -> the state that the step changes, donated; {} if it changes nothing.
      step: as in `train.fit.Stage`; gives (state, anything).
      inputs: arrays of one batch.
      frozen: networks that the step reads; it is given their (parameters, rest) by name.
      phase: static argument of the step.
      name: shown to the user.
    """

    images: int
    init: Callable[[jax.Array], Any]
    step: Step
    inputs: Mapping[str, Input]
    frozen: Mapping[str, Network] = dataclasses.field(default_factory=dict)
    phase: Hashable = None
    name: str = ""

    def batch(self, random: np.random.Generator) -> dict[str, np.ndarray]:
        """Draw one batch on the host."""
        return {
            name: item.draw(random, item.shape).astype(item.dtype, copy=False)
            for name, item in self.inputs.items()
        }


def _normal(*shape: int) -> Input:
    return Input(shape, np.float32, lambda random, shape: random.standard_normal(shape, np.float32))


def _integers(shape: tuple[int, ...], below: int, dtype) -> Input:
    return Input(shape, dtype, lambda random, shape: random.integers(0, below, shape, dtype=dtype))


def _labels(config, size: int) -> Input:
    return _integers((size,), config.diffusion.model.num_classes, np.int32)


def _images(config, size: int) -> Input:
    side = config.data.image_size
    return _integers((size, side, side, 3), 256, np.uint8)


def _latents(config, size: int) -> Input:
    return _normal(size, *latent_shape(config))


def _inference(size: int, network: Network, call: Callable, **inputs: Input) -> Workload:
    """The call of one frozen network: ``call`` is (module, batch) -> output."""

    def step(state, batch, key, frozen, phase):
        del key, phase
        return state, call(network(*frozen["network"]), batch)

    return Workload(size, lambda key: {}, step, inputs, {"network": network})


def _diffusion_network(config) -> Network:
    """The diffusion model as `sample` computes it, on latents of mean 0 and std 1."""
    how = settings(config, "sampler")
    matmuls = how.pop("matmuls")
    return with_matmuls(diffusion_network(config.diffusion, latent_shape(config), **how), matmuls)


def _tokenizer_network(config, use: str) -> Network:
    """The tokenizer for inference, as the "encoder" or the "decoder" computes."""
    how = settings(config, use)
    matmuls = how.pop("matmuls")
    return with_matmuls(tokenizer_network(config, **how), matmuls)


def train_backbone(config, size: int) -> Workload:
    """A training step of the small ViT."""
    _, init, step = backbone.make_step(config.backbone, config.diffusion.model.num_classes)
    inputs = {"image": _images(config, size), "label": _labels(config, size)}
    return Workload(size, init, step, inputs)


def train_teacher(config, size: int) -> Workload:
    """A step of distillation, with the backbone in it."""
    section = config.teacher
    network = backbone_network(
        config.backbone, config.diffusion.model.num_classes, **settings(config, "backbone")
    )
    init, step = teacher.make_step(section, network, teacher.make_network(config))

    def with_frozen(state, batch, key, frozen, phase):
        return step(state, batch, key, frozen["backbone"], phase)

    inputs = {"image": _images(config, size)}
    return Workload(size, init, with_frozen, inputs, {"backbone": network})


def train_tokenizer_given_target(config, size: int) -> Workload:
    """`train_tokenizer` with the semantic target in the batch, as if it had been precomputed."""
    section = config.tokenizer.copy_and_resolve_references()
    section.losses.update(align=0.0, structure=0.0, semantics=0.0)
    aligned, by_teacher = aligns(config.tokenizer)
    if not aligned:
        return train_tokenizer(config, size, section)
    patches, width = backbone_shape(config.backbone)[:2]
    channels = latent_shape(config)[-1] if by_teacher else width
    return train_tokenizer(config, size, section, _normal(size, patches**2, channels))


def train_tokenizer(config, size: int, section=None, target: Input | None = None) -> Workload:
    """A training step of the tokenizer with every term that has a weight, and its networks.

    Args:
      section: ``tokenizer``, by which networks make the targets; None: that of the config.
      target: the semantic target, if it is in the batch.
    """
    section = section or config.tokenizer
    frozen = settings(config, "align")
    makers = {
        "lpips": lambda: metric_network("lpips", **settings(config, "perceptual")),
        "backbone": lambda: backbone_network(
            config.backbone, config.diffusion.model.num_classes, **frozen
        ),
        "teacher": lambda: teacher_network(
            config.teacher.model, config.backbone, config.teacher.kind, **frozen
        ),
        "dino": lambda: dino_network(section.discriminator),
    }
    needed = set(judges_of(section))
    if looks_through_dino(section):
        needed.add("dino")
    if compares_images(section) and section.perceptual.name == "lpips_random":
        needed.add("lpips")
    networks = {name: make() for name, make in makers.items() if name in needed}
    targets_of = targets_by(section, networks)
    inputs = {"image": _images(config, size)}
    if target:
        inputs["target"] = target
        by_networks = targets_of

        def targets_of(frozen, images, batch):
            targets = by_networks(frozen, images, batch)
            return dataclasses.replace(targets, aligned=batch["target"])

    _, init, step = tokenizer.make_step(config, targets_of)
    everything_on = max(section.gan.start, section.gan.discriminator_start)
    phase = tokenizer.phase_of(config.tokenizer, everything_on)
    return Workload(size, init, step, inputs, networks, phase)


def make_latents(config, size: int) -> Workload:
    """Encoding for the stage ``latents``, of mirror images too where the data has them."""
    section, mirror = config.latents, config.data.mirror

    def call(model, batch):
        images = to_float(batch["image"])
        views = [images, images[:, :, ::-1]] if mirror else [images]
        latents = jnp.stack([model.encode(view) for view in views], axis=1)
        return latents.astype(DTYPES[section.dtype])

    return _inference(
        size, _tokenizer_network(config, "encoder"), call, image=_images(config, size)
    )


def train_diffusion(config, size: int) -> Workload:
    """A training step of the diffusion model: loss, backward, AdamW, moving average."""
    shape = latent_shape(config)
    init, step = diffusion.make_step(config, shape, np.zeros(shape[-1]), np.ones(shape[-1]))
    inputs = {"latent": _latents(config, size), "label": _labels(config, size)}
    return Workload(size, init, step, inputs)


def sample(config, size: int, name: str) -> Workload:
    """From noise to uint8 images by the sampler of ``sample.NAME``."""
    network = _diffusion_network(config)
    decoder = _tokenizer_network(config, "decoder")
    sampler = MAKERS[name](**bind_sampler(name, config.sample[name].to_dict()))
    draw = make_draw(Networks((network, None), (decoder, None)), sampler)

    def step(state, batch, key, frozen, phase):
        del phase
        arrays = frozen["diffusion"], frozen["tokenizer"], None
        return state, draw(arrays, key, batch["id"], batch["label"])

    inputs = {"id": _integers((size,), 2**32, np.uint32), "label": _labels(config, size)}
    frozen = {"diffusion": network, "tokenizer": decoder}
    return Workload(size, lambda key: {}, step, inputs, frozen)


def velocity(config, size: int) -> Workload:
    """One velocity of the diffusion model."""
    return _inference(
        size,
        _diffusion_network(config),
        lambda model, batch: model.velocity(batch["latent"], batch["time"][0], batch["label"]),
        latent=_latents(config, size),
        label=_labels(config, size),
        time=Input((size,), np.float32, lambda random, shape: random.random(shape, np.float32)),
    )


def encode(config, size: int) -> Workload:
    """uint8 images -> latents."""
    return _inference(
        size,
        _tokenizer_network(config, "encoder"),
        lambda model, batch: model.encode(to_float(batch["image"])),
        image=_images(config, size),
    )


def decode(config, size: int) -> Workload:
    """Latents -> uint8 images."""
    return _inference(
        size,
        _tokenizer_network(config, "decoder"),
        lambda model, batch: to_uint8(model.decode(batch["latent"])),
        latent=_latents(config, size),
    )


def features(config, size: int) -> Workload:
    """uint8 images -> Inception's features for FID and related metrics, in full fp32."""
    return _inference(
        size,
        metric_network("inception", precision="highest"),
        lambda model, batch: model(batch["image"]),
        image=_images(config, size),
    )


# Those that train, named as their sections of the config.
TRAINED = ("backbone", "teacher", "tokenizer", "diffusion")
# Those of the pipeline, in its order: `plan` and `doctor`.
STAGES = (
    *("backbone", "teacher", "tokenizer", "latents"),
    *("diffusion", "sample-sde", "sample-ode"),
)
# Those that `bench` times.
TIMED = (
    *("dit-train", "dit-forward", "sample-sde"),
    *("tokenizer-train", "tokenizer-train-teacher", "encode", "decode", "features"),
)
# Each takes the config and the global batch.
WORKLOADS: dict[str, Callable[[Any, int], Workload]] = {
    "backbone": train_backbone,
    "teacher": train_teacher,
    "tokenizer": train_tokenizer,
    "latents": make_latents,
    "diffusion": train_diffusion,
    "sample-sde": partial(sample, name="sde"),
    "sample-ode": partial(sample, name="ode"),
    "dit-train": train_diffusion,
    "dit-forward": velocity,
    "tokenizer-train": train_tokenizer_given_target,
    "tokenizer-train-teacher": train_tokenizer,
    "encode": encode,
    "decode": decode,
    "features": features,
}


def make_workload(config, name: str, size: int = 0) -> Workload:
    """Make the workload of a name in `WORKLOADS`.

    Args:
      size: the global batch; 0: the stage's own.
    """
    made = WORKLOADS[name](config, size or batch_size_of(config, name))
    return dataclasses.replace(made, name=name)


def with_timed_precision(config):
    """Return the config with inference in bfloat16, unless it sets another dtype."""
    return precision.fill(
        config,
        {f"precision.{name}.dtype": "bfloat16" for name in ("encoder", "sampler", "decoder")},
    )


def timed_workload(config, name: str) -> Workload:
    """Make one of `TIMED` as ``bench`` defines it.

    Its inference is as in `with_timed_precision`, its batch is that of its section in ``bench``,
    LPIPS has random weights, and sampling is without guidance.
    """
    config, bench = with_timed_precision(config).copy_and_resolve_references(), config.bench
    config.sample.sde.update(guidance=1.0, guidance_parts=())
    config.tokenizer.perceptual.name = "lpips_random"
    return make_workload(config, name, bench[name.replace("-", "_")].batch_size)


def stages_of(config) -> tuple[str, ...]:
    """The `STAGES` of a config: what is imported or fitted in one pass has no step."""
    left_out = set()
    if config.backbone.name != "vit":
        left_out.add("backbone")
    if config.teacher.kind == "svd":
        left_out.add("teacher")
    left_out |= {f"sample-{name}" for name in MAKERS if name not in config.sample.sets}
    return tuple(name for name in STAGES if name not in left_out)


def batch_size_of(config, name: str) -> int:
    """The global batch of a stage in the config."""
    if name in TRAINED:
        return config[name].train.batch_size
    return config[name.split("-")[0]].batch_size


def plain(config):
    """Copy a config such that the model's operations are counted: no kernels, nothing twice."""
    config = config.copy_and_resolve_references()
    simplest = dict(matmuls="same", attention="xla", kernels="xla", remat="none")
    fields = {path: path.rpartition(".")[2] for path in precision.fields_of(config)}
    precision.override(config, {p: simplest[f] for p, f in fields.items() if f in simplest})
    return config


def arguments_of(workload: Workload) -> tuple:
    """Shapes and dtypes of (state, batch, key, frozen), for tracing."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    batch = {
        name: jax.ShapeDtypeStruct(item.shape, item.dtype) for name, item in workload.inputs.items()
    }
    frozen = {name: network.abstract for name, network in workload.frozen.items()}
    return jax.eval_shape(workload.init, key), batch, key, frozen
