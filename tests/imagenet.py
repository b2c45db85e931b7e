"""A tiny ImageNet of real photographs, in every form that the sources and prepare-data read."""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat
from skimage import data as photographs
from sklearn.datasets import load_sample_images

# in the order of the WordNet ids; their ILSVRC2012 ids have another order, as in the devkit
CLASSES = {"n01440764": 3, "n01443537": 1, "n01484850": 2}


def jpegs(seed: int, count: int, *, size: tuple[int, int] = (96, 72)) -> list[bytes]:
    """Crops of photographs as JPEG files, quality 90."""
    random, found = np.random.default_rng(seed), []
    whole = [*load_sample_images().images, photographs.astronaut(), photographs.chelsea()]
    for _ in range(count):
        pixels = whole[random.integers(len(whole))]
        top, left = (random.integers(pixels.shape[i] - size[1 - i] + 1) for i in (0, 1))
        file = io.BytesIO()
        crop = pixels[top : top + size[1], left : left + size[0]]
        Image.fromarray(crop).save(file, "jpeg", quality=90)
        found.append(file.getvalue())
    return found


def images() -> dict[str, list[tuple[str, str, bytes]]]:
    """Split -> (class, file name, content), named as ImageNet's, in the order of name."""
    train = [
        (name, f"{name}_{number}.JPEG", content)
        for label, name in enumerate(CLASSES)
        for number, content in zip((10026, 1003, 7), jpegs(label, 3), strict=True)
    ]
    wnids = [*CLASSES] * 2
    val = [
        (name, f"ILSVRC2012_val_{number + 1:08}.JPEG", content)
        for number, (name, content) in enumerate(zip(wnids[::-1], jpegs(9, 6), strict=True))
    ]
    return {"train": train, "val": val}


def write_tree(root: Path) -> Path:
    """``root/train/CLASS/NAME`` and ``root/val/CLASS/NAME``."""
    for split, rows in images().items():
        for wnid, name, content in rows:
            path = root / split / wnid / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    return root


def tar_of(files: dict[str, bytes], mode: str = "w") -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=mode) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def write_tars(root: Path) -> dict[str, Path]:
    """The official files: train (a tar of tars, out of order), val (flat), and the devkit."""
    root.mkdir(parents=True, exist_ok=True)
    rows = images()
    inner = {
        f"{wnid}.tar": tar_of({name: x for label, name, x in rows["train"][::-1] if label == wnid})
        for wnid in reversed(CLASSES)
    }
    flat = {name: content for _, name, content in reversed(rows["val"])}
    # as in the devkit: one row per synset, ids above those of the classes are inner nodes
    fields = ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children")
    kinds = [(name, object) for name in (*fields, "wordnet_height", "num_train_images")]
    synsets = [
        (CLASSES[wnid], wnid, "a word", "a gloss", 0, np.zeros(0), 0, 3)
        for wnid in sorted(CLASSES, key=CLASSES.get)
    ]
    synsets.append((1001, "n00001740", "entity", "a gloss", 2, np.array([1, 2]), 3, 0))
    meta = io.BytesIO()
    savemat(meta, {"synsets": np.array(synsets, kinds).reshape(-1, 1)})
    truth = "".join(f"{CLASSES[wnid]}\n" for wnid, _, _ in rows["val"])
    contents = {
        "train": tar_of(inner),
        "val": tar_of(flat),
        "devkit": tar_of(
            {
                "ILSVRC2012_devkit_t12/data/meta.mat": meta.getvalue(),
                "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt": truth.encode(),
            },
            "w:gz",
        ),
    }
    paths = {}
    for name, content in contents.items():
        paths[name] = root / f"{name}.tar{'.gz' * (name == 'devkit')}"
        paths[name].write_bytes(content)
    return paths


def write_tfds(root: Path, *, splits=("train", "validation"), **changes) -> Path:
    """TFDS's own layout of imagenet2012 5.1.0, written by TFDS without TensorFlow.

    Args:
      changes: features instead of its own; None takes one away.
    """
    import tensorflow_datasets as tfds

    def examples(split):
        for wnid, name, content in images()[split.removesuffix("idation")]:
            item = {"image": io.BytesIO(content), "label": wnid, "file_name": name}
            yield name, {key: item[key] for key in features}

    features = {
        "image": tfds.features.Image(encoding_format="jpeg"),
        "label": tfds.features.ClassLabel(names=[*CLASSES]),
        "file_name": tfds.features.Text(),
    } | changes
    features = {key: value for key, value in features.items() if value is not None}

    # not registered: the name is that of TFDS's own builder, which reads the files later
    class Imagenet2012(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("5.1.0")

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, manager):
            return {split: self._generate_examples(split) for split in splits}

        def _generate_examples(self, split):
            return examples(split)

    tfds.disable_progress_bar()
    builder = Imagenet2012(data_dir=root, file_format="array_record")
    builder.download_and_prepare()
    return root
