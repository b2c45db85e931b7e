"""The teacher of PAE's prior refinement: its projector is PAE's, its settings are checked."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gae_jax.config.validate import validate
from gae_jax.nn.network import Network
from gae_jax.porting.released import without_counterpart
from gae_jax.runtime import sharding
from gae_jax.runtime.errors import ConfigError
from gae_jax.runtime.mesh import make_mesh
from gae_jax.tokenizers.pae_networks import Bottleneck
from gae_jax.tokenizers.pae_prior import PriorTeacher

SIZES = dict(feature_dim=32, latent_dim=8, decoder_layers=1, num_patches=16, heads=4)


def test_its_projector_is_that_of_pae():
    teacher, own = (
        Network(partial(PriorTeacher, **SIZES)),
        Network(partial(Bottleneck, hidden_size=32, num_heads=4, latent_dim=8)),
    )
    rng = np.random.default_rng(0)
    draw = partial(jax.tree.map, lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32))
    (params, rest), (others, _) = draw(teacher.abstract), draw(own.abstract)
    features = jnp.asarray(rng.normal(size=(2, 16, 32)), jnp.float32)
    latents = teacher(params, rest).downsample(features)
    others |= {"latent_compressor": params["latent_compressor"]}
    found = own(others, {}).compress(features)
    np.testing.assert_allclose(latents.reshape(2, 4, 4, 8), found, atol=1e-5)
    np.testing.assert_allclose(jnp.mean(latents**2, axis=-1), 1, rtol=1e-4)
    back = teacher(params, rest).reconstruct(latents)
    assert (back.shape, back.dtype) == ((2, 16, 32), jnp.float32)
    assert set(rest) == {"pos_embed_dec"}
    # tokens know of their places: the same latent everywhere does not give the same token
    same = teacher(params, rest).reconstruct(jnp.ones((1, 16, 8)))
    assert jnp.max(jnp.std(same[:, 5:7], axis=1)) > 1e-2


def test_its_size_over_dinov2_and_its_rules():
    abstract = Network(
        partial(
            PriorTeacher,
            feature_dim=1024,
            latent_dim=32,
            decoder_layers=4,
            num_patches=256,
            heads=16,
        )
    ).abstract
    size = sum(x.size for x in jax.tree.leaves(abstract[0]["latent_compressor"]))
    assert size == 4_490_272  # as PAE's
    mesh = make_mesh(1, 4, 2)
    sharding.shard(abstract, mesh)
    share, largest, _ = sharding.unsharded(abstract, mesh)
    assert share < 0.02, largest


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("reference", "anyup", "reference is 'anyup'; use one of raw, bilinear, image_guided"),
        ("low_pass", "off", "low_pass is 'off'; use one of blur, zscore"),
        ("strength", 1.5, r"strength is 1.5; it must be in \[0, 1\]"),
        ("colour", 0.0, "colour is 0.0; it must be > 0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(config, field, value, says):
    config.teacher.prior[field] = value
    with pytest.raises(ConfigError, match=f"teacher.prior.{says}"):
        validate(config)


def test_it_is_not_released(config):
    config.teacher.kind = "prior"
    assert "not released" in without_counterpart("teacher", config.to_dict())
    with pytest.raises(ValueError, match="15 patches do not form a square grid"):
        Network(partial(PriorTeacher, **SIZES | dict(num_patches=15)))
