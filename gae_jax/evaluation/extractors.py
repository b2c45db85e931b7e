"""Networks whose activations compare sets of images, and how they are run.

An `Extractor` records the hash of its weights and how images were prepared for it: both belong to
every figure computed with it.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from gae_jax.interop import metric_tables
from gae_jax.interop.convert import import_torch
from gae_jax.interop.files import read_state_dict
from gae_jax.nn.network import Arrays, Loaded, Network, fingerprint
from gae_jax.nn.pixels import dinov2_preprocess
from gae_jax.pretrained.inception import FIDInception
from gae_jax.runtime.errors import ConfigError, DataError, UserError
from gae_jax.runtime.mesh import check_batch, put_batch, to_host
from gae_jax.runtime.sharding import place

INCEPTION_FILE = "pt_inception-2015-12-05-6726825d.pth"
HOW_TO_GET_INCEPTION = (
    f"{INCEPTION_FILE} is published with pytorch-fid (release fid_weights), the same weights as "
    "weights-inception-2015-12-05-6726825d.pth with torch-fidelity"
)


@dataclasses.dataclass(frozen=True)
class Extractor:
    """Images -> named activations.

    Attributes:
      name: in results: "inception" or "dinov2", for example.
      digest: fingerprint of its weights.
      front_end: how images are resized and scaled for it.
      run: (arrays, prepared images) -> {output: [B, d]}; traced.
      arrays: of the network, on the mesh.
      prepare: uint8 images [B, H, W, 3] -> what ``run`` takes, on the host; None: as they are.
      precision: of its matmuls.
    """

    name: str
    digest: str
    front_end: str
    run: Callable[..., dict[str, jax.Array]]
    arrays: Arrays
    prepare: Callable[[np.ndarray], np.ndarray] | None = None
    precision: str = "highest"

    def facts(self) -> dict[str, str]:
        """Return what a manifest records of it."""
        return {
            "extractor": self.name,
            "extractor_weights": self.digest,
            "front_end": self.front_end,
            "extractor_precision": self.precision,
        }


def inception_extractor(
    network: Network, arrays: Arrays, front_end: str, *, digest: str = ""
) -> Extractor:
    """Return the network of FID, sFID, Inception Score, precision and recall.

    Args:
      digest: of the weights, where it is known.
    """

    def run(arrays, images):
        return network(*arrays)(images, front_end)

    return Extractor(
        "inception", digest or fingerprint({"inception": arrays}), front_end, run, arrays
    )


def dinov2_extractor(network: Network, arrays: Arrays, *, digest: str) -> Extractor:
    """Return CLS of DINOv2 for FD-DINOv2, as dgm-eval: PIL's bicubic resize to 224 pixels.

    ``network`` is a `pretrained.backbone.VisionBackbone`; its space is called "cls".
    """

    def run(arrays, pixel_values):
        with jax.default_matmul_precision("highest"):
            return {"cls": network(*arrays).class_token(pixel_values)}

    front_end = "PIL bicubic 224, ImageNet mean and std"
    return Extractor("dinov2", digest, front_end, run, arrays, prepare=dinov2_preprocess)


# The network of FD-DINOv2 (dgm-eval): dinov2_vitl14 of torch.hub
FD_DINOV2 = dict(
    hidden_size=1024,
    num_hidden_layers=24,
    num_attention_heads=16,
    patch_size=14,
    image_size=518,
    num_register_tokens=0,
    use_swiglu_ffn=False,
    interpolate_offset=0.1,
)


def check_fd_dinov2(section: Mapping, where: str | Path) -> None:
    """Raise ConfigError unless a DINOv2 is the one that FD-DINOv2 is defined with.

    Args:
      section: the sizes of the imported backbone, ``backbone.dinov2``.
      where: the run that has it, for the message.
    """
    differing = {name: section[name] for name, x in FD_DINOV2.items() if section[name] != x}
    if differing:
        has = ", ".join(f"{name} {x} (not {FD_DINOV2[name]})" for name, x in differing.items())
        raise ConfigError(
            f"fd_dinov2 is the distance of CLS tokens of DINOv2 ViT-L/14 on images resized to 224 "
            f"pixels, as dgm-eval takes it from torch.hub; the DINOv2 of {where} has {has}, and "
            "its distances are other numbers. Import dinov2_vitl14_pretrain.pth into a run: "
            "python -m gae_jax import-torch --config=configs/teacher_dinov2_l.py --workdir=RUN "
            "--config.import_torch.backbone=FILE"
        )


def read_inception(path: str | Path, mesh: Mesh) -> Loaded:
    """Load the Inception network of a published file.

    Raises:
      UserError: if there is none, saying which file it is and where it is published.
    """
    if not path or not Path(path).is_file():
        what = f"there is no file {path}" if path else "no weights of the Inception network given"
        raise UserError(f"{what}; {HOW_TO_GET_INCEPTION}")
    network = Network(lambda rngs: FIDInception(rngs=rngs))
    tensors = read_state_dict(Path(path))
    return network, place(import_torch(metric_tables.INCEPTION, tensors, network), mesh)


def each_batch(
    batches: Iterable[np.ndarray],
    extractors: Mapping[str, Extractor],
    mesh: Mesh,
    *,
    size: int,
) -> Iterator[tuple[np.ndarray, np.ndarray, dict[str, dict[str, jax.Array]]]]:
    """Yield (images, valid rows, {extractor: {space: [size, d] on the devices}}).

    A batch is padded to ``size`` with repeated images, so that nothing is compiled twice.
    """
    check_batch(size, mesh, "batch_size")
    runs = {name: jax.jit(extractor.run) for name, extractor in extractors.items()}
    for images in batches:
        at = np.arange(size)
        filled = images[np.minimum(at, len(images) - 1)]
        activations = {}
        for name, extractor in extractors.items():
            ready = filled if extractor.prepare is None else extractor.prepare(filled)
            activations[name] = runs[name](extractor.arrays, put_batch(ready, mesh))
        yield images, at < len(images), activations


def dimensions_of(
    extractors: Mapping[str, Extractor], shape: tuple[int, int, int]
) -> dict[tuple[str, str], int]:
    """Return {(extractor, space): dimensions} for images of a shape, without computing.

    Raises:
      DataError: for images that a network cannot take.
    """
    image = np.zeros((1, *shape), np.uint8)
    dimensions: dict[tuple[str, str], int] = {}
    for name, extractor in extractors.items():
        ready = image if extractor.prepare is None else extractor.prepare(image)
        try:
            spaces = jax.eval_shape(extractor.run, extractor.arrays, ready)
        except (ValueError, TypeError) as error:
            raise DataError(f"{name} cannot take images of {list(shape)}: {error}") from None
        dimensions |= {(name, space): rows.shape[-1] for space, rows in spaces.items()}
    return dimensions


def features_of(
    batches: Iterable[np.ndarray],
    extractors: Mapping[str, Extractor],
    mesh: Mesh,
    *,
    size: int,
    progress: Callable[[int], None] = lambda count: None,
) -> dict[str, dict[str, np.ndarray]]:
    """Compute the activations of all images of a set, in their order, on the host.

    A batch is computed while the next one is read and the one before is fetched.

    Args:
      batches: uint8 images [n, H, W, 3], n <= size.
      extractors: by name.
      size: images that are computed at once, over all devices.
      progress: called with the number of images that came back.

    Returns:
      {extractor: {space: float32 [N, d]}}.

    Raises:
      DataError: if there is no image.
    """
    rows: list[dict] = []
    waiting: list[tuple[int, dict]] = []

    def fetch():
        count, activations = waiting.pop(0)
        rows.append(jax.tree.map(lambda x: x[:count], to_host(activations)))
        progress(count)

    for images, _, activations in each_batch(batches, extractors, mesh, size=size):
        waiting.append((len(images), activations))
        if len(waiting) > 1:
            fetch()
    while waiting:
        fetch()
    if not rows:
        raise DataError("there are no images to compute features of")
    return jax.tree.map(lambda *parts: np.concatenate(parts), *rows)
