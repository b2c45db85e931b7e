"""Every number of the config has a range: zero, negative, NaN, infinite, huge, of another kind."""

import contextlib
import math

import ml_collections
import pytest

from gae_jax.commands import cli
from gae_jax.config import default_config, flatten
from gae_jax.config.ranges import is_number, leaves, range_of, range_problems
from gae_jax.config.validate import validate
from gae_jax.runtime.errors import ConfigError

DEFAULT = default_config().to_dict()
KNOWN = flatten(DEFAULT)
NEVER = (math.nan, math.inf, -math.inf, 1e30, 10**30, 10**400, True, "3", None, [1])
# Tuples of numbers, with entries where the default has none.
TUPLES = {
    "*.scales": (("encoder", 0.5),),
    "tokenizer.phases": ((250_000, ".*", ("l1",)),),
    "sample.ode.guidance_parts": ((0.5, 2.0), (1.0, 3.0)),
    "sample.sde.guidance_parts": ((0.5, 2.0), (1.0, 3.0)),
    "sample.classes": (0, 7),
    "tokenizer.dgae.encoder.attn_resolutions": (16,),
}
TEXTS = {  # tuples without numbers
    *(
        "bench.works",
        "bench.feeding.stages",
        "plan.works",
        "doctor.works",
        "evaluate.metrics",
        "evaluate.sgd_probe.heads",
        "precision.override",
    ),
    *("export_torch.networks", "import_torch.leave_out", "sample.sets", "tokenizer.from_teacher"),
    *("tokenizer.discriminator.augment", "tokenizer.aligntok.lora.layers"),
}


def example(path, value):
    """The value of a field, with entries where it is an empty tuple."""
    if path in TUPLES or not isinstance(value, list):
        return TUPLES.get(path, value)
    return TUPLES["*.scales"] if path.endswith("optim.scales") else value


def with_entry(value, index, new):
    """A nested tuple with another entry at ``index``, a list of positions."""
    if not index:
        return new
    at = int(index[0])
    return (*value[:at], with_entry(value[at], index[1:], new), *value[at + 1 :])


def numbers():
    """(field, positions of the entry within it, number) of all numbers."""
    for path, value in KNOWN.items():
        for entry, number in leaves(path, example(path, value)):
            if is_number(number):
                index = entry.removeprefix(path).split(".")[1:]
                yield path, index, number


def with_value(path, value):
    """The default config, untyped, with another value of one field."""
    config = ml_collections.ConfigDict(DEFAULT, type_safe=False)
    *sections, leaf = path.split(".")
    section = config
    for name in sections:
        section = section[name]
    section[leaf] = value
    return config


def shown(path, index):
    return path + "".join(f"[{i}]" for i in index)


def test_every_number_has_a_range():
    """A new numeric field needs a row in gae_jax/config/ranges.py, RANGES."""
    without = [shown(p, i) for p, i, _ in numbers() if range_of(".".join([p, *i])) is None]
    assert not without, f"declare a range in gae_jax/config/ranges.py for {without}"
    assert not range_problems(KNOWN, KNOWN)


def test_every_tuple_is_walked():
    """A new field with a tuple belongs into TUPLES (with an example) or TEXTS of this file."""
    walked = {path for path, *_ in numbers()} | TEXTS
    tuples = {path for path, value in KNOWN.items() if isinstance(value, list)}
    assert not tuples - walked
    with pytest.raises(ConfigError, match=r"bench.works\[0\] is 3; no number belongs there"):
        validate(with_value("bench.works", (3,)))


def test_no_field_takes_what_is_no_number_or_has_no_end():
    for path, index, number in numbers():
        value = example(path, KNOWN[path])
        for bad in NEVER:
            if bad == [1] and index:
                continue  # an entry of its own
            changed = {path: with_entry(value, index, bad)}
            problems = range_problems(changed, KNOWN)
            assert len(problems) == 1, (path, index, bad, problems)
            assert problems[0].startswith(f"{shown(path, index)} is {bad!r}; it must be ")
        assert not range_problems({path: with_entry(value, index, number)}, KNOWN)


