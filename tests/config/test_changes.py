"""Which fields may change, what texts name, and run directories with foreign things in them."""

import ast
import json
import re
import shutil

import pytest
import small
from conftest import ROOT
from remedies import commands_in, fields_in, flags_in, near

from gae_jax import tokenizers
from gae_jax.commands import compare
from gae_jax.commands.table import COMMANDS, OWN, USAGE
from gae_jax.config import (
    changes,
    default_config,
    flatten,
    is_operational,
    precision,
    why_fixed,
)
from gae_jax.evaluation import health
from gae_jax.report import render
from gae_jax.run.amendments import Situation, Wish, obstacle, refusal
from gae_jax.run.recorded_config import get_config
from gae_jax.run.run import STAGES, Run, StageFolder
from gae_jax.run.session import Session
from gae_jax.runtime.errors import UserError
from gae_jax.runtime.files import read_json, write_json
from gae_jax.stages import report
from gae_jax.train.optim import learning_rate_at, make_schedule

FIELDS = flatten(default_config()) | precision.fields_of(default_config())


def test_every_pattern_names_a_field():
    of_kinds = map(tokenizers.fields_of_kinds, ("training_fields", "start_fields"))
    groups = (changes.OPERATIONAL, changes.NETWORK, changes.START, tokenizers.network_fields())
    for patterns in (*groups, *of_kinds):
        for pattern in patterns:
            assert any(changes.matches(path, (pattern,)) for path in FIELDS), pattern


def test_operational_fields_are_these_and_no_others():
    """All leaves were read with the question: does it change what was computed so far?"""
    trained = ("backbone", "teacher", "tokenizer", "diffusion")
    expected = {
        *("data.workers", "data.cache", "data.cache_dir", "data.root", "data.on_corrupt"),
        *("precision.train.remat", "precision.train.attention", "precision.train.kernels"),
        *(f"tokenizer.health.{name}" for name in ("pictures", "probe", "window")),
        *(f"evaluate.online.{name}" for name in ("images", "sampler", "steps")),
        *(f"{name}.batch_size" for name in ("latents", "sample", "evaluate", "likelihood")),
        *(
            f"{section}.train.{name}"
            for section in trained
            for name in (
                *("log_every", "eval_every", "save_every", "keep"),
                *("best_metric", "best_mode"),
            )
        ),
        *(
            f"precision.{network}.{name}"
            for network, use in precision.NETWORKS.items()
            for name in ("remat", "attention", "kernels")
            if name in use.defaults
        ),
    }
    assert {path for path in FIELDS if is_operational(path)} == expected


def test_what_a_training_cannot_go_on_with_is_the_network_and_the_start():
    for path in (
        *("diffusion.model.num_heads", "tokenizer.name", "tokenizer.model.num_heads"),
        *("data.image_size", "backbone.vit.num_heads", "tokenizer.from_teacher", "teacher.kind"),
    ):
        assert why_fixed(path), path
    for path in (
        *("tokenizer.optim.learning_rate", "seed", "tokenizer.model.noise_std", "data.mirror"),
        *("tokenizer.train.batch_size", "tokenizer.losses.gan", "diffusion.flow.time_shift"),
    ):
        assert not why_fixed(path), path


def test_learning_rates_before_and_after_more_steps():
    section = default_config().tokenizer.optim
    own = {n: section[n] for n in ("learning_rate", "end_learning_rate", "warmup_steps")}
    for steps in (20_000, 40_000):
        expected = float(make_schedule(steps=steps, **own)(20_000))
        assert learning_rate_at(20_000, steps, section) == pytest.approx(expected)
    assert learning_rate_at(20_000, 40_000, section) > learning_rate_at(20_000, 20_000, section)


# --- what texts advise --------------------------------------------------------------------------


