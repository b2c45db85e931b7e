"""`sample RUN`: what it says, its classes by name, its guidance, and the files that it leaves."""

import shutil

import numpy as np
import pytest
from PIL import Image

from gae_jax.commands import cli, draw
from gae_jax.config import default_config
from gae_jax.evaluation.archives import open_samples, samples_digest
from gae_jax.generators import guidance
from gae_jax.run import contents, sampling_config
from gae_jax.run.class_names import class_of, in_words, recorded_names
from gae_jax.run.run import Run
from gae_jax.runtime.errors import DataError, UserError
from gae_jax.runtime.files import read_json, write_json, writing

NAMES = ["10", "Border Collie", "beagle", "golden_retriever", "7"]


@pytest.fixture(scope="module")
def run_alone(small_run, tmp_path_factory):
    """Tokenizer and diffusion model of a run, and nothing else."""
    path = tmp_path_factory.mktemp("alone")
    for stage in ("tokenizer", "diffusion"):
        shutil.copytree(small_run / stage, path / stage)
    return path


def drawn(run, *more):
    return draw.draw(draw.parse([str(run), *more]))


def images_in(folder):
    return open_samples(folder)


def pixels_in(folder):
    return np.concatenate(list(open_samples(folder).batches(64)))


def test_it_says_what_it_draws_and_where(run_alone, tmp_path, capsys, caplog):
    out = tmp_path / "a"
    more = ("--class=3", "--count=2", "--guidance=1.5", "--interval=0.1,0.9", f"--out={out}")
    with caplog.at_level("INFO"):
        assert cli.main(["gae_jax", "sample", str(run_alone), *more]) == 0
    text = capsys.readouterr().out
    assert "2 images of 1 class, ode (euler, 3 points, guidance 1.5 for t in [0.1, 0.9])" in text
    assert f"to {out}" in text
    assert str(out / "grid.png") in text
    manifest = read_json(out / "manifest.json")
    assert (manifest["guidance_start"], manifest["guidance_end"]) == (0.1, 0.9)
    assert manifest["finished"]


def test_the_log_is_set_up_before_imports_that_set_it_up(monkeypatch):
    """Commands with options of their own were imported first, and nothing at INFO was shown."""
    calls = []
    monkeypatch.setattr(cli.logging, "basicConfig", lambda **_: calls.append("log"))
    monkeypatch.setattr(cli, "own_command", lambda argv: calls.append("import"))
    assert cli.main(["gae_jax", "--help"]) == 0
    assert calls == ["log", "import"]


def test_fewer_images_leave_no_old_ones(run_alone, tmp_path):
    out = tmp_path / "a"
    drawn(run_alone, "--class=3,7", "--count=2", f"--out={out}")
    (out / "notes.txt").write_text("mine")
    (out / "mine.png").write_bytes(b"mine")
    drawn(run_alone, "--class=3", "--count=1", f"--out={out}")
    names = sorted(path.name for path in out.iterdir())
    assert names == ["0000_class3.png", "grid.png", "manifest.json", "mine.png", "notes.txt"]
    assert images_in(out).count == 1  # the manifest decides, not what lies beside


def test_a_file_of_somebody_else_is_not_overwritten(run_alone, tmp_path):
    out = tmp_path / "a"
    out.mkdir()
    (out / "0000_class3.png").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"has a file 0000_class3.png that `sample RUN` did not"):
        drawn(run_alone, "--class=3", "--count=1", f"--out={out}")
    assert (out / "0000_class3.png").read_bytes() == b"mine"
    (out / "0000_class3.png").unlink()
    (out / "manifest.json").write_text('{"files": 3, "mine": 1}')
    with pytest.raises(UserError, match=r"manifest.json that `sample RUN` did not write"):
        drawn(run_alone, "--class=3", "--count=1", f"--out={out}")


def test_a_manifest_cannot_name_files_elsewhere(tmp_path):
    folder, victim = tmp_path / "a", tmp_path / "victim.txt"
    victim.write_text("mine")
    write_json(folder / "manifest.json", {"files": ["../victim.txt", "x/y.png", 3, "a.png"]})
    assert draw.earlier_files(folder) == ["a.png", "grid.png"]
    draw.claim(folder, [], {"files": []})
    assert victim.exists()


