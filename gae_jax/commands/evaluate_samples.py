"""``evaluate-samples``: FID and its kin of any set of images, against any reference."""

import argparse
import logging
import platform
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from gae_jax import __version__
from gae_jax.commands.arguments import Parser
from gae_jax.evaluation import reconstruction
from gae_jax.evaluation.archives import Samples, is_statistics, open_samples, samples_digest
from gae_jax.evaluation.extractors import (
    Extractor,
    check_fd_dinov2,
    dimensions_of,
    dinov2_extractor,
    features_of,
    inception_extractor,
    read_inception,
)
from gae_jax.evaluation.frechet import frechet
from gae_jax.evaluation.generation import (
    FRECHET,
    SPACES,
    SPLITS,
    SUBSET,
    ReferenceSet,
    Settings,
    check_metrics,
    check_scores,
    generation_scores,
)
from gae_jax.evaluation.presets import PRESETS, RECONSTRUCTION, counted, preset_of
from gae_jax.evaluation.references import load_reference
from gae_jax.report import render, samples_page
from gae_jax.run.judges import say_progress, weights_facts
from gae_jax.run.load import load
from gae_jax.run.run import Run
from gae_jax.runtime import mesh as parallel
from gae_jax.runtime import ranges
from gae_jax.runtime.errors import DataError, UserError, WriteError, number_of
from gae_jax.runtime.files import check_writable, write_bytes, write_figures

USAGE = f"""\
Compares a set of images with a reference: every figure of a preset, in one protocol.

usage: python -m gae_jax evaluate-samples --samples=X --ref=Y --inception=FILE [--preset=NAME]
                              [--metrics=M,M] [--ref-front-end=NAME] [--dinov2=RUN]
                              [--lpips=RUN] [--out=DIR] [--batch-size=N] [--allow-few]
                              [--kid-subset-size=N] [--splits=N]

  --samples=X       .npz with arr_0 (and labels in arr_1), .npy, a folder of PNG files, what
                    `sample RUN` wrote (RUN/drawn/NAME), or a set of a run (RUN/samples/ode)
  --ref=Y           of generated images: a file of statistics (ADM's VIRTUAL_*.npz, pytorch-fid's,
                    EDM2's, or one of make-reference), or images as above; of reconstructions: the
                    very images that were reconstructed, in the same order
  --ref-front-end=NAME  of statistics that do not say it (mu and sigma alone): tf, of ADM's
                    evaluator and torch-fidelity (MAR's and JiT's files), or pytorch_fid
  --preset=NAME     {", ".join(PRESETS)} (default: adm)
  --metrics=M,M     of {", ".join(SPACES)}
                    (default: those of the preset)
  --inception=FILE  pt_inception-2015-12-05-6726825d.pth, or a run that it was imported to
  --dinov2=RUN      a run that DINOv2-L was imported to, for fd_dinov2
  --lpips=RUN       a run that LPIPS was imported to, for reconstructions
  --out=DIR         where result.json and result.html go (default: beside the samples)
  --batch-size=N    images at once, over all devices, at most (default: 128)
  --allow-few       Frechet distances of no more images than dimensions, too
  --kid-subset-size=N
                    images in each of the 100 subsets of KID (default: {SUBSET})
  --splits=N        equal splits of the Inception Score (default: of 5,000 images each with adm,
                    {SPLITS} with the others)

What can be refused is refused before anything is computed, an --out that cannot be written too;
the figures are printed before they are written. A metric of another number of images than 50,000
carries the number in its name: fid_5k.
"""


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser("python -m gae_jax evaluate-samples --help")
    parser.add_argument("--samples", type=Path, required=True)
    parser.add_argument("--ref", type=Path, required=True)
    parser.add_argument("--preset", default="adm")
    parser.add_argument("--metrics", type=lambda text: tuple(text.split(",")))
    parser.add_argument("--ref-front-end", default="", dest="ref_front_end")
    parser.add_argument("--inception", default="")
    parser.add_argument("--dinov2", default="")
    parser.add_argument("--lpips", default="")
    parser.add_argument("--out", type=Path)
    parser.add_number("--batch-size", ranges.COUNT, default=128, dest="size")
    parser.add_argument("--allow-few", action="store_true", dest="allow_few")
    parser.add_number("--kid-subset-size", ranges.whole(2), dest="subset_size")
    parser.add_number("--splits", ranges.COUNT)
    options = parser.parse_args(argv)
    own = {"--metrics": "metrics", "--kid-subset-size": "subset_size", "--splits": "splits"}
    if options.preset in RECONSTRUCTION:
        for flag, name in own.items():
            if getattr(options, name) is not None:
                parser.error(
                    f"{flag} is for generated images; preset {options.preset!r} compares "
                    "reconstructions, with figures of its own"
                )
    return options


