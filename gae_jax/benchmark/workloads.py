"""What is timed: steps as the stages have them, on random weights and data.

Nothing is computed here: a `Work` says how its arrays are made and what a step does with them, and
can be traced without a device.
"""

import dataclasses
from collections.abc import Callable, Hashable
from typing import Any

import jax
import numpy as np

from gae_jax.generators import samplers
from gae_jax.generators.latent_diffusion import diffusion_network
from gae_jax.generators.sampling import sde_sampler
from gae_jax.kernels.fp8 import FP8
from gae_jax.nn.network import Network
from gae_jax.nn.pixels import to_float, to_uint8
from gae_jax.nn.quantized import multiplying
from gae_jax.objectives.discriminator import dino_network, looks_through_dino
from gae_jax.objectives.targets import targets_by
from gae_jax.pretrained.backbone import backbone_network, backbone_shape
from gae_jax.run.load import as_computed, metric_network
from gae_jax.stages import diffusion, tokenizer
from gae_jax.stages.sample import bind_sampler
from gae_jax.tokenizers import aligns, latent_shape, tokenizer_network
from gae_jax.tokenizers.gae_teacher import teacher_network
from gae_jax.train.fit import Step


@dataclasses.dataclass(frozen=True)
class Work:
    """A step, and how what it takes is made.

    Attributes:
      name: shown to the user.
      images: that one step works on.
      init: key -> what the step changes, donated; {} if it changes nothing.
      step: as `train.fit.Stage` has it; gives (state, anything).
      batch: random generator -> arrays of one batch, on the host.
      frozen: networks that the step reads; it is given their (parameters, rest) by name.
      phase: what is static about the step.
    """

    name: str
    images: int
    init: Callable[[jax.Array], Any]
    step: Step
    batch: Callable[[np.random.Generator], dict[str, np.ndarray]]
    frozen: dict[str, Network]
    phase: Hashable = None


def _latents(config, size: int, random: np.random.Generator) -> np.ndarray:
    return random.standard_normal((size, *latent_shape(config)), np.float32)


def _labels(config, size: int, random: np.random.Generator) -> np.ndarray:
    return random.integers(0, config.diffusion.model.num_classes, size, dtype=np.int32)


def _images(config, size: int, random: np.random.Generator) -> np.ndarray:
    side = config.data.image_size
    return random.integers(0, 256, (size, side, side, 3), dtype=np.uint8)


def random_arrays(network: Network, random: np.random.Generator) -> tuple[dict, dict]:
    """(parameters, rest) of a frozen network, on the host, in the dtypes that `load` gives.

    A network's own start would have to be compiled, which takes longer than what is timed.
    Parameters are normal with deviation 0.02, weights in fp8 with 100, as they come out of
    `models.fp8`, the rest (variances among it) in 0.5 to 1.5; a block of numbers is repeated.
    """
    normal = 0.02 * random.standard_normal(2**20, np.float32)
    positive = 0.5 + random.random(2**20, np.float32)

    def fill(block):
        def of(leaf):
            own = 5_000 * normal if leaf.dtype == FP8 else block
            return np.resize(own, leaf.shape).astype(leaf.dtype)

        return of

    params, rest = network.abstract
    params = as_computed(network, jax.tree.map(fill(normal), params))
    return params, jax.tree.map(fill(positive), rest)


def _forward(name: str, size: int, network: Network, call: Callable, batch: Callable) -> Work:
    """Of one frozen network: ``call`` is (module, batch) -> output."""

    def step(state, batch, key, frozen, phase):
        del key, phase
        return state, call(network(*frozen["network"]), batch)

    return Work(name, size, lambda key: {}, step, batch, {"network": network})


def _diffusion_network(config) -> Network:
    """LightningDiT on latents of mean 0 and deviation 1, as ``bench`` has dtype and products."""
    section, shape = config.diffusion, latent_shape(config)
    network = diffusion_network(
        section,
        shape,
        dtype=config.bench.dtype,
        attention=section.compute.attention,
        kernels=section.compute.kernels,
    )
    return multiplying(network, config.bench.products)


def _tokenizer_network(config) -> Network:
    section = config.tokenizer
    network = tokenizer_network(
        config,
        dtype=config.bench.dtype,
        attention=section.compute.attention,
        kernels=section.compute.kernels,
    )
    return multiplying(network, config.bench.products)


def dit_train(config) -> Work:
    """The step of the stage ``diffusion``: loss, backward, AdamW, moving average."""
    size, shape = config.bench.dit_train.batch_size, latent_shape(config)
    init, step = diffusion.make_step(
        config.diffusion, shape, np.zeros(shape[-1]), np.ones(shape[-1])
    )
    return Work(
        name="dit-train",
        images=size,
        init=init,
        step=step,
        batch=lambda random: {
            "latent": _latents(config, size, random),
            "label": _labels(config, size, random),
        },
        frozen={},
    )


def dit_forward(config) -> Work:
    """One velocity."""
    size = config.bench.dit_forward.batch_size
    return _forward(
        "dit-forward",
        size,
        _diffusion_network(config),
        lambda model, batch: model.velocity(batch["latent"], batch["time"][0], batch["label"]),
        lambda random: {
            "latent": _latents(config, size, random),
            "label": _labels(config, size, random),
            "time": random.random(size, np.float32),
        },
    )


