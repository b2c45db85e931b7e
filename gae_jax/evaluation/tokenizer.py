"""Evaluate a tokenizer on images: latents, reconstructions, and decoding of noisy latents."""

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gae_jax.evaluation.extractors import Extractor
from gae_jax.evaluation.frechet import Reference, frechet
from gae_jax.evaluation.noise import area_under, noisy_latents
from gae_jax.evaluation.presets import counted
from gae_jax.evaluation.reconstruction import PRESETS, reconstruction_scores
from gae_jax.nn.network import Arrays, Loaded, Network
from gae_jax.nn.pixels import to_float
from gae_jax.runtime.errors import DataError
from gae_jax.runtime.mesh import check_batch, jit_on, put_batch, to_host

SHOWN = 20  # images that are kept to be looked at
JUDGED = "rfd"  # the distance by the small classifier, whose name has no count
DECODER = 2**32 - 1  # id of the decoder's noise keys, which no image has


@dataclasses.dataclass(frozen=True)
class Reconstructed:
    """Results of a set of images, in their order.

    Attributes:
      latents: [n, h, w, d]; labels: [n]; indices: [n], of the images in their source.
      scores: name -> [n], float32: psnr, ssim, and lpips with a network for it.
      noisy: the same for every level of noise, name -> [n, levels].
      features: name of a Frechet distance -> "real", "clean" and "noisy" -> the activations
        [n, f], [n, f] and [n, levels, f] that it compares.
      shown: the images to be looked at, uint8: real and clean [n, S, S, 3], noisy
        [n, levels, S, S, 3], of at most SHOWN.
    """

    latents: np.ndarray
    labels: np.ndarray
    indices: np.ndarray
    scores: dict[str, np.ndarray]
    noisy: dict[str, np.ndarray]
    features: dict[str, dict[str, np.ndarray]]
    shown: dict[str, np.ndarray]