def texts_of_the_source():
    """(file:line, text) of every string in gae_jax that is no docstring; braces for what is filled
    in."""
    for path in sorted((ROOT / "gae_jax").rglob("*.py")):
        tree = ast.parse(path.read_text())
        documents = {
            node.body[0].value
            for node in ast.walk(tree)
            if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef)
            and isinstance(node.body[0], ast.Expr)
        }

        def text(node):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                return node.value
            if isinstance(node, ast.JoinedStr):
                return "".join(text(v) or "{}" for v in node.values)
            return None

        stack = [tree]
        while stack:
            node = stack.pop()
            if node in documents:
                continue
            if (found := text(node)) is not None:
                yield f"{path.relative_to(ROOT)}:{node.lineno}", found
                continue
            stack += ast.iter_child_nodes(node)


def known_flags():
    """Of every command, from their usage."""
    own = "".join(
        (ROOT / "gae_jax" / f"{row[0].replace('.', '/')}.py").read_text() for row in OWN.values()
    )
    sweep = (ROOT / "gae_jax" / "sweep" / "command_line.py").read_text()
    slurm = (ROOT / "launch" / "slurm.sh").read_text()
    flags = re.findall(r"--[a-z][\w-]*", USAGE + own + sweep + slurm)
    return {*flags, "--help", "--distributed"}


PIP = ("--no-deps", "--force-reinstall")  # flags of pip that errors advise


def test_every_flag_field_and_command_that_a_text_names_is_there():
    flags, odd, count = known_flags(), [], 0
    for where, text in texts_of_the_source():
        # the ranges are patterns of fields, which another test holds against all of them
        if " " not in text or where.startswith("gae_jax/config/ranges.py"):
            continue
        count += len(flags_in(text)) + len(fields_in(text, FIELDS)[0]) + len(commands_in(text))
        for flag in flags_in(text):
            name = flag.partition("=")[0]
            if name.startswith("--config."):
                path = name.removeprefix("--config.")
                # {} stands for a part that is filled in; a folder of stages is one as well;
                # --config.precision=P is short for its preset
                if "{" in text or path in FIELDS or path in ("KEY", "precision"):
                    continue
                odd.append(f"{where}: {flag} (is it {near(path, FIELDS)}?)")
            elif name == "--config" and ".py" in flag and "{" not in flag:
                file = flag.partition("=")[2].partition(":")[0]
                if not (ROOT / file).exists() and "NAME" not in file:
                    odd.append(f"{where}: {flag}")
            elif name in PIP and "pip " in text:
                continue
            elif name not in flags and not name.startswith(("--xla", "--config")):
                odd.append(f"{where}: {flag}")
        odd += [
            f"{where}: {path} (is it {near(path, FIELDS)}?)"
            for path in fields_in(text, FIELDS)[1]
            # networks know no config: who builds them adds the section
            if not where.startswith("gae_jax/nn/")
            and not path.endswith((".py", ".json", ".npz", ".pt", ".pth", ".pkl", ".csv"))
        ]
        odd += [
            f"{where}: {command}"
            for command in commands_in(text)
            if command[0] not in {*COMMANDS, *OWN, "demo"} and "{" not in command[0]
        ]
    assert not odd, "\n".join(odd)
    assert count > 300, "the texts were not read"


def warnings_of(accuracy, loss, **more):
    watch = health.GanWatch(loss="hinge", window=50, **more)
    for step in range(0, 100, 5):
        found = watch(step, {"discriminator/accuracy": accuracy, "discriminator/loss": loss})
        if found:
            return found[0]
    return None


