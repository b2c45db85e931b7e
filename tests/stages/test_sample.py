"""Sampling: labels, devices, batches, interruptions, autoguidance, and a run directory alone."""

import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from gae_jax.commands import cli, draw
from gae_jax.config import plain
from gae_jax.evaluation import sample_files
from gae_jax.evaluation.sample_files import class_grid, load_set, shown_classes
from gae_jax.run.run import Run
from gae_jax.run.session import Session
from gae_jax.runtime.errors import DataError, UserError
from gae_jax.runtime.files import read_json, write_json
from gae_jax.stages import sample
from gae_jax.stages.sample import make_labels


def session(config, path, devices=1, **more):
    return Session(config, Run(path), devices=tuple(jax.devices()[:devices]), **more)


@pytest.fixture
def copy(small_run, tmp_path):
    """A run whose diffusion model is trained and that has no samples."""
    copy = shutil.copytree(small_run, tmp_path / "run")
    shutil.rmtree(copy / "sample")
    return copy


def drawn(path, name="sde"):
    return load_set(Run(path).stage("sample").path, name)


def test_a_set_is_in_the_format_of_the_adm_evaluator(small_run):
    with np.load(small_run / "sample" / "sde" / "samples.npz") as file:
        assert file.files == ["arr_0", "arr_1"]
        assert file["arr_0"].shape == (20, 16, 16, 3)
        assert file["arr_0"].dtype == np.uint8
        labels = file["arr_1"]
    np.testing.assert_array_equal(np.bincount(labels), [2] * 10)
    assert (np.diff(labels) < 0).any(), "labels must be shuffled"
    assert sorted(p.name for p in (small_run / "sample" / "sde").iterdir()) == [
        "grid.png",
        "manifest.json",
        "samples.npz",
    ]


def test_manifests_say_how_samples_were_made(small_run, config):
    for name in ("sde", "ode"):
        manifest = read_json(small_run / "sample" / name / "manifest.json")
        assert plain(config.sample[name]).items() <= manifest.items()
        assert {"weights", "seed", "labels"} <= set(manifest)
    # three points: the ODE's two steps, of which the second is guided, and the SDE's three calls
    assert read_json(small_run / "sample" / "ode" / "manifest.json")["network_calls"] == 3
    assert read_json(small_run / "sample" / "sde" / "manifest.json")["network_calls"] == 3
    grid = Image.open(small_run / "sample" / "sde" / "grid.png")
    assert grid.size == (10 * 16 + 9 * 2, 2 * 16 + 2)


# 16 images on eight devices are both another batch and another number of devices
@pytest.mark.parametrize(
    ("devices", "batch_size"), [pytest.param(4, 12, marks=pytest.mark.slow), (8, 16)]
)
def test_samples_do_not_depend_on_devices_or_batches(devices, batch_size, small_run, copy, config):
    config.sample.batch_size = batch_size
    sample.run(session(config, copy, devices))
    for name in ("sde", "ode"):
        found, expected = (drawn(path, name)[0].astype(int) for path in (copy, small_run))
        assert np.abs(found - expected).max() <= 1


def test_an_interrupted_set_goes_on_where_it_stopped(small_run, copy, config, monkeypatch):
    write, written = sample.write_npz, []

    def full_disk(path, arrays):
        if len(written) == 2:
            raise OSError("no space left")
        written.append(path.name)
        write(path, arrays)

    monkeypatch.setattr(sample, "write_npz", full_disk)
    with pytest.raises(OSError, match="no space left"):
        sample.run(session(config, copy))
    assert written == ["00000000-00000007.npz", "00000008-00000015.npz"]
    assert not (copy / "sample" / "sde" / "samples.npz").exists()
    again = []
    monkeypatch.setattr(sample, "write_npz", lambda p, x: (again.append(p.name), write(p, x)))
    sample.run(session(config, copy))
    assert again[0] == "00000016-00000019.npz"
    assert len(again) == 1 + 3  # the rest of this set, and the other one
    for name in ("sde", "ode"):
        np.testing.assert_array_equal(drawn(copy, name)[0], drawn(small_run, name)[0])


def test_pngs_are_the_samples(copy, config):
    config.sample.update(png=True, sets=("ode",), classes=(3, 7))
    folder = sample.run(session(config, copy))
    images, labels, _ = drawn(copy, "ode")
    assert folder.done["sets"] == ["ode"]
    assert not (copy / "sample" / "sde").exists()
    assert sorted(labels) == [3, 3, 7, 7]
    for index, (pixels, label) in enumerate(zip(images, labels, strict=True)):
        path = copy / "sample" / "ode" / "png" / f"{index:06d}_{label:04d}.png"
        np.testing.assert_array_equal(np.asarray(Image.open(path)), pixels)


