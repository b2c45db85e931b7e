"""ImageNet as class folders, ROOT/train/WNID/*.JPEG and ROOT/val/WNID/*.JPEG, under another config.

    python -m gae_jax tokenizer --config=configs/data/imagenet_folder.py:gae_d32 \\
        --config.data.root=ROOT --workdir=runs/gae_d32

A flat ROOT/val, as Kaggle's, has no classes: make shards of it with `prepare-data --source=ROOT`.

The argument behind the colon is a file of configs/, with its own argument behind another colon:
``imagenet_folder.py:gae_d32:B``. The configs there read class folders by themselves; this file is
for those that read something else.
"""

from pathlib import Path

from gae_jax.config import load_config


def get_config(name="gae_d32"):
    config = load_config(Path(__file__).parents[1], name)
    config.data.update(name="folder")
    return config