@pytest.mark.parametrize(("accuracy", "loss"), [(0.99, 0.1), (0.37, 2.1), (0.5, 1.0)])
@pytest.mark.parametrize("start", [0, 4, 1000])
def test_warnings_of_the_discriminator_name_flags_that_change_the_course(accuracy, loss, start):
    text = warnings_of(accuracy, loss, rate=1e-3, end_rate=1e-4, weight=0.5, start=start)
    flags = flags_in(text)
    assert "--amend" in flags
    fields = [flag[9:].split("=") for flag in flags if flag.startswith("--config.")]
    assert fields
    for path, value in fields:
        assert float(value) != FIELDS[path], path
        assert not why_fixed(path)
        assert not is_operational(path)
    peaks, ends = ([float(v) for p, v in fields if p.endswith(f"optim.{n}")]
                   for n in ("learning_rate", "end_learning_rate"))  # fmt: skip
    assert peaks
    assert all(end < peak for peak, end in zip(peaks, ends, strict=True))
    # the checkpoint is kept once the generator sees the discriminator
    assert [flag for flag in flags if "from-step" in flag] == ["--from-step=4"] * (start == 4)
    later = [float(value) for path, value in fields if path == "tokenizer.gan.start"]
    assert all(value > max(start, 45 * (start != 4)) for value in later)


def test_the_error_names_amend_only_where_it_helps(tmp_path):
    change = [{"field": "tokenizer.optim.learning_rate", "old": 1, "new": 2}]
    heads = [{"field": "tokenizer.model.num_heads", "old": 1, "new": 2}]
    unfinished = Situation("tokenizer", tmp_path, done=False, steps=(3, 6), wanted=9)
    finished = Situation("tokenizer", tmp_path, done=True, steps=(3, 6), wanted=6)
    latents = Situation("latents", tmp_path, done=True, steps=(), wanted=None)
    assert "or pass --amend to resume from step 6" in refusal(change, unfinished, Wish(trains=True))
    assert "another one" in refusal(heads, unfinished, Wish(trains=True))
    assert "pass --amend" not in refusal(heads, unfinished, Wish(trains=True))
    assert "--from-step=3" in refusal(change, finished, Wish(trains=True))
    assert not obstacle(change, finished, Wish(trains=True, amend=True, from_step=3))
    assert "--amend" not in refusal(change, latents, Wish())


# --- what is built on what was trained again ----------------------------------------------------


def made(run, name, inputs, **done):
    folder = run.stage(name)
    write_json(folder.path / "config.json", {"config": {"seed": 0}, "inputs": inputs})
    write_json(folder.path / "done.json", done)
    return folder


def test_what_was_built_on_other_weights_names_all_commands_in_order(tmp_path):
    run = Run(tmp_path)
    made(run, "tokenizer", {}, fingerprint="t2")
    made(run, "latents", {"tokenizer": "t1"}, fingerprint="l1")
    made(run, "diffusion", {"latents": "l1"}, fingerprint="d1")
    samples = made(run, "sample", {"tokenizer": "t1", "diffusion": "d1"}, fingerprint="s1")
    with pytest.raises(UserError) as error:
        samples.open({"seed": 0}, {"tokenizer": "t2", "diffusion": "d1"}, fresh=False)
    path = str(tmp_path)
    assert commands_in(str(error.value)) == [
        ["latents", path, "--fresh"], ["diffusion", path, "--fresh"], ["sample", path, "--fresh"],
    ]  # fmt: skip
    # what is in order is left alone
    made(run, "latents", {"tokenizer": "t2"}, fingerprint="l2")
    with pytest.raises(UserError) as error:
        samples.open({"seed": 0}, {"tokenizer": "t2", "diffusion": "d1"}, fresh=False)
    again = [["diffusion", path, "--fresh"], ["sample", path, "--fresh"]]
    assert commands_in(str(error.value)) == again


