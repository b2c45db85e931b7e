"""The linear probe by SGD: against torch, on one device and on eight, and on data that it knows."""

import json
import logging
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from gae_jax.evaluation import sgd_epoch
from gae_jax.evaluation import sgd_probe as probe
from gae_jax.evaluation.sgd_epoch import Layer
from gae_jax.evaluation.sgd_probe import ProbeSettings, sgd_probe
from gae_jax.runtime.errors import ConfigError, DataError, NonFiniteError
from gae_jax.runtime.mesh import BATCH, make_mesh

GOLDEN = Path(__file__).parents[1] / "golden" / "probe.safetensors"
with safe_open(GOLDEN, "numpy") as file:
    CONFIG = json.loads(file.metadata()["config"])


def mesh_of(devices, **shape):
    return make_mesh(**shape, devices=jax.devices()[:devices])


def toy(count, *, classes=5, views=0, seed=0, noise=0.5, d=4):
    """Latents [count, (views,) 2, 2, d] around the mean of their class, and labels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count)
    means = np.random.default_rng(99).normal(size=(classes, 2, 2, d))
    shape = (count, views, 2, 2, d) if views else (count, 2, 2, d)
    centres = means[labels][:, None] if views else means[labels]
    return (centres + noise * rng.normal(size=shape)).astype(np.float32), labels


def rows_of(order, batch_size, drop_last, ways):
    """One epoch's permutation as `draw_batches` lays it out."""
    parts = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    if drop_last and len(parts[-1]) < batch_size:
        parts.pop()
    width = batch_size + -batch_size % ways
    return np.stack([np.pad(p, (0, width - len(p)), constant_values=-1) for p in parts])


@pytest.mark.parametrize("devices", [1, 2, 8])
@pytest.mark.parametrize("case", CONFIG["cases"])
def test_epochs_are_those_of_torch(case, devices):
    """The same initial weights and permutations, 5 epochs; one device and shares of a batch."""
    golden = load_file(GOLDEN)
    settings = ProbeSettings(**CONFIG["cases"][case], batch_size=CONFIG["batch_size"])
    mesh = mesh_of(devices, fsdp=min(devices, 2))
    features, held_out = (
        probe.put_features(golden[name][:, None], mesh, settings)
        for name in ("latents", "test_latents")
    )
    held_out_labels = np.pad(golden["test_labels"], (0, len(held_out) - 60), constant_values=-1)
    epoch = sgd_epoch.make_epoch(
        mesh, learning_rate=settings.learning_rate, momentum=settings.momentum, precision="highest"
    )
    score = sgd_epoch.make_score(mesh, precision="highest")
    weight, bias = golden[f"{case}.initial.weight"].T, golden[f"{case}.initial.bias"]
    layer = jax.device_put(
        Layer(weight, bias, np.zeros_like(weight), np.zeros_like(bias)),
        jax.NamedSharding(mesh, jax.P()),
    )
    for i, order in enumerate(golden["order"]):
        order = rows_of(order, settings.batch_size, settings.drop_last, devices)
        layer, loss = epoch(layer, features, golden["labels"], order, np.zeros_like(order))
        top1, top5, test_loss = score(layer, held_out, held_out_labels)
        np.testing.assert_allclose(loss, golden[f"{case}.train_loss"][i], rtol=1e-6)
        np.testing.assert_allclose(test_loss, golden[f"{case}.loss"][i], rtol=1e-6)
        np.testing.assert_allclose(top1, golden[f"{case}.top1"][i], rtol=1e-6)
        np.testing.assert_allclose(top5, golden[f"{case}.top5"][i], rtol=1e-6)
    difference = np.abs(layer.kernel - golden[f"{case}.weight"].T).max()
    print(f"{case}, {devices} devices: {difference:.1e}")
    np.testing.assert_allclose(layer.kernel, golden[f"{case}.weight"].T, rtol=0, atol=1e-6)
    np.testing.assert_allclose(layer.bias, golden[f"{case}.bias"], rtol=0, atol=1e-6)


# the dtype is that of the products alone, whatever the mesh
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_devices_do_not_change_the_figures(dtype):
    """Sets and a batch that do not divide over 8, and a mesh whose tensor axis repeats rows."""
    train, test = toy(83, views=2, noise=2.0), toy(45, seed=1, noise=2.0)
    settings = ProbeSettings(
        batch_size=12, epochs=3, learning_rate=0.1, drop_last=False, momentum=0.5, dtype=dtype
    )
    results = [
        sgd_probe(train, test, classes=5, mesh=mesh, settings=settings)
        for mesh in (mesh_of(1), mesh_of(2), mesh_of(8), mesh_of(8, data=2, fsdp=2, tensor=2))
    ]
    assert 0.3 < results[0].last_top1 < 1
    for other in results[1:]:
        for name in ("train_loss", "loss"):
            np.testing.assert_allclose(getattr(other, name), getattr(results[0], name), rtol=1e-6)
        np.testing.assert_allclose(other.top1, results[0].top1, rtol=1e-6)
        assert (other.batch_size, other.dimensions) == (12, 16)


