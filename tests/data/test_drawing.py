"""What stands for a split: spread over its classes, bounded in memory, and left out if it lacks."""

import json
import logging
import tracemalloc

import jax
import numpy as np
import pytest
from PIL import Image

from gae_jax.data.contents import Contents, counted
from gae_jax.data.drawing import drawn, order_of, stratified_order
from gae_jax.data.latent_shards import finish_set, write_shard
from gae_jax.data.latents import LatentSet, Picked
from gae_jax.data.sources import make_source
from gae_jax.evaluation import diagnostics
from gae_jax.run import generation_judge
from gae_jax.run.run import Run
from gae_jax.run.session import Session
from gae_jax.stages import diffusion, evaluate, latents, tokenizer
from gae_jax.stages.backbone import held_out_batches


class Sorted:
    """Images that lie class by class: each is grey and as bright as its class."""

    def __init__(self, counts, *, known=True, unreadable=()):
        labels = np.repeat(np.arange(len(counts)), counts)
        self._all, self.class_names = labels, [str(name) for name in range(len(counts))]
        self.contents = Contents.of(counted(labels, self.class_names))
        self._unreadable, self.read = set(unreadable), []
        if known:
            self.labels = labels

    def __len__(self):
        return len(self._all)

    def __getitem__(self, index):
        self.read.append(index)
        label = int(self._all[index])
        return {"image": Image.new("RGB", (16, 16), (label % 256,) * 3), "label": label}

    def readable(self, index):
        return index not in self._unreadable

    def __repr__(self):
        return f"Sorted({len(self)})"


@pytest.mark.parametrize("name", ["digits", "folder"])
@pytest.mark.parametrize("split", ["train", "holdout"])
def test_sources_know_their_labels(name, split, tmp_path):
    for label, color in (("a", 0), ("b", 90), ("c", 200)):
        (tmp_path / label).mkdir()
        for index in range(5):
            Image.new("RGB", (8, 8), (color,) * 3).save(tmp_path / label / f"{index}.png")
    source = make_source(name, split, root=str(tmp_path), holdout=0.4)
    labels = [source[index]["label"] for index in range(len(source))]
    np.testing.assert_array_equal(source.labels, labels)


def session_of(config, tmp_path, **sources):
    session = Session(config, Run(tmp_path / "run"), devices=tuple(jax.devices()[:1]))
    session._sources.update(sources)
    config.diffusion.model.num_classes = len(session.source("train").class_names)
    return session


def test_every_prefix_is_stratified():
    labels = np.repeat(np.arange(4), [600, 300, 99, 1])
    order = stratified_order(labels, 4)
    assert sorted(order) == list(range(1000))
    assert sorted(labels[order[:4]]) == [0, 1, 2, 3]
    for most in (50, 200, 700):
        counts = np.bincount(labels[order[:most]], minlength=4)
        np.testing.assert_allclose(counts, np.array([600, 300, 99, 1]) * most / 1000, atol=2)
    # not the first of a class either
    assert labels[order[:50]].tolist() != sorted(labels[order[:50]])
    assert order[labels[order] == 0][:20].tolist() != list(range(20))


def test_few_images_of_two_splits_are_of_the_same_classes():
    splits = np.repeat(np.arange(1000), 13), np.repeat(np.arange(1000), 5)
    found = [set(labels[drawn(labels, 1000, 64)]) for labels in splits]
    assert len(found[0]) == 64
    assert found[0] == found[1]


def test_all_are_taken_in_their_order_where_there_are_no_more():
    labels = np.random.default_rng(0).integers(0, 3, 50)
    np.testing.assert_array_equal(drawn(labels, 3, 50), np.arange(50))


def test_a_first_class_of_more_images_than_are_asked_for(config, tmp_path):
    """Cats and dogs: 2,100 and 900, of which 100 are drawn; no other image is read."""
    source = Sorted([2100, 900])
    session = session_of(config, tmp_path, train=source, holdout=Sorted([300, 100]))
    images, labels = session.images("train", 100)
    assert np.bincount(labels).tolist() == [70, 30]
    np.testing.assert_array_equal(images[:, 0, 0, 0], labels)
    assert len(set(source.read)) <= 100
    again = session.images("train", 100)
    np.testing.assert_array_equal(images, again[0])


def test_a_source_that_does_not_know_its_labels_is_shuffled(config, tmp_path):
    source = Sorted([500, 500], known=False)
    session = session_of(config, tmp_path, train=source)
    assert 20 < session.images("train", 80)[1].sum() < 60
    assert len(set(source.read)) <= 80
    assert sorted(order_of(source)) == list(range(1000))


