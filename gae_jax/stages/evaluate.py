"""``evaluate``: reconstruction, probes, the decoder under noise, latents, and generated sets."""

import logging
import platform
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from gae_jax import __version__
from gae_jax.config import bind, plain
from gae_jax.data.drawing import drawn, order_of
from gae_jax.data.latent_shards import varying
from gae_jax.data.latents import LatentSet, Picked
from gae_jax.evaluation import latent, neighbours, reconstruction
from gae_jax.evaluation.extractors import Extractor
from gae_jax.evaluation.presets import PRESETS
from gae_jax.evaluation.probe import linear_probe, pixel_probe, without_probe
from gae_jax.evaluation.sample_files import load_set, shown_classes
from gae_jax.evaluation.sgd_probe import ProbeSettings, sgd_probe
from gae_jax.evaluation.tokenizer import JUDGED, SHOWN, TokenizerEvaluator, summary
from gae_jax.nn.network import Loaded, Network
from gae_jax.run import amendments, judges
from gae_jax.run.generation_judge import GenerationJudge
from gae_jax.run.judges import (
    imagenet_extractors,
    inception_of,
    lpips_of,
    weights_facts,
    without_judge,
)
from gae_jax.run.load import load
from gae_jax.run.run import StageFolder
from gae_jax.run.session import Session
from gae_jax.runtime.errors import DataError
from gae_jax.runtime.files import write_figures, write_npz
from gae_jax.runtime.keys import stage_key
from gae_jax.runtime.mesh import put_batch, to_host
from gae_jax.runtime.progress import Progress, Stopwatch, duration
from gae_jax.stages import segments
from gae_jax.stages.segments import segment_coherence


