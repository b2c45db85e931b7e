"""``evaluate``: reconstruction, probes, the decoder under noise, latents, and generated sets."""

import logging
import platform
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
from einops import rearrange
from sklearn.decomposition import PCA

from gae_jax import __version__
from gae_jax.config import bind, plain
from gae_jax.data.latents import LatentSet
from gae_jax.errors import ConfigError
from gae_jax.evaluation import latent, reconstruction
from gae_jax.evaluation.extractors import (
    HOW_TO_GET_INCEPTION,
    Extractor,
    features_of,
    inception_extractor,
)
from gae_jax.evaluation.frechet import Reference, frechet_distance
from gae_jax.evaluation.generation import ReferenceSet, generation_scores
from gae_jax.evaluation.judge import Judge
from gae_jax.evaluation.presets import PRESETS
from gae_jax.evaluation.probe import linear_probe, pixel_probe
from gae_jax.evaluation.references import load_reference, moments_of_images
from gae_jax.evaluation.sgd_probe import ProbeSettings, sgd_probe
from gae_jax.evaluation.tokenizer import SHOWN, Loaded, TokenizerEvaluator, summary
from gae_jax.files import write_json, write_npz
from gae_jax.parallel import put_batch
from gae_jax.run import StageFolder, Stopwatch
from gae_jax.stages.load import load
from gae_jax.stages.sample import load_set
from gae_jax.stages.session import Session
from gae_jax.train.fit import stage_key
from gae_jax.train.log import Progress, duration
from gae_jax.train.state import Network


def lpips_of(session: Session, *, required: bool = True) -> Loaded | None:
    """The run's LPIPS, or None where the config asks for none.

    Raises:
      ConfigError: if it asks for one and the run has none, and it is ``required``.
    """
    folder = session.run.stage("lpips")
    if not session.config.evaluate.lpips or not (folder.done or required):
        return None
    if not folder.done:
        raise ConfigError(
            f"evaluate.lpips is True but {session.run.path} has no LPIPS; bring VGG16 "
            "(vgg16-397923af.pth, published with torchvision) and the heads "
            "(lpips/weights/v0.1/vgg.pth, in the package lpips) in with: python -m gae_jax "
            "import-torch --config.import_torch.vgg=FILE --config.import_torch.lpips_heads=FILE, "
            "or pass --config.evaluate.lpips=False"
        )
    return load(folder, session.mesh, precision="highest")


def inception_of(session: Session, front_end: str, *, required: bool = True) -> Extractor | None:
    """The run's Inception network behind a front end, or None where the config has no use for it.

    Raises:
      ConfigError: if the config asks for it and the run has none, and it is ``required``.
    """
    folder = session.run.stage("inception")
    if session.config.evaluate.features != "inception" or not (folder.done or required):
        return None
    if not folder.done:
        raise ConfigError(
            f"evaluate.features is 'inception' but {session.run.path} has no such network: "
            f"{HOW_TO_GET_INCEPTION}. Bring it in with: python -m gae_jax import-torch "
            "--config.import_torch.inception=FILE, or pass --config.evaluate.features=none"
        )
    return inception_extractor(
        *load(folder, session.mesh), front_end, digest=folder.done["fingerprint"]
    )


def tokenizer_evaluator(
    session: Session, network: Network, *, levels: tuple[float, ...] = (), required: bool = True
) -> TokenizerEvaluator:
    """The evaluator of a run's tokenizer, in training and after it.

    Args:
      levels: of noise on the latents.
      required: whether the run must have the networks of LPIPS and rFID that the config asks for;
        a training goes on without.
    """
    config = session.config.evaluate
    front_end = PRESETS[config.reconstruction].front_end
    return TokenizerEvaluator(
        network,
        session.mesh,
        protocol=config.reconstruction,
        size=config.batch_size,
        levels=levels,
        key=stage_key("evaluate", session.config.seed),
        lpips=lpips_of(session, required=required),
        extractor=inception_of(session, front_end, required=required),
    )


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


def probes(session: Session, latents: LatentSet, held_out: tuple) -> dict[str, float]:
    """Accuracy of linear probes on held-out latents (latents [n, h, w, d], labels [n])."""
    config = session.config.evaluate
    if config.linear_probe == "none":
        return {}
    if config.linear_probe == "logistic":
        train = tuple(part[: config.probe_images] for part in latents.all())
        return {"linear_probe": linear_probe(train, held_out)}
    settings, result = dict(config.sgd_probe), {}
    classes = session.config.diffusion.model.num_classes
    for head in settings.pop("heads"):
        arguments = bind(ProbeSettings, {**settings, "head": head}, "evaluate.sgd_probe")
        own = ProbeSettings(**arguments, seed=session.config.seed)
        with Progress(f"probe ({head})", own.epochs, unit="epoch") as progress:

            def told(epoch, figures, progress=progress):
                progress.update()
                if epoch % 10 == 0:
                    progress.say(epoch, figures)

            found = sgd_probe(
                (latents.views(), latents.labels),
                held_out,
                classes=classes,
                mesh=session.mesh,
                settings=own,
                progress=told,
            )
        name = "linear_probe" if head == "flatten" else f"linear_probe_{head}"
        result[name], result[f"{name}_top5"] = found.last_top1, found.last_top5
        result[f"{name}_best"] = found.best_top1
    return result


