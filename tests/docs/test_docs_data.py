"""The commands of docs/data.md, word for word, on a tiny ImageNet in the true forms."""

import re
import shlex
import shutil
from pathlib import Path

import imagenet
import numpy as np
import pytest

from gae_jax.commands import cli, prepare_data
from gae_jax.data import imagenet as known
from gae_jax.data.sources import make_source

ROOT = Path(__file__).parents[2]


@pytest.fixture
def data(tmp_path, monkeypatch):
    """What the page takes for given: the official files where it runs, and trees below data/."""
    for name, path in imagenet.write_tars(tmp_path / "tars").items():
        official = {
            "train": "ILSVRC2012_img_train.tar",
            "val": "ILSVRC2012_img_val.tar",
            "devkit": "ILSVRC2012_devkit_t12.tar.gz",
        }
        path.rename(tmp_path / official[name])
    data = tmp_path / "data"
    imagenet.write_tree(data / "imagenet_folders")
    imagenet.write_tfds(data / "tensorflow_datasets")
    kaggle = data / "ILSVRC/Data/CLS-LOC"
    shutil.copytree(data / "imagenet_folders/train", kaggle / "train")
    for folder in ("val", "test"):
        (kaggle / folder).mkdir()
    for _, name, content in imagenet.images()["val"]:
        (kaggle / "val" / name).write_bytes(content)
    labels = tuple(wnid for wnid, _, _ in imagenet.images()["val"])
    own = known.listed
    # the list that comes with tensorflow-datasets is of all 50,000
    monkeypatch.setattr(known, "listed", lambda x: labels if "validation" in x else own(x))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    return data


def test_imagenet_in_three_ways(data, caplog):
    page = (ROOT / "docs/data.md").read_text()
    block = re.search(r"## ImageNet in .*?```bash\n(.*?)```", page, re.DOTALL)[1]
    commands = [
        shlex.split(re.sub(r"(?<==)/data/", f"{data}/", line), comments=True)
        for line in block.replace("\\\n", " ").splitlines()
    ]
    pixels, prepared = [], 0
    for command in filter(None, commands):
        assert command[:3] == ["python", "-m", "gae_jax"]
        if command[3] == "prepare-data":
            assert prepare_data.main([*command[4:], "--workers=1"]) == 0
            prepared += 1
            continue
        _, config, _, _ = cli.parse(command[2:])
        for split in ("train", "holdout"):
            places = {"root": config.data.root, "dataset": config.data.dataset}
            source = make_source(config.data.name, split, **places)
            images = [source[index] for index in range(len(source))]
            pixels.append((split, {(x["label"], np.asarray(x["image"]).tobytes()) for x in images}))
    assert prepared == 2
    assert len(pixels) == 6
    for split, images in pixels:
        assert images == dict(pixels)[split]
        assert len(images) == {"train": 9, "holdout": 6}[split]
    assert "there is test, which is left aside" in caplog.text