def test_features_lie_split_over_the_devices():
    features = probe.put_features(toy(30)[0][:, None], mesh_of(8, fsdp=2), ProbeSettings())
    assert features.shape == (32, 1, 16)
    assert features.sharding.spec == BATCH
    assert features.addressable_shards[0].data.shape == (4, 1, 16)


@pytest.mark.parametrize("head", ["flatten", "mean"])
def test_what_is_separable_is_learnt(head):
    train, test = toy(600, classes=8, d=16), toy(200, classes=8, d=16, seed=1)
    settings = ProbeSettings(head=head, batch_size=50, epochs=15, learning_rate=0.3)
    seen = []
    result = sgd_probe(
        train, test, classes=8, mesh=mesh_of(1), settings=settings,
        progress=lambda at, values: seen.append((at, values["top1"])),
    )  # fmt: skip
    assert result.dimensions == (64 if head == "flatten" else 16)
    assert result.last_top1 > 0.95
    assert result.train_loss[-1] < 0.5 * result.train_loss[0]
    assert seen == list(enumerate(result.top1, start=1))
    assert result.best_top1 == max(result.top1)
    assert all(five >= one for one, five in zip(result.top1, result.top5, strict=True))
    # labels that say nothing about the latents are not learnt
    shuffled = train[0], np.random.default_rng(5).permutation(train[1])
    chance = sgd_probe(shuffled, test, classes=8, mesh=mesh_of(1), settings=settings)
    assert chance.last_top1 < 0.35


def test_the_defaults_are_the_papers():
    settings = ProbeSettings()
    paper = dict(head="flatten", learning_rate=0.008, batch_size=2048, epochs=100)
    assert {name: getattr(settings, name) for name in paper} == paper


def test_few_images_shrink_the_batch_and_say_so(caplog):
    train, test = toy(30), toy(10, seed=1)
    with caplog.at_level(logging.WARNING):
        result = sgd_probe(
            train, test, classes=5, mesh=mesh_of(8), settings=ProbeSettings(epochs=2)
        )
    assert result.batch_size == 30
    assert "only 30 training images, so batches of 30 instead of 2048" in caplog.text
    caplog.clear()
    sgd_probe(
        train, test, classes=5, mesh=mesh_of(1), settings=ProbeSettings(epochs=1, batch_size=30)
    )
    assert not caplog.text


@pytest.mark.parametrize(("drop_last", "steps", "used"), [(True, 3, 30), (False, 4, 37)])
def test_an_epoch_draws_every_image_once(drop_last, steps, used):
    kwargs = dict(images=37, views=2, batch_size=10, drop_last=drop_last)
    key = jax.random.key(0)
    order, view = sgd_epoch.draw_batches(key, **kwargs, ways=4)
    assert order.shape == view.shape == (steps, 12)
    drawn = order[order >= 0]
    assert len(drawn) == len(set(drawn.tolist())) == used
    assert set(np.asarray(view).ravel().tolist()) == {0, 1}
    # the same images in the same batches with the same views, whatever the devices
    alone, alone_view = sgd_epoch.draw_batches(key, **kwargs, ways=1)
    np.testing.assert_array_equal(order[:, :10], alone)
    np.testing.assert_array_equal(np.where(order >= 0, view, 0)[:, :10][alone >= 0],
                                  alone_view[alone >= 0])  # fmt: skip
    other, _ = sgd_epoch.draw_batches(jax.random.key(1), **kwargs, ways=4)
    assert np.any(other != order)


def test_views_are_drawn_only_where_wanted():
    """The second view is noise: the probe that draws it is worse; without flips it is not read."""
    latents, labels = toy(300, views=2)
    latents[:, 1] = np.random.default_rng(1).normal(size=latents[:, 1].shape)
    test = toy(100, seed=1)
    kwargs = dict(classes=5, mesh=mesh_of(1))
    settings = dict(batch_size=50, epochs=5, learning_rate=0.3)
    drawn = sgd_probe((latents, labels), test, settings=ProbeSettings(**settings), **kwargs)
    plain = ProbeSettings(**settings, flips=False)
    alone = sgd_probe((latents, labels), test, settings=plain, **kwargs)
    assert drawn.train_loss[-1] > 1.5 * alone.train_loss[-1]
    one_view = sgd_probe((latents[:, 0], labels), test, settings=plain, **kwargs)
    assert one_view == alone
    one_view = sgd_probe(
        (latents[:, 0], labels), test, settings=ProbeSettings(**settings), **kwargs
    )
    assert one_view == alone


