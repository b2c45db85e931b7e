"""The teacher's arms: simpler downsamplers, and the projection on singular vectors."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gae_jax.commands.cli import run_command
from gae_jax.config.precision import NETWORKS, settings
from gae_jax.config.validate import validate
from gae_jax.data.latents import LatentSet
from gae_jax.interop.convert import export_torch
from gae_jax.interop.sizes import differing
from gae_jax.interop.tables import TEACHER
from gae_jax.nn.layers import rms_norm
from gae_jax.nn.network import Network
from gae_jax.nn.pixels import to_float
from gae_jax.porting.released import released
from gae_jax.run.load import load
from gae_jax.run.run import Run
from gae_jax.run.session import Session
from gae_jax.runtime.errors import UserError
from gae_jax.stages import teacher
from gae_jax.tokenizers.gae_teacher import (
    SecondMoment,
    SemanticTeacher,
    SVDTeacher,
    svd_projection,
    teacher_network,
)
from gae_jax.tokenizers.pae_target import structural_target
from gae_jax.train.fit import init_state, jit_step
from gae_jax.train.log import read_metrics

SIZES = dict(feature_dim=32, latent_dim=4, decoder_layers=1, num_patches=16, window_size=2, heads=2)


def session(config, path, **more):
    return Session(config, Run(path), devices=tuple(jax.devices()[:1]), **more)


@pytest.fixture(scope="module")
def with_backbone(tmp_path_factory):
    """A run that has a backbone only."""
    from small import get_config

    path = tmp_path_factory.mktemp("teacher") / "run"
    run_command("backbone", session(get_config(), path))
    return path


@pytest.fixture
def run(with_backbone, tmp_path):
    """A run directory of its own with that backbone."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "backbone").symlink_to(with_backbone / "backbone")
    return tmp_path / "run"


@pytest.fixture
def svd_config(plain_config):
    plain_config.teacher.kind = "svd"
    return plain_config


# Attention 4 C^2 (or 3 C^2 + C d), the Linear of the arm, and what all have: two tables, the head
# and a block of the decoder with its SwiGLU of width 256.
REST = 2 * 16 * 32 + 4 * 32 + 4 * 32**2 + 3 * 32 * 256
COUNTS = {
    "attention": 3 * 32**2 + 32 * 4 + REST,
    "attention_linear": 4 * 32**2 + 32 * 4 + REST,
    "attention_conv": 4 * 32**2 + 4 * 32 * 4 * 4 + REST,
}


@pytest.mark.parametrize("downsampler", COUNTS)
def test_every_arm_has_its_parameters_and_learns(downsampler, config, run):
    config.teacher.model.downsampler = downsampler
    validate(config)
    stage = teacher.make_stage(session(config, run))
    state, rows = steps_of(stage, session(config, run).mesh, 4)
    assert sum(x.size for x in jax.tree.leaves(state.params)) == COUNTS[downsampler]
    assert rows[-1]["cosine_distance"] < rows[0]["cosine_distance"]


def steps_of(stage, mesh, count):
    """The last state, and the figures of every step on one batch of noise."""
    step, shardings = jit_step(stage, mesh)
    state = init_state(stage, shardings, 0)
    pixels = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), np.uint8)
    rows = []
    for _ in range(count):
        state, figures = step(state, {"image": pixels}, jax.random.key(0), stage.frozen, None)
        rows.append({name: float(value) for name, value in figures.items()})
    return state, rows


def test_parts_of_a_batch_and_bfloat16(config, run):
    """Parts cost nothing but time; half precision is that of activations and frozen matrices."""
    found = {}
    for name, parts, compute, dtype in (
        ("plain", 1, {}, "float32"),
        ("parts", 4, dict(remat="nothing_saveable"), "float32"),
        ("half", 1, dict(dtype="bfloat16"), "bfloat16"),
        ("frozen half", 1, {}, "bfloat16"),
    ):
        config.teacher.train.accumulate = parts
        config.precision.train.update(dict(remat="none", dtype="float32") | compute)
        config.precision.frozen.dtype = dtype
        validate(config)
        stage = teacher.make_stage(session(config, run))
        assert stage.frozen[0]["encoder"]["patch_embed"]["kernel"].dtype == jnp.dtype(dtype)
        state, rows = steps_of(stage, session(config, run).mesh, 2)
        assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
        found[name] = np.array([row["cosine_distance"] for row in rows])
    np.testing.assert_allclose(found["parts"], found["plain"], rtol=1e-5)
    for name in ("half", "frozen half"):
        np.testing.assert_allclose(found[name], found["plain"], rtol=2e-2)
        assert (found[name] != found["plain"]).all()
        # a mean of tokens' distances in bf16 would have eight bits
        assert (found[name].astype(jnp.bfloat16) != found[name]).all()
    assert (found["half"] != found["frozen half"]).all()