def test_labels(config):
    section = config.sample
    section.update(per_class=300, labels="random")
    random = make_labels(section, 10, seed=0)
    counts = np.bincount(random, minlength=10)
    assert len(random) == 3000
    assert counts.min() > 200
    assert len(set(counts)) > 1
    np.testing.assert_array_equal(random, make_labels(section, 10, seed=0))
    assert not np.array_equal(random, make_labels(section, 10, seed=1))
    section.update(labels="uniform", classes=(2, 5))
    np.testing.assert_array_equal(np.bincount(make_labels(section, 10, seed=0))[[2, 5]], 300)


def test_labels_of_a_file_keep_their_order(config, tmp_path):
    section, path = config.sample, tmp_path / "labels.txt"
    path.write_text("7\n3\n7\n")
    section.update(labels="file", labels_file=str(path))
    np.testing.assert_array_equal(make_labels(section, 10, seed=0), [7, 3, 7])
    np.save(tmp_path / "labels.npy", np.array([9, 0], np.int64))
    section.labels_file = str(tmp_path / "labels.npy")
    found = make_labels(section, 10, seed=0)
    np.testing.assert_array_equal(found, [9, 0])
    assert found.dtype == np.int32


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("1\n10\n", "has the class 10; the model knows 0 to 9"),
        ("1.5\n", "has the class 1.5"),
        ("cat\n", "cannot be read"),
        ("1 2\n3 4\n", r"has shape \[2, 2\]"),
        (None, "cannot be read"),
    ],
)
def test_a_bad_file_of_labels_is_refused(content, message, config, tmp_path):
    path = tmp_path / "labels.txt"
    if content is not None:
        path.write_text(content)
    config.sample.update(labels="file", labels_file=str(path))
    with pytest.raises(DataError, match=message):
        make_labels(config.sample, 10, seed=0)


def test_parts_of_other_labels_are_not_taken_up(copy, config, tmp_path, monkeypatch):
    """A file of labels that was edited while the set was half drawn."""
    path = tmp_path / "labels.txt"
    path.write_text("1\n" * 10)
    config.sample.update(labels="file", labels_file=str(path), sets=("ode",))

    def killed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(sample_files, "assemble", killed)
    with pytest.raises(KeyboardInterrupt):
        sample.run(session(config, copy))
    path.write_text("1\n" * 9 + "2\n")
    with pytest.raises(DataError, match="was drawn for other labels"):
        sample.run(session(config, copy))


@pytest.mark.parametrize("method", ["heun", "adams_bashforth", "dopri5"])
def test_other_solvers_draw_too_and_count_their_calls(method, copy, config):
    config.sample.update(sets=("ode",), per_class=1)
    config.sample.ode.update(method=method, guidance=1.0)
    sample.run(session(config, copy))
    images, _, manifest = drawn(copy, "ode")
    assert len(images) == 10
    calls = manifest["network_calls"]
    assert calls == {"heun": 4, "adams_bashforth": 2}.get(method, calls)
    assert calls % 6 == 2 or method != "dopri5"


@pytest.mark.slow  # test_rae_networks has another model's
def test_autoguidance_by_the_same_model_changes_nothing(small_run, copy, config):
    config.sample.update(sets=("ode",), weaker=str(small_run))
    config.sample.ode.update(guidance=3.0)
    sample.run(session(config, copy))
    guided, calls = drawn(copy, "ode")[0], drawn(copy, "ode")[2]["network_calls"]
    config.sample.weaker = ""
    config.sample.ode.guidance = 1.0
    sample.run(session(config, copy, fresh=True))
    alone = drawn(copy, "ode")[0]
    assert np.abs(guided.astype(int) - alone.astype(int)).max() <= 1
    assert calls == 3
    assert drawn(copy, "ode")[2]["network_calls"] == 2


def test_a_weaker_model_of_other_latents_is_refused(small_run, copy, config, tmp_path):
    other = shutil.copytree(small_run, tmp_path / "other")
    done = read_json(other / "diffusion" / "done.json")
    write_json(other / "diffusion" / "done.json", done | {"tokenizer": "91bc"})
    config.sample.weaker = str(other)
    with pytest.raises(DataError, match="latents of tokenizer 91bc, this run's is"):
        sample.run(session(config, copy))


