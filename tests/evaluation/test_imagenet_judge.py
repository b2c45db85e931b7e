"""Generated images judged by a classifier of ImageNet."""

import importlib.util

import jax.numpy as jnp
import numpy as np
import pytest
from small import get_config

from gae_jax.data.imagenet import listed
from gae_jax.evaluation.extractors import Extractor
from gae_jax.evaluation.imagenet import judged_right, labels_in_imagenet
from gae_jax.run import judges
from gae_jax.run.run import Run
from gae_jax.run.session import Session
from gae_jax.runtime.errors import UserError
from gae_jax.runtime.files import write_npz


def test_the_synsets_are_imagenets_in_its_order():
    synsets = listed("labels.txt")
    assert len(synsets) == 1000
    assert list(synsets) == sorted(synsets)
    # the tench is label 0, the goldfish 1 and the toilet tissue 999
    assert (synsets[0], synsets[1], synsets[999]) == ("n01440764", "n01443537", "n15075141")


def test_without_the_package_that_lists_them_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    listed.cache_clear()
    with pytest.raises(UserError, match="pip install tensorflow-datasets"):
        listed("labels.txt")


def test_classes_are_found_by_their_synset_or_not_judged():
    assert labels_in_imagenet(["n15075141", "n01440764"]).tolist() == [999, 0]
    assert labels_in_imagenet(["n01440764", "cats"]) is None
    assert labels_in_imagenet([]) is None


def test_an_image_is_right_if_its_class_is_the_likeliest_of_the_runs():
    logits = np.zeros((3, 1000))
    logits[:, 5] = 9  # a class that the run does not have
    logits[0, 0], logits[1, 999], logits[2, 999] = 1, 1, 1
    right = judged_right(logits, np.array([1, 1, 0]), np.array([999, 0]))
    assert right.tolist() == [True, False, True]


def grey_extractor(digest: str = "abc") -> Extractor:
    """A network whose features are the means of an image's rows."""

    def run(arrays, images):
        del arrays
        return {"pool": jnp.mean(images.astype(jnp.float32), axis=(2, 3))}

    return Extractor("vgg16", digest, "as they are", run, ({}, {}))


def test_statistics_of_the_training_images_are_computed_once(tmp_path, monkeypatch, caplog):
    session = Session(get_config(), Run(tmp_path / "run"))
    extractors = {"vgg16": grey_extractor()}
    moments, features = judges.statistics_of_training_images(session, extractors)
    images, _ = session.images("train", 10_000)
    expected = images.mean(axis=(2, 3))
    np.testing.assert_allclose(moments["vgg16", "pool"].mean, expected.mean(axis=0), rtol=1e-5)
    calls = []
    computed = judges.moments_of_images

    def counted(*args, **more):
        calls.append(args)
        return computed(*args, **more)

    monkeypatch.setattr(judges, "moments_of_images", counted)
    again, features_again = judges.statistics_of_training_images(session, extractors)
    assert not calls
    own, other = again["vgg16", "pool"], moments["vgg16", "pool"]
    assert own.count == other.count == len(images)
    np.testing.assert_array_equal(own.m2, other.m2)
    np.testing.assert_array_equal(features_again["vgg16", "pool"], features["vgg16", "pool"])
    # other weights are another file
    judges.statistics_of_training_images(session, {"vgg16": grey_extractor("def")})
    assert len(calls) == 1
    # and a damaged one is made again
    for path in (tmp_path / "run" / "kept").glob("*.npz"):
        path.write_bytes(path.read_bytes()[:500])
    judges.statistics_of_training_images(session, extractors)
    assert len(calls) == 2
    assert "it is computed again" in caplog.text
    # so is one that lacks a part
    for path in (tmp_path / "run" / "kept").glob("*.npz"):
        write_npz(path, {"mean|vgg16|pool": np.zeros(8)})
    judges.statistics_of_training_images(session, extractors)
    assert len(calls) == 3
