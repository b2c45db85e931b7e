"""Configs: what does not fit is refused, by name."""

import importlib.util

import ml_collections
import pytest
from conftest import ROOT

from gae_jax.config import bind, default_config, flatten
from gae_jax.config.validate import validate
from gae_jax.runtime.errors import ConfigError
from gae_jax.tokenizers.gae import GAE


def config_of(name, *argument):
    path = ROOT / "configs" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(*argument)


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "configs").glob("*.py")))
def test_every_config_file_is_valid(name):
    validate(config_of(name))


@pytest.mark.parametrize(
    ("name", "argument", "differs"),
    [
        ("gae_d32", "L", {}),
        ("gae_d32", "B", {"tokenizer.model.embed_dim": 768, "tokenizer.model.num_layers": 12}),
        (
            *("gae_d64", "S"),
            {"tokenizer.model.latent_dim": 64, "teacher.model.latent_dim": 64}
            | {"tokenizer.model.num_heads": 6, "sample.sde.time_shift": 0.5},
        ),
        ("fae", "full", {"tokenizer.name": "fae", "backbone.dinov2.num_hidden_layers": 40}),
        ("fae", "digits", {"tokenizer.name": "fae", "tokenizer.fae.latent_dim": 8}),
        ("rae", "full", {"tokenizer.name": "rae", "backbone.dinov2.num_register_tokens": 4}),
        ("rae", "mae", {"backbone.name": "mae", "backbone.mae.hidden_size": 768}),
        (
            *("rae", "siglip2"),
            {"backbone.name": "siglip", "backbone.siglip.num_hidden_layers": 12}
            | {"backbone.siglip.intermediate_size": 3072},
        ),
        ("pae", "dinov3", {"tokenizer.name": "pae", "backbone.name": "dinov3"}),
        ("pae", "mae", {"tokenizer.name": "pae", "backbone.name": "mae"}),
        ("pae", "siglip2", {"tokenizer.name": "pae", "backbone.name": "siglip"}),
        ("aligntok", "d64", {"tokenizer.aligntok.latent_dim": 64}),
        ("aligntok", "mae", {"backbone.name": "mae"}),
        ("aligntok", "siglip2", {"backbone.name": "siglip", "backbone.siglip.hidden_size": 1024}),
        ("fae", "siglip2", {"backbone.name": "siglip", "backbone.siglip.hidden_size": 1536}),
        ("rae", "weak", {"diffusion.model.hidden_size": 384, "diffusion.train.steps": 17_514}),
        ("rae", "digits", {"tokenizer.discriminator.dino.weights": "random"}),
        ("gae_ablation", "B", {"tokenizer.model.num_heads": 12, "tokenizer.model.noise_std": 0.1}),
        ("teacher_dinov2_l", "64", {"teacher.model.latent_dim": 64}),
        (
            *("dit_xl_d64", "800"),
            {"diffusion.model.use_qknorm": True, "diffusion.train.steps": 1_000_000}
            | {"tokenizer.model.latent_dim": 64, "sample.sde.time_shift": 0.5},
        ),
    ],
)
def test_argument_of_a_config_file(name, argument, differs):
    config, paper = config_of(name, argument), flatten(default_config())
    validate(config)
    changed = {key: value for key, value in flatten(config).items() if paper[key] != value}
    assert differs.items() <= changed.items()
    assert bool(differs) == bool(changed)


@pytest.mark.parametrize("name", ["gae_d32", "gae_d64", "gae_ablation", "teacher_dinov2_l"])
def test_unknown_argument_of_a_config_file_names_the_others(name):
    known = "use :32 or :64" if name.startswith("teacher") else "use :S or :B or :L"
    with pytest.raises(ConfigError, match=f"'XXL' in this config: {known}"):
        config_of(name, "XXL")


@pytest.mark.parametrize(
    ("name", "differs"),
    [
        ("dit_xl_d32_80ep", {}),
        (
            "dit_xl_d32_800ep",
            {"diffusion.model.use_qknorm": True, "diffusion.train.steps": 1_000_000}
            | {"sample.ode.guidance": 3.3, "sample.ode.guidance_start": 0.3},
        ),
        (
            "dit_b_d32",
            {"diffusion.model.hidden_size": 768, "diffusion.model.depth": 12}
            | {"diffusion.model.num_heads": 12},
        ),
    ],
)
def test_what_the_diffusion_configs_change(name, differs):
    """The defaults are the 80-epoch setting, but for where the released SDE stops."""
    config, paper = flatten(config_of(name)), flatten(default_config())
    changed = {key: value for key, value in config.items() if paper[key] != value}
    assert changed == differs | {"sample.sde.last_step": "reference"}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("imagenet_tfds", {"data.name": "tfds"}),
        ("imagenet_array_record", {"data.name": "array_record"}),
        ("imagenet_folder", {}),
    ],
)
@pytest.mark.parametrize("under", ["gae_d32", "gae_d32:B", "dit_xl_d64:800", "teacher_dinov2_l"])
def test_a_data_config_changes_the_data_of_another(name, changes, under):
    config = config_of(f"data/{name}", under)
    validate(config)
    plain = flatten(config_of(*under.split(":")))
    assert {key: x for key, x in flatten(config).items() if plain[key] != x} == changes
    assert flatten(config_of(f"data/{name}")) == flatten(config_of(f"data/{name}", "gae_d32"))