@pytest.mark.parametrize("value", [0, -1])
def test_zero_and_less_are_named_or_taken(value):
    """The other checks, which divide and compare, work with every number that its range allows."""
    taken = {}
    for path, index, number in numbers():
        bad = float(value) if isinstance(number, float) else value
        changed = with_entry(example(path, KNOWN[path]), index, bad)
        if problems := range_problems({path: changed}, KNOWN):
            assert problems[0].startswith(f"{shown(path, index)} is {bad!r}; it must be ")
        else:
            taken[path] = changed
    for batch in [list(taken.items())[i::8] for i in range(8)]:
        config = ml_collections.ConfigDict(DEFAULT, type_safe=False)
        config.update_from_flattened_dict(dict(batch))
        with contextlib.suppress(ConfigError):  # clashes with other fields
            validate(config)


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("seed", -1, "seed is -1; it must be from 0 to 4294967295"),
        ("tokenizer.train.save_every", 0, "save_every is 0; it must be at least 1"),
        ("diffusion.train.batch_size", 0, "batch_size is 0; it must be at least 1"),
        ("tokenizer.train.keep", 0, "keep is 0; it must be at least 1"),
        ("tokenizer.train.log_every", 0, "log_every is 0; it must be at least 1"),
        ("sample.ode.guidance", math.nan, "guidance is nan; it must be a finite number, at least"),
        ("latents.batch_size", 10**30, "it must be at most 2,147,483,647"),
        ("diffusion.optim.learning_rate", 1e30, "it must be at most 1,000"),
        ("mesh.data", 0, "mesh.data is 0; it must be at least 1, or -1"),
        ("mesh.fsdp", -1, "mesh.data and mesh.fsdp are -1"),
        ("evaluate.noise_levels", (0.0, math.nan), r"evaluate.noise_levels\[1\] is nan"),
        ("evaluate.noise_levels", 0.1, "it must be a tuple"),
        ("tokenizer.phases", ((0, ".*", ("l1",)),), r"tokenizer.phases\[0\]\[0\] is 0; it must"),
        ("tokenizer.phases", ("abc",), "tokenizer.phases has 'abc'; give"),
        ("tokenizer.optim.scales", (("(", 1.0),), "has the regex '.', which is none"),
        ("tokenizer.optim.scales", (("a",),), "give pairs"),
        ("sample.ode.guidance_parts", (0.5,), r"guidance_parts\[0\] is 0.5; no number belongs"),
        ("sample.ode.guidance_start", 1.0, ""),
        ("sample.sde.guidance_end", 0.0, ""),
        ("sample.ode.guidance_end", 0.1, "guidance_start is 0.25, after sample.ode.guidance_end"),
        ("sample.sde.start", 0.999, "where the grid has ended"),
        ("diffusion.train.eval_every", 0, ""),
        ("data.mirror", "yes", "data.mirror is 'yes'; it must be True or False"),
        ("data.root", None, "data.root is None; it must be a text"),
    ],
)
def test_what_is_said(path, value, says):
    config = with_value(path, value)
    if says:
        with pytest.raises(ConfigError, match=says):
            validate(config)
    else:
        validate(config)


def test_a_bad_number_ends_the_command_with_one_line(tmp_path, capsys):
    for flag in ("seed=-1", "diffusion.train.keep=0", "sample.ode.guidance=nan"):
        arguments = ("--config=configs/demo.py", f"--workdir={tmp_path / 'run'}")
        assert cli.main(["gae_jax", "demo", *arguments, f"--config.{flag}"]) == 1
        text = capsys.readouterr().err
        assert "Traceback" not in text
        assert f"{flag.split('=')[0]} is " in text
    assert not (tmp_path / "run").exists()