def sample_sde(config) -> Work:
    """Latents by ``sample.sde``, without guidance, from noise as the stage ``sample`` makes it."""
    size, shape = config.bench.sample_sde.batch_size, latent_shape(config)
    section = {**config.sample.sde.to_dict(), "guidance": 1.0, "guidance_parts": ()}
    sampler = sde_sampler(**bind_sampler("sde", section))

    def call(model, batch):
        keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(0), i))(batch["id"])
        noise = model.prior(samplers.noise_for(keys, shape))
        return sampler(model, None, noise, batch["label"], keys).x

    return _forward(
        "sample-sde",
        size,
        _diffusion_network(config),
        call,
        lambda random: {
            "id": random.integers(0, 2**32, size, dtype=np.uint32),
            "label": _labels(config, size, random),
        },
    )


def _tokenizer_train(config, name: str, *, teacher: bool) -> Work:
    """The step of the stage ``tokenizer`` with all that its weights switch on.

    LPIPS has random weights. The semantic target comes from the teacher in the step, or with the
    batch.
    """
    config = config.copy_and_resolve_references()
    section, size = config.tokenizer, config.bench[name.replace("-", "_")].batch_size
    section.perceptual.name = "lpips_random"
    tokens, width = backbone_shape(config.backbone)[0] ** 2, backbone_shape(config.backbone)[1]
    lpips = {name: section.perceptual[name] for name in ("precision", "dtype")}
    networks = {"lpips": metric_network("lpips", **lpips)}
    if looks_through_dino(section):
        networks["dino"] = dino_network(section.discriminator)
    aligned, by_teacher = aligns(section)
    if aligned and teacher:
        dtype = section.align.dtype
        networks["backbone"] = backbone_network(
            config.backbone, config.diffusion.model.num_classes, dtype=dtype
        )
        if by_teacher:
            networks["teacher"] = teacher_network(
                config.teacher.model, config.backbone, config.teacher.kind, dtype=dtype
            )
    without = section.copy_and_resolve_references()
    if not teacher:
        without.losses.update(align=0.0, structure=0.0, semantics=0.0)
    by_networks = targets_by(without, networks)

    def targets_of(frozen, images, batch):
        found = by_networks(frozen, images, batch)
        given = aligned and not teacher
        return dataclasses.replace(found, aligned=batch["target"]) if given else found

    def batch(random):
        found = {"image": _images(config, size, random)}
        if aligned and not teacher:
            channels = latent_shape(config)[-1] if by_teacher else width
            found["target"] = random.standard_normal((size, tokens, channels), np.float32)
        return found

    _, init, step = tokenizer.make_step(config, targets_of)
    on = max(section.gan.start, section.gan.discriminator_start)
    phase = tokenizer.phase_of(section, on)
    return Work(name, size, init, step, batch, networks, phase)


def tokenizer_train(config) -> Work:
    """Training with a semantic target that lies there, as after one pass over the images."""
    return _tokenizer_train(config, "tokenizer-train", teacher=False)


def tokenizer_train_teacher(config) -> Work:
    """Training with backbone and teacher in the step."""
    return _tokenizer_train(config, "tokenizer-train-teacher", teacher=True)


def encode(config) -> Work:
    """uint8 images -> latents."""
    size = config.bench.encode.batch_size
    return _forward(
        "encode",
        size,
        _tokenizer_network(config),
        lambda model, batch: model.encode(to_float(batch["image"])),
        lambda random: {"image": _images(config, size, random)},
    )


def decode(config) -> Work:
    """Latents -> uint8 images."""
    size = config.bench.decode.batch_size
    return _forward(
        "decode",
        size,
        _tokenizer_network(config),
        lambda model, batch: to_uint8(model.decode(batch["latent"])),
        lambda random: {"latent": _latents(config, size, random)},
    )


def features(config) -> Work:
    """uint8 images -> what FID and its kin read of Inception, in full fp32."""
    size = config.bench.features.batch_size
    return _forward(
        "features",
        size,
        metric_network("inception", precision="highest"),
        lambda model, batch: model(batch["image"]),
        lambda random: {"image": _images(config, size, random)},
    )


WORKS: dict[str, Callable[[Any], Work]] = {
    "dit-train": dit_train,
    "dit-forward": dit_forward,
    "sample-sde": sample_sde,
    "tokenizer-train": tokenizer_train,
    "tokenizer-train-teacher": tokenizer_train_teacher,
    "encode": encode,
    "decode": decode,
    "features": features,
}


def plain(config):
    """A copy of the config whose operations count as the model's: no kernels, nothing twice."""
    config = config.copy_and_resolve_references()
    config.bench.products = "same"
    for name in ("diffusion", "tokenizer", "teacher"):
        config[name].compute.update(attention="xla", kernels="xla", remat="none")
    for section in (config.sample, config.teacher.backbone):
        section.attention = "xla"
    return config


def arguments_of(work: Work) -> tuple:
    """Shapes and dtypes of (state, batch, key, frozen), for tracing."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    rows = work.batch(np.random.default_rng(0))
    batch = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in rows.items()}
    frozen = {name: network.abstract for name, network in work.frozen.items()}
    return jax.eval_shape(work.init, key), batch, key, frozen