def settings_of(options) -> Settings:
    """How generated images are scored."""
    return Settings(
        allow_few=options.allow_few,
        subset_size=options.subset_size or SUBSET,
        splits=options.splits or 0,
    )


def folder_of(options) -> Path:
    """Where the results go."""
    beside = options.samples if options.samples.is_dir() else options.samples.parent
    return options.out or beside


def check_out(options) -> None:
    """Raises UserError if the results cannot be written."""
    try:
        check_writable(folder_of(options))
    except WriteError as error:
        raise WriteError(f"{error}, or give another --out=DIR") from None


def extractors_of(options, metrics, mesh: Mesh) -> dict[str, Extractor]:
    """The networks that the metrics ask for.

    Raises:
      UserError: if one is missing, saying where its weights are published.
    """
    wanted, found = {SPACES[metric][0] for metric in metrics}, {}
    if "inception" in wanted:
        folder = Run(Path(options.inception)).stage("inception")
        if options.inception and folder.done:
            network, arrays = load(folder, mesh)
        else:
            network, arrays = read_inception(options.inception, mesh)
        front_end = PRESETS[options.preset].front_end
        found["inception"] = inception_extractor(network, arrays, front_end)
    if "dinov2" in wanted:
        folder = Run(Path(options.dinov2 or ".")).stage("backbone")
        if not (folder.done and folder.config.backbone.name == "dinov2"):
            raise UserError(
                "fd_dinov2 needs DINOv2-L: dinov2_vitl14_pretrain.pth, published with "
                "facebookresearch/dinov2; bring it in with: python -m gae_jax import-torch "
                "--config=configs/teacher_dinov2_l.py --workdir=RUN "
                "--config.import_torch.backbone=FILE, and pass --dinov2=RUN"
            )
        check_fd_dinov2(folder.config.backbone.dinov2, options.dinov2)
        loaded = load(folder, mesh)
        found["dinov2"] = dinov2_extractor(*loaded, digest=folder.done["fingerprint"])
    return found


def metrics_of(options) -> tuple[str, ...]:
    metrics = options.metrics or preset_of(options.preset).metrics
    check_metrics(metrics)
    return tuple(metrics)


def base_manifest(options, samples: Samples, extractors: dict[str, Extractor]) -> dict:
    """What both kinds of evaluation record of how they measured."""
    return {
        "preset": options.preset,
        "samples": str(samples.path),
        "samples_digest": samples_digest(samples.path),
        "count": samples.count,
        "image_size": list(samples.shape[:2]),
        "labels": "in the file" if samples.labels is not None else "unknown",
        "stored_as": samples.kind,
        "reference": str(options.ref),
        "extractors": {name: extractor.facts() for name, extractor in extractors.items()},
        "device": jax.devices()[0].device_kind,
        "versions": {
            "gae_jax": __version__,
            "jax": jax.__version__,
            "python": platform.python_version(),
        },
    }


def generated(options, samples: Samples, mesh: Mesh) -> dict:
    """Result of generated images."""
    metrics = metrics_of(options)
    if not options.ref.exists():
        raise DataError(f"--ref={options.ref} is not there")
    extractors, settings = extractors_of(options, metrics, mesh), settings_of(options)
    sizes = dimensions_of(extractors, samples.shape)

    def check(reference: ReferenceSet, images: int) -> None:
        check_scores(
            reference,
            options.preset,
            metrics,
            count=samples.count,
            sizes=sizes,
            images=dict.fromkeys(sizes, images),
            labels=samples.labels,
            settings=settings,
        )
        for at in {SPACES[metric] for metric in metrics if metric in FRECHET}:
            if stored := reference.statistics.get(at):
                try:
                    _ = stored.factor  # refuses what is no covariance; it is kept for later
                except UserError as error:
                    raise DataError(f"{options.ref}: {error}") from None
        check_out(options)

    reference = load_reference(
        options.ref,
        extractors,
        mesh,
        size=options.size,
        say=say_progress,
        check=check,
        front_end=options.ref_front_end,
    )
    size = parallel.batch_of(options.size, samples.count, mesh)
    rows = features_of(
        samples.batches(size),
        extractors,
        mesh,
        size=size,
        progress=say_progress("features of samples", samples.count),
    )
    features = {(name, space): x for name, own in rows.items() for space, x in own.items()}
    figures, parts = generation_scores(
        features,
        reference,
        options.preset,
        metrics,
        labels=samples.labels,
        settings=settings,
        say=lambda what: logging.info("evaluate-samples: %s", what),
    )
    rules = PRESETS[options.preset]
    facts = base_manifest(options, samples, extractors) | {
        "kind": "generated images",
        "reference_digest": reference.digest,
        "reference_front_end": reference.front_end or "as the samples",
        "inception_score": rules.inception_score,
        "precision_recall": rules.precision_recall,
    }
    if "kid" in metrics:
        facts["kid_subset_size"] = settings.subset_size
    if settings.splits:
        facts["inception_splits"] = settings.splits
    return {"metrics": figures, "parts": parts, "manifest": facts}