def test_every_data_config_is_tested():
    found = sorted(path.stem for path in (ROOT / "configs/data").glob("*.py"))
    assert found == ["imagenet_array_record", "imagenet_folder", "imagenet_tfds"]


def test_a_data_config_under_none_names_the_others():
    with pytest.raises(ConfigError, match=r"no config .*gae_d23.py: use :.*:gae_d32"):
        config_of("data/imagenet_tfds", "gae_d23")


def test_default_config_is_valid():
    validate(default_config())


def test_unknown_key_is_refused_by_the_locked_config(config):
    with pytest.raises(AttributeError, match="latnt_dim"):
        config.tokenizer.model.latnt_dim = 8


def test_unknown_and_missing_keys_are_named():
    config = ml_collections.ConfigDict(default_config().to_dict())
    config.tokenizer.model.latnt_dim = 8
    del config.seed
    with pytest.raises(ConfigError) as error:
        validate(config)
    assert "unknown key tokenizer.model.latnt_dim" in str(error.value)
    assert "did you mean tokenizer.model.latent_dim?" in str(error.value)
    assert "missing key seed" in str(error.value)


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("tokenizer.model.image_size", 64, "data.image_size is 16"),
        ("tokenizer.model.patch_size", 5, "not a multiple of patch_size 5"),
        ("tokenizer.model.num_heads", 3, "not a multiple of num_heads 3"),
        ("diffusion.model.patch_size", 0, "patch_size is 0; it must be at least 1"),
        ("teacher.model.heads", -1, "teacher.model.heads is -1; it must be at least 1"),
        ("teacher.model.latent_dim", 2, "must be equal"),
        ("teacher.kind", "pca", "use one of learned, svd, prior"),
        (
            "teacher.model.downsampler",
            "linear",
            "use one of attention_conv, attention,",
        ),
        ("teacher.model.window_size", 3, "is 3, which does not divide 4"),
        ("teacher.svd.images", 0, "must be at least 1"),
        ("precision.train.dtype", "float16", "use one of auto, float32, bfloat16"),
        ("precision.override", ("teacher.dtype=float16",), "use one of auto, float32, bfloat16"),
        ("teacher.train.accumulate", 3, "does not divide into"),
        ("precision.override", ("backbone.attention=flash",), "use one of auto, xla"),
        ("tokenizer.train.accumulate", 3, "does not divide into"),
        ("precision.train.remat", "some", "use one of none, nothing_saveable"),
        ("diffusion.train.accumulate", 3, "does not divide into"),
        ("tokenizer.discriminator.stat_groups", 0, "is 0; it must be at least 1"),
        ("tokenizer.discriminator.stat_groups", 3, "does not divide the 16 images"),
        ("data.on_corrupt", "ignore", "use one of error, skip"),
        ("diffusion.flow.time_shift", 0.0, "must be > 0"),
        ("diffusion.name", "dit", "use one of lightningdit, ddt"),
        ("diffusion.head.num_heads", 3, "is 3, which does not divide 2048"),
        ("latents.statistics", "token", "use one of channel, element"),
        ("tokenizer.optim.decay", "step", "use one of cosine, linear"),
        ("tokenizer.discriminator.name", "gan", "use one of patch, dino"),
        ("tokenizer.discriminator.augment", ("cutout",), r"has \['cutout'\]; known are transl"),
        ("tokenizer.discriminator.dino.depth", 6, "but depth differ from its sizes"),
        ("tokenizer.discriminator.dino.ks", 8, "is 8; it must be odd"),
        ("diffusion.flow.time_least", 1.0, r"must be in \[0, 1\)"),
        ("sample.ode.end", 0.0, r"must be in \(0, 1\]"),
        ("sample.sde.guidance_parts", ((0.5, 2.0),), r"end at \[0.5\]; they must increase"),
        (
            "sample.sde.guidance_parts",
            ((1.0, 2.0, 3.0),),
            r"\[0\]\[2\] is 3.0; no number belongs",
        ),
        ("sample.ode.guidance_parts", ((1.0, 2.0),), "is 2.5; with .* it must be 1"),
    ],
)
def test_clashes_are_explained(config, path, value, says):
    *sections, leaf = path.split(".")
    section = config
    for name in sections:
        section = section[name]
    section[leaf] = value
    with pytest.raises(ConfigError, match=says):
        validate(config)


def test_bind_refuses_what_the_constructor_does_not_take():
    with pytest.raises(
        ConfigError, match=r"tokenizer.model.latent is no argument of GAE.*latent_dim"
    ):
        bind(GAE, {"latent": 4}, "tokenizer.model")
    assert bind(GAE, {"latent_dim": 4}, "tokenizer.model") == {"latent_dim": 4}


def test_flatten():
    config = {"b": {"x": (1, 2)}, "a": 3}
    assert flatten(config) == {"b.x": [1, 2], "a": 3}


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("bench.stepz=0", "--config.bench.stepz: bench has no field 'stepz'"),
        ("tokenizer.traain.steps=3", "tokenizer has no field 'traain'; did you mean train?"),
        ("foo=3", "--config.foo: the config has no field 'foo'; it has"),
        ("tokenizer.train.steps.x=3", "tokenizer.train.steps is a field and has none inside"),
    ],
)
def test_a_flag_of_a_field_that_there_is_not_is_named(flag, says, capsys):
    from gae_jax.commands.cli import main

    assert main(["gae_jax", "report", "--config=configs/demo.py", f"--config.{flag}"]) == 1
    assert says in capsys.readouterr().err
