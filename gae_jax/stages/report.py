"""``report``: write the page and ``result.json`` of a run."""

import json
import logging
import platform
from pathlib import Path

import flax
import jax
import numpy as np

from gae_jax import __version__
from gae_jax.config import plain
from gae_jax.evaluation.sample_files import GRID, class_grid, load_set, shown_classes
from gae_jax.report import data_uri, enlarge, plots, render, strip
from gae_jax.run import amendments
from gae_jax.run.class_names import in_words
from gae_jax.run.contents import read_contents
from gae_jax.run.run import Run, StageFolder
from gae_jax.run.session import Session
from gae_jax.runtime.errors import number_of
from gae_jax.runtime.files import read_figures, write_bytes, write_figures
from gae_jax.runtime.progress import duration
from gae_jax.train.log import read_metrics

# Stage -> what it makes, in the order of the pipeline.
STAGES = {
    "backbone": "a small ViT classifier instead of DINOv2",
    "teacher": "semantic downsampler and feature decoder, cosine distillation",
    "tokenizer": "ViT autoencoder: L1, perceptual, GAN, semantic preservation",
    "latents": "every training image encoded, exact statistics",
    "diffusion": "LightningDiT, flow matching, EMA, label dropout",
    "sample": "images of every class, by SDE and by ODE",
    "evaluate": "reconstruction, probes, noise curve, generated sets",
}
CHECKOUT = Path(__file__).parents[2]  # its place on this machine is not shown
# Set of samples -> what its figures' names end with. The paper guides the ODE and not the SDE.
SUFFIX = {"sde": "", "ode": "_guided"}

STAND_IN = (
    "GAE's semantic teacher is DINOv2, whose weights cannot be bundled. Here a small ViT stands "
    "in for it: a classifier of the training images, trained with their labels. Supervision was "
    "chosen over self-supervision because a thousand small images are too few to learn semantics "
    "from without labels in half a minute. So the teacher has seen the training labels, and the "
    "probe of the latents shows that the alignment carries its semantics over, not that they "
    "arise without labels. The perceptual term uses the same ViT's features, with no learned "
    "weights, instead of LPIPS."
)


def flat_result(evaluation: dict, seconds: dict[str, float]) -> dict:
    """Flatten the figures to stable dotted names; those not measured are left out."""
    tokenizer = evaluation["tokenizer"]
    result = {
        f"tokenizer.{name}": value
        for name, value in tokenizer.items()
        if isinstance(value, int | float)
    }
    for level, value in zip(
        tokenizer.get("noise_levels", []), tokenizer.get("noise_psnr", []), strict=True
    ):
        result[f"tokenizer.psnr_at_noise.{level:g}"] = value
    for name, scores in evaluation.get("generation", {}).items():
        suffix = SUFFIX[name]
        for figure, value in scores.items():
            if isinstance(value, int | float):
                result[f"generation.{figure}{suffix}"] = value
        result[f"generation.network_calls{suffix}"] = scores["sampling"]["network_calls"]
        for label, value in scores.get("per_class", {}).items():
            result[f"generation.accuracy{suffix}.class_{label}"] = value
    for part in ("latents", "judge"):
        result |= {f"{part}.{name}": value for name, value in evaluation.get(part, {}).items()}
    result |= {f"seconds.{name}": value for name, value in seconds.items()}
    result["seconds.total"] = sum(seconds.values())
    return result


def history(run: Run) -> dict[str, dict[str, str]]:
    """As `amendments.history`, of all stages of the run."""
    return amendments.history({name: run.stage(name).done for name in STAGES})


def table(result: dict, evaluation: dict) -> str:
    """The main figures as lines of text."""
    rows = [(row["label"], row["value"], row["note"]) for row in metric_rows(result, evaluation)]
    rows.append(("time of all stages", duration(result["seconds.total"]), "on this machine"))
    wide = [max(len(row[i]) for row in rows) for i in range(2)]
    return "\n".join(f"  {a:<{wide[0]}}  {b:>{wide[1]}}  {c}" for a, b, c in rows)


