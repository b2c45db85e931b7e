"""``evaluate``: reconstruction, probes, the decoder under noise, latents, and generated sets."""

import logging
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gae_jax.config import bind, plain
from gae_jax.data.drawing import drawn, order_of
from gae_jax.data.latents import LatentSet, Picked
from gae_jax.evaluation import latent, reconstruction, segments
from gae_jax.evaluation.diagnostics import diagnostics, latent_colours
from gae_jax.evaluation.extractors import Extractor
from gae_jax.evaluation.presets import PRESETS
from gae_jax.evaluation.probe import linear_probe, pixel_probe, without_probe
from gae_jax.evaluation.sample_files import load_set, shown_classes
from gae_jax.evaluation.sgd_probe import ProbeSettings, sgd_probe
from gae_jax.evaluation.tokenizer import JUDGED, SHOWN, TokenizerEvaluator, summary
from gae_jax.nn.network import Loaded, Network
from gae_jax.run import amendments, judges
from gae_jax.run.batches import in_batches
from gae_jax.run.generation_judge import GenerationJudge
from gae_jax.run.judges import (
    environment,
    imagenet_extractors,
    inception_of,
    lpips_of,
    weights_facts,
    without_judge,
)
from gae_jax.run.load import load
from gae_jax.run.run import StageFolder
from gae_jax.run.session import Session
from gae_jax.runtime.errors import ConfigError, DataError
from gae_jax.runtime.files import write_figures, write_npz
from gae_jax.runtime.keys import stage_key
from gae_jax.runtime.progress import Progress, Stopwatch, duration


def tokenizer_evaluator(
    session: Session,
    network: Network,
    *,
    levels: tuple[float, ...] = (),
    judge: Extractor | None = None,
    required: bool = True,
) -> TokenizerEvaluator:
    """Make the evaluator of a run's tokenizer, in training and after it.

    Args:
      levels: of noise on the latents.
      judge: the small classifier's extractor, if images are compared by it.
      required: whether the run must have the networks of LPIPS and rFID that the config asks for;
        training continues without them.
    """
    config = session.config.evaluate
    front_end = PRESETS[config.reconstruction].front_end
    if judge:
        extractors = {JUDGED: judge}
    elif inception := inception_of(session, front_end, required=required):
        extractors = {"rfid": inception}
    else:
        by_network = imagenet_extractors(session, required=required)
        extractors = {f"rfd_{name}": extractor for name, extractor in by_network.items()}
    return TokenizerEvaluator(
        network,
        session.mesh,
        protocol=config.reconstruction,
        size=config.batch_size,
        levels=levels,
        key=stage_key("evaluate", session.config.seed),
        lpips=lpips_of(session, required=required),
        extractors=extractors,
    )


def probes(session: Session, latents: LatentSet, held_out: tuple) -> dict[str, float]:
    """Measure linear probes on held-out (latents [n, h, w, d], labels [n])."""
    config, classes = session.config.evaluate, len(session.source("train").class_names)
    if config.linear_probe == "none":
        return {}
    settings, result, labels = dict(config.sgd_probe), {}, latents.labels
    heads, most = settings.pop("heads"), settings.pop("images")
    logistic = config.linear_probe == "logistic"
    chosen = drawn(labels, classes, config.probe_images if logistic else most)
    if lacks := without_probe(labels[chosen], len(held_out[1])):
        logging.info("evaluate: no probe of latents: %s", lacks)
        return {}
    if logistic:
        return {"linear_probe": linear_probe(latents.take(chosen), held_out)}
    views = latents.views()
    train = Picked(views, chosen) if len(chosen) < len(labels) else views
    for head in heads:
        arguments = bind(ProbeSettings, {**settings, "head": head}, "evaluate.sgd_probe")
        how = ProbeSettings(**arguments, seed=session.config.seed)
        with Progress(f"probe ({head})", how.epochs, unit="epoch") as progress:

            def show(epoch, figures, progress=progress):
                progress.update()
                if epoch % 10 == 0:
                    progress.say(epoch, figures)

            accuracy = sgd_probe(
                (train, labels[chosen]),
                held_out,
                classes=classes,
                mesh=session.mesh,
                settings=how,
                progress=show,
            )
        name = "linear_probe" if head == "flatten" else f"linear_probe_{head}"
        result[name], result[f"{name}_top5"] = accuracy.last_top1, accuracy.last_top5
        result[f"{name}_best"] = accuracy.best_top1
    return result


