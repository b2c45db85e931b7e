"""``report``: the page and ``result.json`` of a run."""

import json
import logging
import platform

import flax
import jax
import numpy as np

from gae_jax import __version__
from gae_jax.config import plain
from gae_jax.files import read_json, write_bytes, write_json
from gae_jax.report import data_uri, enlarge, plots, render, strip
from gae_jax.run import StageFolder, command_of
from gae_jax.stages.sample import GRID, class_grid, load_set
from gae_jax.stages.session import Session
from gae_jax.train.log import duration, read_metrics

# Folder -> what the stage does, in the order of the pipeline.
STAGES = {
    "backbone": "a small ViT classifier in the place of DINOv2",
    "teacher": "semantic downsampler and feature decoder, cosine distillation",
    "tokenizer": "ViT autoencoder: L1, perceptual, GAN, semantic preservation",
    "latents": "every training image encoded, exact statistics",
    "diffusion": "LightningDiT, flow matching, EMA, label dropout",
    "samples": "images of every class, by SDE and by ODE",
    "evaluation": "reconstruction, probes, noise curve, generated sets",
}
# Set of samples -> what its figures' names end with. The paper guides the ODE and not the SDE.
SUFFIX = {"sde": "", "ode": "_guided"}

STAND_IN = (
    "GAE's semantic teacher is DINOv2, whose weights cannot be bundled. Here a small ViT stands "
    "in for it: a classifier of the training images, trained with their labels. Supervision was "
    "chosen over self-supervision because a thousand small images are too few to learn semantics "
    "from without labels in half a minute. So the teacher has seen the training labels, and the "
    "probe of the latents shows that the alignment carries its semantics over, not that they "
    "arise without labels. The perceptual term uses the same ViT's features, with no learned "
    "weights, in the place of LPIPS."
)


def flat_result(evaluation: dict, seconds: dict[str, float]) -> dict:
    """Every figure under a stable dotted name."""
    tokenizer, generation = evaluation["tokenizer"], evaluation["generation"]
    names = ("psnr", "ssim", "linear_probe", "pixel_probe", "dimensions", "held_out_images")
    result = {f"tokenizer.{name}": tokenizer[name] for name in names}
    for level, value in zip(tokenizer["noise_levels"], tokenizer["noise_psnr"], strict=True):
        result[f"tokenizer.psnr_at_noise.{level:g}"] = value
    for name, scores in generation.items():
        suffix = SUFFIX[name]
        for figure in ("accuracy", "accuracy_worst_class", "fd", "count"):
            result[f"generation.{figure}{suffix}"] = scores[figure]
        result[f"generation.network_calls{suffix}"] = scores["sampling"]["network_calls"]
        for label, value in scores["per_class"].items():
            result[f"generation.accuracy{suffix}.class_{label}"] = value
    result["judge.accuracy_real"] = evaluation["judge"]["accuracy_real"]
    result["judge.fd_train_holdout"] = evaluation["judge"]["fd_train_holdout"]
    result |= {f"seconds.{name}": value for name, value in seconds.items()}
    result["seconds.total"] = sum(seconds.values())
    return result


def table(result: dict) -> str:
    """The figures that matter as lines of text."""
    rows = [(row["label"], row["value"], row["note"]) for row in metric_rows(result)]
    rows.append(("time of all stages", duration(result["seconds.total"]), "on this machine"))
    wide = [max(len(row[i]) for row in rows) for i in range(2)]
    return "\n".join(f"  {a:<{wide[0]}}  {b:>{wide[1]}}  {c}" for a, b, c in rows)


def metric_rows(result: dict) -> list[dict[str, str]]:
    """Label, value and note of the figures in the printed table and the page."""
    held_out = f"{result['tokenizer.held_out_images']} held-out images"
    numbers = f"{result['tokenizer.dimensions']} numbers per image"

    def row(label, name, form, note):
        return {"label": label, "value": form.format(result[name]), "note": note}

    def generated(name):
        suffix, images = SUFFIX[name], f"{result[f'generation.count{SUFFIX[name]}']} images"
        how = f"{result[f'generation.network_calls{suffix}']} network calls"
        return [
            (f"judged right, {name.upper()}", f"generation.accuracy{suffix}", percent, images),
            (
                f"worst class, {name.upper()}",
                f"generation.accuracy_worst_class{suffix}",
                percent,
                "",
            ),
            (f"Frechet distance, {name.upper()}", f"generation.fd{suffix}", "{:.3f}", how),
        ]

    percent, sets = "{:.1%}", [n for n in SUFFIX if f"generation.fd{SUFFIX[n]}" in result]
    return [
        row("reconstruction PSNR", "tokenizer.psnr", "{:.2f} dB", held_out),
        row("reconstruction SSIM", "tokenizer.ssim", "{:.4f}", held_out),
        row("linear probe, latents", "tokenizer.linear_probe", percent, numbers),
        row("linear probe, pixels", "tokenizer.pixel_probe", percent, f"PCA to {numbers}"),
        *(row(*cells) for name in sets for cells in generated(name)),
        row("Frechet distance, real", "judge.fd_train_holdout", "{:.3f}", "held out to training"),
        row("judge's own accuracy", "judge.accuracy_real", percent, held_out),
    ]


