"""What the tokenizer's terms compare with, by the run's frozen networks."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from gae_jax.nn import losses
from gae_jax.objectives.discriminator import load_dino, looks_through_dino, view
from gae_jax.objectives.objective import Targets
from gae_jax.pretrained.lpips import LPIPS
from gae_jax.run.load import load
from gae_jax.run.session import Session
from gae_jax.runtime.mesh import place
from gae_jax.tokenizers import aligns
from gae_jax.train.fit import stage_key
from gae_jax.train.state import Network


def judges_of(config) -> tuple[str, ...]:
    """The finished stages whose networks a tokenizer's terms read in every step."""
    perceptual = compares_images(config)
    aligned, teacher = aligns(config)
    lpips = perceptual and config.perceptual.name == "lpips"
    backbone = aligned or (perceptual and config.perceptual.name == "backbone")
    dino = looks_through_dino(config) and config.discriminator.dino.weights == "dino"
    wanted = {"lpips": lpips, "backbone": backbone, "teacher": teacher, "dino": dino}
    return tuple(name for name, use in wanted.items() if use)


def compares_images(config) -> bool:
    """Whether a term asks for a perceptual distance."""
    return config.losses.perceptual > 0 or config.losses.continuity > 0


def load_lpips(session: Session) -> tuple[Network, tuple[dict, dict]]:
    """LPIPS of the run, or one with random weights where the config asks for that."""
    config = session.config.tokenizer.perceptual
    how = {name: config[name] for name in ("precision", "dtype")}
    if config.name == "lpips":
        return load(session.run.stage("lpips"), session.mesh, **how)
    network = Network(lambda rngs: LPIPS(**how, rngs=rngs))
    params, rest = network.init(stage_key("lpips", session.config.seed))
    heads = {name: part for name, part in params.items() if name.startswith("lin")}
    # learned heads weigh squared differences and are never negative
    return network, place((params | jax.tree.map(jnp.abs, heads), rest), session.mesh)


def make_targets(session: Session):
    """(frozen arrays, `targets_by` the run's finished networks)."""
    config = session.config.tokenizer
    found = {
        name: load(session.run.stage(name), session.mesh, dtype=config.align.dtype)
        for name in judges_of(config)
        if name not in ("lpips", "dino")
    }
    if compares_images(config) and config.perceptual.name in ("lpips", "lpips_random"):
        found["lpips"] = load_lpips(session)
    if looks_through_dino(config):
        found["dino"] = load_dino(session)
    networks = {name: network for name, (network, _) in found.items()}
    return {name: arrays for name, (_, arrays) in found.items()}, targets_by(config, networks)


def targets_by(config, networks: dict[str, Network]) -> Callable[..., Targets]:
    """Function of (frozen arrays by name, images in [-1, 1], their batch) that makes `Targets`.

    Args:
      config: the section ``tokenizer``.
      networks: those of lpips, backbone, teacher and dino that its terms ask for.
    """
    perceptual = config.perceptual.name if compares_images(config) else None
    aligned_with, by_teacher = aligns(config)

    def make(frozen, images: jax.Array, batch) -> Targets:
        del batch  # the networks see images alone
        models = {name: network(*frozen[name]) for name, network in networks.items()}
        aligned = features = distance = apart = None
        if perceptual == "backbone":
            features, maps = models["backbone"].features_and_maps(images)

            def distance_from(maps, found):
                return losses.feature_distance(models["backbone"].features_and_maps(found)[1], maps)

            def apart(a, b):
                return distance_from(models["backbone"].features_and_maps(b)[1], a)

            distance = partial(distance_from, maps)
        elif perceptual:

            def distance_from(real, found):
                return jnp.mean(models["lpips"].compare(models["lpips"].features(found), real))

            def apart(a, b):
                return distance_from(models["lpips"].features(b), a)

            distance = partial(distance_from, models["lpips"].features(images))
        if aligned_with:
            takes = models["teacher"].takes if by_teacher else {}
            if features is None or takes:
                features = models["backbone"].features(images, **takes)
            aligned = models["teacher"].downsample(features) if by_teacher else features
            aligned = jax.lax.stop_gradient(aligned).astype(jnp.float32)
        look = view(config.discriminator, models.get("dino"))
        return Targets(aligned=aligned, perceptual=distance, apart=apart, look=look)

    return make