class TokenizerEvaluator:
    """Scores a tokenizer's arrays on batches of images; compiled once.

    Args:
      network: of the tokenizer.
      protocol: a name of `evaluation.reconstruction.PRESETS`.
      size: images that are computed at once, over all devices.
      levels: stds of noise on the latents; the noise of an image is the same at all of them.
      key: of the noise on the latents, and of what the decoder draws; an image's place decides.
      lpips: network and arrays, or None for no LPIPS.
      extractors: of the features of Frechet distances, the output "pool", by the name of the
        distance: "rfid", for example.
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
        extractors: Mapping[str, Extractor] | None = None,
    ):
        check_batch(size, mesh, "evaluate.batch_size")
        self._mesh, self.levels = mesh, tuple(levels)
        decoder_key = jax.random.fold_in(key, DECODER)
        extractors = dict(extractors or {})
        of_extractors = {name: extractor.arrays for name, extractor in extractors.items()}
        self._frozen = (lpips and lpips[1], of_extractors)

        def features_of(frozen, pixels):
            return {
                name: extractor.run(frozen[1][name], pixels)["pool"]
                for name, extractor in extractors.items()
            }

        def scored(frozen, images, restored, rows):
            """Compute scores and features of reconstructions, and some rows as uint8."""
            distance = None
            if lpips:
                distance = lpips[0](*frozen[0])
            scores, pixels = reconstruction_scores(PRESETS[protocol], images, restored, distance)
            # the host needs no more of the pixels
            return scores, features_of(frozen, pixels), pixels[rows]

        @jit_on(mesh)
        def run(arrays, frozen, images, ids, rows):
            model = network(*arrays)
            latents = model.encode(to_float(images))
            keys = jax.vmap(lambda i: jax.random.fold_in(decoder_key, i))(ids)
            clean = scored(frozen, images, model.decode(latents, keys), rows)
            noisy = None
            if self.levels:
                noisy = jax.lax.map(
                    lambda level: scored(
                        frozen,
                        images,
                        model.decode(noisy_latents(latents, ids, level, key), keys),
                        rows,
                    ),
                    jnp.asarray(self.levels),
                )
            return latents, features_of(frozen, images), clean, noisy

        self._run = run

    def __call__(
        self,
        arrays: Arrays,
        batches: Iterable[Mapping[str, np.ndarray]],
        *,
        shown: Collection[int] | None = None,
        progress: Callable[[int], None] = lambda count: None,
    ) -> Reconstructed:
        """Evaluate the valid images of ``batches``, as `data.pipeline.ImageData.ordered`.

        Args:
          arrays: of the tokenizer.
          shown: indices of the images to be looked at, at most SHOWN; None: the first ones.

        Raises:
          DataError: if there is no image.
        """
        rows: list[dict] = []
        waiting: list[tuple] = []  # what `fetch` takes apart
        shown_so_far = 0

        def fetch():
            batch, keep, seen, outputs = waiting.pop(0)
            latents, real, clean, noisy = to_host(outputs)
            of_seen = np.arange(len(seen))
            row = {"latents": latents[keep], "labels": batch["label"][keep]}
            row["indices"] = batch["index"][keep]
            row["scores"] = {name: value[keep] for name, value in clean[0].items()}
            row["shown"] = {
                "real": batch["image"][seen],
                "clean": clean[2][of_seen],
            }
            row["noisy"] = {}
            row["features"] = {
                name: {"real": real[name][keep], "clean": clean[1][name][keep]} for name in real
            }
            if noisy is not None:
                row["noisy"] = {name: value.T[keep] for name, value in noisy[0].items()}
                row["shown"]["noisy"] = noisy[2][:, of_seen].swapaxes(0, 1)
                for name, of_levels in noisy[1].items():
                    row["features"][name]["noisy"] = of_levels[:, keep].swapaxes(0, 1)
            rows.append(row)
            progress(len(row["labels"]))

        for batch in batches:
            keep = np.flatnonzero(batch["valid"])
            inputs = put_batch((batch["image"], batch["index"].astype(np.uint32)), self._mesh)
            wanted = keep if shown is None else keep[np.isin(batch["index"][keep], list(shown))]
            seen = wanted[: SHOWN - shown_so_far]
            shown_so_far += len(seen)
            padded = np.zeros(SHOWN, np.int32)
            padded[: len(seen)] = seen
            outputs = self._run(arrays, self._frozen, *inputs, padded)
            waiting.append((batch, keep, seen, outputs))
            if len(waiting) > 1:
                fetch()
        while waiting:
            fetch()
        if not sum(len(row["labels"]) for row in rows):
            raise DataError("there is no readable image to reconstruct")
        return Reconstructed(**jax.tree.map(lambda *parts: np.concatenate(parts), *rows))


def summary(
    reconstructed: Reconstructed,
    levels: Sequence[float],
    *,
    say: Callable[[str], None] = lambda what: None,
) -> dict[str, float | list[float]]:
    """Average the metrics of a set over its images in float64.

    Args:
      reconstructed: the set.
      levels: as of the evaluator.
      say: called with what is computed next.
    """
    count = len(reconstructed.labels)
    result: dict[str, float | list[float]] = {"held_out_images": count}
    for name, values in reconstructed.scores.items():
        result[name] = float(values.mean(dtype=np.float64))
    curves = {name: values.mean(0, np.float64) for name, values in reconstructed.noisy.items()}
    for distance, features in reconstructed.features.items():
        name = distance if distance == JUDGED else counted(distance, count)
        if count < 2:
            say(f"no {name}: a Frechet distance needs two images or more, there is {count}")
            continue
        say(name)
        reference = Reference(features["real"])
        result[name] = frechet(features["clean"], reference).total
        if reconstructed.noisy:
            totals = []
            for index, level in enumerate(levels):
                say(f"{name} at noise {level:g}")
                totals.append(frechet(features["noisy"][:, index], reference).total)
            curves[name] = np.array(totals)
    if reconstructed.noisy:
        result["noise_levels"] = [float(level) for level in levels]
        for name, curve in curves.items():
            result[f"noise_{name}"] = curve.tolist()
            if len(levels) > 1:
                result[f"noise_area_{name}"] = float(area_under(levels, curve))
    return result
