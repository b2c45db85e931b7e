"""`init_from`: what every tokenizer and the diffusion model take over from a run."""

import logging

import jax
import numpy as np
import pytest
from small import get_config
from starting import at_size, of_kind, opened, random_state, require_same, started, trained
from test_pae_stage import pae_config

from gae_jax.config.validate import validate
from gae_jax.run import fine_tuning
from gae_jax.runtime.errors import ConfigError
from gae_jax.stages import diffusion
from gae_jax.train.carry import flat, resized

KINDS = ("gae", "pae", "dgae", "aligntok", "fae", "rae", "conv")
# Kind -> (tables that are interpolated, tables that are computed) for another size of images
TABLES = {
    "gae": ({"decoder/pos_embed", "foundation_encoder/pos_embed"}, set()),
    "pae": (
        {"encoder/encoder/pos_embed"},
        {"pae/delta_encoder/pos_embed", "pae/decoder/decoder_pos_embed"},
    ),
    "dgae": (set(), set()),
    "aligntok": ({"encoder/encoder/pos_embed"}, set()),
    "fae": (
        {"encoder/encoder/pos_embed", "decoder/pos_embed", "autoencoder/decoder/pos_embed"},
        set(),
    ),
    "rae": ({"encoder/encoder/pos_embed"}, {"decoder/decoder_pos_embed"}),
    "conv": (set(), set()),
}


@pytest.mark.parametrize(
    "kind",
    # gae has interpolated tables, rae interpolated and computed ones; the code knows no kinds
    [pytest.param(k, marks=[pytest.mark.slow] * (k not in ("gae", "rae"))) for k in KINDS],
)
def test_every_tokenizer_starts_from_a_run_bit_for_bit_and_at_another_size(kind, tmp_path):
    config = of_kind(kind)
    source = trained(tmp_path / "source", "tokenizer", config)
    config.tokenizer.init_from = str(tmp_path / "source")
    config.tokenizer.train.steps = 6
    found, record = started("tokenizer", config, tmp_path / "same")
    # the moving average is what counts in the source, and both start from it
    require_same(found.params["tokenizer"], source.ema["tokenizer"])
    require_same(found.ema["tokenizer"], source.ema["tokenizer"])
    require_same(found.rest["tokenizer"], source.rest["tokenizer"])
    assert record["step"] == 3
    assert record["interpolated"] == record["new"] == record["left"] == {}
    assert record["optimizers"] == "new"

    found, record = started("tokenizer", at_size(config, 32), tmp_path / "larger")
    resizes, computes = TABLES[kind]
    assert set(record["interpolated"]) == resizes
    assert set(record["new"]) == computes
    here = flat((found.params["tokenizer"], found.rest["tokenizer"]))
    there = flat((source.ema["tokenizer"], source.rest["tokenizer"]))
    assert here.keys() == there.keys()
    for path in here.keys() - computes:
        wanted = resized(there[path], 64) if path in resizes else there[path]
        np.testing.assert_array_equal(here[path], wanted, err_msg=path)


def adversarial():
    config = get_config()
    config.tokenizer.losses.perceptual = 0.0
    config.tokenizer.align.target, config.tokenizer.ema_decay = "snapshot", 0.0
    return config


