"""What is written as JSON is read by every reader, also where a figure is infinite."""

import json
import math
import shutil

import numpy as np
import pytest

from gae_jax.commands import cli
from gae_jax.run.run import Run
from gae_jax.run.session import Session
from gae_jax.runtime.errors import UserError
from gae_jax.runtime.files import read_figures, read_json, write_json
from gae_jax.stages import report
from gae_jax.sweep.definition import Metric
from gae_jax.sweep.outcomes import figure


def strict(path):
    """The value as readers outside of Python take it: no NaN, no Infinity."""

    def refuse(word):
        raise ValueError(f"{path} holds {word}")

    return json.loads(path.read_bytes(), parse_constant=refuse)


def test_every_file_of_a_run_is_strict(small_run):
    files = sorted(small_run.rglob("*.json"))
    assert small_run / "result.json" in files
    assert small_run / "evaluate" / "result.json" in files
    for path in files:
        strict(path)


def test_numbers_without_an_end_keep_their_meaning(tmp_path):
    path = tmp_path / "a.json"
    value = {
        "psnr": math.inf,
        "low": -math.inf,
        "rows": [1.5, math.nan, (np.float64(np.inf), "text")],
        "count": 3,
    }
    write_json(path, value)
    assert strict(path) == {
        "psnr": "Infinity",
        "low": "-Infinity",
        "rows": [1.5, "NaN", ["Infinity", "text"]],
        "count": 3,
    }
    found = read_figures(path)
    assert (found["psnr"], found["low"], found["count"]) == (math.inf, -math.inf, 3)
    assert math.isnan(found["rows"][1])
    assert found["rows"][2] == [math.inf, "text"]
    assert read_json(path)["psnr"] == "Infinity"  # a class may be called so


def test_compare_takes_files_of_both_kinds(tmp_path, capsys):
    """Older versions wrote the bare word Infinity."""
    (tmp_path / "old.json").write_text('{"metrics": {"psnr": Infinity, "ssim": 1.0}}')
    write_json(tmp_path / "new.json", {"metrics": {"psnr": math.inf, "ssim": 0.5}})
    assert (
        cli.main(["gae_jax", "compare", *(str(tmp_path / f"{n}.json") for n in ("old", "new"))])
        == 0
    )
    lines = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()[6:]}
    assert lines["metrics.psnr"] == ["inf", "inf", "+0"]
    assert lines["metrics.ssim"] == ["1", "0.5", "-0.5"]


def test_an_exact_pair_goes_through_report_and_sweep(small_run, config, tmp_path, capsys):
    copy = shutil.copytree(small_run, tmp_path / "run")
    path = copy / "evaluate" / "result.json"
    evaluation = read_json(path)
    evaluation["tokenizer"]["psnr"] = math.inf
    evaluation["tokenizer"]["noise_psnr"][0] = math.inf
    write_json(path, evaluation)
    report.run(Session(config, Run(copy)))
    assert "inf dB" in capsys.readouterr().out
    assert strict(copy / "result.json")["tokenizer.psnr"] == "Infinity"
    metric = Metric("PSNR", "tokenizer.psnr", "{:.2f}")
    assert figure(Run(copy), metric) == math.inf


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe{}", b"", b"[" * 100_000])
def test_damaged_json_is_named(content, tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match="is not valid JSON"):
        read_json(path)
