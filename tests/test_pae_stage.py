"""PAE through the stages: prior refinement, then the tokenizer on a frozen backbone."""

import dataclasses

import jax
import numpy as np
import pytest
from small import get_config

from gae_jax.__main__ import run_command
from gae_jax.errors import ConfigError
from gae_jax.run import Run
from gae_jax.stages import tokenizer
from gae_jax.stages.lending import start_from
from gae_jax.stages.load import load
from gae_jax.stages.session import Session
from gae_jax.train.fit import init_state, jit_step
from gae_jax.train.log import read_metrics
from gae_jax.validation import validate

OWN = ("l1", "structure", "semantics")


def pae_config():
    """Two steps without the term "continuity", then two with it."""
    config = get_config()
    config.teacher.kind = "prior"
    config.teacher.model.heads = 2
    config.teacher.train.update(steps=2, log_every=1)
    config.tokenizer.name = "pae"
    config.tokenizer.pae.update(
        num_heads=2,
        delta_depth=1,
        latent_dim=4,
        decoder_patch_size=4,
        decoder_hidden_size=16,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=32,
    )
    config.tokenizer.from_teacher = (("pae/latent_compressor", "latent_compressor"),)
    terms = dict(structure=0.2, semantics=1.0, continuity=0.5)
    config.tokenizer.losses.update(perceptual=0.0, gan=0.0, align=0.0, **terms)
    config.tokenizer.phases = ((2, "", OWN), (2, "", (*OWN, "continuity")))
    config.tokenizer.health.update(pictures=0, probe=0)
    config.tokenizer.train.update(steps=4, log_every=1)
    return config


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    """A run whose backbone, teacher and tokenizer are finished."""
    config = pae_config()
    validate(config)
    path = tmp_path_factory.mktemp("pae") / "run"
    session = Session(config, Run(path), devices=tuple(jax.devices()[:1]))
    for command in ("teacher-backbone", "teacher", "tokenizer"):
        run_command(command, session)
    return session


def test_terms_come_with_their_phase(session):
    rows = [row for row in read_metrics(session.run.stage("tokenizer").path) if "l1" in row]
    assert [set(OWN) <= set(row) for row in rows] == [True] * 4
    assert ["continuity" in row for row in rows] == [False, False, True, True]
    for row in rows:
        weights = session.config.tokenizer.losses
        total = sum(weights[name] * row[name] for name in (*OWN, "continuity") if name in row)
        np.testing.assert_allclose(row["total"], total, rtol=1e-5)
    # a projector that starts from the teacher's, on tokens that nothing modulates yet, gives its
    # latents: up to the second norm of these tokens
    assert rows[0]["structure"] < 1e-5
    assert rows[0]["semantics"] < 1e-4
    assert rows[-1]["structure"] > rows[0]["structure"]


def test_the_backbone_is_the_run_s_and_stays_as_it_is(session):
    backbone = load(session.run.stage("backbone"), session.mesh)[1]
    params, rest = load(session.run.stage("tokenizer"), session.mesh)[1]
    assert set(params) == {"pae"}
    jax.tree.map(np.testing.assert_array_equal, rest["encoder"]["encoder"], backbone[0]["encoder"])


def test_the_teacher_has_its_figures(session):
    rows = read_metrics(session.run.stage("teacher").path)
    assert {"representation", "gram"} <= set(rows[0])
    _, (params, rest) = load(session.run.stage("teacher"), session.mesh)
    assert {"latent_compressor", "recon_head"} <= set(params)
    assert set(rest) == {"pos_embed_dec"}


def test_what_starts_from_the_teacher(session):
    stage = tokenizer.make_stage(session)
    fresh = dataclasses.replace(stage, begin=None)
    _, shardings = jit_step(fresh, session.mesh)
    state = init_state(fresh, shardings, 0)
    teacher = load(session.run.stage("teacher"), session.mesh)[1][0]
    pairs = session.config.tokenizer.from_teacher
    found = start_from(state, teacher, pairs).params["tokenizer"]["pae"]
    own = state.params["tokenizer"]["pae"]
    same = jax.tree.map(np.array_equal, found["latent_compressor"], teacher["latent_compressor"])
    assert all(jax.tree.leaves(same))
    others = {name for name in own if name != "latent_compressor"}
    assert all(found[name] is own[name] for name in others)
    for parts, says in (
        ((("pae/nothing", "latent_compressor"),), "'pae/nothing', which the tokenizer does not"),
        ((("pae/decoder", "other"),), "'other', which the teacher does not have"),
        ((("pae/latent_compressor/1", "recon_head"),), "'recon_head' does not fit"),
    ):
        with pytest.raises(ConfigError, match=says):
            start_from(state, teacher, parts)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("noise", "off", "noise is 'off'; use one of tangent, isotropic"),
        ("angles", (50.0, 40.0), r"angles is \(50.0, 40.0\); give two between 0 and 90, growing"),
        ("jitter", 1.0, r"jitter is 1.0; it must be in \[0, 1\)"),
        ("decoder_patch_size", 8, "makes images of 32 pixels, but data.image_size is 16"),
        ("latent_dim", 3, "tokenizer.pae.latent_dim 3 must be equal"),
        ("num_heads", 4, "teacher.model.heads is 2 and tokenizer.pae.num_heads 4; they must be"),
    ],
)
def test_settings_that_do_not_fit_are_refused(field, value, says):
    config = pae_config()
    config.tokenizer.pae[field] = value
    with pytest.raises(ConfigError, match=says):
        validate(config)
    config = pae_config()
    config.tokenizer.losses.velocity = 1.0
    with pytest.raises(ConfigError, match="velocity, which tokenizer 'pae' cannot serve"):
        validate(config)
