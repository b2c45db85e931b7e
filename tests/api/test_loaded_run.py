"""`gae_jax.load`: encoding, decoding and sampling, with the numbers of the commands."""

import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from small import get_config

import gae_jax
from gae_jax.commands import draw
from gae_jax.data.latents import LatentSet
from gae_jax.evaluation.archives import open_samples
from gae_jax.run.load import load
from gae_jax.run.recorded_config import get_config as recorded
from gae_jax.run.run import Run
from gae_jax.run.session import Session
from gae_jax.runtime.errors import UserError
from gae_jax.runtime.files import read_json, write_json
from gae_jax.tokenizers import sections_of, tokenizer_network
from gae_jax.tokenizers.base import Tokenizer
from gae_jax.train.checkpoint import save_weights

ONE = jax.devices()[:1]


@pytest.fixture(scope="module")
def run(small_run):
    return gae_jax.load(small_run, devices=ONE)


@pytest.fixture(scope="module")
def images(small_run):
    """The first training images of the run, uint8 [64, 16, 16, 3]."""
    session = Session(recorded(str(small_run)), Run(small_run))
    return next(iter(session.data.ordered(session.source("train"), 64)))["image"]


@pytest.fixture
def traces(monkeypatch):
    """Batch sizes for which the encoder was traced."""
    sizes, encode = [], Tokenizer.encode

    def spy(self, images):
        sizes.append(len(images))
        return encode(self, images)

    monkeypatch.setattr(Tokenizer, "encode", spy)
    return sizes


def test_a_run_says_what_it_takes(run, small_run):
    assert (run.path, run.image_size, run.latent_shape) == (Path(small_run), 16, (4, 4, 4))
    assert run.class_names == [str(digit) for digit in range(10)]
    assert repr(run) == f"gae_jax.load({str(small_run)!r})"


def test_encode_gives_the_latents_of_the_stage(run, images, small_run):
    latents = run.encode(images)
    assert (latents.dtype, latents.shape) == (np.float32, (64, 4, 4, 4))
    stored = LatentSet.open(small_run / "latents").views()[:64][:, 0]
    np.testing.assert_allclose(latents, stored.astype(np.float32), rtol=1e-5, atol=1e-6)


def test_all_kinds_of_images_are_encoded_alike(run, images):
    few = images[:4]
    floats = few.astype(np.float32) / 127.5 - 1
    expected = run.encode(few)
    for same in (
        floats,
        floats.astype(np.float64),
        [Image.fromarray(x) for x in few],
        jax.numpy.asarray(few),
    ):
        np.testing.assert_allclose(run.encode(same), expected, rtol=1e-5, atol=1e-6)


def test_odd_batches_compile_nothing_new(small_run, images, traces):
    run = gae_jax.load(small_run, devices=ONE)
    latents = run.encode(images[:8])
    for count in (5, 6, 7, 8):
        few = run.encode(images[:count])
        assert few.shape == (count, 4, 4, 4)
        np.testing.assert_array_equal(few, latents[:count])
    assert traces == [8]
    run.encode(images[:3])
    run.encode(images[:4])
    assert traces == [8, 4]
    done = []
    many = run.encode(images[:11], batch_size=4, callback=lambda *x: done.append(x))
    np.testing.assert_allclose(many[:8], latents, rtol=1e-5, atol=1e-6)
    assert traces == [8, 4]
    assert done == [(4, 11), (8, 11), (11, 11)]


def test_devices_share_a_batch(small_run, run, images, traces):
    several = gae_jax.load(small_run)
    assert several.mesh.size == 8
    np.testing.assert_allclose(
        several.encode(images[:11]), run.encode(images[:11]), rtol=1e-4, atol=1e-5
    )
    assert traces[0] == 16
    pixels = several.decode(run.encode(images[:3])).astype(int)
    assert np.abs(pixels - run.decode(run.encode(images[:3]))).max() <= 1


def test_decode_gives_pixels(run, images):
    latents = run.encode(images[:5])
    pixels = run.decode(latents)
    assert (pixels.dtype, pixels.shape) == (np.uint8, (5, 16, 16, 3))
    network, arrays = load(run._session.run.stage("tokenizer"), run.mesh)
    values = np.asarray(network(*arrays).decode(jax.numpy.asarray(latents)))
    np.testing.assert_allclose(pixels, np.clip(127.5 * values + 128, 0, 255), atol=1.01)
    np.testing.assert_array_equal(run.decode(latents, seed=3), pixels)
    with pytest.raises(UserError, match="steps is 5, but the decoder of tokenizer 'gae' is one"):
        run.decode(latents, steps=5)


