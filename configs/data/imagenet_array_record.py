"""ImageNet as `prepare-data` wrote it, under another config.

    python -m gae_jax prepare-data --train-tar=ILSVRC2012_img_train.tar \\
        --val-tar=ILSVRC2012_img_val.tar --out=SHARDS
    python -m gae_jax tokenizer --config=configs/data/imagenet_array_record.py:gae_d32 \\
        --config.data.root=SHARDS --workdir=runs/gae_d32

The argument behind the colon is a file of configs/, with its own argument behind another colon:
``imagenet_array_record.py:gae_d32:B``. All that this file changes is the data section.
"""

from pathlib import Path

from gae_jax.config import load_config


def get_config(name="gae_d32"):
    config = load_config(Path(__file__).parents[1], name)
    config.data.update(name="array_record")
    return config