def test_runs_of_earlier_versions_are_read_under_their_folders_names(tmp_path):
    run = Run(tmp_path)
    tokenizer = made(run, "tokenizer", {}, fingerprint="t1")
    old = StageFolder(tmp_path / "samples")
    old.open({"seed": 0}, {"tokenizer": "t1"}, fresh=False)
    old.finish(fingerprint="s1")
    folder = StageFolder(tmp_path / "evaluation")
    folder.open({"seed": 0}, {"tokenizer": "t1", "samples": "s1"}, fresh=False)
    folder.finish()
    folder = StageFolder(tmp_path / "reference")
    folder.open({"make_reference": {"split": "holdout"}}, {}, fresh=False)
    folder.finish()
    assert run.fingerprint("sample") == "s1"
    assert [stage.name for stage in run.require()] == [
        "evaluate", "reference", "sample", "tokenizer",
    ]  # fmt: skip
    assert get_config(str(tmp_path)).reference.split == "holdout"
    evaluated, inputs = run.stage("evaluate"), {"tokenizer": "t1", "sample": "s1"}
    assert not evaluated.open({"seed": 0}, inputs, fresh=False)  # finished
    evaluated.require_up_to_date()
    assert evaluated.open({"seed": 0}, inputs, fresh=True)
    assert not (tmp_path / "evaluate").exists()
    assert run.stage("tokenizer") == tokenizer


RECORD = {
    "stage": "tokenizer",
    "step": 3,
    "time": "2026-11-28T20:00:00+00:00",
    "changes": [{"field": "tokenizer.optim.learning_rate", "old": 0.001, "new": 0.0001}],
    "removed": [6],
}


def test_an_amendment_is_carried_shown_on_the_page_and_compared(small_run, tmp_path):
    run = Run(tmp_path / "run")
    shutil.copytree(small_run, run.path)
    done = read_json(run.path / "tokenizer" / "done.json")
    write_json(run.path / "tokenizer" / "done.json", done | {"amended": [RECORD]})
    report.run(Session(get_config(str(run.path)), run))
    text = "back from step 6; tokenizer.optim.learning_rate 0.001 -&gt; 0.0001"
    assert text in (run.path / "report.html").read_text()
    shown, same = compare.compare(small_run, run.path)
    assert "amended.tokenizer" in shown
    assert "tokenizer.optim.learning_rate 0.001 -> 0.0001" in shown
    assert not same
    assert "amended" not in read_json(small_run / "result.json")
    assert render  # the page of a run that nobody amended says nothing of it
    assert "Amended" not in (small_run / "report.html").read_text()
    # a stage that is claimed on top of it carries it on
    folder = run.stage("latents")
    marker = read_json(run.path / "tokenizer" / "config.json")
    write_json(run.path / "tokenizer" / "config.json", marker | {"amended": [RECORD]})
    shutil.rmtree(folder.path)
    folder.open({"seed": 0}, {"tokenizer": done["fingerprint"]}, fresh=False)
    folder.finish(fingerprint="l")
    assert folder.done["amended"] == folder.marker["amended"] == [RECORD]


def test_what_a_stage_started_from_is_compared(tmp_path):
    def result(name, **more):
        write_json(tmp_path / name, {"psnr": 1.0, **more})
        return tmp_path / name

    def started(path, print_):
        return {"tokenizer.started_from": f"started from {path}, step 3 (fingerprint {print_})"}

    plain, here = result("plain.json"), result("here.json", **started("/a", "12"))
    moved, other = (
        result("moved.json", **started("/b (c)", "12")),
        result("other.json", **started("/a", "34")),
    )
    for a, b, same in ((plain, here, False), (here, other, False), (here, moved, True)):
        text, found = compare.compare(a, b)
        assert found == same
        assert ("tokenizer.started_from" in text) != same
    nested = {"manifest": {"started_from": {"tokenizer": "started from /a (fingerprint 12)"}}}
    elsewhere = {"manifest": {"started_from": {"tokenizer": "started from /b (fingerprint 12)"}}}
    assert compare.compare(result("n.json", **nested), result("m.json", **elsewhere))[1]