def test_zero_guidance_is_no_class(run_alone, tmp_path, monkeypatch):
    """The network is asked with the label behind the last class, once a step."""
    asked = []

    def spy(session, drawn, arrays, labels, size):
        asked.append(labels.tolist())
        return batches(session, drawn, arrays, labels, size)

    batches = draw.batches_of_images
    monkeypatch.setattr(draw, "batches_of_images", spy)
    folders = [
        drawn(run_alone, "--count=2", *more, f"--out={tmp_path / str(i)}")
        for i, more in enumerate(
            [
                ("--class=3,7", "--guidance=0"),
                ("--class=none,none",),
                ("--class=3,7", "--guidance=0", "--interval=0,1"),
            ]
        )
    ]
    assert asked == [[10] * 4, [10] * 4, [3, 3, 7, 7]]
    pixels = [pixels_in(folder).astype(int) for folder in folders]
    np.testing.assert_array_equal(pixels[0], pixels[1])
    assert np.abs(pixels[0] - pixels[2]).max() <= 1  # by the formula, at all times
    manifest = read_json(folders[0] / "manifest.json")
    assert manifest["labels"] == [None] * 4
    assert manifest["network_calls"] == 2  # of two steps: nothing is computed twice
    assert images_in(folders[0]).labels is None


def test_scales_of_guidance():
    """0 is the velocity without a class to the bit, 1 that of the class, 2 as far beyond."""
    c, u = np.float32(0.3), np.float32(0.1)
    for scale, expected in ((0.0, u), (1.0, c), (2.0, 2 * c - u)):
        velocity = guidance.guided(
            lambda x, t: c + 0 * x,
            lambda x, t: (c + 0 * x, u + 0 * x),
            guidance.in_interval(scale),
        )
        found = velocity(np.zeros(3, np.float32), np.float32(0.5))
        np.testing.assert_allclose(found, expected, rtol=0 if scale < 2 else 1e-6)


def test_classes_come_by_name(run_alone, tmp_path, monkeypatch):
    assert recorded_names(Run(run_alone)) == [str(digit) for digit in range(10)]
    monkeypatch.setattr(
        sampling_config, "recorded_names", lambda run: [f"bird_{i}" for i in range(10)]
    )
    folder = drawn(run_alone, "--class=bird_4,Bird 7,none", "--count=1", f"--out={tmp_path / 'a'}")
    assert read_json(folder / "manifest.json")["labels"] == [4, 7, None]
    assert (folder / "0002.png").exists()
    with pytest.raises(UserError, match=r"no class of that name among 10; the nearest are bird_"):
        drawn(run_alone, "--class=brid_4")


def test_names_of_an_older_run_are_asked_of_its_images(run_alone, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(run_alone, run)
    for stage in ("diffusion", "tokenizer"):
        (run / stage / contents.FILE).unlink()
    assert recorded_names(Run(run)) == [str(digit) for digit in range(10)]
    made = read_json(run / "tokenizer" / "config.json")
    made["config"]["data"].update(name="folder", root=str(tmp_path / "gone"))
    write_json(run / "tokenizer" / "config.json", made)
    with pytest.raises(UserError, match=r"does not record the names of its classes, .* 0 to 9"):
        drawn(run, "--class=seven")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("3", 3),
        ("golden_retriever", 3),
        ("Golden Retriever", 3),
        ("border-collie", 1),
        ("none", None),
        ("name:7", 4),
        ("name:10", 0),
        ("number:4", 4),
    ],
)
def test_class_of(text, found):
    assert class_of(text, 5, NAMES) == found


def test_synsets_go_by_their_words(tmp_path):
    lines = ["n01443537\tgoldfish, Carassius auratus", "n02012849\tcrane", "n03126707\tcrane"]
    (tmp_path / "words.txt").write_text("\n".join(lines) + "\nn00000001\tnothing\n")
    (tmp_path / "train").mkdir()
    names = ["n01443537", "n02012849", "n03126707", "n99999999", "mine"]
    for root in (tmp_path, tmp_path / "train"):
        words = in_words(names, root)
        assert words == ["goldfish", "crane", "crane", "n99999999", "mine"]
    assert class_of("Gold-fish", 5, names, words=words) == 0
    assert class_of("n01443537", 5, names, words=words) == 0
    with pytest.raises(UserError, match=r"2 classes have this name; give one of the numbers 1, 2"):
        class_of("crane", 5, names, words=words)
    with pytest.raises(UserError, match="the nearest are goldfish"):
        class_of("goldfsh", 5, names, words=words)
    assert in_words(names, "") == in_words(names, tmp_path / "train" / "x") == names
    (tmp_path / "LOC_synset_mapping.txt").write_text("n99999999 tench, Tinca tinca\n")
    assert in_words(names, tmp_path)[3] == "tench"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("5", "there is no class 5; they are 0 to 4"),
        ("-1", "there is no class -1"),
        ("99999999999999999999", "there is no class 9999"),
        ("golden_retreiver", "the nearest are golden_retriever"),
        ("@@@", "they begin with "),
        ("number:x", "there is no class x"),
        ("name:none", "there is no class of that name"),
    ],
)
def test_class_of_refuses(text, says):
    with pytest.raises(UserError, match=says):
        class_of(text, 5, NAMES)
    with pytest.raises(UserError, match=r"two meanings: class 2 is called 'a', and class 1"):
        class_of("2", 3, ["0", "2", "a"])


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--count=-1"], "--count is -1; it must be at least 1"),
        (["--count=1.5"], "argument --count: invalid int value"),
        (["--count=" + "9" * 30], "--count is 9+; it must be at most"),
        (["--seed=-1"], "--seed is -1; it must be from 0 to 4294967295"),
        (["--seed=4294967296"], "--seed is 4294967296"),
        (["--guidance=nan"], "--guidance is nan; it must be a finite number"),
        (["--guidance=inf"], "--guidance is inf"),
        (["--guidance=-1"], "--guidance is -1.0; it must be at least 0"),
        (["--steps=0"], "--steps is 0; it must be at least 2"),
        (["--batch-size=0"], "--batch-size is 0"),
        (["--interval=0.2"], "'0.2' is no interval; give LOW,HIGH"),
        (["--interval=0.8,0.2"], "is no interval"),
        (["--interval=0,nan"], "is no interval"),
        (["--interval=-1,2"], "is no interval"),
        (["--class=3,"], "names an empty class"),
        (["--interval=0,1", "--sampler=sde"], r"\(sde\) has no guidance; give --guidance=W too"),
        (
            ["--interval=0,1", "--guidance=1"],
            "=1 is no guidance; give --guidance=W too, other than 1",
        ),
    ],
)
def test_flags_are_refused_by_name(more, says, run_alone):
    with pytest.raises(UserError, match=says):
        drawn(run_alone, *more)
    assert not (run_alone / "drawn").exists()