def reconstructed(options, samples: Samples, mesh: Mesh) -> dict:
    """Result of reconstructions against the images themselves.

    Raises:
      DataError: for a reference of other images, or of statistics.
    """
    if is_statistics(options.ref):
        raise DataError(
            f"{options.ref} is a reference of generated images: statistics of a training set. "
            f"{options.preset!r} compares reconstructions with the very images that were "
            "reconstructed (an rFID against other images is off by one and more); give those"
        )
    originals = open_samples(options.ref)
    for what in ("count", "shape"):
        ours, theirs = getattr(samples, what), getattr(originals, what)
        if ours != theirs:
            raise DataError(
                f"{samples.path} has {what} {ours}, {originals.path} has {theirs}: reconstructions "
                "and originals must be the same images in the same order"
            )
    if samples.count < 2:
        raise DataError(f"{samples.path} holds one image; an rFID needs at least two")
    extractors = extractors_of(options, ("fid",), mesh)
    dimensions_of(extractors, samples.shape)
    size = parallel.batch_of(options.size, samples.count, mesh)
    preset, lpips = reconstruction.PRESETS[options.preset], None
    lpips_facts = {}
    if options.lpips:
        folder = Run(Path(options.lpips)).stage("lpips")
        lpips = load(folder, mesh, precision="highest")
        lpips_facts = weights_facts(folder)

    @jax.jit
    def score(arrays, images, found):
        # stored pixels are what is left of the decoder's output
        as_float = found.astype(np.float32) / 127.5 - 1
        distance = lpips[0](*arrays) if lpips else None
        return reconstruction.reconstruction_scores(preset, images, as_float, distance)[0]

    pixels = jax.ShapeDtypeStruct((size, *samples.shape), np.uint8)
    try:
        jax.eval_shape(score, lpips and lpips[1], pixels, pixels)
    except ValueError as error:
        raise DataError(f"{samples.path}: {error}") from None
    check_out(options)
    rows, told = [], say_progress("reconstructions", samples.count)
    for found, images in zip(samples.batches(size), originals.batches(size), strict=True):
        at = np.minimum(np.arange(size), len(found) - 1)
        batch = parallel.put_batch((images[at], found[at]), mesh)
        scores = jax.device_get(score(lpips and lpips[1], *batch))
        rows.append({name: value[: len(found)] for name, value in scores.items()})
        told(len(found))
    features = [
        features_of(
            archive.batches(size),
            extractors,
            mesh,
            size=size,
            progress=say_progress(f"features of {what}", archive.count),
        )["inception"]["pool"]
        for what, archive in (("originals", originals), ("reconstructions", samples))
    ]
    whole = jax.tree.map(lambda *parts: np.concatenate(parts), *rows)
    figures = {name: float(value.mean(dtype=np.float64)) for name, value in whole.items()}
    distance = frechet(*features)
    name = counted("rfid", samples.count)
    figures[name] = distance.total
    facts = base_manifest(options, samples, extractors) | {
        "kind": "reconstructions",
        "reference_digest": samples_digest(options.ref),
        "quantiser": preset.quantiser,
        "inputs": "uint8 as stored, not the decoder's floats",
        "lpips": options.lpips or "not measured",
        "lpips_weights": lpips_facts,
    }
    parts = {f"{name}.mean_part": distance.mean_part}
    parts[f"{name}.covariance_part"] = distance.covariance_part
    return {"metrics": figures, "parts": parts, "manifest": facts}


def evaluate_samples(options: argparse.Namespace, *, devices=None) -> Path:
    """Measures, writes ``result.json`` and a page, and prints the table.

    Returns:
      The path of ``result.json``.

    Raises:
      UserError: naming what cannot be used, and what to do about it; nothing is written then.
    """
    preset_of(options.preset)
    mesh = parallel.make_mesh(devices=devices)
    samples = open_samples(options.samples)
    kind = reconstructed if options.preset in RECONSTRUCTION else generated
    result = kind(options, samples, mesh)
    folder = folder_of(options)
    wide = max(map(len, result["metrics"]))
    lines = [f"  {name:<{wide}}  {value:.4f}" for name, value in result["metrics"].items()]
    print(
        f"preset {options.preset}, {number_of(samples.count, 'image')}\n" + "\n".join(lines),
        flush=True,
    )
    write_figures(folder / "result.json", result)
    first = next(samples.batches(64))
    write_bytes(folder / "result.html", render(samples_page(result, first), "samples.html.j2"))
    print(f"\n{folder / 'result.json'}\n{folder / 'result.html'}")
    return folder / "result.json"


def main(argv: list[str]) -> int:
    evaluate_samples(parse(argv))
    return 0