def page(session: Session, result: dict, evaluation: dict) -> bytes:
    """report.html."""
    run, config = session.run, session.config
    class_names = run.stage("backbone").require_done()["class_names"]
    with np.load(run.stage("evaluation").path / "pictures.npz") as file:
        pictures = dict(file)
    factor = max(1, 64 // pictures["real"].shape[1])
    levels = evaluation["tokenizer"]["noise_levels"]
    latent = run.stage("diffusion").require_done()["latent_shape"]
    size = config.data.image_size
    sets = evaluation["generation"]
    seconds = {name: result[f"seconds.{command_of(name)}"] for name in STAGES}
    return render(
        dict(
            title="A geometric autoencoder and a diffusion model"
            + (" of handwritten digits" if config.data.name == "digits" else ""),
            lead=lead(session, result),
            tiles=tiles(result),
            grids=[grid(session, name, class_names) for name in sets],
            latent_shape=f"{np.prod(latent)} ({' x '.join(map(str, latent))})",
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
            noise_chart=plots.noise_curve(levels, evaluation["tokenizer"]["noise_psnr"]),
            noise_rows=[
                _row(f"noise {level:g}", strip(pictures["noisy"][:10, index]))
                for index, level in enumerate(levels)
            ],
            metrics=metric_rows(result),
            class_chart=plots.class_bars(
                {name.upper(): scores["per_class"] for name, scores in sets.items()},
                class_names,
            ),
            judge_note=(
                "The judge is scikit-learn's multilayer perceptron on 8 x 8 grey images, trained "
                "on the real training images only; the Frechet distances are between the "
                "activations of its hidden layer, to the training images."
            ),
            stand_in=STAND_IN,
            stages=[stage_row(run.stage(name), seconds[name]) for name in STAGES],
            total_seconds=f"{result['seconds.total']:.0f}",
            charts=[
                {"stage": command_of(name), "svg": plots.curves(read_metrics(run.stage(name).path))}
                for name in ("backbone", "teacher", "tokenizer", "diffusion")
            ],
            command=command_line(session, "demo"),
            commands="\n".join(
                command_line(session, command) for command in [*map(command_of, STAGES), "report"]
            ),
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
    where = f"--config={session.config_file} --workdir={session.run.path}"
    return f"python -m gae_jax {command} {where}"


def lead(session: Session, result: dict) -> str:
    """What the page is about, in a few sentences."""
    train = session.run.stage("latents").require_done()["count"]
    if session.config.data.name == "digits":
        data = f"{train} of scikit-learn's 1,797 real handwritten digits"
    else:
        data = f"{train} images from {session.config.data.root}"
    return (
        f"Trained from nothing on {data}: a semantic teacher, an autoencoder whose latents follow "
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
    pixel = percent.format(result["tokenizer.pixel_probe"])
    return [
        {"label": label, "value": form.format(result[name]), "note": note.format(pixel=pixel)}
        for label, name, form, note in shown
        if name in result
    ]


def grid(session: Session, name: str, class_names: list[str]) -> dict:
    """One set of samples, a column per class."""
    images, labels, manifest = load_set(session.run.stage("samples"), name)
    pixels = class_grid(images, labels, *GRID)
    how = f"{name.upper()}, {manifest['method']}, {manifest['network_calls']} network calls"
    if manifest["guidance"] == 1:
        title = "Without guidance"
    else:
        title, how = "With guidance", f"{how}, scale {manifest['guidance']:g}"
    return {
        "title": title,
        "classes": [class_names[label] for label in np.unique(labels)[: GRID[1]]],
        "image": data_uri(enlarge(pixels, max(1, 48 // images.shape[1]))),
        "caption": f"{how}, time shift {manifest['time_shift']:g}, EMA weights",
    }


def stage_row(folder: StageFolder, seconds: float) -> dict[str, str]:
    """A line of the table of stages."""
    done, config = folder.require_done(), folder.config
    steps = config[folder.name].train.steps if "weights" in done else ""
    return {
        "stage": folder.name,
        "command": command_of(folder.name),
        "what": STAGES[folder.name],
        "parameters": f"{sum(done.get('parameters', {}).values()):,}" if steps else "",
        "steps": f"{steps:,}" if steps else "",
        "seconds": f"{seconds:.1f}",
    }


def _row(label: str, pixels: np.ndarray, kind: str = "soft") -> dict[str, str]:
    return {"label": label, "image": data_uri(pixels), "kind": kind}


def run(session: Session) -> None:
    """Writes both files anew from what the run holds, and prints the table."""
    evaluation = read_json(session.run.stage("evaluation").path / "result.json")
    seconds = {
        command_of(name): session.run.stage(name).require_done()["seconds"] for name in STAGES
    }
    result = flat_result(evaluation, seconds)
    write_json(session.run.path / "result.json", result)
    path = session.run.path / "report.html"
    write_bytes(path, page(session, result, evaluation))
    logging.info("report: %s", path)
    print(f"\n{table(result)}\n\n{path}")
