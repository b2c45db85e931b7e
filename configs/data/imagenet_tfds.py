"""ImageNet as TensorFlow Datasets prepared it in ArrayRecord, under another config.

    python -m gae_jax tokenizer --config=configs/data/imagenet_tfds.py:gae_d32 \\
        --config.data.root=TFDS_DATA_DIR --workdir=runs/gae_d32

The argument behind the colon is a file of configs/, with its own argument behind another colon:
``imagenet_tfds.py:gae_d32:B``. All that this file changes is the data section; docs/data.md says
how the data are prepared. TensorFlow is not needed to read them.
"""

from pathlib import Path

from gae_jax.config import load_config


def get_config(name="gae_d32"):
    config = load_config(Path(__file__).parents[1], name)
    config.data.update(name="tfds", dataset="imagenet2012:5.*.*")
    return config
