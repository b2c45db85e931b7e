"""PAE through the stages: prior refinement, then the tokenizer on a frozen backbone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import get_config

from gae_jax.commands.cli import run_command
from gae_jax.config.validate import validate
from gae_jax.nn.network import fingerprint
from gae_jax.pretrained.backbone import backbone_network
from gae_jax.run.load import load
from gae_jax.run.run import Run
from gae_jax.run.session import Session
from gae_jax.runtime.errors import ConfigError
from gae_jax.stages import tokenizer
from gae_jax.tokenizers.gae_teacher import teacher_network
from gae_jax.train.checkpoint import save_weights
from gae_jax.train.fit import init_state, jit_step
from gae_jax.train.log import read_metrics
from gae_jax.train.state import TrainState
from gae_jax.train.warm_start import start_from

OWN = ("l1", "structure", "semantics")


def pae_config():
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
    config.tokenizer.optim.warmup_steps = 0
    config.tokenizer.train.update(steps=4, log_every=1)
    return config


def finish(session, name, network):
    """A stage of the run that is finished, with the weights that it would start with."""
    folder = session.run.stage(name)
    sections = {key: session.config[key] for key in ("seed", "data", "backbone", "teacher")}
    folder.open(sections, {}, fresh=True)
    rng = np.random.default_rng(0)
    arrays = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), network.abstract)
    save_weights(folder.path, "params", {name: arrays})
    folder.finish(
        seconds=0.0,
        fingerprint=fingerprint(arrays),
        weights="params",
        parameters={},
        num_classes=10,
    )


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    """A run whose backbone and teacher are finished, and drawn."""
    config = pae_config()
    validate(config)
    path = tmp_path_factory.mktemp("pae") / "run"
    session = Session(config, Run(path), devices=tuple(jax.devices()[:1]))
    finish(session, "backbone", backbone_network(config.backbone, 10))
    sections = config.teacher.model, config.backbone
    finish(session, "teacher", teacher_network(*sections, "prior"))
    return session


@pytest.fixture(scope="module")
def trained(session):
    """(state at step 0, figures of the step after it, state then)."""
    stage = tokenizer.make_stage(session)
    step, shardings = jit_step(stage, session.mesh)
    state = stage.begin(init_state(stage, shardings, 0))
    before = jax.device_get((state.params["tokenizer"], state.rest["tokenizer"]))
    pixels = np.random.default_rng(1).integers(0, 256, (8, 16, 16, 3), np.uint8)
    phase = stage.phase(2)
    after, figures = step(state, {"image": pixels}, jax.random.key(0), stage.frozen, phase)
    after = jax.device_get((after.params["tokenizer"], after.rest["tokenizer"]))
    return before, {name: float(value) for name, value in figures.items()}, after


def test_a_step_of_all_terms(session, trained):
    _, figures, _ = trained
    weights = session.config.tokenizer.losses
    total = sum(weights[name] * figures[name] for name in (*OWN, "continuity"))
    np.testing.assert_allclose(figures["total"], total, rtol=1e-5)
    assert figures["continuity"] > 0
    # a projector that starts from the teacher's, on tokens that nothing modulates yet, gives its
    # latents
    assert figures["structure"] < 1e-5
    assert figures["semantics"] < 1e-4


def test_continuity_may_come_later(session):
    terms = [tokenizer.phase_of(session.config.tokenizer, step).terms for step in range(4)]
    assert ["continuity" in found for found in terms] == [False, False, True, True]


def test_the_backbone_is_the_run_s_and_stays_as_it_is(session, trained):
    backbone = load(session.run.stage("backbone"), session.mesh)[1][0]
    for params, rest in (trained[0], trained[2]):
        assert set(params) == {"pae"}
        jax.tree.map(np.testing.assert_array_equal, rest["encoder"]["encoder"], backbone["encoder"])
    jax.tree.map(np.testing.assert_array_equal, trained[0][1], trained[2][1])  # tables too
    changed = jax.tree.map(lambda a, b: not np.array_equal(a, b), trained[0][0], trained[2][0])
    parts = {name: any(jax.tree.leaves(part)) for name, part in changed["pae"].items()}
    assert parts == dict.fromkeys(parts, True)


def test_what_starts_from_the_teacher(session, trained):
    teacher = load(session.run.stage("teacher"), session.mesh)[1][0]
    params = trained[0][0]
    jax.tree.map(
        np.testing.assert_array_equal,
        params["pae"]["latent_compressor"],
        teacher["latent_compressor"],
    )
    state = TrainState(0, {"tokenizer": jax.tree.map(jnp.asarray, params)}, {}, {}, {})
    for parts, says in (
        ((("pae/nothing", "latent_compressor"),), "'pae/nothing', which the tokenizer does not"),
        ((("pae/decoder", "other"),), "'other', which the teacher does not have"),
        ((("pae/latent_compressor/1", "recon_head"),), "'recon_head' does not fit"),
    ):
        with pytest.raises(ConfigError, match=says):
            start_from(state, teacher, parts)


@pytest.mark.slow
def test_the_stages_from_the_command_line(tmp_path):
    """Prior refinement, then two steps without the term "continuity", then two with it."""
    session = Session(pae_config(), Run(tmp_path / "run"), devices=tuple(jax.devices()[:1]))
    for command in ("backbone", "teacher", "tokenizer"):
        run_command(command, session)
    assert {"representation", "gram"} <= set(read_metrics(session.run.stage("teacher").path)[0])
    rows = [row for row in read_metrics(session.run.stage("tokenizer").path) if "l1" in row]
    assert ["continuity" in row for row in rows] == [False, False, True, True]
    assert rows[0]["structure"] < 1e-5
    assert rows[-1]["structure"] > rows[0]["structure"]
    _, (params, rest) = load(session.run.stage("tokenizer"), session.mesh)
    backbone = load(session.run.stage("backbone"), session.mesh)[1][0]
    assert set(params) == {"pae"}
    jax.tree.map(np.testing.assert_array_equal, rest["encoder"]["encoder"], backbone["encoder"])


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
