"""``evaluate``: reconstruction, probes, decoder under noise, and the generated sets."""

import itertools
import logging

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from sklearn.decomposition import PCA

from gae_jax.data.images import to_float, to_uint8
from gae_jax.data.latents import LatentSet
from gae_jax.evaluation.frechet import frechet_distance
from gae_jax.evaluation.judge import Judge
from gae_jax.evaluation.probe import linear_probe, pixel_probe
from gae_jax.evaluation.reconstruction import psnr, ssim
from gae_jax.files import write_json, write_npz
from gae_jax.parallel import check_batch, put_batch
from gae_jax.run import StageFolder, Stopwatch
from gae_jax.stages.load import load
from gae_jax.stages.sample import load_set
from gae_jax.stages.session import Session
from gae_jax.train.fit import stage_key
from gae_jax.train.log import Progress, duration

SHOWN = 20  # images kept for the report


def read_images(session: Session, split: str, most: int) -> tuple[np.ndarray, np.ndarray]:
    """(uint8 images, labels) of up to ``most`` readable images of a split, in memory."""
    size = session.config.evaluate.batch_size
    batches = session.data.ordered(session.source(split), size)
    kept = [
        (batch["image"][batch["valid"]], batch["label"][batch["valid"]])
        for batch in itertools.islice(batches, -(-most // size))
    ]
    images, labels = (np.concatenate(column)[:most] for column in zip(*kept, strict=True))
    return images, labels


def reconstruct(session: Session, images: np.ndarray) -> dict[str, np.ndarray]:
    """Latents, scores and reconstructions of uint8 images under every noise level.

    Returns:
      ``latents`` [n, h, w, d]; ``ssim`` and ``psnr`` [n] and ``clean`` [SHOWN, S, S, 3] without
      noise; ``noise_psnr`` [n, levels] and ``noisy`` [SHOWN, levels, S, S, 3] with it.
    """
    config = session.config.evaluate
    check_batch(config.batch_size, session.mesh, "evaluate.batch_size")
    network, arrays = load(session.run.stage("tokenizer"), session.mesh)
    key = stage_key("evaluate", session.config.seed)
    levels = jnp.asarray(config.noise_levels)

    @jax.jit
    def score(arrays, images, ids):
        model = network(*arrays)
        latents = model.encode(to_float(images))
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(ids)
        # the same noise at every level: the curve is smooth
        noise = jax.vmap(lambda k: jax.random.normal(k, model.latent_shape))(keys)

        def at(level):
            return to_uint8(model.decode(latents + level * noise))

        clean = to_uint8(model.decode(latents))
        found = jax.lax.map(at, levels)
        scores = jax.vmap(lambda x: psnr(x, images))(found)
        return latents, ssim(clean, images), psnr(clean, images), scores, clean, found

    rows = []
    with Progress("evaluate", len(images), unit="image") as progress:
        for first in range(0, len(images), config.batch_size):
            ids = np.arange(first, first + config.batch_size)
            inside = np.minimum(ids, len(images) - 1)
            batch = put_batch((images[inside], ids.astype(np.uint32)), session.mesh)
            row = jax.device_get(score(arrays, *batch))
            count = min(config.batch_size, len(images) - first)
            latents, similarity, clean_psnr, scores, clean, found = row
            shown = min(max(SHOWN - first, 0), count)
            rows.append(
                (
                    latents[:count],
                    similarity[:count],
                    clean_psnr[:count],
                    scores[:, :count].T,
                    clean[:shown],
                    found[:, :shown].swapaxes(0, 1),
                )
            )
            progress.update(count)
    names = ("latents", "ssim", "psnr", "noise_psnr", "clean", "noisy")
    return dict(zip(names, map(np.concatenate, zip(*rows, strict=True)), strict=True))


def latent_colours(latents: np.ndarray) -> np.ndarray:
    """The first three principal components of latent tokens as colours, [n, h, w, 3] uint8."""
    tokens = rearrange(latents, "n h w d -> (n h w) d")
    parts = PCA(3, random_state=0).fit_transform(tokens)
    low, high = np.percentile(parts, [1, 99], axis=0)
    colours = np.clip((parts - low) / (high - low), 0, 1)
    n, h, w, _ = latents.shape
    return np.round(colours.reshape(n, h, w, 3) * 255).astype(np.uint8)


def judge_samples(judge: Judge, images, labels, reference) -> dict:
    """Accuracy of the judge on a set, per class and in all, and the Frechet distance."""
    right = judge.predict(images) == labels
    per_class = {str(c): float(right[labels == c].mean()) for c in np.unique(labels)}
    return {
        "accuracy": float(right.mean()),
        "accuracy_worst_class": min(per_class.values()),
        "per_class": per_class,
        "fd": frechet_distance(judge.features(images), judge.features(reference)),
        "count": len(images),
    }


def evaluate(session: Session, folder: StageFolder, parts: tuple[str, ...]) -> dict:
    """The figures of a run; also writes the pictures that the report shows.

    Args:
      parts: "latents" gives the probes, "samples" the generated sets; reconstruction always.
    """
    most = session.config.evaluate.probe_images
    test, test_labels = read_images(session, "holdout", most)
    found = reconstruct(session, test)
    result = {
        "tokenizer": {
            "psnr": float(found["psnr"].mean()),
            "ssim": float(found["ssim"].mean()),
            "held_out_images": len(test),
            "noise_levels": list(session.config.evaluate.noise_levels),
            "noise_psnr": found["noise_psnr"].mean(axis=0).tolist(),
        }
    }
    if parts:
        real, real_labels = read_images(session, "train", most)
    if "latents" in parts:
        latents, latent_labels = LatentSet.open(session.run.stage("latents").path).all()
        train = latents[:most], latent_labels[:most]
        dimensions = int(np.prod(latents.shape[1:]))
        logging.info("evaluate: probes of %d dimensions", dimensions)
        result["tokenizer"] |= {
            "linear_probe": linear_probe(train, (found["latents"], test_labels)),
            "pixel_probe": pixel_probe((real, real_labels), (test, test_labels), dimensions),
            "dimensions": dimensions,
        }
    if "samples" in parts:
        judge = Judge(real, real_labels)
        result["judge"] = {
            "accuracy_real": float((judge.predict(test) == test_labels).mean()),
            "fd_train_holdout": frechet_distance(judge.features(real), judge.features(test)),
        }
        result["generation"] = {}
        samples = session.run.stage("samples")
        for name in samples.require_done()["sets"]:
            images, labels, manifest = load_set(samples, name)
            scores = judge_samples(judge, images, labels, real)
            result["generation"][name] = scores | {"sampling": manifest}
    write_npz(
        folder.path / "pictures.npz",
        real=test[:SHOWN],
        reconstructed=found["clean"],
        noisy=found["noisy"],
        colours=latent_colours(found["latents"])[:SHOWN],
    )
    return result


def run(session: Session) -> StageFolder:
    """Evaluates what the run has of tokenizer, latents and samples, unless that is done."""
    parts = tuple(name for name in ("latents", "samples") if session.run.stage(name).done)
    folder = session.open(
        "evaluation", sections=("seed", "data", "evaluate"), inputs=("tokenizer", *parts)
    )
    if not folder.done:
        watch = Stopwatch()
        for name, what in (("latents", "probes"), ("samples", "generated sets")):
            if name not in parts:
                logging.info("evaluate: no %s in this run, so no %s", name, what)
        write_json(folder.path / "result.json", evaluate(session, folder, parts))
        folder.finish(seconds=watch.seconds)
        logging.info("evaluate: %s in %s", folder.path / "result.json", duration(watch.seconds))
    return folder
