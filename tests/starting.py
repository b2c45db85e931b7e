"""Stages that start from weights that exist, without training: what tests of it share."""

import jax
import jax.numpy as jnp
import numpy as np
from small import get_config
from test_aligntok import SMALL as ALIGNTOK
from test_conv_tokenizer import TINY as CONV
from test_dgae import SIZES as DGAE
from test_fae_rae_stages import FAE, RAE
from test_pae_stage import pae_config

from gae_jax.config.validate import validate
from gae_jax.nn.network import fingerprint
from gae_jax.run import fine_tuning
from gae_jax.run.run import Run
from gae_jax.run.session import Session
from gae_jax.runtime.files import read_json
from gae_jax.stages import diffusion, tokenizer
from gae_jax.tokenizers import sections_of
from gae_jax.train.carry import flat
from gae_jax.train.checkpoint import Checkpoints
from gae_jax.train.state import TrainState


def opened(config, path, **more):
    return Session(config, Run(path), devices=tuple(jax.devices()[:1]), **more)


def of_kind(name):
    """The small config with another tokenizer; L1 alone, and a moving average."""
    config = pae_config() if name == "pae" else get_config()
    section = config.tokenizer
    section.name, section.from_teacher, section.phases = name, (), ()
    for term in section.losses:
        section.losses[term] = 0.0
    if name == "dgae":
        section.dgae.update(DGAE | {"encoder": DGAE["encoder"] | {"ch_mult": (1, 1, 1)}})
        section.losses.velocity = 1.0
    elif name == "fae":
        section.fae.update(FAE)
        section.losses.features = 1.0
        section.phases = ((6, "", ("features",), "features"),)
    else:
        section.losses.l1 = 1.0
    if name == "rae":
        section.rae.update(RAE)
    if name == "aligntok":
        section.aligntok.update(ALIGNTOK | {"conv": ALIGNTOK["conv"] | {"ch_mult": (1, 1, 1)}})
    if name == "conv":
        section.conv.update(CONV)
    section.ema_decay = 0.5
    return config


def at_size(config, size):
    """For images of another size."""
    config.data.image_size = config.backbone.vit.image_size = size
    config.tokenizer.model.image_size = size
    return config


SHAPES = {}  # of states, by all that they depend on: tracing them takes seconds


def shapes_of(stage, config, optimizers):
    """The state of a stage at step 0, without arrays; without optimizers it is soon had."""
    key = config.copy_and_resolve_references()
    key.tokenizer.init_from = key.diffusion.init_from = ""
    key = stage, optimizers, key.to_json()
    if key not in SHAPES:
        SHAPES[key] = _shapes_of(stage, config, optimizers)
    return SHAPES[key]


def _shapes_of(stage, config, optimizers):
    if stage == "diffusion":
        mean, std = np.full(4, 0.5), np.full(4, 2.0)
        init = diffusion.make_step(config, (4, 4, 4), mean, std)[0]
        return jax.eval_shape(init, jax.random.key(0))
    if optimizers:
        return jax.eval_shape(tokenizer.make_step(config, lambda *_: None)[1], jax.random.key(0))
    networks = tokenizer.make_networks(config)
    params = {name: network.abstract[0] for name, network in networks.items()}
    rest = {name: network.abstract[1] for name, network in networks.items()}
    ema = {"tokenizer": params["tokenizer"]}
    return TrainState(jax.ShapeDtypeStruct((), np.int32), params, rest, {}, ema)


def random_state(stage, config, seed, *, optimizers=False):
    """A state in which nothing is zero, so that a place mixed up shows."""
    rng = np.random.default_rng(seed)

    def draw(leaf):
        if np.issubdtype(leaf.dtype, np.integer):
            return jnp.full(leaf.shape, 3, leaf.dtype)
        return jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape), leaf.dtype)

    return jax.tree.map(draw, shapes_of(stage, config, optimizers))


def trained(path, stage, config, seed=1, *, done=True, optimizers=False):
    """A run whose stage has a checkpoint of step 3 with this random state; the state."""
    state, which = random_state(stage, config, seed, optimizers=optimizers), "ema"
    if stage == "tokenizer" and not config.tokenizer.ema_decay:
        which = "params"
    session = opened(config, path)
    sections = sections_of(config.tokenizer) if stage == "tokenizer" else ("seed", "diffusion")
    folder = session.run.stage(stage)
    folder.open(session.made_of(sections), {}, fresh=True)
    checkpoints = Checkpoints(folder.path)
    checkpoints.save(3, state, {"seconds": 0.0})
    checkpoints.wait()
    checkpoints.close()
    weights = {stage: (getattr(state, which)[stage], state.rest[stage])}
    facts = dict(latent_shape=[4, 4, 4], tokenizer="0123") if stage == "diffusion" else {}
    if done:
        folder.finish(
            step=3, weights=which, fingerprint=fingerprint(weights), parameters={}, **facts
        )
    return jax.device_get(state)


def started(stage, config, path, *, optimizers=False):
    """(state, record) of a stage that starts as its config says."""
    session = opened(config, path)
    validate(config)
    fine_tuning.check(session, stage)
    state = fine_tuning.start(session, stage, random_state(stage, config, 2, optimizers=optimizers))
    return jax.device_get(state), read_json(path / stage / fine_tuning.RECORD)


def require_same(a, b):
    assert a.keys() == b.keys()
    for path, leaf in flat((a, {})).items():
        np.testing.assert_array_equal(leaf, flat((b, {}))[path], err_msg=path)


def changed(config, flags):
    """A config with --config.KEY=VALUE flags in it."""
    for flag in flags:
        key, value = flag.removeprefix("--config.").split("=", 1)
        *path, name = key.split(".")
        section = config
        for part in path:
            section = section[part]
        old = section[name]
        section[name] = value if isinstance(old, str) else type(old)(eval(value.strip("'")))
    return config
