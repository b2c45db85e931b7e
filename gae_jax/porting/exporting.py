"""Write the networks of a run for the released PyTorch code."""

import importlib.util
import json
from pathlib import Path

import numpy as np

from gae_jax import __version__
from gae_jax.data.latents import LatentSet
from gae_jax.interop import rae_tables, tables
from gae_jax.interop.check import largest_difference, outputs
from gae_jax.interop.convert import ConversionError, export_torch, import_torch, mapping
from gae_jax.interop.files import read_state_dict, write_safetensors
from gae_jax.objectives.dino_discriminator import DinoDisc
from gae_jax.objectives.discriminator import module_of
from gae_jax.objectives.patchgan import PatchGAN
from gae_jax.porting import model_card, torch_latents
from gae_jax.porting.comparison import TOLERANCE, difference_line, mapping_table
from gae_jax.porting.released import BACKBONE_IN_TEACHER, Released, released, without_counterpart
from gae_jax.run.load import network_of
from gae_jax.run.run import StageFolder
from gae_jax.run.session import Session
from gae_jax.runtime.errors import number_of
from gae_jax.runtime.files import write_bytes, write_json
from gae_jax.tokenizers import kind_of, name_of, sizes_of
from gae_jax.train.checkpoint import load_weights, stored_networks

# Stage -> (file without suffix, suffix of the torch file).
FILES = {"teacher": ("teacher", ".pth"), "tokenizer": ("gae", ".ckpt"), "diffusion": ("dit", ".pt")}


Tensors = dict[str, np.ndarray]


def why_not(folder: StageFolder) -> str:
    """Why a stage cannot be exported; "" if it can."""
    if folder.name == "tokenizer":
        section = folder.config.tokenizer
        counterpart = kind_of(section).torch
        if not (counterpart and counterpart().describe):
            return (
                f"tokenizer.name is {name_of(section)!r}, and the folder is for the code released "
                "with GAE"
            )
    return without_counterpart(folder.name, folder.config)


def export_stage(folder: StageFolder, target: Path) -> dict[str, Tensors]:
    """Write a network as safetensors, read it back and compare.

    Returns:
      Entry of the torch file -> its state dict.

    Raises:
      ConversionError: if outputs of the network that was read back differ.
    """
    done, name = folder.require_done(), folder.name
    network, counterpart = network_of(folder, done), counterpart_of(folder)
    rows = mapping(counterpart.table, counterpart.network, **counterpart.sizes)
    print(f"\n{name}: {folder.path}\n{mapping_table(rows)}")
    entries = {}
    for which in ("ema", "params"):
        if name not in stored_networks(folder.path, which, done.get("step")):
            continue
        arrays = load_weights(folder.path, which, name, done.get("step"))
        tensors = export_torch(counterpart.table, *counterpart.inside(arrays), **counterpart.sizes)
        path = target / file_of(name, which)
        write_safetensors(path, tensors)
        again = import_torch(
            counterpart.table, read_state_dict(path), counterpart.network, **counterpart.sizes
        )
        after = counterpart.outside(again, arrays)
        differences = largest_difference(outputs(network, arrays), outputs(network, after))
        print(f"  {path.name}: {number_of(len(tensors), 'tensor')}\n{difference_line(differences)}")
        if max(differences.values()) > TOLERANCE:
            raise ConversionError(f"{path.name} does not hold what {folder.path} holds")
        entries[entry_of(name, which)] = tensors
    return entries


def counterpart_of(folder: StageFolder) -> Released:
    """The released module of a finished stage; sizes from the stage's own folder."""
    config = folder.config.to_dict()
    if folder.name == "diffusion":
        shape = folder.require_done()["latent_shape"]
        return released("diffusion", config, shape=shape)
    return released(folder.name, config)


def file_of(name: str, which: str) -> str:
    """The name of a network's file; the EMA, which one samples with, has the plain name."""
    raw = "_raw" if name == "diffusion" and which == "params" else ""
    return f"{FILES[name][0]}{raw}.safetensors"


def entry_of(name: str, which: str) -> str:
    if name == "diffusion":
        return "ema" if which == "ema" else "model"
    return {"teacher": "model_state_dict", "tokenizer": "state_dict"}[name]