def test_others_take_the_place_of_images_that_cannot_be_read(config, tmp_path):
    source = Sorted([100, 100], unreadable=range(0, 200, 3))
    session = session_of(config, tmp_path, train=source)
    images, labels = session.images("train", 60)
    assert len(images) == len(labels) == 60
    assert 20 <= labels.sum() <= 40


def test_many_sorted_classes_are_all_seen_by_what_is_shown_in_training(config, tmp_path):
    config.evaluate.batch_size, config.evaluate.probe_images = 16, 300
    sources = {"train": Sorted([4] * 120), "holdout": Sorted([3] * 120)}
    session = session_of(config, tmp_path, **sources)
    batches = list(held_out_batches(session))
    assert len(batches) == 8
    assert len(set(np.concatenate([batch["label"] for batch in batches]))) == 120
    assert len(set(session.images("train", 300)[1])) == 120
    judge_labels = []
    with pytest.MonkeyPatch.context() as patch:
        config.evaluate.features = "judge"
        patch.setattr(generation_judge, "Judge", lambda images, labels: judge_labels.extend(labels))
        with pytest.raises(AttributeError):
            generation_judge.GenerationJudge(session)
    assert len(set(judge_labels)) == 120


def test_drawn_samples_are_of_all_classes_while_the_diffusion_model_trains():
    np.testing.assert_array_equal(
        diffusion.online_labels(30, 10, 3),
        np.random.default_rng(3).permutation(np.arange(30, dtype=np.int32) % 10),
    )
    few = diffusion.online_labels(64, 1000, 0)
    assert len(set(few.tolist())) == 64
    assert few.max() > 700
    assert np.bincount(diffusion.online_labels(25, 10, 0)).tolist().count(3) == 5


def write_set(folder, counts, *, shape=(1, 2, 2, 3)):
    """A set of latents whose numbers are their labels, class by class, in shards of 100."""
    labels = np.repeat(np.arange(len(counts)), counts).astype(np.int32)
    shards = -(-len(labels) // 100)
    for index in range(shards):
        part = labels[100 * index : 100 * (index + 1)]
        values = np.broadcast_to(part[:, None, None, None, None], (len(part), *shape))
        noise = np.random.default_rng(index).normal(size=values.shape) / 10
        values = (values + noise).astype(np.float32)
        write_shard(folder, index, values, part, tokenizer="t", skipped=0)
    finish_set(folder, shards, dtype="float32", tokenizer="t", source="s", views=["image"])
    return LatentSet.open(folder)


@pytest.mark.parametrize("kind", ["logistic", "sgd"])
def test_the_probe_of_latents_sees_every_class(kind, config, tmp_path):
    found = write_set(tmp_path, [3, 250, 7, 40])
    session = session_of(config, tmp_path, train=Sorted([1] * 4))
    config.evaluate.update(linear_probe=kind, probe_images=30)
    config.evaluate.sgd_probe.update(images=30, epochs=3, batch_size=8, heads=("mean",))
    seen = {}

    def fake(train, test, **_):
        seen["labels"], seen["latents"] = train[1], np.asarray(train[0][:])
        return 0.5

    held_out = found.take(np.arange(0, 300, 10))
    with pytest.MonkeyPatch.context() as patch:
        if kind == "logistic":
            patch.setattr(evaluate, "linear_probe", fake)
            assert evaluate.probes(session, found, held_out) == {"linear_probe": 0.5}
        else:
            real = evaluate.sgd_probe

            def spied(train, test, **more):
                fake(train, test)
                return real(train, test, **more)

            patch.setattr(evaluate, "sgd_probe", spied)
            assert "linear_probe_mean" in evaluate.probes(session, found, held_out)
    assert len(seen["labels"]) == 30
    assert set(seen["labels"]) == {0, 1, 2, 3}
    rows = seen["latents"].reshape(30, -1).mean(axis=1)
    np.testing.assert_allclose(rows, seen["labels"], atol=0.3)


@pytest.mark.parametrize("kind", ["logistic", "sgd"])
def test_one_class_has_no_probe_and_one_line_says_why(kind, config, tmp_path, caplog):
    found = write_set(tmp_path, [120])
    session = session_of(config, tmp_path, train=Sorted([120]))
    config.evaluate.linear_probe = kind
    with caplog.at_level(logging.INFO):
        assert evaluate.probes(session, found, found.take(np.arange(9))) == {}
    said = [line for line in caplog.messages if "no probe" in line]
    assert len(said) == 1
    assert "are of one class; a probe needs two or more" in said[0]


def test_diagnostics_of_one_class_and_of_one_image():
    latents_ = np.random.default_rng(0).normal(size=(12, 4, 4, 3)).astype(np.float32)
    several = diagnostics.diagnostics(latents_, np.arange(12) % 2)
    one_class = diagnostics.diagnostics(latents_, np.zeros(12, int))
    assert set(several) - set(one_class) == {"gsq", "class_neighbourhood"}
    one_image = diagnostics.diagnostics(latents_[:1], np.zeros(1, int))
    assert set(one_class) - set(one_image) == {"viv"}
    flat = diagnostics.diagnostics(latents_[:, :1, :1], np.arange(12) % 2)
    assert "coherence_near" not in flat
    assert flat["gsq"] >= 0


def test_picked_rows_are_read_where_they_are_sliced(tmp_path):
    found = write_set(tmp_path, [150, 150])
    indices = np.array([299, 0, 101, 100, 99])
    picked = Picked(found.views(), indices)
    assert picked.shape == (5, 1, 2, 2, 3)
    whole = found.views()[0:300]
    np.testing.assert_array_equal(picked[0:5], whole[indices])
    np.testing.assert_array_equal(picked[1:3], whole[indices[1:3]])
    np.testing.assert_array_equal(found.take(indices)[0], whole[indices, 0])
    np.testing.assert_array_equal(found.take(indices)[1], found.labels[indices])


def large_set(folder, *, images=200_000, shape=(1, 4, 4, 32)):
    """A set of 400 MB that takes no disk: shards of holes, and labels of 1,000 sorted classes."""
    from gae_jax.runtime.files import write_json

    shards, size = 4, images // 4
    labels = np.sort(np.arange(images, dtype=np.int32) % 1000)
    for index in range(shards):
        path = folder / f"latents-{index:05}.npy"
        np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(size, *shape))
        np.save(folder / f"labels-{index:05}.npy", labels[index * size : (index + 1) * size])
    entries = [{"index": index, "count": size, "sha256": ""} for index in range(shards)]
    facts = dict(tokenizer="t", dtype="float32", mean=[0.0] * 32, std=[1.0] * 32)
    facts |= dict(statistics_of="channel", variance_only=False)
    write_json(folder / "manifest.json", {**facts, "count": images, "shards": entries})
    return LatentSet.open(folder)