PERCENT = "{:.1%}"
# Figure -> label, form, note, in this order; {images} and {numbers} are filled in.
ROWS = {
    "tokenizer.psnr": ("reconstruction PSNR", "{:.2f} dB", "{images}"),
    "tokenizer.ssim": ("reconstruction SSIM", "{:.4f}", "{images}"),
    "tokenizer.lpips": ("reconstruction LPIPS", "{:.4f}", "{images}"),
    "tokenizer.rfd": ("reconstruction, Frechet distance", "{:.3f}", "by the small classifier"),
    "tokenizer.decode_steps": ("decoder's steps", "{:.0f}", "calls of the network for an image"),
    "tokenizer.noise_area_psnr": ("PSNR under noise, area", "{:.2f}", "over the noise levels"),
    "tokenizer.linear_probe": ("linear probe, latents", PERCENT, "{numbers}"),
    "tokenizer.linear_probe_mean": ("linear probe, mean latent", PERCENT, "one token"),
    "tokenizer.pixel_probe": ("linear probe, pixels", PERCENT, "PCA to {numbers}"),
    "latents.effective_rank": ("effective rank of the latents", PERCENT, "of all channels"),
    "latents.gsq": ("nearest neighbour of the same class", PERCENT, "mean latents, cosine"),
    "latents.lpc": ("LPIPS of a step in the latents (LPC)", "{:.4f}", "lower is smoother"),
    "latents.coherence_near": ("cosine of neighbouring tokens", "{:.3f}", ""),
    "latents.coherence_far": ("cosine of distant tokens", "{:.3f}", ""),
    "judge.fd_train_holdout": ("Frechet distance, real", "{:.3f}", "held out to training"),
    "judge.judged_right_real": ("judged right, real images", PERCENT, "held out"),
    "judge.accuracy_real": ("judge's own accuracy", PERCENT, "{images}"),
}
# Distances of reconstructions whose names hold network and count.
DISTANCES = {
    "tokenizer.rfid": "reconstruction rFID",
    "tokenizer.rfd_": "reconstruction, Frechet distance",
}
GENERATED = {
    "judged_right": ("judged right by EfficientNet-Lite0", PERCENT),
    "accuracy": ("judged right", PERCENT),
    "accuracy_worst_class": ("worst class", PERCENT),
    "fd": ("Frechet distance", "{:.3f}"),
}


def metric_rows(result: dict, evaluation: dict) -> list[dict[str, str]]:
    """Label, value and note of each figure in the printed table and on the page."""
    words = {
        "images": f"{result['tokenizer.held_out_images']} held-out images",
        "numbers": f"{result['tokenizer.dimensions']} numbers per image",
    }

    def row(label, form, name, note):
        return {"label": label, "value": form.format(result[name]), "note": note}

    rows = [
        row(label, form, name, note.format(**words))
        for name, (label, form, note) in ROWS.items()
        if name in result
    ]
    rows += [
        row(label, "{:.3f}", name, name.removeprefix("tokenizer."))
        for name in result
        for prefix, label in DISTANCES.items()
        if name.startswith(prefix)
    ]
    for kind, scores in evaluation.get("generation", {}).items():
        calls = scores["sampling"]["network_calls"]
        for figure, value in scores.items():
            if isinstance(value, float):
                label, form = GENERATED.get(figure, (figure, "{:.4g}"))
                how = f"{number_of(scores['count'], 'image')}, {number_of(calls, 'network call')}"
                value = form.format(value)
                rows.append({"label": f"{label}, {kind.upper()}", "value": value, "note": how})
    return rows