def test_what_the_prior_refinement_does_not_compute_is_refused(config):
    config.teacher.kind = "prior"
    validate(config)
    config.precision.preset, config.precision.train.remat = "fast", "nothing_saveable"
    validate(config)
    assert settings(config, "teacher") == NETWORKS["teacher"].defaults
    assert settings(config, "backbone")["dtype"] == "bfloat16"
    config.precision.override = ("teacher.dtype=bfloat16",)
    with pytest.raises(UserError, match=r"teacher\.dtype is 'bfloat16', but teacher\.kind 'prior'"):
        validate(config)


def test_the_prior_refinement_learns(config, run):
    """PAE's stage 0: tokens that come back, and a Gram matrix that follows the target's."""
    config.teacher.kind = "prior"
    config.teacher.optim.update(learning_rate=1e-2, warmup_steps=1)
    validate(config)
    now = session(config, run)
    stage = teacher.make_stage(now)
    state, rows = steps_of(stage, now.mesh, 6)
    assert set(rows[0]) == {"representation", "gram"}
    assert all(rows[-1][name] < rows[0][name] for name in rows[0])
    network = teacher_network(config.teacher.model, config.backbone, "prior")
    backbone = load(now.run.stage("backbone"), now.mesh)
    terms = teacher.terms(config.teacher, backbone[0], network)

    @jax.jit
    def by_hand(arrays, images):
        features = backbone[0](*backbone[1]).features(images, affine=False, antialias=False)
        model = network(*arrays)
        latents = model.downsample(features)
        target = structural_target(features, images, strength=0.4)
        return features, latents, model.reconstruct(latents), target

    arrays = state.params["teacher"], state.rest["teacher"]
    images = to_float(jnp.asarray(np.random.default_rng(1).integers(0, 256, (4, 16, 16, 3))))
    found = jax.jit(terms)(stage.frozen, arrays, (images + 1) * 127.5)
    features, latents, back, target = by_hand(arrays, images)
    np.testing.assert_allclose(jnp.var(features, axis=-1), 1, rtol=1e-3)
    np.testing.assert_allclose(found["representation"], jnp.mean((back - features) ** 2), rtol=1e-4)
    unit = [x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (latents, target)]
    grams = [jnp.einsum("bnc,bmc->bnm", x, x) for x in unit]
    np.testing.assert_allclose(found["gram"], jnp.mean((grams[0] - grams[1]) ** 2), rtol=1e-3)


@pytest.mark.parametrize("downsampler", COUNTS)
def test_arms_by_hand(downsampler):
    """Latents of unit mean square; each token's own but for the attention, outside of windows."""
    network = Network(partial(SemanticTeacher, **SIZES, downsampler=downsampler))
    model = network(*network.init(jax.random.key(0)))
    features = jax.random.normal(jax.random.key(1), (2, 16, 32))
    latents = model.downsample(features)
    assert latents.shape == (2, 16, 4)
    np.testing.assert_allclose(jnp.mean(latents**2, axis=-1), 1, rtol=1e-3)  # eps
    attended = model.projector_block["attn"](rms_norm(rms_norm(features) + model.pos_embed_pro))
    if downsampler == "attention":
        expected = rms_norm(attended)
    elif downsampler == "attention_linear":
        expected = rms_norm(rms_norm(attended) @ model.to_latent.kernel[...])
    else:
        rows = rms_norm(attended)[:, jnp.array([0, 1, 4, 5])].reshape(2, -1)
        expected = rms_norm((rows @ model.to_latent.kernel[...]).reshape(2, 4, 4))
        latents = latents[:, jnp.array([0, 1, 4, 5])]
    np.testing.assert_allclose(latents, expected, rtol=1e-4, atol=1e-5)