def test_a_model_without_a_null_class_says_so(run_alone, tmp_path):
    run = shutil.copytree(run_alone, tmp_path / "run")
    made = read_json(run / "diffusion" / "config.json")
    made["config"]["diffusion"]["model"]["class_dropout_prob"] = 0.0
    write_json(run / "diffusion" / "config.json", made)
    with pytest.raises(UserError, match="--class=none is without a class, but"):
        drawn(run, "--class=none", "--guidance=1")


def test_what_cannot_be_written_is_one_line_and_keeps_the_images(
    run_alone, tmp_path, capsys, monkeypatch
):
    (tmp_path / "file").write_text("")
    arguments = ("gae_jax", "sample", str(run_alone), "--class=3", "--count=3", "--batch-size=1")
    assert cli.main([*arguments, f"--out={tmp_path / 'file' / 'x'}"]) == 1
    assert "a file lies where a folder is wanted" in capsys.readouterr().err
    write, out = draw.write_bytes, tmp_path / "a"

    def full_disk(path, content):
        if path.name.startswith("0002"):
            with writing(path):
                raise OSError(28, "No space left on device")
        write(path, content)

    monkeypatch.setattr(draw, "write_bytes", full_disk)
    assert cli.main([*arguments, f"--out={out}"]) == 1
    text = capsys.readouterr().err
    assert "No space left on device" in text
    assert f"2 of 3 images are in {out}" in text
    assert len(list(out.glob("*.png"))) == 2
    with pytest.raises(DataError, match="the set is incomplete: 1 of 3 images are missing"):
        open_samples(out)
    monkeypatch.undo()  # the remedy: the same command again
    assert cli.main([*arguments, f"--out={out}"]) == 0
    assert open_samples(out).count == 3


def test_folders_of_samples_are_taken_as_they_are(small_run, run_alone, tmp_path):
    folder = drawn(run_alone, "--count=1", f"--out={tmp_path / 'a'}")
    found = open_samples(folder)
    assert (found.count, found.kind, found.labels.tolist()) == (10, "png", list(range(10)))
    assert (
        np.asarray(Image.open(folder / "0003_class3.png")).tolist() == pixels_in(folder)[3].tolist()
    )
    stage = small_run / "sample" / "ode"
    assert open_samples(stage).path == stage / "samples.npz"
    assert samples_digest(stage) == samples_digest(stage / "samples.npz")
    for several in (small_run / "sample", small_run):
        with pytest.raises(DataError, match=r"holds several sets; give one of .*ode, .*sde"):
            open_samples(several)


def test_long_lists_of_classes_have_short_names(run_alone):
    options = draw.parse([str(run_alone), "--class=" + ",".join(["1", "2"] * 300)])
    section = default_config().sample.ode.to_dict()
    name = draw.name_of([1, 2] * 300, 10, options, section)
    assert len(name) < 100
    assert name.startswith("600_classes_")


def test_what_is_no_run_is_named(tmp_path, capsys):
    for command in ("sample", "evaluate"):
        assert cli.main(["gae_jax", command, str(tmp_path)]) == 1
        assert f"{tmp_path} is no run directory" in capsys.readouterr().err
    assert cli.main(["gae_jax", "evaluate", ""]) == 1
    assert "the name of the run is empty" in capsys.readouterr().err
