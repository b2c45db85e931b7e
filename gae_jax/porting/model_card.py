"""The README of an exported folder: its contents, how to load it, and its origin."""

from pathlib import Path

from gae_jax import __version__
from gae_jax.run.amendments import in_words, started_from
from gae_jax.run.run import StageFolder
from gae_jax.run.session import Session
from gae_jax.runtime.files import read_json

WHAT = {
    "gae.safetensors": "the autoencoder: `FoundationEncoderModel.load_state_dict`, strict",
    "gae.ckpt": 'the same as `{"state_dict": ...}`',
    "discriminator.safetensors": "the discriminator that trained with it",
    "teacher.safetensors": "the semantic teacher (`DinoReconstructor4D`)",
    "teacher.pth": 'the same as `{"model_state_dict": ...}`',
    "dit.safetensors": "LightningDiT, moving average of the weights: sample with these",
    "dit_raw.safetensors": "LightningDiT, the weights without averaging",
    "dit.pt": 'both, as `{"model": ..., "ema": ...}`',
    "latents_stats.safetensors": "mean and std of the latents, [1, d, 1, 1]",
    "latents_stats.pt": "the same",
    "latents/": "the training set's latents, as `ImgLatentDataset` reads them",
    "config.json": "arguments of the released classes, and the statistics",
}


def text(session: Session, folders: dict[str, StageFolder], target: Path) -> str:
    """Write the README as Markdown; all other files must have been written to ``target``."""
    files = [name for name in WHAT if name == "config.json" or (target / name).exists()]
    lead = (
        "Weights for the PyTorch code released with GAE (arXiv 2603.10365), by its own names; "
        "every file loads with `strict=True`. t = 0 is noise, t = 1 is data. The diffusion model "
        "takes `(latents - mean) / std * latent_multiplier`."
    )
    lines = [
        "---",
        "library_name: gae_jax",
        "tags: [image-tokenizer, latent-diffusion]",
        "---",
        "",
        "# Geometric Autoencoder",
        "",
        lead,
        "",
        "| file | contents |",
        "|---|---|",
        *(f"| `{name}` | {WHAT[name]} |" for name in files),
        "",
        "## Origin of the weights",
        "",
        *(origin(session, folder) for folder in folders.values()),
    ]
    if "teacher" in folders and (why := without_backbone(session.run.stage("backbone"))):
        lines.append(f"- {why}")
    lines += ["", f"Exported by gae_jax {__version__}.", ""]
    return "\n".join(lines)


def without_backbone(backbone: StageFolder) -> str:
    """Why a teacher's file lacks its backbone; "" if it has it."""
    if not backbone.done:
        return "The run does not have the teacher's backbone, so it is left out."
    if backbone.config.backbone.name == "vit":
        return (
            "The teacher's backbone is a small ViT instead of DINOv2, for which the released code "
            "has no class, so it is left out."
        )
    return ""


def origin(session: Session, folder: StageFolder) -> str:
    """One line: the imported file, or the data and length of the training."""
    done = folder.require_done()
    if folder.name == "latents":
        made_by = read_json(folder.path / "manifest.json")["tokenizer"]
        return f"- **latents** ({done['count']:,} images): made by the tokenizer `{made_by}`."
    count = sum(done["parameters"].values())
    head = f"- **{folder.name}** ({count:,} parameters, fingerprint `{done['fingerprint']}`): "
    if imported := done.get("imported"):
        files = [f"`{file}` (SHA-256 `{digest}`)" for file, digest in imported["files"].items()]
        return f"{head}imported from {' and '.join(files)}."
    config = folder.config[folder.name].train
    data = session.config.data
    source = data.root if data.name == "folder" else f"the data set '{data.name}'"
    changes = "".join(f" Amended: {in_words(item)}." for item in done.get("amended", []))
    started = done.get("started_from")
    origin = f"; {started_from(started)}." if started else "."
    return (
        f"{head}trained with gae_jax on {source}, {config.steps:,} steps of {config.batch_size} "
        f"images, seed {folder.config.get('seed', session.config.seed)}{origin}{changes}"
    )
