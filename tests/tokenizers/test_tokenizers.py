"""The frame that tokenizers share: what is frozen and lent, phases, optimizers by path, names."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gae_jax import tokenizers
from gae_jax.config import optim
from gae_jax.config.validate import validate
from gae_jax.nn.layers import Buffer, freeze
from gae_jax.nn.network import Network
from gae_jax.runtime.errors import ConfigError
from gae_jax.stages import tokenizer
from gae_jax.tokenizers.base import at_linear
from gae_jax.train.optim import make_optimizer
from gae_jax.train.state import TrainState


class Holder(nnx.Module):
    """A network with one part that may be frozen."""

    def __init__(self, *, frozen: bool, rngs: nnx.Rngs):
        layers = nnx.List(nnx.Linear(2, 2, rngs=rngs) for _ in range(11))
        part = nnx.Dict(layers=layers, table=Buffer(jnp.zeros(3)))
        self.encoder = freeze(part) if frozen else part
        self.decoder = nnx.Linear(2, 3, rngs=rngs)


def test_what_is_frozen_keeps_its_names_and_values_and_is_no_parameter():
    free, frozen = (Network(lambda rngs, f=f: Holder(frozen=f, rngs=rngs)) for f in (False, True))
    key = jax.random.key(3)
    (params, rest), (own, kept) = free.init(key), frozen.init(key)
    assert set(own) == {"decoder"}
    assert set(rest["encoder"]) == {"table"}
    assert jax.tree.structure(kept["encoder"]["layers"]) == jax.tree.structure(
        params["encoder"]["layers"]
    )
    jax.tree.map(
        np.testing.assert_array_equal, kept["encoder"]["layers"], params["encoder"]["layers"]
    )


@pytest.mark.parametrize("frozen", [True, False])
def test_a_backbone_is_lent_to_the_encoder_whether_it_learns_or_not(frozen):
    network = Network(lambda rngs: Holder(frozen=frozen, rngs=rngs))
    params, rest = network.init(jax.random.key(0))
    lender, _ = Network(lambda rngs: Holder(frozen=False, rngs=rngs)).init(jax.random.key(1))
    lent = {**lender["encoder"], "head": jnp.ones(2)}, {"table": jnp.full(3, 7.0)}
    state = TrainState(
        step=jnp.int32(0),
        params={"tokenizer": params},
        rest={"tokenizer": rest, "snapshot": params},
        opt={},
        ema={"tokenizer": params},
    )
    found = tokenizer.lend(state, *lent)
    whole = network(found.params["tokenizer"], found.rest["tokenizer"]).encoder
    np.testing.assert_array_equal(whole["table"][...], lent[1]["table"])
    for index, layer in enumerate(whole["layers"]):
        kernel = lender["encoder"]["layers"][str(index)]["kernel"]
        np.testing.assert_array_equal(layer.kernel[...], kernel)
        if not frozen:
            for other in (found.ema["tokenizer"], found.rest["snapshot"]):
                np.testing.assert_array_equal(
                    other["encoder"]["layers"][str(index)]["kernel"], kernel
                )
    np.testing.assert_array_equal(
        found.params["tokenizer"]["decoder"]["kernel"], params["decoder"]["kernel"]
    )
    with pytest.raises(ValueError, match="the backbone has no encoder/table"):
        tokenizer.lend(state, lent[0], {})


def test_learning_rates_by_path_and_schedules_that_start_anew():
    section = optim(learning_rate=1.0, end_learning_rate=0.1, warmup_steps=0, weight_decay=0.0)
    params = {"encoder": {"kernel": jnp.ones((2, 2))}, "decoder": {"kernel": jnp.ones((2, 2))}}
    grads = jax.tree.map(jnp.ones_like, params)

    def sizes(**changes):
        section.update(changes)
        optimizer = make_optimizer(10, **section, phases=(4, 6))
        state, found = optimizer.init(params), []
        for _ in range(5):
            updates, state = optimizer.update(grads, state, params)
            found.append([float(updates[name]["kernel"][0, 0]) for name in params])
        return np.array(found)

    plain, scaled = sizes(), sizes(scales=((r"^encoder/", 0.25), ("encoder", 3.0)))
    np.testing.assert_allclose(scaled, plain * [0.25, 1.0], rtol=1e-6)
    anew = sizes(scales=(), restart=True)
    np.testing.assert_allclose(anew[4], anew[0], rtol=1e-4)  # the first step of phase two
    assert abs(plain[4, 0]) < 0.75 * abs(plain[0, 0])
    assert abs(anew[3, 0]) < abs(plain[3, 0])  # nearer to its end


def test_phases_have_modes_and_the_snapshot_follows_until_it_is_asked_for(config):
    config.tokenizer.losses.update(l1=1.0, perceptual=0.0, gan=0.0, align=1.0)
    config.tokenizer.align.target = "snapshot"
    config.tokenizer.phases = (
        (2, "decoder", ("l1",)),
        (3, "", ("l1", "align")),
        (1, "decoder", ("l1",)),
    )
    config.tokenizer.train.steps = 6
    validate(config)
    phases = [tokenizer.phase_of(config.tokenizer, step) for step in range(6)]
    assert [p.follows for p in phases] == [True, True, False, False, False, False]
    assert [p.terms for p in phases[1:3]] == [("l1",), ("align", "l1")]
    assert {p.mode for p in phases} == {""}
    config.tokenizer.phases = ((6, "", ("l1",), "backwards"),)
    with pytest.raises(ConfigError, match=r"modes \['backwards'\]; tokenizer 'gae' has ''"):
        validate(config)
    config.tokenizer.phases = ((6, ""),)
    with pytest.raises(ConfigError, match="give \\(steps, regex, terms\\)"):
        validate(config)


def test_a_tokenizer_refuses_names_and_terms_that_it_does_not_have(config):
    config.tokenizer.losses.structure = 0.1
    with pytest.raises(ConfigError, match="structure, which tokenizer 'gae' cannot serve"):
        validate(config)
    config.tokenizer.name = "gea"
    with pytest.raises(ConfigError, match=r"tokenizer\.name is 'gea'; use one of gae"):
        validate(config)


def test_a_stage_records_only_its_own_tokenizer(config):
    own = tokenizers.without_other_sizes(config.tokenizer)
    assert "model" in own
    assert not set(own) & (set(tokenizers.TOKENIZERS) - {"gae"})
    assert tokenizers.latent_shape(config) == (4, 4, 4)


def test_the_gradient_at_a_linear_last_layer():
    hidden = jax.random.normal(jax.random.key(0), (2, 4, 5))
    kernel = jax.random.normal(jax.random.key(1), (5, 12))
    weight = jax.random.normal(jax.random.key(2), (2, 4, 4, 3))

    def images(kernel):
        patches = (hidden @ kernel).reshape(2, 2, 2, 2, 2, 3)
        return patches.transpose(0, 1, 3, 2, 4, 5).reshape(2, 4, 4, 3)

    expected = jax.grad(lambda k: jnp.sum(weight * images(k)))(kernel)
    np.testing.assert_allclose(at_linear(hidden, weight, 2), expected, rtol=1e-5, atol=1e-5)