def test_a_decoder_that_draws_takes_a_seed_and_steps(tmp_path):
    config = get_config()
    config.tokenizer.name = "dgae"
    config.tokenizer.dgae.update(
        latent_dim=3,
        decode_steps=3,
        encoder=dict(ch=32, ch_mult=(1, 1, 1), num_res_blocks=0, attn_resolutions=()),
        decoder=dict(
            model_channels=32,
            num_res_blocks=0,
            channel_mult=(1,),
            attention_resolutions=(),
            num_head_channels=32,
            use_scale_shift_norm=True,
        ),
    )
    session = Session(config, Run(tmp_path), devices=tuple(ONE))
    folder = session.run.stage("tokenizer")
    folder.open(session.made_of(sections_of(config.tokenizer)), {}, fresh=False)
    params, rest = tokenizer_network(config).init(jax.random.key(0))
    params = jax.tree.map(lambda x: x + 0.02, params)  # its last layer is 0
    save_weights(folder.path, "params", {"tokenizer": (params, rest)})
    folder.finish(weights="params", fingerprint="abc")
    run = gae_jax.load(tmp_path, devices=ONE)
    latents = np.zeros((2, 4, 4, 3), np.float32)
    first = run.decode(latents)
    assert np.any(first[0] != first[1])
    np.testing.assert_array_equal(run.decode(latents[:1]), first[:1])
    assert np.any(run.decode(latents, seed=1) != first)
    assert np.any(run.decode(latents, steps=1) != first)
    assert len(run._programs._loaded) == 1  # the weights are loaded once
    with pytest.raises(UserError, match=r"steps is 0; it must be at least 1"):
        run.decode(latents, steps=0)
    with pytest.raises(
        UserError, match=r"latents does not exist|diffusion does not exist; run first"
    ):
        run.sample(3)


def test_sample_draws_the_images_of_the_command(run, small_run, tmp_path):
    arguments = [str(small_run), "--class=7", "--count=16", "--seed=0", "--guidance=3.3"]
    options = draw.parse([*arguments, f"--out={tmp_path / 'a'}"])
    folder = draw.draw(options, devices=tuple(ONE))
    expected = np.concatenate(list(open_samples(folder).batches(64)))
    done = []
    images = run.sample(class_id=7, count=16, guidance=3.3, callback=lambda *x: done.append(x))
    assert images.dtype == np.uint8
    np.testing.assert_array_equal(images, expected)
    assert done == [(16, 16)]
    programs = len(run._programs._jitted)
    np.testing.assert_array_equal(run.sample(["7"], 16, guidance=3.3, seed=0), expected)
    assert np.any(run.sample(7, 16, guidance=3.3, seed=1) != expected)
    program = list(run._programs._jitted.values())[-1]
    traced = program._cache_size()
    for count in (9, 13):
        np.testing.assert_array_equal(run.sample(7, count, guidance=3.3), expected[:count])
    assert program._cache_size() == traced
    others = run.sample(np.array([3, 7]), 8, guidance=3.3)
    np.testing.assert_array_equal(others[8:], expected[8:])
    assert len(run._programs._jitted) == programs