def test_commands_on_the_page_name_no_checkout(tmp_path):
    path, config = ROOT / "runs" / "demo", small.get_config()
    session = Session(config, Run(path, f"--config={ROOT}/configs/demo.py:x --workdir={path}"))
    assert report.command_line(session, "demo") == (
        "python -m gae_jax demo --config=configs/demo.py:x --workdir=runs/demo"
    )
    session = Session(config, Run(path))
    assert report.command_line(session, "evaluate") == "python -m gae_jax evaluate runs/demo"
    session = Session(config, Run(tmp_path, f"--config={tmp_path}/mine.py"))
    assert report.command_line(session, "demo") == (
        f"python -m gae_jax demo --config={tmp_path}/mine.py"
    )


# --- foreign things in a run directory ----------------------------------------------------------


@pytest.fixture
def run_of_one_stage(tmp_path):
    run = Run(tmp_path / "run")
    folder = run.stage("tokenizer")
    section = default_config().tokenizer.to_dict() | {"ema_decay": 0.5}
    folder.open({"seed": 3, "tokenizer": section}, {}, fresh=False)
    return run


FOREIGN = (
    '{"model": {}}',
    "[1]",
    '"text"',
    "3",
    "null",
    "",
    '{"config": {"seed"',
    "\x00\xff",
    "{}",
)


@pytest.mark.parametrize("content", FOREIGN)
def test_a_foreign_folder_in_a_run_breaks_nothing(run_of_one_stage, content):
    for name in ("export", "latents_of_mine", ".cache", "checkpoint-best"):
        folder = run_of_one_stage.path / name
        folder.mkdir()
        (folder / "config.json").write_bytes(content.encode("latin-1"))
    (run_of_one_stage.path / "config.json").write_text(content)
    (run_of_one_stage.path / "diffusion").mkdir()  # empty
    config = get_config(str(run_of_one_stage.path))
    assert (config.seed, config.tokenizer.ema_decay) == (3, 0.5)


@pytest.mark.parametrize("content", FOREIGN)
@pytest.mark.parametrize("name", ["config.json", "done.json"])
def test_a_damaged_marker_is_named_with_a_remedy(run_of_one_stage, content, name):
    folder = run_of_one_stage.stage("tokenizer")
    good = folder.marker
    (folder.path / name).write_bytes(content.encode("latin-1"))
    if name == "done.json" and content in ("{}", '{"model": {}}'):
        assert folder.done is not None  # an object: what it lacks is asked for where it is read
        return
    with pytest.raises(UserError) as error:
        get_config(str(run_of_one_stage.path)) if name == "config.json" else folder.require_done()
    assert str(folder.path / name) in str(error.value)
    assert commands_in(str(error.value))[0][0] == "tokenizer"
    if name == "config.json":  # the remedy: start over
        assert {"--fresh"} <= set(flags_in(str(error.value)))
        assert folder.open(good["config"], {}, fresh=True)
        assert get_config(str(run_of_one_stage.path)).seed == 3


def test_a_marker_of_a_later_version_is_named(run_of_one_stage):
    folder = run_of_one_stage.stage("tokenizer")
    for change in ({"not_here": {"a": 1}}, {"tokenizer": {"not_here": 1}}, {"tokenizer": 3}):
        write_json(folder.path / "config.json", {"config": change, "inputs": {}})
        with pytest.raises(UserError, match=r"tokenizer/config.json: its section"):
            get_config(str(run_of_one_stage.path))


def test_a_section_comes_from_its_own_stage(run_of_one_stage):
    """A stage that is built on it recorded what it was before it was amended."""
    marker = {"config": {"backbone": {"label_smoothing": 0.3}}, "inputs": {}}
    write_json(run_of_one_stage.path / "backbone" / "config.json", marker)
    marker = {"config": {"backbone": {"label_smoothing": 0.1}}, "inputs": {}}
    write_json(run_of_one_stage.path / "teacher" / "config.json", marker)
    assert get_config(str(run_of_one_stage.path)).backbone.label_smoothing == 0.3


def test_every_stage_of_a_run_is_known(small_run):
    there = {path.parent.name for path in small_run.glob("*/config.json")}
    assert there <= STAGES
    assert json.loads((small_run / "tokenizer" / "config.json").read_text())["config"]
