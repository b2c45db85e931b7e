"""A tokenizer on images: latents, reconstructions, and the decoder under noise on the latents."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gae_jax.data.images import to_float
from gae_jax.errors import DataError
from gae_jax.evaluation.extractors import Extractor
from gae_jax.evaluation.frechet import frechet_distance
from gae_jax.evaluation.noise import area_under, noisy_latents
from gae_jax.evaluation.presets import counted
from gae_jax.evaluation.reconstruction import PRESETS, reconstruction_scores
from gae_jax.parallel import check_batch, jit_on, put_batch, to_host
from gae_jax.train.state import Network

SHOWN = 20  # images that are kept to be looked at
DECODER = 2**32 - 1  # whose key the decoder's noise has, in the place of an image's
Loaded = tuple[Network, tuple[dict, dict]]


@dataclasses.dataclass(frozen=True)
class Reconstructed:
    """What came of a set of images, in their order.

    Attributes:
      latents: [n, h, w, d]; labels: [n].
      scores: name -> [n], float32: psnr, ssim and lpips if there is a network for it.
      noisy: the same for every level of noise, name -> [n, levels].
      features: "real", "clean" and "noisy" -> activations [n, f], [n, f] and [n, levels, f] that
        rFID compares; empty without an extractor.
      shown: the first images, uint8: real and clean [SHOWN, S, S, 3], noisy
        [SHOWN, levels, S, S, 3].
    """

    latents: np.ndarray
    labels: np.ndarray
    scores: dict[str, np.ndarray]
    noisy: dict[str, np.ndarray]
    features: dict[str, np.ndarray]
    shown: dict[str, np.ndarray]


class TokenizerEvaluator:
    """Scores a tokenizer's arrays on batches of images; compiled once.

    Args:
      network: of the tokenizer.
      protocol: a name of `evaluation.reconstruction.PRESETS`.
      size: images that are computed at once, over all devices.
      levels: deviations of noise on the latents; the noise of an image is the same at all of them.
      key: of the noise on the latents, and of what the decoder draws; an image's place decides.
      lpips: network and arrays, or None for no LPIPS.
      extractor: of the features of rFID, or None for no rFID.
    """

    def __init__(
        self,
        network: Network,
        mesh: Mesh,
        *,
        protocol: str,
        size: int,
        levels: Sequence[float] = (),
        key: jax.Array,
        lpips: Loaded | None = None,
        extractor: Extractor | None = None,
    ):
        check_batch(size, mesh, "evaluate.batch_size")
        self._mesh, self.levels = mesh, tuple(levels)
        decoder_key = jax.random.fold_in(key, DECODER)
        self._frozen = (lpips and lpips[1], extractor and extractor.arrays)

        def scored(frozen, images, found):
            """Scores and features of reconstructions [B, S, S, 3], and the first ones as uint8."""
            distance = None
            if lpips:
                distance = lpips[0](*frozen[0])
            scores, pixels = reconstruction_scores(PRESETS[protocol], images, found, distance)
            features = extractor.run(frozen[1], pixels)["pool"] if extractor else None
            return scores, features, pixels[:SHOWN]  # the host needs no more of them

        @jit_on(mesh)
        def run(arrays, frozen, images, ids):
            model = network(*arrays)
            latents = model.encode(to_float(images))
            keys = jax.vmap(lambda i: jax.random.fold_in(decoder_key, i))(ids)
            clean = scored(frozen, images, model.decode(latents, keys))
            noisy = None
            if self.levels:
                noisy = jax.lax.map(
                    lambda level: scored(
                        frozen, images, model.decode(noisy_latents(latents, ids, level, key), keys)
                    ),
                    jnp.asarray(self.levels),
                )
            real = extractor.run(frozen[1], images)["pool"] if extractor else None
            return latents, real, clean, noisy

        self._run = run

    def __call__(
        self,
        arrays: tuple[dict, dict],
        batches: Iterable[Mapping[str, np.ndarray]],
        *,
        most: int | None = None,
        progress: Callable[[int], None] = lambda count: None,
    ) -> Reconstructed:
        """Of the valid images of ``batches``, as `data.pipeline.ImageData.ordered` gives them.

        Args:
          arrays: of the tokenizer.
          most: images at most.

        Raises:
          DataError: if there is no image.
        """
        rows, left, waiting = [], most, []

        def fetch():
            batch, keep, outputs = waiting.pop(0)
            latents, real, clean, noisy = to_host(outputs)
            first = max(SHOWN - sum(len(row["labels"]) for row in rows), 0)
            seen = keep[keep < SHOWN][:first]
            row = {"latents": latents[keep], "labels": batch["label"][keep]}
            row["scores"] = {name: value[keep] for name, value in clean[0].items()}
            row["shown"] = {
                "real": batch["image"][seen],
                "clean": clean[2][seen],
            }
            row["noisy"], row["features"] = {}, {}
            if real is not None:
                row["features"] = {"real": real[keep], "clean": clean[1][keep]}
            if noisy is not None:
                row["noisy"] = {name: value.T[keep] for name, value in noisy[0].items()}
                row["shown"]["noisy"] = noisy[2][:, seen].swapaxes(0, 1)
                if real is not None:
                    row["features"]["noisy"] = noisy[1][:, keep].swapaxes(0, 1)
            rows.append(row)
            progress(len(row["labels"]))

        for batch in batches:
            keep = np.flatnonzero(batch["valid"])[:left]
            left = None if left is None else left - len(keep)
            inputs = put_batch((batch["image"], batch["index"].astype(np.uint32)), self._mesh)
            waiting.append((batch, keep, self._run(arrays, self._frozen, *inputs)))
            if len(waiting) > 1:
                fetch()
            if left == 0:
                break
        while waiting:
            fetch()
        if not sum(len(row["labels"]) for row in rows):
            raise DataError("there is no readable image to reconstruct")
        return Reconstructed(**jax.tree.map(lambda *parts: np.concatenate(parts), *rows))


def summary(
    found: Reconstructed,
    levels: Sequence[float],
    *,
    distance: str = "",
    say: Callable[[str], None] = lambda what: None,
) -> dict:
    """The figures of a set, means over its images in float64.

    Args:
      levels: as of the evaluator.
      distance: name of the Frechet distance, where it is not rFID by the Inception network.
      say: told what is computed next.
    """
    count, result = len(found.labels), {"held_out_images": len(found.labels)}
    for name, values in found.scores.items():
        result[name] = float(values.mean(dtype=np.float64))
    rfid = distance or counted("rfid", count)
    real = None
    if found.features:
        say(rfid)
        real = found.features["real"]
        result[rfid] = frechet_distance(real, found.features["clean"])
    if found.noisy:
        curves = {name: values.mean(0, np.float64) for name, values in found.noisy.items()}
        if real is not None:
            rows = []
            for index, level in enumerate(levels):
                say(f"{rfid} at noise {level:g}")
                rows.append(frechet_distance(real, found.features["noisy"][:, index]))
            curves[rfid] = np.array(rows)
        result["noise_levels"] = [float(level) for level in levels]
        for name, curve in curves.items():
            result[f"noise_{name}"] = curve.tolist()
            if len(levels) > 1:
                result[f"noise_area_{name}"] = float(area_under(levels, curve))
    return result
