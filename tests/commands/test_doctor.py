"""What is tried on every host before a long run."""

import json

import pytest

from gae_jax.commands import doctor
from gae_jax.run.run import Run
from gae_jax.run.session import Session
from gae_jax.runtime.errors import ConfigError, UserError


def hosts(**changes):
    one = dict(
        versions="jax 1", commit="abc", config="123", devices="4 x cpu", data="digits", errors={}
    )
    return [{**one, "host": "a"}, {**one, "host": "b", **changes}]


def test_hosts_that_are_alike_pass():
    assert all(check.ok for check in doctor.compare(hosts()))


@pytest.mark.parametrize("name", ["versions", "commit", "config", "devices", "data"])
def test_a_host_that_differs_is_named(name):
    (bad,) = [check for check in doctor.compare(hosts(**{name: "other"})) if not check.ok]
    assert bad.name == name
    assert "not the same on all hosts" in bad.text
    assert "b: other" in bad.text


def test_a_host_that_cannot_read_is_named():
    found = doctor.compare(hosts(data=None, errors={"data": "data.root is '', no directory"}))
    assert [(check.name, check.text) for check in found if not check.ok] == [
        ("data", "b: data.root is '', no directory")
    ]


def test_everything_is_tried_and_told(config, tmp_path, capsys):
    config.doctor.update(works=("backbone", "diffusion"), disk_megabytes=1)
    checks = {one.name: one for one in doctor.run(Session(config, Run(tmp_path)))}
    assert not [one for one in checks.values() if one.ok is False]
    for name in ("hosts", "versions", "commit", "disk", "reading", "directory", "network"):
        assert name in checks
    assert "attention xla" in checks["compute"].text
    assert "sum over 8 devices" in checks["network"].text
    assert "backbone needs" in checks["feeding"].text
    assert "diffusion" not in checks["feeding"].text  # it reads latents
    for name in ("backbone", "diffusion"):
        assert "steps/s" in checks[name].text
        assert "GiB per device" in checks[name].text
    assert "ok      diffusion" in capsys.readouterr().out
    found = json.loads((tmp_path / "doctor.json").read_text())
    assert {one["name"] for one in found["checks"]} == set(checks)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_missing_cores_are_counted(config, tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "cores", lambda: 4)
    session = Session(config, Run(tmp_path))
    # two processes: each needs 300 images/s, the slower one reads 100 with 4 cores
    found = doctor.check_feeding({"tokenizer": 600.0}, [100.0, 200.0], session).text
    assert "tokenizer needs 300 images/s of each process, the slowest reads 100" in found
    assert "with 4 cores: 8 cores missing" in found
    assert "data.cache=disk" in found
    assert "enough" in doctor.check_feeding({"tokenizer": 100.0}, [100.0], session).text


def test_what_is_wrong_is_told_all_at_once(config, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("GAE_JAX_COMMIT", "0123abcd")
    config.doctor.update(steps=0, disk_megabytes=1)
    config.data.update(name="folder", root=str(tmp_path / "nowhere"))
    config.mesh.update(data=3)
    with pytest.raises(UserError, match="doctor: data, mesh failed"):
        doctor.run(Session(config, Run(tmp_path / "run")))
    said = capsys.readouterr().out
    assert "nowhere" in said
    assert "does not fit 8 devices" in said
    assert "0123abcd" in said


def test_too_many_classes_are_told(config, tmp_path):
    config.doctor.update(steps=0, disk_megabytes=1)
    config.diffusion.model.num_classes = 11
    with pytest.raises(UserError, match="doctor: classes failed"):
        doctor.run(Session(config, Run(tmp_path)))


def test_an_unknown_work_is_refused_before_anything_is_compiled(config, tmp_path):
    config.doctor.works = ("difusion",)
    with pytest.raises(ConfigError, match=r"doctor.works has \['difusion'\].*diffusion"):
        doctor.check(Session(config, Run(tmp_path)))
