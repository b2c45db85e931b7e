"""The step of every stage as a `Work`: what a run does at the config's size, without its data."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from gae_jax.benchmark.workloads import Work, arguments_of
from gae_jax.data.latent_files import DTYPES
from gae_jax.generators.latent_diffusion import diffusion_network
from gae_jax.generators.sampling import MAKERS, Networks, make_draw
from gae_jax.nn.pixels import to_float
from gae_jax.nn.quantized import multiplying
from gae_jax.objectives.discriminator import dino_network, looks_through_dino
from gae_jax.objectives.targets import compares_images, judges_of, targets_by
from gae_jax.pretrained.backbone import backbone_network
from gae_jax.run.load import metric_network
from gae_jax.stages import backbone, diffusion, teacher, tokenizer
from gae_jax.stages.sample import bind_sampler
from gae_jax.tokenizers import latent_shape, tokenizer_network
from gae_jax.tokenizers.gae_teacher import teacher_network


def _batch(config, size: int, *, label: bool = False) -> Callable:
    """Of zeros, for their shapes."""
    side = config.data.image_size

    def batch(random):
        del random
        found = {"image": np.zeros((size, side, side, 3), np.uint8)}
        return found | ({"label": np.zeros(size, np.int32)} if label else {})

    return batch


def backbone_step(config, size: int) -> Work:
    """Of the ViT that stands in for DINOv2."""
    _, init, step = backbone.make_step(config.backbone, config.diffusion.model.num_classes)
    return Work("teacher-backbone", size, init, step, _batch(config, size, label=True), {})


def teacher_step(config, size: int) -> Work:
    """Distillation, with the backbone in the step."""
    section = config.teacher
    network = backbone_network(
        config.backbone, config.diffusion.model.num_classes, **section.backbone
    )
    init, step = teacher.make_step(section, network, teacher.make_network(config))

    def with_frozen(state, batch, key, frozen, phase):
        return step(state, batch, key, frozen["backbone"], phase)

    return Work("teacher", size, init, with_frozen, _batch(config, size), {"backbone": network})


def tokenizer_step(config, size: int) -> Work:
    """With all that its weights switch on, and every frozen network that they ask for."""
    section = config.tokenizer
    makers = {
        "lpips": lambda: metric_network(
            "lpips", **{name: section.perceptual[name] for name in ("precision", "dtype")}
        ),
        "backbone": lambda: backbone_network(
            config.backbone, config.diffusion.model.num_classes, dtype=section.align.dtype
        ),
        "teacher": lambda: teacher_network(
            config.teacher.model, config.backbone, config.teacher.kind, dtype=section.align.dtype
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
    _, init, step = tokenizer.make_step(config, targets_of)
    on = max(section.gan.start, section.gan.discriminator_start)
    phase = tokenizer.phase_of(section, on)
    return Work("tokenizer", size, init, step, _batch(config, size), networks, phase)


def latents_step(config, size: int) -> Work:
    """Encoding, of the mirror images too where the data has them."""
    asked, mirror = config.latents, config.data.mirror
    network = tokenizer_network(config, dtype=asked.encode_dtype)
    network = multiplying(network, asked.encode_products)

    def step(state, batch, key, frozen, phase):
        del key, phase
        images, model = to_float(batch["image"]), network(*frozen["tokenizer"])
        views = [images, images[:, :, ::-1]] if mirror else [images]
        found = jnp.stack([model.encode(view) for view in views], axis=1)
        return state, found.astype(DTYPES[asked.dtype])

    return Work("latents", size, lambda key: {}, step, _batch(config, size), {"tokenizer": network})


def diffusion_step(config, size: int) -> Work:
    """Of LightningDiT on latents."""
    shape = latent_shape(config)
    init, step = diffusion.make_step(
        config.diffusion, shape, np.zeros(shape[-1]), np.ones(shape[-1])
    )

    def batch(random):
        del random
        return {"latent": np.zeros((size, *shape), np.float32), "label": np.zeros(size, np.int32)}

    return Work("diffusion", size, init, step, batch, {})


def _sample_step(config, size: int, name: str) -> Work:
    """From noise to uint8 images by one of the samplers, with its guidance."""
    dtype, attention = config.sample.dtype, config.sample.attention
    shape = latent_shape(config)
    network = diffusion_network(config.diffusion, shape, dtype=dtype, attention=attention)
    network = multiplying(network, config.sample.products)
    decoder = multiplying(tokenizer_network(config, dtype=dtype), config.sample.decode_products)
    sampler = MAKERS[name](**bind_sampler(name, config.sample[name].to_dict()))
    draw = make_draw(Networks((network, None), (decoder, None)), sampler)

    def step(state, batch, key, frozen, phase):
        del phase
        arrays = frozen["diffusion"], frozen["tokenizer"], None
        return state, draw(arrays, key, batch["id"], batch["label"])

    def batch(random):
        del random
        return {"id": np.zeros(size, np.uint32), "label": np.zeros(size, np.int32)}

    frozen = {"diffusion": network, "tokenizer": decoder}
    return Work(f"sample-{name}", size, lambda key: {}, step, batch, frozen)


def sample_sde_step(config, size: int) -> Work:
    return _sample_step(config, size, "sde")


def sample_ode_step(config, size: int) -> Work:
    return _sample_step(config, size, "ode")


# In the order of the pipeline; each takes the config and the global batch.
STEPS: dict[str, Callable[..., Work]] = {
    "teacher-backbone": backbone_step,
    "teacher": teacher_step,
    "tokenizer": tokenizer_step,
    "latents": latents_step,
    "diffusion": diffusion_step,
    "sample-sde": sample_sde_step,
    "sample-ode": sample_ode_step,
}
# Those that train, and their sections of the config.
TRAINED = {
    "teacher-backbone": "backbone",
    "teacher": "teacher",
    "tokenizer": "tokenizer",
    "diffusion": "diffusion",
}


def steps_of(config) -> tuple[str, ...]:
    """The works of a config's pipeline: what is imported or fitted in one pass has no step."""
    left_out = set()
    if config.backbone.name != "vit":
        left_out.add("teacher-backbone")
    if config.teacher.kind == "svd":
        left_out.add("teacher")
    left_out |= {f"sample-{name}" for name in MAKERS if name not in config.sample.sets}
    return tuple(name for name in STEPS if name not in left_out)


def batch_size_of(config, name: str) -> int:
    """The global batch that a stage has in the config."""
    if name in TRAINED:
        return config[TRAINED[name]].train.batch_size
    return config[name.split("-")[0]].batch_size


def images_of(config, name: str, size: int, images: int) -> int:
    """How many images a stage works on in all.

    Args:
      size: its global batch.
      images: in the training set.
    """
    if name in TRAINED:
        return config[TRAINED[name]].train.steps * size
    if name == "latents":
        return images
    classes = len(config.sample.classes) or config.diffusion.model.num_classes
    return config.sample.per_class * classes


def output_of(work: Work) -> jax.ShapeDtypeStruct:
    """Shape and dtype of what a step gives beside the state."""
    arguments = arguments_of(work)
    return jax.eval_shape(lambda *arrays: work.step(*arrays, work.phase), *arguments)[1]