def continuity(session: Session, loaded: Loaded, lpips: Loaded, held_out: tuple) -> float:
    """Measure LPC of held-out latents: the LPIPS between images of latents a small step apart.

    Images are clamped before they are compared (ours; the paper's choice was not at hand).
    """
    latents, labels = held_out
    classes = len(session.source("train").class_names)
    latents = latents[drawn(labels, classes, session.config.evaluate.continuity_images)]
    key = stage_key("continuity", session.config.seed)

    def clamped(a, b, network):
        return network(*(jnp.clip(x, -1, 1) for x in (a, b)))

    @jax.jit
    def changes(arrays, frozen, latents, ids):
        return latent.perceptual_changes(
            latents,
            ids,
            decode=loaded[0](*arrays).decode,
            distance=partial(clamped, network=lpips[0](*frozen)),
            key=key,
        )

    with Progress("continuity", len(latents), unit="image") as progress:
        rows = in_batches(
            changes,
            (loaded[1], lpips[1]),
            (latents, np.arange(len(latents), dtype=np.uint32)),
            mesh=session.mesh,
            batch_size=session.config.evaluate.batch_size,
            callback=lambda done, _: progress.update(done - progress.done),
        )
    return latent.lpc(rows)


def check_segments(session: Session) -> None:
    """Raise ConfigError if ``evaluate.segments`` is set and cannot be used."""
    config = session.config
    if not config.evaluate.segments:
        return
    if config.data.name != "folder":
        raise ConfigError(
            f"evaluate.segments finds label maps by the names of images, which data.name "
            f"{config.data.name!r} does not keep; set data.name to 'folder', or evaluate.segments "
            "to ''"
        )
    if not Path(config.evaluate.segments).is_dir():
        raise ConfigError(f"evaluate.segments is {config.evaluate.segments!r}, which is no folder")


def segment_coherence(
    session: Session, latents: np.ndarray, indices: np.ndarray
) -> dict[str, float]:
    """Measure mean SSC: do clusters of latents follow the segments of held-out images?

    Args:
      latents: [n, h, w, d] of readable held-out images.
      indices: [n], of these images in their source.

    Returns:
      The mean, and the number of images in it: those with at least two segments.
    """
    check_segments(session)
    config = session.config.evaluate
    source: Any = session.source("holdout")  # of folders, with labels and places
    chosen = drawn(source.labels[indices], len(source.class_names), config.segment_images)
    maps = []
    with Progress("segments", len(chosen), unit="image") as progress:
        for index in indices[chosen]:
            path = Path(config.segments) / source.place(index).with_suffix(".png")
            labels = segments.crop(segments.read(path), session.config.data.image_size, config.crop)
            maps.append(segments.to_grid(labels, latents.shape[1:3]))
            progress.update()
    logging.info("evaluate: SSC of %d images", len(maps))
    try:
        scores = latent.ssc(latents[chosen], np.stack(maps))
    except DataError as error:
        logging.info("evaluate: no SSC: %s", error)
        return {}
    return {"ssc": float(np.nanmean(scores)), "ssc_images": int(np.sum(~np.isnan(scores)))}


def manifest(session: Session) -> dict:
    """The protocol of a run's figures, beside that in the manifest of each set of samples."""
    config = session.config.evaluate
    stages = ("backbone", "teacher", "tokenizer", "latents", "diffusion", "inception", "lpips")
    done = {name: done for name in stages if (done := session.run.stage(name).done)}
    return {
        "metric_weights": {
            name: weights_facts(session.run.stage(name))
            for name in ("inception", "lpips")
            if name in done
        },
        "reconstruction_preset": config.reconstruction,
        "front_end_of_rfid": PRESETS[config.reconstruction].front_end,
        "crop": config.crop,
        "quantiser": reconstruction.PRESETS[config.reconstruction].quantiser,
        "latents": "mode",
        "images": repr(session.source("holdout")),
        "image_size": session.config.data.image_size,
        "weights": {
            name: done[name]["weights"] for name in ("tokenizer", "diffusion") if name in done
        },
        "fingerprints": {name: facts["fingerprint"] for name, facts in done.items()},
        **amendments.history(done),
        "dtype": "float32",
        # set at run time
        "matmul_precision": str(jax.config.jax_default_matmul_precision),  # type: ignore[attr-defined]
        "extractor_precision": "highest",
        "probe": config.linear_probe,
        "sgd_probe": plain(config.sgd_probe) if config.linear_probe == "sgd" else None,
        "seed": session.config.seed,
        **environment(),
    }


def first_of_classes(images: np.ndarray, labels: np.ndarray, count: int) -> np.ndarray:
    """Select the first image of each of ``count`` classes, those in a grid of so many columns."""
    return np.stack([images[labels == label][0] for label in shown_classes(labels, count)])