def test_a_linear_per_token_is_a_convolution_of_window_one():
    linear, conv = (
        Network(partial(SemanticTeacher, **SIZES | more))
        for more in (dict(downsampler="attention_linear"), dict(window_size=1))
    )
    arrays = linear.init(jax.random.key(0))
    features = jax.random.normal(jax.random.key(1), (2, 16, 32))
    np.testing.assert_array_equal(
        linear(*arrays).downsample(features), conv(*arrays).downsample(features)
    )


def test_an_unknown_downsampler_is_refused():
    with pytest.raises(ValueError, match="use one of attention, attention_linear, attention_conv"):
        Network(partial(SemanticTeacher, **SIZES, downsampler="conv"))


@pytest.mark.parametrize(
    ("written", "asked", "flags"),
    [
        *((name, name, []) for name in COUNTS),
        ("attention", "attention_conv", ["downsampler=attention"]),
        ("attention_conv", "attention", ["downsampler=attention_conv"]),
        ("attention_conv", "attention_linear", ["downsampler=attention_conv"]),
        # on disk a Linear for every token is a convolution of window 1
        ("attention_linear", "attention_conv", ["window_size=1"]),
        ("attention_linear", "attention", ["downsampler=attention_conv", "window_size=1"]),
    ],
)
def test_a_file_of_another_arm_is_answered_with_flags(written, asked, flags):
    network = Network(partial(SemanticTeacher, **SIZES, downsampler=written))
    tensors = export_torch(TEACHER, *network.init(jax.random.key(0)), **SIZES, downsampler=written)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    section = SIZES | dict(downsampler=asked)
    found = differing("teacher", shapes, section, "teacher.model")
    assert found == [f"--config.teacher.model.{flag}" for flag in flags]


def test_the_projection_is_that_of_all_tokens_at_once():
    rng = np.random.default_rng(0)
    features = (rng.normal(size=(50, 16, 8)) * np.arange(1, 9) + 0.5).astype(np.float32)
    moment = SecondMoment(8)
    for start in range(0, 50, 16):  # the last batch is filled up with what must not count
        batch = np.resize(features[start : start + 16], (16, 16, 8))
        moment.add(jnp.asarray(batch), np.arange(16) < 50 - start)
    assert moment.images == 50
    tokens = np.asarray(rms_norm(features), np.float64).reshape(-1, 8)
    np.testing.assert_allclose(moment.total, tokens.T @ tokens, rtol=1e-5, atol=1e-3)
    once = SecondMoment(8)
    once.add(jnp.asarray(features))
    np.testing.assert_allclose(moment.total, once.total, rtol=1e-5, atol=1e-3)
    _, values, rows = np.linalg.svd(tokens)
    found = svd_projection(moment.total, 3)
    np.testing.assert_allclose(np.sum(found * rows[:3].T, axis=0) ** 2, 1, rtol=1e-9)
    np.testing.assert_allclose(found.T @ found, np.eye(3), atol=1e-12)
    lengths = np.linalg.norm(tokens @ found, axis=0)
    np.testing.assert_allclose(lengths, values[:3], rtol=1e-6)
    largest = found[np.argmax(np.abs(found), axis=0), range(3)]
    assert (largest > 0).all()
    assert svd_projection(moment.total, 8).shape == (8, 8)


def test_all_directions_lose_nothing():
    network = Network(partial(SVDTeacher, feature_dim=8, latent_dim=8, num_patches=4))
    features = jax.random.normal(jax.random.key(0), (2, 4, 8))
    moment = SecondMoment(8)
    moment.add(features)
    vectors = svd_projection(moment.total, 8)
    model = network({}, {"projection": jnp.asarray(vectors, jnp.float32)})
    latents = model.downsample(features)
    np.testing.assert_allclose(jnp.mean(latents**2, axis=-1), 1, rtol=1e-4)
    np.testing.assert_allclose(model.reconstruct(latents), rms_norm(features), atol=1e-5)
    with pytest.raises(ValueError, match="8 channels have no 9 directions"):
        Network(partial(SVDTeacher, feature_dim=8, latent_dim=9, num_patches=4))