def page(session: Session, result: dict, evaluation: dict) -> bytes:
    """Render report.html."""
    run, config = session.run, session.config
    made_of = read_contents(run.stage("evaluate")).get("train", session.source("train"))
    class_names = in_words(made_of.class_names, config.data.root)
    with np.load(run.stage("evaluate").path / "pictures.npz") as file:
        pictures = dict(file)
    factor = max(1, 64 // pictures["real"].shape[1])
    levels = evaluation["tokenizer"].get("noise_levels", [])
    latent = pictures["colours"].shape[1:3]
    size, numbers = config.data.image_size, evaluation["tokenizer"]["dimensions"]
    sets = evaluation.get("generation", {})
    judged = {name.upper(): s["per_class"] for name, s in sets.items() if "per_class" in s}
    done = [name for name in STAGES if run.stage(name).done]
    return render(
        dict(
            title="A geometric autoencoder and a diffusion model"
            + (" of handwritten digits" if config.data.name == "digits" else ""),
            lead=lead(session, result),
            tiles=tiles(result),
            grids=[grid(session, name, class_names) for name in sets],
            latent_shape=f"{numbers} ({latent[0]} x {latent[1]} x {numbers // np.prod(latent)})",
            image_shape=f"{size * size * 3} ({size} x {size} x 3)",
            pairs=[
                _row("real", strip(enlarge(pictures["real"], factor))),
                _row("reconstructed", strip(enlarge(pictures["reconstructed"], factor))),
                _row(
                    "latent",
                    strip(enlarge(pictures["colours"], factor * size // latent[0])),
                    "hard",
                ),
            ],
            nearest=[
                row
                for name in sets
                if f"nearest_{name}" in pictures
                for row in (
                    _row(
                        f"generated, {name.upper()}",
                        strip(enlarge(pictures[f"generated_{name}"], factor)),
                    ),
                    _row(
                        "nearest in training", strip(enlarge(pictures[f"nearest_{name}"], factor))
                    ),
                )
            ],
            noise_chart=(
                plots.noise_curve(levels, evaluation["tokenizer"]["noise_psnr"]) if levels else ""
            ),
            noise_rows=[
                _row(f"noise {level:g}", strip(pictures["noisy"][:10, index]))
                for index, level in enumerate(levels)
            ],
            metrics=metric_rows(result, evaluation),
            class_chart=plots.class_accuracies(judged, class_names) if judged else "",
            judge_note=(
                "The judge is scikit-learn's multilayer perceptron on 8 x 8 grey images, trained "
                "on the real training images only; the Frechet distances are between the "
                "activations of its hidden layer, to the training images."
            ),
            stand_in=STAND_IN if config.backbone.name == "vit" else "",
            stages=[stage_row(run.stage(name), result[f"seconds.{name}"]) for name in done],
            amended=[
                amendments.in_words(item)
                for item in amendments.merged(
                    *(run.stage(n).require_done().get("amended", []) for n in done)
                )
            ],
            total_seconds=f"{result['seconds.total']:.0f}",
            charts=[
                {"stage": name, "svg": plots.curves(rows)}
                for name in ("backbone", "teacher", "tokenizer", "diffusion")
                if (rows := read_metrics(run.stage(name).path))
            ],
            command=command_line(session, "demo"),
            commands="\n".join(command_line(session, command) for command in [*STAGES, "report"]),
            versions=(
                f"gae_jax {__version__}, jax {jax.__version__}, flax {flax.__version__}, Python "
                f"{platform.python_version()}, {jax.device_count()} x "
                f"{jax.devices()[0].device_kind}, seed {config.seed}"
            ),
            config=json.dumps(plain(config), indent=2),
        )
    )


def command_line(session: Session, command: str) -> str:
    """The command as a user types it in the repository's root."""
    return session.run.command(command).replace(f"{CHECKOUT}/", "")


def lead(session: Session, result: dict) -> str:
    """Introduce the page in a few sentences."""
    train = len(session.source("train"))
    if session.config.data.name == "digits":
        data = f"{train} of scikit-learn's 1,797 real handwritten digits"
    else:
        data = f"{number_of(train, 'image')} from {session.config.data.root}"
    imported = [name for name in STAGES if (session.run.stage(name).done or {}).get("imported")]
    if imported:
        return (
            f"Weights of {', '.join(imported)} were imported, measured on images of {data}. Every "
            "metric below is on held-out images, or on generated ones."
        )
    if started := history(session.run).get("started_from"):
        parts = "; ".join(f"{name} {words}" for name, words in started.items())
        return (
            f"Fine-tuned on {data}: {parts}. Every metric below is on images that this training "
            "never saw, or on generated ones."
        )
    return (
        f"Trained from scratch on {data}: a semantic teacher, an autoencoder whose latents follow "
        "it, and a diffusion transformer that generates such latents. Every metric below is on "
        f"images that training never saw, or on generated ones. It took "
        f"{duration(result['seconds.total'])} on this machine."
    )


def tiles(result: dict) -> list[dict[str, str]]:
    """The figures at the head of the page."""
    percent = "{:.1%}"
    shown = [
        ("reconstruction", "tokenizer.psnr", "{:.1f} dB", "PSNR, held-out images"),
        ("probe of latents", "tokenizer.linear_probe", percent, "pixels: {pixel}"),
        ("samples, SDE", "generation.accuracy", percent, "judged to be their class"),
        ("samples, ODE", "generation.accuracy_guided", percent, "judged to be their class"),
    ]
    pixel = percent.format(result.get("tokenizer.pixel_probe", float("nan")))
    return [
        {"label": label, "value": form.format(result[name]), "note": note.format(pixel=pixel)}
        for label, name, form, note in shown
        if name in result
    ]


def grid(session: Session, name: str, class_names: list[str]) -> dict:
    """One set of samples, a column per class."""
    images, labels, manifest = load_set(session.run.stage("sample").path, name)
    pixels = class_grid(images, labels, *GRID)
    how = (
        f"{name.upper()}, {manifest['method']}, "
        f"{number_of(manifest['network_calls'], 'network call')}"
    )
    parts = manifest.get("guidance_parts", ())
    if parts:
        scales = ", ".join(f"{scale:g} up to t = {end:g}" for end, scale in parts)
        title, how = "With guidance", f"{how}, scale {scales}"
    elif manifest["guidance"] == 1:
        title = "Without guidance"
    else:
        title, how = "With guidance", f"{how}, scale {manifest['guidance']:g}"
    return {
        "title": title,
        "classes": [class_names[label] for label in shown_classes(labels)],
        "image": data_uri(enlarge(pixels, max(1, 48 // images.shape[1]))),
        "caption": f"{how}, time shift {manifest['time_shift']:g}, weights: {manifest['weights']}",
    }


def stage_row(folder: StageFolder, seconds: float) -> dict[str, str]:
    """A line of the table of stages."""
    done, config = folder.require_done(), folder.config
    trained = "weights" in done and "imported" not in done
    origin = done.get("started_from")
    steps = config[folder.name].train.steps if trained else ""
    waits = [row["data_wait"] for row in read_metrics(folder.path) if "data_wait" in row]
    return {
        "data_wait": f"{np.mean(waits):.1%}" if waits else "",
        "stage": folder.name,
        "what": STAGES[folder.name] + (f"; {amendments.started_from(origin)}" if origin else ""),
        "parameters": f"{sum(done['parameters'].values()):,}" if "parameters" in done else "",
        "steps": f"{steps:,}" if steps else "",
        "seconds": f"{seconds:.1f}",
    }


def _row(label: str, pixels: np.ndarray, kind: str = "soft") -> dict[str, str]:
    return {"label": label, "image": data_uri(pixels), "kind": kind}


def run(session: Session) -> None:
    """Write both files from the results in the run, and print the table.

    Raises:
      UserError: if the run is not evaluated, or its weights have changed since.
    """
    folder = session.run.stage("evaluate")
    folder.require_done()
    for name in ("latents", "sample", "evaluate"):
        if session.run.stage(name).done:
            session.run.stage(name).require_up_to_date()
    evaluation = read_figures(folder.path / "result.json")
    seconds = {name: done["seconds"] for name in STAGES if (done := session.run.stage(name).done)}
    result = flat_result(evaluation, seconds)
    changes = history(session.run)
    result |= {"amended": changes["amended"]} if "amended" in changes else {}
    started = changes.get("started_from", {})
    result |= {f"{name}.started_from": text for name, text in started.items()}
    print(f"\n{table(result, evaluation)}\n", flush=True)
    for stage, text in result.get("amended", {}).items():
        print(f"  amended: {stage}, {text}", flush=True)
    write_figures(session.run.path / "result.json", result)
    path = session.run.path / "report.html"
    write_bytes(path, page(session, result, evaluation))
    logging.info("report: %s", path)
    print(path)