def test_options_of_sampling_count(run):
    images = run.sample(1, 2)
    for options in ({"steps": 5, "method": "heun"}, {"sampler": "sde"}):
        assert np.any(run.sample(1, 2, **options) != images), options
    early, late = (run.sample(1, 2, guidance=900, interval=at) for at in ((0, 0.1), (0.9, 1)))
    assert np.any(early != images)
    np.testing.assert_array_equal(late, run.sample(1, 2, guidance=1))  # no step begins there
    np.testing.assert_array_equal(run.sample(1, 2, guidance=0), run.sample("none", 2))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (
            lambda run: run.encode(np.zeros((2, 8, 8, 3), np.uint8)),
            r"shape \[2, 8, 8, 3\]; this run takes \[B, 16, 16, 3\]; resize",
        ),
        (lambda run: run.encode(np.zeros((16, 16, 3), np.uint8)), r"one image is images\[None\]"),
        (lambda run: run.encode(np.zeros((2, 3, 16, 16))), r"transpose\(0, 2, 3, 1\)"),
        (lambda run: run.encode(np.zeros((0, 16, 16, 3), np.uint8)), "images is empty"),
        (lambda run: run.encode(np.zeros((2, 16, 16, 3), int)), "dtype int64; give uint8"),
        (
            lambda run: run.encode(np.full((2, 16, 16, 3), 255.0)),
            r"values from 255 to 255; floats must be in \[-1, 1\]: give uint8",
        ),
        (lambda run: run.encode(np.full((2, 16, 16, 3), -1.5)), r"clip them: images.clip\(-1, 1\)"),
        (lambda run: run.encode(np.full((2, 16, 16, 3), np.nan)), "replace the NaNs"),
        (lambda run: run.encode(Image.new("RGB", (16, 16))), "one PIL image; give a list"),
        (
            lambda run: run.encode([Image.new("RGB", (16, 9))]),
            r"images\[0\] has 16 x 9 pixels.*fit",
        ),
        (
            lambda run: run.encode([Image.new("RGB", (16, 16)), 3]),
            r"images\[1\] is int, but others",
        ),
        (lambda run: run.encode([[1], [2, 3]]), "images cannot be made an array"),
        (lambda run: run.encode("x.png"), "images has shape"),
        (
            lambda run: run.encode(np.zeros((2, 16, 16, 3)), batch_size=0),
            "batch_size is 0; it must be at least 1",
        ),
        (lambda run: run.decode(np.zeros((2, 4, 4, 5))), r"latents are \[B, 4, 4, 4\]"),
        (lambda run: run.decode(np.zeros((4, 4, 4))), r"one latent is latents\[None\]"),
        (lambda run: run.decode(np.zeros((2, 4, 4, 4), int)), "dtype int64; give floats"),
        (
            lambda run: run.decode(np.full((2, 4, 4, 4), np.inf)),
            r"latents\[0\] has a NaN or an inf",
        ),
        (lambda run: run.decode(np.zeros((2, 4, 4, 4)), seed=-1), "seed is -1; it must be from 0"),
        (lambda run: run.sample(10), "class_id=10: there is no such class; give .*from 0 to 9"),
        (lambda run: run.sample(True), "class_id=True: there is no such class"),
        (lambda run: run.sample(1.5), "class_id=1.5: there is no such class"),
        (lambda run: run.sample(None), "class_id=None: there is no such class"),
        (lambda run: run.sample("77"), "class_id=77: there is no class 77; they are 0 to 9"),
        (lambda run: run.sample("seven"), "class_id=seven: there is no class of that name"),
        (lambda run: run.sample([]), "class_id is empty"),
        (lambda run: run.sample(3, 0), "count is 0; it must be at least 1"),
        (lambda run: run.sample(3, steps=1), "steps is 1; it must be at least 2"),
        (lambda run: run.sample(3, guidance=-1), "guidance is -1; it must be at least 0"),
        (lambda run: run.sample(3, guidance="3"), "guidance is '3'; it must be a finite number"),
        (lambda run: run.sample(3, seed=2**32), "seed is 4294967296"),
        (lambda run: run.sample(3, sampler="x"), "sampler is 'x'; use sde or ode"),
        (lambda run: run.sample(3, method="x"), "sample.ode.method is 'x'"),
        (
            lambda run: run.sample(3, interval=(0.5, 0.1)),
            r"interval is \(0.5, 0.1\); give \(low, high\)",
        ),
        (lambda run: run.sample(3, interval=3), "interval is 3; give"),
        (
            lambda run: run.sample(3, interval=(0, 1), guidance=1),
            "guidance=1 is no guidance; give guidance=W too",
        ),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(call, says, run):
    with pytest.raises(UserError, match=says):
        call(run)


def test_a_model_without_a_null_class_has_no_guidance(small_run, tmp_path):
    for stage in ("tokenizer", "diffusion"):
        shutil.copytree(small_run / stage, tmp_path / stage)
    path = tmp_path / "diffusion" / "config.json"
    made = read_json(path)
    made["config"]["diffusion"]["model"]["class_dropout_prob"] = 0.0
    write_json(path, made)
    run = gae_jax.load(tmp_path)
    with pytest.raises(UserError, match="there is no null class to guide away from"):
        run.sample(3, guidance=3.3)
    with pytest.raises(UserError, match="class_id=none is without a class, but the diffusion"):
        run.sample("none", guidance=1)


def test_what_is_no_run_is_refused_by_name(small_run, tmp_path):
    for name in ("hf://owner/name", "https://example.org/run"):
        with pytest.raises(UserError, match=f"{name}: only runs on this machine's disks"):
            gae_jax.load(name)
    with pytest.raises(UserError, match="nowhere is no directory; give a run directory"):
        gae_jax.load(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is no run directory"):
        gae_jax.load(tmp_path)
    (tmp_path / "config.json").write_text('{"gae_jax": "0.1.0", "tokenizer": {}}')
    with pytest.raises(UserError, match="is a folder of exported weights"):
        gae_jax.load(tmp_path)


def test_a_stage_that_is_not_finished_names_its_command(small_run, tmp_path):
    shutil.copytree(small_run / "tokenizer", tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "done.json").unlink()
    run = gae_jax.load(tmp_path)
    with pytest.raises(UserError, match="tokenizer is not finished; run first: python -m gae_jax"):
        run.encode(np.zeros((1, 16, 16, 3), np.uint8))


def test_the_package_has_these_names():
    assert {"load", "metrics", "LoadedRun", "UserError"} <= set(dir(gae_jax))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        gae_jax.nothing  # noqa: B018