def test_of_many_classes_evenly_spaced_ones_are_shown():
    labels = np.repeat(np.arange(200), 2)
    assert shown_classes(labels, 5).tolist() == [0, 50, 100, 149, 199]
    assert shown_classes(np.array([3, 1, 3]), 5).tolist() == [1, 3]
    images = np.broadcast_to(labels.astype(np.uint8)[:, None, None, None], (400, 4, 4, 3))
    grid = class_grid(images, labels, rows=2, columns=5, gap=1)
    assert grid[0, ::5, 0].tolist() == [0, 50, 100, 149, 199]


def test_class_grid_has_a_column_per_class():
    images = np.stack([np.full((4, 4, 3), label, np.uint8) for label in (1, 0, 1, 0, 1)])
    grid = class_grid(images, np.array([1, 0, 1, 0, 1]), rows=3, gap=1)
    assert grid.shape == (9, 9, 3)  # one class has two images only
    assert (grid[:4, :4] == 0).all()
    assert (grid[5:, 5:] == 1).all()
    assert (grid[4] == 255).all()


def test_images_of_one_class_form_a_square():
    images = np.stack([np.full((4, 4, 3), index, np.uint8) for index in range(6)])
    for count, edge, rows in ((1, 1, 1), (4, 2, 2), (5, 3, 2)):
        grid = class_grid(images, np.zeros(6, int), rows=count, gap=1)
        assert grid.shape == (5 * rows - 1, 5 * edge - 1, 3)
        corners = grid[::5, ::5, 0].ravel().tolist()
        assert corners == [*range(count), *[255] * (edge * rows - count)]


def options(path, *more):
    return draw.parse([str(path), *more])


def test_a_run_directory_alone_draws(copy, tmp_path, capsys):
    """Architecture, statistics, tokenizer and defaults are found in it, wherever it lies."""
    moved = tmp_path / "elsewhere"
    for stage in ("tokenizer", "diffusion"):
        shutil.copytree(copy / stage, moved / stage)
    status = cli.main(
        ["gae_jax", "sample", str(moved), "--class=3,7", "--count=2", "--guidance=1.5"]
    )
    assert status == 0, capsys.readouterr().err
    (folder,) = (moved / "drawn").iterdir()
    names = sorted(path.name for path in folder.glob("*.png"))
    assert names == [
        *("0000_class3.png", "0001_class3.png", "0002_class7.png", "0003_class7.png"),
        "grid.png",
    ]
    manifest = read_json(folder / "manifest.json")
    # the run was made with three steps, the default has 250
    assert (manifest["steps"], manifest["guidance"]) == (3, 1.5)
    assert Image.open(folder / "grid.png").size == (2 * 16 + 2, 2 * 16 + 2)


def test_drawing_again_gives_the_same_and_another_seed_gives_others(copy):
    def first(*more):
        folder = draw.draw(options(copy, "--class=1", "--count=1", *more))
        return np.asarray(Image.open(next(folder.glob("0000*.png"))))

    np.testing.assert_array_equal(first(), first("--out=" + str(copy / "other")))
    assert (first("--seed=1") != first()).any()
    assert (first("--sampler=sde", "--steps=4") != first()).any()


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--class=12"], "there is no class 12; they are 0 to 9"),
        (["--steps=1"], "--steps is 1; it must be at least 2"),
        (["--method=rk4"], "use one of euler, heun, adams_bashforth, dopri5"),
        (["--count=0"], "--count is 0"),
    ],
)
def test_what_cannot_be_drawn_is_refused(copy, more, says):
    with pytest.raises(UserError, match=says):
        draw.draw(options(copy, *more))


def test_a_tokenizer_that_the_model_was_not_trained_for_is_refused(copy):
    done = read_json(copy / "tokenizer" / "done.json")
    write_json(copy / "tokenizer" / "done.json", done | {"fingerprint": "91bc"})
    with pytest.raises(DataError, match=f"latents of tokenizer {done['fingerprint']}, .* is 91bc"):
        draw.draw(options(copy))
    with pytest.raises(UserError, match="nowhere is no run directory"):
        draw.draw(options(copy / "nowhere"))


def test_help_of_drawing(capsys):
    assert cli.main(["gae_jax", "sample", "--help"]) == 0
    assert "--guidance" in capsys.readouterr().out
    assert cli.main(["gae_jax", "sample", "RUN", "--clas=3"]) == 1
    assert "see: python -m gae_jax sample --help" in capsys.readouterr().err