@pytest.mark.parametrize("head", ["flatten", "mean"])
def test_standardised_latents_do_not_depend_on_the_channels_scale(head):
    (latents, labels), (others, other_labels) = toy(80, noise=1.0), toy(40, seed=1, noise=1.0)
    scale, shift = np.array([1, 10, 0.1, 3], np.float32), np.array([0, 5, 1, -20], np.float32)
    settings = ProbeSettings(head=head, batch_size=16, epochs=3, standardise=True)
    kwargs = dict(classes=5, mesh=mesh_of(2), settings=settings)
    plain = sgd_probe((latents, labels), (others, other_labels), **kwargs)
    moved = sgd_probe(
        (latents * scale + shift, labels), (others * scale + shift, other_labels), **kwargs
    )
    np.testing.assert_allclose(moved.loss, plain.loss, rtol=1e-5)
    mean, std = probe.channel_moments(latents)
    np.testing.assert_allclose(mean, latents.mean((0, 1, 2), dtype=np.float64), rtol=1e-9)
    np.testing.assert_allclose(std, latents.std((0, 1, 2), dtype=np.float64), rtol=1e-9)


def test_initial_weights_are_those_of_a_linear_layer():
    layer = sgd_epoch.initial_layer(jax.random.key(0), 400, 50)
    for x in (layer.kernel, layer.bias):
        assert np.abs(x).max() <= 0.05
    np.testing.assert_allclose(np.std(layer.kernel), 0.05 / np.sqrt(3), rtol=0.02)
    assert np.abs(layer.bias).max() > 0.04
    assert not layer.kernel_velocity.any()


def test_ranks_break_ties_by_index_and_leave_padding_out():
    """Equal logits of all classes: only class 0 is first, and only classes 0 to 4 in five."""
    layer = Layer(np.zeros((3, 8), np.float32), np.zeros(8, np.float32), 0, 0)
    labels = np.array([0, 1, 2, 3, 4, 5, 6, 7, 0, 0, -1, -1, -1, -1, -1, -1], np.int32)
    score = sgd_epoch.make_score(mesh_of(8), precision="highest")
    found = score(layer, np.ones((16, 1, 3), np.float32), labels)
    np.testing.assert_allclose(found, [3 / 10, 7 / 10, np.log(8)], rtol=1e-6)


def test_scores_of_more_rows_than_a_chunk(monkeypatch):
    monkeypatch.setattr(sgd_epoch, "CHUNK", 7)
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(40, 6)), rng.normal(size=(6, 9))
    labels = rng.integers(0, 9, 40)
    layer = Layer(kernel.astype(np.float32), np.zeros(9, np.float32), 0, 0)
    score = sgd_epoch.make_score(mesh_of(2), precision="highest")
    found = score(layer, x[:, None].astype(np.float32), labels.astype(np.int32))
    order = np.argsort(-x @ kernel, axis=1)
    hits = order == labels[:, None]
    np.testing.assert_allclose(found[:2], [hits[:, 0].mean(), hits[:, :5].any(1).mean()], rtol=1e-6)


def test_what_does_not_fit_is_explained():
    train, test = toy(30), toy(10, seed=1)

    def run(train, test, **settings):
        settings = ProbeSettings(batch_size=10, **settings)
        sgd_probe(train, test, classes=5, mesh=mesh_of(1), settings=settings)

    with pytest.raises(ConfigError, match="no head 'gap'"):
        ProbeSettings(head="gap")
    with pytest.raises(ConfigError, match="0 epochs"):
        ProbeSettings(epochs=0)
    with pytest.raises(DataError, match=r"test labels are between 0 and 5, but .* 5 classes"):
        run(train, (test[0], np.arange(10) % 6))
    with pytest.raises(DataError, match=r"training latents \[30, 2, 2, 4\] and labels \[29\]"):
        run((train[0], train[1][:-1]), test)
    with pytest.raises(DataError, match=r"\[2, 2, 4\] and its test latents \[2, 2, 3\]"):
        run(train, (test[0][..., :3], test[1]))
    with pytest.raises(NonFiniteError, match=r"not finite in epoch 1 .*lower its learning_rate"):
        run((train[0] * 1e20, train[1]), test, learning_rate=1e20)


def test_a_constant_channel_can_be_standardised():
    latents = np.random.default_rng(0).standard_normal((6, 1, 2, 2, 3)).astype(np.float32)
    latents[..., 1] = 0.25
    mean, std = probe.channel_moments(latents)
    assert (mean[1], std[1]) == (0.25, 1)
    np.testing.assert_allclose(std[0], latents[..., 0].std(dtype=np.float64))