def test_the_discriminator_comes_along_and_moments_where_they_are_asked_for(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    config = adversarial()
    source = trained(tmp_path / "source", "tokenizer", config, optimizers=True)
    config.tokenizer.init_from = str(tmp_path / "source")
    config.tokenizer.losses.l1 = 2.0
    found, record = started("tokenizer", config, tmp_path / "new", optimizers=True)
    fresh = jax.device_get(random_state("tokenizer", config, 2, optimizers=True))
    assert record["discriminator"] == fine_tuning.TAKEN
    require_same(found.params["discriminator"], source.params["discriminator"])
    require_same(found.rest["discriminator"], source.rest["discriminator"])
    assert any("mean" in path for path in flat((found.rest["discriminator"], {})))
    require_same(found.rest["snapshot"], source.params["tokenizer"])
    assert jax.tree.all(jax.tree.map(np.array_equal, found.opt, fresh.opt))
    assert "tokenizer: tokenizer.losses.l1 is 2.0, 1.0 in the source" in caplog.text

    config.tokenizer.init_optimizer = True
    found, record = started("tokenizer", config, tmp_path / "moments", optimizers=True)
    assert record["optimizers"] == "moments of discriminator, tokenizer taken along"
    for name in ("tokenizer", "discriminator"):
        here, there = (
            next(x for x in jax.tree.leaves(state.opt[name], is_leaf=is_adam) if is_adam(x))
            for state in (found, source)
        )
        require_same(here.mu, there.mu)
        require_same(here.nu, there.nu)

    config.tokenizer.discriminator.ndf = 4
    found, record = started("tokenizer", config, tmp_path / "other", optimizers=True)
    assert record["discriminator"].startswith("new, the source's does not fit: main/")
    require_same(found.params["discriminator"], fresh_params(config))
    assert record["optimizers"] == "moments of tokenizer taken along"

    config.tokenizer.losses.gan, config.tokenizer.init_optimizer = 0.0, False
    _, record = started("tokenizer", config, tmp_path / "none")
    assert record["discriminator"] == "left, this config has none"
    assert "tokenizer: discriminator: left, this config has none" in caplog.text


def is_adam(part):
    return hasattr(part, "mu")


def fresh_params(config):
    return jax.device_get(
        random_state("tokenizer", config, 2, optimizers=True).params["discriminator"]
    )


def test_a_diffusion_model_takes_other_classes_and_grids_and_its_own_statistics(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    config = get_config()
    source = trained(tmp_path / "source", "diffusion", config)
    config.diffusion.init_from = f"{tmp_path / 'source'}@3"
    found, record = started("diffusion", config, tmp_path / "same")
    require_same(found.params["diffusion"], source.ema["diffusion"])
    require_same(found.ema["diffusion"], source.ema["diffusion"])
    fresh = jax.device_get(random_state("diffusion", config, 2))
    for name in ("latent_mean", "latent_std"):
        np.testing.assert_array_equal(found.rest["diffusion"][name], fresh.rest["diffusion"][name])
        assert name in record["new"]

    config.diffusion.model.num_classes = 3
    found, record = started("diffusion", config, tmp_path / "classes")
    fresh = jax.device_get(random_state("diffusion", config, 2))
    label = "dit/y_embedder/embedding_table/embedding"
    here, there, new = (flat((x, {})) for x in (
        found.params["diffusion"], source.ema["diffusion"], fresh.params["diffusion"],
    ))  # fmt: skip
    assert here[label].shape == (4, 32)
    np.testing.assert_array_equal(here[label][-1], there[label][-1])
    np.testing.assert_array_equal(here[label][:3], new[label][:3])
    for path in here.keys() - {label}:
        np.testing.assert_array_equal(here[path], there[path], err_msg=path)
    assert f"diffusion: {label}: new, 3 classes, 10 in the source; the row of no class" in (
        caplog.text
    )
    require_same(found.ema["diffusion"], found.params["diffusion"])

    # another grid: the tables of LightningDiT are computed
    larger = at_size(get_config(), 32)
    larger.diffusion.init_from = str(tmp_path / "source")
    session = opened(larger, tmp_path / "grid")
    fine_tuning.check(session, "diffusion")
    init = diffusion.make_step(larger, (8, 8, 4), np.zeros(4), np.ones(4))[0]
    state = init(jax.random.key(0))
    found = jax.device_get(fine_tuning.start(session, "diffusion", state))
    np.testing.assert_array_equal(
        found.rest["diffusion"]["dit"]["pos_embed"], state.rest["diffusion"]["dit"]["pos_embed"]
    )
    assert "dit/pos_embed: new, computed for 64 positions, 16 in the source" in caplog.text
    require_same(found.params["diffusion"], source.ema["diffusion"])


def test_another_meaning_of_the_output_is_warned_of(tmp_path, caplog):
    config = get_config()
    trained(tmp_path / "source", "diffusion", config)
    config.diffusion.init_from = str(tmp_path / "source")
    config.diffusion.flow.prediction = "noise"
    started("diffusion", config, tmp_path / "new")
    assert "diffusion.flow.prediction is 'noise', the source was trained with 'velocity'" in (
        caplog.text
    )


def test_configs_that_contradict_themselves_are_refused(config):
    config.tokenizer.init_optimizer = True
    with pytest.raises(ConfigError, match=r"tokenizer\.init_from is empty"):
        validate(config)
    config = pae_config()
    config.tokenizer.init_from = "somewhere"
    with pytest.raises(ConfigError, match=r"from_teacher='\(\)'"):
        validate(config)
    config.tokenizer.from_teacher = ()
    validate(config)
