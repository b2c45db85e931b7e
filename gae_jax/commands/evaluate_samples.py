"""``evaluate-samples``: FID and related metrics of any set of images, against any reference."""

import argparse
import logging
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from gae_jax.commands.arguments import Parser
from gae_jax.evaluation import reconstruction
from gae_jax.evaluation.archives import Samples, open_samples, samples_digest
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
from gae_jax.evaluation.stored_statistics import is_statistics
from gae_jax.report import render, samples_page
from gae_jax.run.judges import environment, say_progress, weights_facts
from gae_jax.run.load import load
from gae_jax.run.run import Run, StageFolder
from gae_jax.runtime import ranges
from gae_jax.runtime.errors import DataError, UserError, WriteError, number_of
from gae_jax.runtime.files import check_writable, write_bytes, write_figures
from gae_jax.runtime.mesh import batch_of, make_mesh, put_batch

USAGE = f"""\
Compare a set of images with a reference by the metrics and the protocol of a preset.

usage: python -m gae_jax evaluate-samples --samples=X --ref=Y --inception=FILE [--preset=NAME]
                              [--metrics=M,M] [--ref-front-end=NAME] [--dinov2=RUN]
                              [--lpips=RUN] [--out=DIR] [--batch-size=N] [--allow-few]
                              [--kid-subset-size=N] [--splits=N]

  --samples=X       .npz with arr_0 (and labels in arr_1), .npy, a folder of PNG files, a folder of
                    `sample RUN` (RUN/drawn/NAME), or a set of a run (RUN/sample/ode)
  --ref=Y           for generated images: a file of statistics (ADM's VIRTUAL_*.npz, pytorch-fid's,
                    EDM2's, or one of reference), or images as above; for reconstructions: the
                    original images in the same order
  --ref-front-end=NAME
                    resizing used for statistics that do not record it (mu and sigma alone): tf for
                    ADM's evaluator and torch-fidelity (MAR's and JiT's files), or pytorch_fid
  --preset=NAME     {", ".join(PRESETS)} (default: adm)
  --metrics=M,M     some of {", ".join(SPACES)}
                    (default: those of the preset)
  --inception=FILE  pt_inception-2015-12-05-6726825d.pth, or a run into which it was imported
  --dinov2=RUN      a run into which DINOv2-L was imported, for fd_dinov2
  --lpips=RUN       a run into which LPIPS was imported, for reconstructions
  --out=DIR         folder of result.json and result.html (default: that of the samples)
  --batch-size=N    images at once, over all devices (default: 128)
  --allow-few       compute Frechet distances even of no more images than dimensions
  --kid-subset-size=N
                    images in each of the 100 subsets of KID (default: {SUBSET})
  --splits=N        equal splits of the Inception Score (default: of 5,000 images each with adm,
                    {SPLITS} with the others)

Invalid options and files are refused before anything is computed, and so is an --out that cannot
be written. The number of images is in a metric's name (fid_5k) unless it is 50,000.
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
    for_generated = {
        "--metrics": options.metrics,
        "--kid-subset-size": options.subset_size,
        "--splits": options.splits,
    }
    given = [flag for flag, value in for_generated.items() if value is not None]
    if given and options.preset in RECONSTRUCTION:
        parser.error(
            f"{given[0]} is for generated images; preset {options.preset!r} compares "
            "reconstructions, with metrics of its own"
        )
    return options


def folder_of(options) -> Path:
    """The folder of the results."""
    samples = options.samples
    return options.out or (samples if samples.is_dir() else samples.parent)


def check_out(options) -> None:
    """Raise WriteError if the results cannot be written."""
    try:
        check_writable(folder_of(options))
    except WriteError as error:
        raise WriteError(f"{error}, or give another --out=DIR") from None


def imported(name: str, path: str) -> StageFolder:
    """Find a network, "inception" or "lpips", in the run that the flag of its name gives.

    Raises:
      UserError: if the run lacks it; says what the run has and how the network is imported.
    """
    folder = Run(Path(path)).stage(name)
    if not folder.done:
        stages = ", ".join(stage.name for stage in folder.run.require())
        raise UserError(
            f"--{name}={path}: this run has {stages}, but no {name}; import it with: "
            f"{folder.run.command(name)}, or name a run that has it"
        )
    return folder


def extractors_of(options, metrics, mesh: Mesh) -> dict[str, Extractor]:
    """Load the networks that the metrics need.

    Raises:
      UserError: if one is missing; says where its weights are published.
    """
    wanted, extractors = {SPACES[metric][0] for metric in metrics}, {}
    if "inception" in wanted:
        if options.inception and Path(options.inception).is_dir():
            network, arrays = load(imported("inception", options.inception), mesh)
        else:
            network, arrays = read_inception(options.inception, mesh)
        front_end = PRESETS[options.preset].front_end
        extractors["inception"] = inception_extractor(network, arrays, front_end)
    if "dinov2" in wanted:
        folder = Run(Path(options.dinov2 or ".")).stage("backbone")
        if not (folder.done and folder.config.backbone.name == "dinov2"):
            raise UserError(
                "fd_dinov2 needs DINOv2-L: dinov2_vitl14_pretrain.pth, published with "
                "facebookresearch/dinov2; import it with: python -m gae_jax import-torch "
                "--config=configs/teacher_dinov2_l.py --workdir=RUN "
                "--config.import_torch.backbone=FILE, and pass --dinov2=RUN"
            )
        check_fd_dinov2(folder.config.backbone.dinov2, options.dinov2)
        loaded = load(folder, mesh)
        extractors["dinov2"] = dinov2_extractor(*loaded, digest=folder.done["fingerprint"])
    return extractors


def metrics_of(options) -> tuple[str, ...]:
    metrics = options.metrics or preset_of(options.preset).metrics
    check_metrics(metrics)
    return tuple(metrics)


def base_manifest(options, samples: Samples, extractors: dict[str, Extractor]) -> dict:
    """The protocol fields that both kinds of evaluation record."""
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
        **environment(),
    }


def generated(options, samples: Samples, mesh: Mesh) -> dict:
    """Evaluate generated images."""
    metrics = metrics_of(options)
    if not options.ref.exists():
        raise DataError(f"--ref={options.ref} does not exist")
    extractors = extractors_of(options, metrics, mesh)
    settings = Settings(
        allow_few=options.allow_few,
        subset_size=options.subset_size or SUBSET,
        splits=options.splits or 0,
    )
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
                    _ = stored.factor  # refuses what is not a covariance; cached
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
    size = batch_of(options.size, samples.count, mesh)
    rows = features_of(
        samples.batches(size),
        extractors,
        mesh,
        size=size,
        progress=say_progress("features of samples", samples.count),
    )
    features = {(name, space): x for name, spaces in rows.items() for space, x in spaces.items()}
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
    """Evaluate reconstructions against the original images.

    Raises:
      DataError: if the reference is of statistics, or of other images.
    """
    if is_statistics(options.ref):
        raise DataError(
            f"{options.ref} is a reference for generated images: statistics of a training set. "
            f"{options.preset!r} compares reconstructions with the original images (against other "
            "images an rFID is wrong by 1 or more); give those"
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
    size = batch_of(options.size, samples.count, mesh)
    preset, lpips = reconstruction.PRESETS[options.preset], None
    lpips_facts = {}
    if options.lpips:
        folder = imported("lpips", options.lpips)
        lpips = load(folder, mesh, precision="highest")
        lpips_facts = weights_facts(folder)

    @jax.jit
    def score(arrays, images, reconstructions):
        # the decoder's floats are not stored
        as_float = reconstructions.astype(np.float32) / 127.5 - 1
        distance = lpips[0](*arrays) if lpips else None
        return reconstruction.reconstruction_scores(preset, images, as_float, distance)[0]

    pixels = jax.ShapeDtypeStruct((size, *samples.shape), np.uint8)
    try:
        jax.eval_shape(score, lpips and lpips[1], pixels, pixels)
    except ValueError as error:
        raise DataError(f"{samples.path}: {error}") from None
    check_out(options)
    rows, progress = [], say_progress("reconstructions", samples.count)
    for batch, images in zip(samples.batches(size), originals.batches(size), strict=True):
        at = np.minimum(np.arange(size), len(batch) - 1)
        placed = put_batch((images[at], batch[at]), mesh)
        scores = jax.device_get(score(lpips and lpips[1], *placed))
        rows.append({name: value[: len(batch)] for name, value in scores.items()})
        progress(len(batch))
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
    columns = jax.tree.map(lambda *parts: np.concatenate(parts), *rows)
    figures = {name: float(value.mean(dtype=np.float64)) for name, value in columns.items()}
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
    """Measure, print the figures, and write ``result.json`` and a page.

    Returns:
      The path of ``result.json``.

    Raises:
      UserError: if an option or a file cannot be used; nothing is written then.
    """
    preset_of(options.preset)
    mesh = make_mesh(devices=devices)
    samples = open_samples(options.samples)
    kind = reconstructed if options.preset in RECONSTRUCTION else generated
    result = kind(options, samples, mesh)
    folder = folder_of(options)
    width = max(map(len, result["metrics"]))
    lines = [f"  {name:<{width}}  {value:.4f}" for name, value in result["metrics"].items()]
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