def evaluate(session: Session, folder: StageFolder, parts: tuple[str, ...]) -> dict:
    """Measure a run, and write the pictures of the report.

    Args:
      parts: "latents" for the probes, "sample" for the generated sets, beside reconstruction.
    """
    config = session.config.evaluate
    if "sample" in parts:
        judges.check_generation(session)
    levels = tuple(config.noise_levels)
    how = {"decode_steps": config.decode_steps} if config.decode_steps else {}
    network, arrays = load(session.run.stage("tokenizer"), session.mesh, **how)
    lacks = without_judge(session)
    if lacks:
        logging.info("evaluate: no figures by the small classifier: %s", lacks)
    judge = GenerationJudge(session) if config.features == "judge" and not lacks else None
    scored = tokenizer_evaluator(
        session, network, levels=levels, judge=judge.extractor if judge else None
    )
    source = session.source("holdout")
    shown = order_of(source)[:SHOWN].tolist()
    with Progress("evaluate", min(len(source), config.images), unit="image") as progress:
        measured = scored(
            arrays,
            session.batches("holdout", config.images, config.crop),
            shown=shown,
            progress=progress.update,
        )
    tokenizer = summary(measured, levels, say=lambda what: logging.info("evaluate: %s", what))
    dimensions = tokenizer["dimensions"] = int(np.prod(measured.latents.shape[1:]))
    if steps := getattr(network(*arrays), "decode_steps", 0):
        tokenizer["decode_steps"] = steps
    result = {"manifest": manifest(session), "tokenizer": tokenizer}
    held_out = measured.latents, measured.labels
    if config.diagnostics:
        logging.info("evaluate: diagnostics of %d latents", len(measured.labels))
        result["latents"] = diagnostics(*held_out)
        if lpips := lpips_of(session):
            result["latents"]["lpc"] = continuity(session, (network, arrays), lpips, held_out)
        if config.segments:
            result["latents"] |= segment_coherence(session, measured.latents, measured.indices)
    if "latents" in parts:
        logging.info("evaluate: probes of %d dimensions", dimensions)
        latents = LatentSet.open(session.run.stage("latents").path)
        tokenizer |= probes(session, latents, held_out)
        if config.linear_probe == "logistic":
            real, test = (session.images(split, config.probe_images) for split in SPLITS)
            if not without_probe(real[1], len(test[1])):  # logged for the latents
                tokenizer["pixel_probe"] = pixel_probe(real, test, dimensions)
    pictures: dict[str, np.ndarray] = {}
    if "sample" in parts and config.features != "none" and not lacks:
        judge = judge or GenerationJudge(session)
        result["manifest"]["generation"] = judge.facts
        if judge.of_real:
            result["judge"] = judge.of_real
        samples = session.run.stage("sample")
        result["generation"] = {}
        for name in samples.require_done()["sets"]:
            images, labels, made = load_set(samples.path, name)
            result["generation"][name] = judge(images, labels) | {"sampling": made}
            if config.nearest:
                generated = first_of_classes(images, labels, config.nearest)
                training, cosine = judge.nearest(generated)
                pictures |= {f"generated_{name}": generated, f"nearest_{name}": training}
                result["generation"][name]["nearest_cosine"] = float(cosine.mean())
    pictures |= {
        "real": measured.shown["real"],
        "reconstructed": measured.shown["clean"],
        "noisy": measured.shown.get("noisy", measured.shown["clean"][:, None]),
        "colours": latent_colours(measured.latents)[np.isin(measured.indices, shown)],
    }
    write_npz(folder.path / "pictures.npz", pictures)
    return result


SPLITS = ("train", "holdout")


def check(session: Session) -> None:
    """Raise UserError if there is work to do and what it needs is missing or does not fit."""
    if session.fresh or not session.run.stage("evaluate").done:
        judges.check(session)
        check_segments(session)


def run(session: Session) -> StageFolder:
    """Evaluate the tokenizer, and the latents and samples that the run has, unless that is done."""
    parts = tuple(name for name in ("latents", "sample") if session.run.stage(name).done)
    for name in parts:  # not made of other weights than the run's
        session.run.stage(name).require_up_to_date()
    folder = session.open(
        "evaluate", sections=("seed", "data", "evaluate"), inputs=("tokenizer", *parts)
    )
    if not folder.done:
        watch = Stopwatch()
        for name, what in (("latents", "probes"), ("sample", "generated sets")):
            if name not in parts:
                logging.info("evaluate: no %s in this run, so no %s", name, what)
        write_figures(folder.path / "result.json", evaluate(session, folder, parts))
        folder.finish(seconds=watch.seconds)
        logging.info("evaluate: %s in %s", folder.path / "result.json", duration(watch.seconds))
    return folder