def test_memory_does_not_grow_with_the_latents(config, tmp_path, monkeypatch):
    """400 MB of latents; what looks at labels or draws from them allocates a few MB."""
    run = Run(tmp_path / "run")
    (run.path / "latents").mkdir(parents=True)
    large_set(run.path / "latents")
    config.evaluate.update(linear_probe="logistic", probe_images=500)
    session = session_of(config, tmp_path, train=Sorted([1] * 1000))
    for name in ("tokenizer", "latents"):
        (run.path / name).mkdir(exist_ok=True)
        (run.path / name / "done.json").write_text(json.dumps({"fingerprint": "t"}))
    trained = []
    monkeypatch.setattr(Session, "train", lambda self, folder, stage, **_: trained.append(stage))
    probed = []
    monkeypatch.setattr(evaluate, "linear_probe", lambda *sets: probed.append(sets) or 0.0)
    held_out = np.zeros((4, 4, 4, 32), np.float32), np.arange(4)
    diffusion.run(session)  # what is imported and traced first is not counted
    tracemalloc.start()
    diffusion.run(session)
    found = LatentSet.open(run.path / "latents")
    evaluate.probes(session, found, held_out)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(trained) == 2
    assert probed[0][0][0].shape == (500, 4, 4, 32)
    assert peak < 40e6, f"{peak / 1e6:.0f} MB"


@pytest.mark.slow  # the probe and the diagnostics of one class are above
def test_training_on_one_class_goes_on_without_a_probe(plain_config, tmp_path, caplog):
    """To the end of the tokenizer, with its evaluations, then `latents` and `evaluate`."""
    config = plain_config
    config.tokenizer.health.probe = 40
    config.tokenizer.losses.align = 0.0
    config.tokenizer.train.update(steps=2, eval_every=1)
    config.evaluate.update(noise_levels=())
    session = session_of(config, tmp_path, train=Sorted([50]), holdout=Sorted([20]))
    with caplog.at_level(logging.INFO):
        done = tokenizer.run(session).done
        latents.run(session)
        result = json.loads((evaluate.run(session).path / "result.json").read_text())
    assert done["step"] == 2
    assert sum("tokenizer: no probe" in line for line in caplog.messages) == 1
    assert sum("no probe of latents" in line for line in caplog.messages) == 1
    assert sum("no figures by the small classifier" in line for line in caplog.messages) == 1
    assert result["tokenizer"]["psnr"] > 0
    assert not {"linear_probe", "pixel_probe", "rfd"} & set(result["tokenizer"])
