"""Generated images judged by a classifier of ImageNet."""

import numpy as np

from gae_jax.evaluation.imagenet import imagenet_synsets, judged_right, labels_in_imagenet


def test_the_synsets_are_imagenets_in_its_order():
    synsets = imagenet_synsets()
    assert len(synsets) == 1000
    assert list(synsets) == sorted(synsets)
    # the tench is label 0, the goldfish 1 and the toilet tissue 999
    assert (synsets[0], synsets[1], synsets[999]) == ("n01440764", "n01443537", "n15075141")


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