def tokenizer_evaluator(
    session: Session,
    network: Network,
    *,
    levels: tuple[float, ...] = (),
    judge: Extractor | None = None,
    required: bool = True,
) -> TokenizerEvaluator:
    """The evaluator of a run's tokenizer, in training and after it.

    Args:
      levels: of noise on the latents.
      judge: the small classifier's extractor, where that is what images are compared by.
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


def latent_colours(latents: np.ndarray) -> np.ndarray:
    """The first three principal components of latent tokens as colours, [n, h, w, 3] uint8.

    Of one channel grey, of two red and green.
    """
    from sklearn.decomposition import PCA  # takes a second

    tokens = rearrange(latents, "n h w d -> (n h w) d")
    n, h, w, channels = latents.shape
    with np.errstate(invalid="ignore"):  # shares of a variance of 0
        parts = PCA(min(*tokens.shape, 3), random_state=0).fit_transform(tokens)
    # fewer tokens than channels have fewer components: the others are 0
    parts = np.pad(parts, ((0, 0), (0, min(channels, 3) - parts.shape[1])))
    low, high = np.percentile(parts, [1, 99], axis=0)
    span = np.maximum(high - low, np.finfo(np.float32).tiny)  # 0 of latents that are all the same
    colours = np.clip((parts - low) / span, 0, 1)
    if channels == 1:
        colours = np.repeat(colours, 3, axis=1)
    elif channels == 2:
        colours = np.pad(colours, ((0, 0), (0, 1)), constant_values=0.5)
    return np.round(colours.reshape(n, h, w, 3) * 255).astype(np.uint8)


def probes(session: Session, latents: LatentSet, held_out: tuple) -> dict[str, float]:
    """Accuracy of linear probes on held-out latents (latents [n, h, w, d], labels [n])."""
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
        own = ProbeSettings(**arguments, seed=session.config.seed)
        with Progress(f"probe ({head})", own.epochs, unit="epoch") as progress:

            def told(epoch, figures, progress=progress):
                progress.update()
                if epoch % 10 == 0:
                    progress.say(epoch, figures)

            found = sgd_probe(
                (train, labels[chosen]),
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
    found = {
        "std": latents.std(dtype=np.float64),
        "effective_rank": latent.effective_rank(latents),
        "spectral_energy": latent.spectral_energy(latents),
    }
    try:
        coherence = latent.spatial_coherence(latents)
        found |= {"coherence_near": coherence.near, "coherence_far": coherence.far}
    except DataError as error:
        logging.info("evaluate: no coherence: %s", error)
    several, fellows = len(np.unique(labels)) > 1, np.bincount(labels).max() > 1
    if several and fellows:
        gsq = neighbours.gsq(latents, labels)
        found["gsq"] = gsq.mean
        if gsq.repeats > 1:
            found["gsq_std"] = gsq.std
    else:
        lacks = "no class has two of the images" if several else "the images are of one class"
        logging.info("evaluate: no GSQ and no class neighbourhood: %s", lacks)
    if several and fellows and len(labels) > 10:
        found["class_neighbourhood"] = neighbours.class_neighbourhood(latents, labels)
    if fellows:
        mean, std = latents.mean(axis=(0, 1, 2)), latents.std(axis=(0, 1, 2))
        std = np.where(varying(mean, std), std, 1)  # a channel that is the same everywhere stays 0
        found["viv"] = latent.viv((latents - mean) / std, labels)
    return {name: float(value) for name, value in found.items()}


def continuity(session: Session, loaded: Loaded, lpips: Loaded, held_out: tuple) -> float:
    """LPC of some of the held-out latents: how much a small step in them changes what LPIPS sees.

    Images are clamped before they are compared (ours; the paper's choice was not at hand).
    """
    size, (latents, labels) = session.config.evaluate.batch_size, held_out
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

    rows = []
    with Progress("continuity", len(latents), unit="image") as progress:
        for first in range(0, len(latents), size):
            ids = np.arange(first, first + size)
            inside = np.minimum(ids, len(latents) - 1)
            batch = put_batch((latents[inside], ids.astype(np.uint32)), session.mesh)
            found = to_host(changes(loaded[1], lpips[1], *batch))
            rows.append(found[: len(latents) - first])
            progress.update(len(rows[-1]))
    return latent.lpc(np.concatenate(rows))


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
        "metric_weights": {
            name: weights_facts(folder)
            for name in ("inception", "lpips")
            if (folder := session.run.stage(name)).done
        },
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
        **amendments.history({name: session.run.stage(name).done for name in fingerprints}),
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


def first_of_classes(images: np.ndarray, labels: np.ndarray, count: int) -> np.ndarray:
    """The first image of each of ``count`` classes, those that a grid of as many columns shows."""
    return np.stack([images[labels == label][0] for label in shown_classes(labels, count)])


def evaluate(session: Session, folder: StageFolder, parts: tuple[str, ...]) -> dict:
    """The figures of a run; also writes the pictures that the report shows.

    Args:
      parts: "latents" gives the probes, "sample" the generated sets; reconstruction always.
    """
    config = session.config.evaluate
    if "sample" in parts:
        judges.check_generation(session)
    levels = tuple(config.noise_levels)
    own = {"decode_steps": config.decode_steps} if config.decode_steps else {}
    network, arrays = load(session.run.stage("tokenizer"), session.mesh, **own)
    lacks = without_judge(session)
    if lacks:
        logging.info("evaluate: no figures by the small classifier: %s", lacks)
    judge = GenerationJudge(session) if config.features == "judge" and not lacks else None
    scored = tokenizer_evaluator(session, network, levels=levels, judge=judge and judge.extractor)
    source = session.source("holdout")
    shown = order_of(source)[:SHOWN].tolist()
    with Progress("evaluate", min(len(source), config.images), unit="image") as progress:
        found = scored(
            arrays,
            session.batches("holdout", config.images, config.crop),
            shown=shown,
            progress=progress.update,
        )
    tokenizer = summary(
        found,
        levels,
        say=lambda what: logging.info("evaluate: %s", what),
    )
    tokenizer["dimensions"] = int(np.prod(found.latents.shape[1:]))
    if steps := getattr(network(*arrays), "decode_steps", 0):
        tokenizer["decode_steps"] = steps
    result = {"manifest": manifest(session), "tokenizer": tokenizer}
    held_out = found.latents, found.labels
    if config.diagnostics:
        logging.info("evaluate: diagnostics of %d latents", len(found.labels))
        result["latents"] = diagnostics(*held_out)
        if lpips := lpips_of(session):
            result["latents"]["lpc"] = continuity(session, (network, arrays), lpips, held_out)
        if config.segments:
            result["latents"] |= segment_coherence(session, found.latents, found.indices)
    if "latents" in parts:
        logging.info("evaluate: probes of %d dimensions", tokenizer["dimensions"])
        latents = LatentSet.open(session.run.stage("latents").path)
        tokenizer |= probes(session, latents, held_out)
        if config.linear_probe == "logistic":
            real, test = (session.images(split, config.probe_images) for split in SPLITS)
            if not without_probe(real[1], len(test[1])):  # said of the latents' already
                tokenizer["pixel_probe"] = pixel_probe(real, test, tokenizer["dimensions"])
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
        "real": found.shown["real"],
        "reconstructed": found.shown["clean"],
        "noisy": found.shown.get("noisy", found.shown["clean"][:, None]),
        "colours": latent_colours(found.latents)[np.isin(found.indices, shown)],
    }
    write_npz(folder.path / "pictures.npz", pictures)
    return result


SPLITS = ("train", "holdout")


def check(session: Session) -> None:
    """Raises UserError if there is work to do and what it needs is missing or does not fit."""
    if session.fresh or not session.run.stage("evaluate").done:
        judges.check(session)
        segments.check(session)


def run(session: Session) -> StageFolder:
    """Evaluates what the run has of tokenizer, latents and samples, unless that is done."""
    parts = tuple(name for name in ("latents", "sample") if session.run.stage(name).done)
    for name in parts:  # figures of other weights than the run's would stand beside them
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