def diagnostics(latents: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """What the held-out latents look like; definitions are in `evaluation.latent`."""
    coherence = latent.spatial_coherence(latents)
    found = {
        "effective_rank": latent.effective_rank(latents),
        "spectral_energy": latent.spectral_energy(latents),
        "coherence_near": coherence.near,
        "coherence_far": coherence.far,
        "gsq": latent.gsq(latents, labels).mean,
    }
    if len(labels) > 10:
        found["class_neighbourhood"] = latent.class_neighbourhood(latents, labels)
    if np.bincount(labels).max() > 1:
        std = latents.std(axis=(0, 1, 2))
        found["viv"] = latent.viv((latents - latents.mean(axis=(0, 1, 2))) / std, labels)
    return {name: float(value) for name, value in found.items()}


def continuity(session: Session, loaded: Loaded, lpips: Loaded, latents: np.ndarray) -> float:
    """LPC of the first latents: how much a small step in them changes what LPIPS sees."""
    size = session.config.evaluate.batch_size
    latents = latents[: session.config.evaluate.continuity_images]
    key = stage_key("continuity", session.config.seed)

    @jax.jit
    def changes(arrays, frozen, latents, ids):
        return latent.perceptual_changes(
            latents,
            ids,
            decode=loaded[0](*arrays).decode,
            distance=lpips[0](*frozen),
            key=key,
        )

    rows = []
    with Progress("continuity", len(latents), unit="image") as progress:
        for first in range(0, len(latents), size):
            ids = np.arange(first, first + size)
            inside = np.minimum(ids, len(latents) - 1)
            batch = put_batch((latents[inside], ids.astype(np.uint32)), session.mesh)
            found = jax.device_get(changes(loaded[1], lpips[1], *batch))
            rows.append(found[: len(latents) - first])
            progress.update(len(rows[-1]))
    return latent.lpc(np.concatenate(rows))


def say_progress(what: str, count: int) -> Callable[[int], None]:
    """Shows progress over ``count`` images; the function given back is told how many are done."""
    progress = Progress(what, count, unit="image")

    def told(done: int) -> None:
        progress.update(done)
        if progress.done >= count:
            progress.close()

    return told


def images_of(session: Session, split: str) -> Iterator[np.ndarray]:
    """The readable images of a split, batch by batch, in the crop of evaluation."""
    config = session.config.evaluate
    for batch in session.data.ordered(session.source(split), config.batch_size, config.crop):
        if batch["valid"].any():
            yield batch["image"][batch["valid"]]


def generation_reference(session: Session, extractor: Extractor) -> ReferenceSet:
    """What the config names, or the training images of the run."""
    config, extractors = session.config.evaluate, {"inception": extractor}
    if config.reference:
        return load_reference(
            Path(config.reference),
            extractors,
            session.mesh,
            size=config.batch_size,
            say=say_progress,
        )
    source = session.source("train")
    moments, features, _ = moments_of_images(
        images_of(session, "train"),
        len(source),
        extractors,
        session.mesh,
        size=config.batch_size,
        progress=say_progress("training images", len(source)),
    )
    statistics = {at: Reference(own) for at, own in moments.items()}
    where = f"the training images of {session.run.path}"
    return ReferenceSet(where, repr(source), statistics, features, extractor.front_end)


class GenerationJudge:
    """Scores generated sets of a run, in training and after it, by what the config says.

    Args:
      session: with the data that "judge" is fitted on.
    """

    def __init__(self, session: Session):
        self._session, self.kind = session, session.config.evaluate.features
        self.facts: dict = {"features": self.kind}
        config = session.config.evaluate
        if self.kind == "judge":
            self._real, labels = session.images("train", config.probe_images)
            self._judge = Judge(self._real, labels)
            test, test_labels = session.images("holdout", config.probe_images)
            self.own = {
                "accuracy_real": float((self._judge.predict(test) == test_labels).mean()),
                "fd_train_holdout": frechet_distance(
                    self._judge.features(self._real), self._judge.features(test)
                ),
            }
        elif self.kind == "inception":
            self._extractor = inception_of(session, PRESETS[config.generation].front_end)
            self._reference = generation_reference(session, self._extractor)
            self.facts |= self._extractor.facts() | {
                "preset": config.generation,
                "reference": self._reference.path,
                "reference_digest": self._reference.digest,
            }

    def __call__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        *,
        metrics: tuple[str, ...] | None = None,
        allow_few: bool | None = None,
    ) -> dict:
        """Figures of uint8 images [n, S, S, 3] with their labels.

        ``metrics`` and ``allow_few`` are the config's where they are None.
        """
        config = self._session.config.evaluate
        if self.kind == "judge":
            return judge_samples(self._judge, images, labels, self._real)
        size = config.batch_size
        rows = features_of(
            (images[first : first + size] for first in range(0, len(images), size)),
            {"inception": self._extractor},
            self._session.mesh,
            size=size,
            progress=say_progress("features of samples", len(images)),
        )
        features = {("inception", space): x for space, x in rows["inception"].items()}
        figures, more = generation_scores(
            features,
            self._reference,
            config.generation,
            config.metrics if metrics is None else metrics,
            labels=labels,
            allow_few=config.allow_few if allow_few is None else allow_few,
            say=lambda what: logging.info("evaluate: %s", what),
        )
        return {**figures, "parts": more, "count": len(images)}