def export_discriminator(folder: StageFolder, target: Path) -> None:
    """Write the discriminator that trained with a tokenizer, if its checkpoint has one."""
    step = (folder.done or {}).get("step")
    if "discriminator" not in stored_networks(folder.path, "params", step):
        return
    module, sizes = module_of(folder.config.tokenizer.discriminator)
    table = {PatchGAN: tables.PATCHGAN, DinoDisc: rae_tables.DINO_DISC}[module]
    arrays = load_weights(folder.path, "params", "discriminator", step)
    tensors = export_torch(table, *arrays, **sizes)
    write_safetensors(target / "discriminator.safetensors", tensors)
    print("  discriminator.safetensors: the discriminator that trained with it")


def backbone_tensors(session: Session) -> Tensors:
    """The teacher's backbone by the names inside a teacher's file; {} if there is none."""
    folder = session.run.stage("backbone")
    if why := model_card.without_backbone(folder):
        print(f"  {why}")
        return {}
    counterpart = released("backbone", folder.config.to_dict())
    done = folder.require_done()
    arrays = load_weights(folder.path, done["weights"], "backbone", done.get("step"))
    tensors = export_torch(counterpart.table, *counterpart.inside(arrays), **counterpart.sizes)
    return {BACKBONE_IN_TEACHER + name: tensor for name, tensor in tensors.items()}


def statistics(session: Session) -> Tensors:
    """Mean and std of the latents: the diffusion model's, else those of the set.

    [1, d, 1, 1], or [1, d, h, w] where they are of every element.
    """
    folder = session.run.stage("diffusion")
    if folder.done:
        done = folder.done
        rest = load_weights(folder.path, done["weights"], "diffusion", done.get("step"))[1]
        arrays = {"mean": rest["latent_mean"], "std": rest["latent_std"]}
    elif session.run.stage("latents").done:
        latents = LatentSet.open(session.run.stage("latents").path)
        arrays = {"mean": latents.mean, "std": latents.std}
    else:
        return {}
    grids = {key: np.asarray(value) for key, value in arrays.items()}
    grids = {key: x[None, None] if x.ndim == 1 else x for key, x in grids.items()}
    return {key: np.moveaxis(x, -1, 0)[None] for key, x in grids.items()}


def write_torch(path: Path, content: dict) -> None:
    """Write state dicts with torch."""
    import torch

    def tensors(tree):
        if isinstance(tree, dict):
            return {name: tensors(value) for name, value in tree.items()}
        return torch.from_numpy(np.array(tree))

    torch.save(tensors(content), path)


def write_folder(session: Session, folders: dict[str, StageFolder], target: Path) -> None:
    """Write all files of an export to an empty folder."""
    torch_files = {}
    for name, folder in folders.items():
        if name == "latents":
            torch_latents.export(folder, target / "latents")
            continue
        entries = export_stage(folder, target)
        if name == "teacher" and (inside := backbone_tensors(session)):
            entries = {"model_state_dict": inside | entries["model_state_dict"]}
            write_safetensors(target / file_of(name, "params"), entries["model_state_dict"])
        if name == "tokenizer":
            export_discriminator(folder, target)
        torch_files["".join(FILES[name])] = entries
    if of_latents := statistics(session):
        write_safetensors(target / "latents_stats.safetensors", of_latents)
        torch_files["latents_stats.pt"] = of_latents
        if "latents" in folders:  # where the released dataset class looks for them
            torch_files["latents/latents_stats.pt"] = of_latents
    if importlib.util.find_spec("torch"):
        for name, content in torch_files.items():
            write_torch(target / name, content)
    else:
        print("\n.pt files are left out: torch is not installed (pip install torch adds them)")
        if "latents" in folders:
            print(
                "  without latents/latents_stats.pt the released dataset class computes its own "
                "from 10,000 random latents"
            )
    write_json(target / "config.json", describe(folders, of_latents))
    write_bytes(
        target / "README.md",
        model_card.text(session, folders, target).encode(errors="backslashreplace"),
    )


def describe(folders: dict[str, StageFolder], of_latents: Tensors) -> dict:
    """The contents of config.json: arguments of the released classes, and the statistics."""
    described = {"gae_jax": __version__}
    if "tokenizer" in folders:
        section = folders["tokenizer"].config.tokenizer
        described["tokenizer"] = kind_of(section).counterpart.describe(sizes_of(section))
    if "teacher" in folders:
        described["teacher"] = counterpart_of(folders["teacher"]).sizes
    if "diffusion" in folders:
        described["diffusion"] = counterpart_of(folders["diffusion"]).sizes
        section = folders["diffusion"].config.diffusion
        described["latent_multiplier"] = section.latent_multiplier
    for key, value in of_latents.items():
        described[f"latents_{key}"] = value.ravel().tolist()
    return json.loads(json.dumps(described))
