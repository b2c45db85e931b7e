"""A released PAE or RAE becomes the tokenizer of a run, on the backbone that it was trained on."""

from functools import partial

import jax
import numpy as np
import pytest

from gae_jax.commands import export_torch as exports
from gae_jax.commands import import_torch
from gae_jax.interop.convert import ConversionError, export_torch
from gae_jax.interop.files import write_safetensors
from gae_jax.interop.vision_tables import DINOV2
from gae_jax.nn.network import Network
from gae_jax.pretrained.dinov2 import Dinov2
from gae_jax.run.load import load
from gae_jax.run.run import Run
from gae_jax.run.session import Session
from gae_jax.runtime.errors import UserError
from gae_jax.tokenizers import latent_shape
from gae_jax.tokenizers.mae_decoder import GeneralDecoder
from gae_jax.tokenizers.pae_networks import PAE
from gae_jax.tokenizers.pae_torch import DECODER, PAE_COUNTERPART, PAE_MODEL, RAE_COUNTERPART

BACKBONE = dict(
    hidden_size=32,
    num_hidden_layers=1,
    num_attention_heads=4,
    image_size=28,
    patch_size=7,
    num_register_tokens=4,
    interpolate_offset=0.0,
)


def random_state(table, module, sizes):
    network, rng = Network(partial(module, **sizes)), np.random.default_rng(0)
    arrays = jax.tree.map(
        lambda x: rng.normal(size=x.shape).astype(np.float32) / 5, network.abstract
    )
    return export_torch(table, *arrays, **sizes)


@pytest.fixture
def files(config, tmp_path):
    """(config, tensors of the checkpoint), both files written: the encoder is inside too."""
    config.data.image_size = 32
    config.backbone.name = "dinov2"
    config.backbone.dinov2.update(BACKBONE | dict(input_size=28))
    config.tokenizer.name = "pae"
    config.tokenizer.pae.update(
        num_heads=4,
        delta_depth=1,
        latent_dim=8,
        decoder_patch_size=8,
        decoder_hidden_size=16,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=32,
    )
    encoder = random_state(DINOV2, Dinov2, BACKBONE)
    write_safetensors(tmp_path / "dinov2.safetensors", encoder)
    sizes = PAE_COUNTERPART.arguments(config.tokenizer.pae, config.backbone, 32)
    tensors = {f"module.{k}": v for k, v in random_state(PAE_MODEL, PAE, sizes).items()}
    inside = {
        k: v for k, v in encoder.items() if not k.startswith(("layernorm", "embeddings.mask"))
    }
    tensors |= {f"module.encoder.encoder.{k}": v for k, v in inside.items()}
    write_safetensors(tmp_path / "pae.safetensors", tensors)
    config.import_torch.update(
        backbone=str(tmp_path / "dinov2.safetensors"), tokenizer=str(tmp_path / "pae.safetensors")
    )
    return config, tensors


def test_a_released_decoder_of_rae_becomes_the_tokenizer(files, tmp_path, capsys):
    config, _ = files
    config.tokenizer.name = "rae"
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24)
    config.tokenizer.rae.update({f"decoder_{k}": v for k, v in sizes.items()}, patch_size=8)
    sizes = RAE_COUNTERPART.arguments(config.tokenizer.rae, config.backbone, 32)
    tensors = random_state(DECODER, GeneralDecoder, sizes)
    write_safetensors(tmp_path / "model.safetensors", tensors)
    config.import_torch.tokenizer = str(tmp_path / "model.safetensors")
    now = session(config, tmp_path / "run")
    import_torch.run(now)
    told = capsys.readouterr().out
    assert "has no encoder that could be compared" in told
    assert "tensors that differ when exported again: 0" in told
    network, (params, rest) = load(now.run.stage("tokenizer"), now.mesh)
    kernel = params["decoder"]["decoder_pred"]["kernel"]
    np.testing.assert_array_equal(kernel, tensors["decoder_pred.weight"].T)
    backbone = load(now.run.stage("backbone"), now.mesh)[1][0]["encoder"]
    jax.tree.map(np.testing.assert_array_equal, rest["encoder"]["encoder"], backbone)
    assert network(params, rest).latent_shape == (4, 4, 32)
    config.tokenizer.rae.update(decoder_hidden_size=8, patch_size=16)
    with pytest.raises(ConversionError) as error:
        import_torch.run(session(config, tmp_path / "another"))
    for flag in ("decoder_hidden_size=16", "patch_size=8"):
        assert f"--config.tokenizer.rae.{flag}" in str(error.value)


def session(config, path):
    return Session(config, Run(path), devices=tuple(jax.devices()[:1]))


@pytest.mark.slow
def test_a_released_pae_becomes_the_tokenizer(files, tmp_path, capsys):
    config, tensors = files
    now = session(config, tmp_path / "run")
    import_torch.run(now)
    told = capsys.readouterr().out
    assert "its encoder is the run's backbone, 23 tensors" in told
    assert "tensors that differ when exported again: 0" in told
    folder = now.run.stage("tokenizer")
    assert latent_shape(folder.config) == (4, 4, 8)
    network, (params, rest) = load(folder, now.mesh)
    kernel = params["pae"]["decoder"]["decoder_pred"]["kernel"]
    np.testing.assert_array_equal(kernel, tensors["module.decoder.decoder_pred.weight"].T)
    backbone = load(now.run.stage("backbone"), now.mesh)[1][0]["encoder"]
    jax.tree.map(np.testing.assert_array_equal, rest["encoder"]["encoder"], backbone)
    assert network(params, rest).latent_shape == (4, 4, 8)
    # the tokenizer alone, into a run that has the backbone: the same weights, nothing to do
    config.import_torch.backbone = ""
    before = (folder.path / "done.json").stat().st_mtime_ns
    import_torch.run(session(config, tmp_path / "run"))
    assert (folder.path / "done.json").stat().st_mtime_ns == before
    config.export_torch.networks = ("tokenizer",)
    with pytest.raises(
        UserError, match="'pae', and the folder is one for the code released with GAE"
    ):
        exports.run(now)


def test_what_does_not_fit_is_refused(files, tmp_path):
    config, tensors = files
    now = partial(session, config, tmp_path / "run")
    changed = "module.encoder.encoder.encoder.layer.0.norm1.weight"
    write_safetensors(tmp_path / "pae.safetensors", tensors | {changed: tensors[changed] + 1})
    with pytest.raises(ConversionError, match=r"not the run's backbone: \['encoder.layer.0.norm1"):
        import_torch.run(now())
    write_safetensors(tmp_path / "pae.safetensors", tensors)
    config.tokenizer.pae.update(delta_depth=2, fusion_mode="add", decoder_patch_size=4)
    with pytest.raises(ConversionError) as error:
        import_torch.run(now())
    for flag in ("delta_depth=1", "fusion_mode=sft", "decoder_patch_size=8"):
        assert f"--config.tokenizer.pae.{flag}" in str(error.value)
    assert "latent_dim" not in str(error.value)
    config.tokenizer.pae.update(delta_depth=1, fusion_mode="sft", decoder_patch_size=8)
    config.import_torch.backbone = ""
    with pytest.raises(UserError, match="is imported on its frozen encoder: pass"):
        import_torch.run(now())