def all_tokens(now):
    """rms(features) of every training image, [images, N, C]."""
    network, arrays = load(now.run.stage("backbone"), now.mesh)
    found = []
    for batch in now.data.ordered(now.source("train"), 256):
        features = network(*arrays).features(to_float(jnp.asarray(batch["image"])))
        found.append(np.asarray(rms_norm(features), np.float64)[batch["valid"]])
    return np.concatenate(found)


@pytest.mark.parametrize("batch_size", [16, 1000])  # 1000: the last batch is half of it
def test_svd_teacher_of_the_digits(svd_config, run, batch_size):
    svd_config.teacher.train.batch_size = batch_size
    validate(svd_config)
    now = session(svd_config, run)
    run_command("teacher", now)
    folder = now.run.stage("teacher")
    tokens = all_tokens(now)
    assert folder.done["images"] == len(tokens) == len(now.source("train"))
    assert folder.done["parameters"] == {"teacher": 32 * 4}
    network, arrays = load(folder, now.mesh)
    assert arrays[0] == {}
    rows = np.linalg.svd(tokens.reshape(-1, 32), full_matrices=False)[2][:4]
    found = np.asarray(arrays[1]["projection"], np.float64)
    signs = np.sign(np.sum(found * rows.T, axis=0))
    np.testing.assert_allclose(found, rows.T * signs, atol=1e-4)
    latents = network(*arrays).downsample(jnp.asarray(tokens[:8], jnp.float32))
    np.testing.assert_allclose(
        latents, rms_norm(jnp.asarray(tokens[:8] @ found, jnp.float32)), atol=1e-4
    )
    (row,) = read_metrics(folder.path)
    kept = np.sum((tokens @ found) ** 2) / np.sum(tokens**2)
    np.testing.assert_allclose(row["kept_share"], kept, rtol=1e-5)
    assert 0 < row["eval/cosine_distance"] < 1
    before = (folder.path / "done.json").stat().st_mtime_ns
    run_command("teacher", session(svd_config, run))
    assert (folder.path / "done.json").stat().st_mtime_ns == before
    svd_config.teacher.kind = "learned"
    with pytest.raises(UserError, match=r"teacher.kind: 'svd' there, 'learned' asked for"):
        run_command("teacher", session(svd_config, run))


def test_a_number_of_images_is_drawn_by_the_seed(svd_config, run):
    """Of all classes, none twice, and the same again, on eight devices."""
    svd_config.teacher.svd.images = 100
    now = session(svd_config, run)
    network, arrays = load(now.run.stage("backbone"), now.mesh)
    found = teacher.second_moment(now, network, arrays)
    assert found.images == 100
    batches = now.data.training_batches(now.source("train"), 100, svd_config.seed).read()
    first = next(iter(batches))
    assert set(first["label"]) == set(range(10))
    expected = SecondMoment(32)
    expected.add(network(*arrays).features(to_float(jnp.asarray(first["image"]))))
    np.testing.assert_allclose(found.total, expected.total, rtol=1e-5, atol=1e-3)
    many = Session(svd_config, Run(run))
    again = teacher.second_moment(many, *load(many.run.stage("backbone"), many.mesh))
    np.testing.assert_allclose(again.total, found.total, rtol=1e-5, atol=1e-3)


@pytest.mark.slow
def test_the_pipeline_runs_on_an_svd_teacher_and_exports_the_rest(svd_config, run, capsys):
    now = session(svd_config, run)
    run_command("demo", now)
    assert LatentSet.open(run / "latents").manifest["tokenizer"]
    assert (run / "report.html").exists()
    capsys.readouterr()
    run_command("export-torch", now)
    assert "teacher: left out; teacher.kind is 'svd'" in capsys.readouterr().out
    names = {path.stem for path in (run / "export").glob("*.safetensors")}
    assert {"gae", "dit", "latents_stats"} <= names
    assert "teacher" not in names


def test_an_svd_teacher_is_not_exported_or_imported_alone(svd_config, run):
    now = session(svd_config, run)
    run_command("teacher", now)
    svd_config.export_torch.networks = ("teacher",)
    with pytest.raises(UserError, match=r"no finished teacher to export; teacher: teacher\.kind"):
        run_command("export-torch", now)
    assert not (run / "export").exists()
    with pytest.raises(UserError, match="no counterpart in the released code"):
        released("teacher", svd_config.to_dict())
