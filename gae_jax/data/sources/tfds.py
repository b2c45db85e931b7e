"""Image classification data sets that TensorFlow Datasets prepared, read without TensorFlow."""

import hashlib
import io
from typing import Any

from gae_jax.data.contents import ClassContents, Contents
from gae_jax.data.sources.base import Encoded, check_holdout, check_place, empty_split
from gae_jax.runtime.errors import DataError

RECIPE = """\
prepare it once where TensorFlow is installed (reading needs none):
  import tensorflow_datasets as tfds
  builder = tfds.builder({name!r}, data_dir={root!r}, file_format="array_record")
  builder.download_and_prepare(
      download_config=tfds.download.DownloadConfig(manual_dir="FOLDER OF THE TARS"))
or without TensorFlow, from the same tars or an extracted tree: python -m gae_jax prepare-data, and
--config.data.name=array_record"""


class Tfds(Encoded):
    """A data set of TensorFlow Datasets in its ArrayRecord format, undecoded.

    Splits: ``train``; of held-out images ``validation``, else ``test``, else a share of ``train``
    (its first records, which TFDS shuffled when it wrote them).

    Args:
      root: TFDS's data_dir: a local folder, or one of ``gs://`` (for which gcsfs must be
        installed).
      dataset: name, config and version as TFDS has them: "imagenet2012:5.*.*".

    Raises:
      DataError: if the data do not exist, are incomplete, not ArrayRecord, or not labelled images.
    """

    def __init__(
        self,
        root: str,
        dataset: str,
        split: str,
        *,
        holdout: float = 0.0,
        on_corrupt: str = "error",
        exif: str = "ignore",
    ):
        check_place(root)
        info, self._records, chosen = open_tfds(root, dataset, split, holdout)
        self.class_names: list[str] = list(info.features["label"].names)
        super().__init__(f"{root} ({info.full_name})", len(self._records), on_corrupt, exif)
        self._split = chosen
        split_info = info.splits[chosen.partition("[")[0]]
        facts = f"{split_info.shard_lengths} {split_info.num_bytes} {self.class_names}"
        digest = hashlib.sha256(facts.encode()).hexdigest()[:16]
        self.contents = Contents.of(
            [ClassContents(name) for name in self.class_names],
            count=split_info.num_examples,
            facts=facts,
        )
        self._repr = (
            f"Tfds({info.full_name!r}, {chosen!r}, {len(self)} images, {digest}{self._read_as})"
        )

    def _encoded(self, index: int) -> tuple[io.BytesIO, int]:
        item = self._records[index]
        label = int(item["label"])
        if label < 0:
            raise DataError(f"{self._name(index)} has no label: this split is a test without them")
        return io.BytesIO(item["image"]), label

    def _name(self, index: int) -> str:
        try:
            name = self._records[index].get("file_name", b"no name").decode()
        except (ValueError, RuntimeError):
            name = "no name"
        return f"record {index} ({name}) of {self._split} in {self._where}"

    def __repr__(self) -> str:
        return self._repr


def open_tfds(root: str, dataset: str, split: str, holdout: float) -> tuple[Any, Any, str]:
    """Open a data set; arguments and errors as in `Tfds`.

    Returns:
      (dataset info, random-access records, TFDS's name of the split).
    """
    if not root:
        raise DataError(
            "data.root is empty; give --config.data.root=DIR with DIR the data_dir of TensorFlow "
            f"Datasets, which holds {dataset.partition(':')[0]}/"
        )
    import tensorflow_datasets as tfds  # takes seconds

    name = dataset.partition(":")[0]
    try:
        builder = tfds.builder(dataset, data_dir=root)
        prepared = builder.is_prepared()
    except ImportError as error:  # gs:// without gcsfs
        raise DataError(f"data.root is {root!r}: {error}") from error
    except (AssertionError, ValueError, RuntimeError, tfds.core.DatasetNotFoundError) as error:
        why = next(iter(str(error).splitlines()), "")
        raise DataError(
            f"data.dataset is {dataset!r}, which TFDS does not find in {root} ({why})"
        ) from error
    if not prepared:
        recipe = RECIPE.format(name=name, root=root)
        raise DataError(f"{root} holds no prepared {dataset}; {recipe}")
    info = builder.info
    features = dict(info.features)
    kinds = {"image": tfds.features.Image, "label": tfds.features.ClassLabel}
    if not all(isinstance(features.get(name), kind) for name, kind in kinds.items()):
        raise DataError(
            f"data.dataset is {dataset!r}, which has no features image and label of a class; it "
            f"has {', '.join(sorted(features))}"
        )
    chosen = _split_of(info, split, holdout)
    try:
        records = builder.as_data_source(
            split=chosen, decoders={"image": tfds.decode.SkipDecoding()}
        )
    except NotImplementedError as error:
        recipe = RECIPE.format(name=name, root="ANOTHER FOLDER")
        raise DataError(
            f"{builder.data_dir} is prepared as {info.file_format.value}, which only TensorFlow "
            f"reads, and not by index; {recipe}"
        ) from error
    files = info.splits[chosen.partition("[")[0]].filenames
    present = {path.name for path in builder.data_path.iterdir()}
    if missing := [name for name in files if name not in present]:
        raise DataError(
            f"{builder.data_dir} lacks {len(missing)} of {len(files)} shards, such as "
            f"{missing[0]}; copy them again"
        )
    return info, records, chosen


def _split_of(info, split: str, holdout: float) -> str:
    """Return TFDS's name of a split."""
    if "train" not in info.splits:
        raise DataError(f"{info.full_name} has no split train, only {', '.join(info.splits)}")
    for name in ("validation", "test"):
        if name in info.splits:
            return "train" if split == "train" else name
    check_holdout(holdout)
    count = info.splits["train"].num_examples
    out = round(holdout * count)
    if (out if split == "holdout" else count - out) == 0:
        raise empty_split(split, holdout, [count])
    return f"train[:{out}]" if split == "holdout" else f"train[{out}:]"