def manifest(session: Session) -> dict:
    """How the figures of a run are measured, beside what each set of samples says of itself."""
    config, device = session.config.evaluate, jax.devices()[0]
    fingerprints = {
        name: done["fingerprint"]
        for name in (
            "backbone",
            "teacher",
            "tokenizer",
            "latents",
            "diffusion",
            "inception",
            "lpips",
        )
        if (done := session.run.stage(name).done)
    }
    return {
        "reconstruction_preset": config.reconstruction,
        "front_end_of_rfid": PRESETS[config.reconstruction].front_end,
        "crop": config.crop,
        "quantiser": reconstruction.PRESETS[config.reconstruction].quantiser,
        "latents": "mode",
        "images": repr(session.source("holdout")),
        "image_size": session.config.data.image_size,
        "weights": {
            name: session.run.stage(name).done["weights"]
            for name in ("tokenizer", "diffusion")
            if session.run.stage(name).done
        },
        "fingerprints": fingerprints,
        "dtype": "float32",
        "matmul_precision": str(jax.config.jax_default_matmul_precision),
        "extractor_precision": "highest",
        "probe": config.linear_probe,
        "sgd_probe": plain(config.sgd_probe) if config.linear_probe == "sgd" else None,
        "seed": session.config.seed,
        "device": device.device_kind,
        "versions": {
            "gae_jax": __version__,
            "jax": jax.__version__,
            "python": platform.python_version(),
        },
    }


def evaluate(session: Session, folder: StageFolder, parts: tuple[str, ...]) -> dict:
    """The figures of a run; also writes the pictures that the report shows.

    Args:
      parts: "latents" gives the probes, "samples" the generated sets; reconstruction always.
    """
    config = session.config.evaluate
    levels = tuple(config.noise_levels)
    network, arrays = load(session.run.stage("tokenizer"), session.mesh)
    scored = tokenizer_evaluator(session, network, levels=levels)
    source = session.source("holdout")
    with Progress("evaluate", min(len(source), config.images), unit="image") as progress:
        found = scored(
            arrays,
            session.data.ordered(source, config.batch_size, config.crop),
            most=config.images,
            progress=progress.update,
        )
    tokenizer = summary(found, levels, say=lambda what: logging.info("evaluate: %s", what))
    tokenizer["dimensions"] = int(np.prod(found.latents.shape[1:]))
    result = {"manifest": manifest(session), "tokenizer": tokenizer}
    held_out = found.latents, found.labels
    if config.diagnostics:
        logging.info("evaluate: diagnostics of %d latents", len(found.labels))
        result["latents"] = diagnostics(*held_out)
        if lpips := lpips_of(session):
            result["latents"]["lpc"] = continuity(session, (network, arrays), lpips, found.latents)
    if "latents" in parts:
        logging.info("evaluate: probes of %d dimensions", tokenizer["dimensions"])
        latents = LatentSet.open(session.run.stage("latents").path)
        tokenizer |= probes(session, latents, held_out)
        if config.linear_probe == "logistic":
            real, test = (session.images(split, config.probe_images) for split in SPLITS)
            tokenizer["pixel_probe"] = pixel_probe(real, test, tokenizer["dimensions"])
    if "samples" in parts and config.features != "none":
        judge = GenerationJudge(session)
        result["manifest"]["generation"] = judge.facts
        if judge.kind == "judge":
            result["judge"] = judge.own
        samples = session.run.stage("samples")
        result["generation"] = {}
        for name in samples.require_done()["sets"]:
            images, labels, made = load_set(samples, name)
            result["generation"][name] = judge(images, labels) | {"sampling": made}
    write_npz(
        folder.path / "pictures.npz",
        real=found.shown["real"],
        reconstructed=found.shown["clean"],
        noisy=found.shown.get("noisy", found.shown["clean"][:, None]),
        colours=latent_colours(found.latents)[:SHOWN],
    )
    return result


SPLITS = ("train", "holdout")


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
