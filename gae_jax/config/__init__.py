"""The one config: every field with its default, and the checks that refuse what nothing reads.

A config describes the whole pipeline; a stage reads its own section. `default_config` is both
the documentation and the schema; the long sections are in the files beside this one, as
``NAME_section``. Files in ``configs/`` start from it and change what differs, and a key that it
does not have is an error. Leaf names equal the arguments of the function or constructor that
receives the section (see `bind`), so one grep connects the two.

Sources of the values: [paper] quoted from GAE, arXiv 2603.10365; [code] from the authors'
released code or configs; [ours] chosen here.
"""

import ml_collections
from ml_collections.config_dict import FieldReference

from gae_jax.config.changes import is_operational, why_fixed
from gae_jax.config.commands import (
    bench_section,
    doctor_section,
    export_torch_section,
    import_torch_section,
    plan_section,
)
from gae_jax.config.diffusion import diffusion_section, sample_section
from gae_jax.config.evaluation import evaluate_section, likelihood_section, make_reference_section
from gae_jax.config.teacher import backbone_section, teacher_section
from gae_jax.config.tokenizer import latents_section, tokenizer_section
from gae_jax.config.tools import at_home, bind, expand_home, flatten, load_config, plain, preset
from gae_jax.config.training import optim

__all__ = [
    "at_home",
    "bind",
    "default_config",
    "expand_home",
    "flatten",
    "is_operational",
    "load_config",
    "optim",
    "plain",
    "preset",
    "why_fixed",
]


def default_config() -> ml_collections.ConfigDict:
    """GAE at the paper's size (d = 32, ViT-L, 256 px, LightningDiT-XL/1, 80 epochs)."""
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.mesh = dict(
        data=-1,  # devices per axis; -1 takes what is left
        fsdp=1,  # parameters, optimizer and EMA are split over it, as the batch is
        tensor=1,  # heads and MLPs are split over it
        slices=0,  # groups with a slow network between them, over which data is split; 0: as found
        preset="",  # or a machine of gae_jax/runtime/machines.py, such as "v5p-64", for its mesh
    )

    config.data = dict(
        name="folder",  # digits | folder | tfds | array_record, see docs/data.md
        # folder: where the class folders are; tfds: TFDS's data_dir; array_record: what
        # `prepare-data` wrote. The last two may be gs://
        root="",
        dataset="imagenet2012:5.*.*",  # tfds: name and version
        holdout=0.0,  # share of the images held out, where the source has no split of its own
        image_size=256,
        crop="center",  # center | random, after the ADM resize
        mirror=True,  # horizontal mirror images make sense for this data
        on_corrupt="error",  # error | skip (counted and named)
        exif="ignore",  # ignore | apply: EXIF orientations; ImageNet's protocols ignore them
        # processes that decode; "auto": one for each core, none for few images or for one core;
        # 0: none, threads read
        workers=FieldReference("auto", field_type=object),
        # of decoded, cut images: none | memory | disk, see docs/data.md
        cache="none",
        cache_dir="",  # where `disk` keeps them; empty: ~/.cache/gae_jax (or XDG_CACHE_HOME)
    )
    config.backbone = backbone_section()
    config.teacher = teacher_section()
    config.tokenizer = tokenizer_section()
    config.latents = latents_section()
    config.diffusion = diffusion_section()
    config.sample = sample_section()
    config.evaluate = evaluate_section()
    config.make_reference = make_reference_section()
    config.likelihood = likelihood_section()
    config.bench = bench_section()
    config.plan = plan_section()
    config.doctor = doctor_section()
    config.import_torch = import_torch_section()
    config.export_torch = export_torch_section()
    return config.lock()
