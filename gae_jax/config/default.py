"""The default config: every field there is, with its default.

A config describes the whole pipeline; a stage reads its own section. `default_config` is both the
documentation and the schema: files in ``configs/`` start from it and change what differs, and a
key that it does not have is an error. Leaf names equal the arguments of the function or
constructor that receives the section (see `bind`), so one grep connects the two.

Sources of the values: [paper] quoted from GAE, arXiv 2603.10365; [code] from the authors'
released code or configs; [ours] chosen here.
"""

import ml_collections

from gae_jax.config.commands import (
    bench_section,
    doctor_section,
    export_torch_section,
    import_torch_section,
    plan_section,
)
from gae_jax.config.data import data_section, mesh_section
from gae_jax.config.diffusion import diffusion_section
from gae_jax.config.evaluation import evaluate_section, likelihood_section, reference_section
from gae_jax.config.latents import latents_section
from gae_jax.config.precision import precision_section
from gae_jax.config.sample import sample_section
from gae_jax.config.teacher import backbone_section, teacher_section
from gae_jax.config.tokenizer import tokenizer_section


def default_config() -> ml_collections.ConfigDict:
    """GAE at the paper's size (d = 32, ViT-L, 256 px, LightningDiT-XL/1, 80 epochs)."""
    config = ml_collections.ConfigDict(
        dict(
            seed=0,
            mesh=mesh_section(),
            precision=precision_section(),
            data=data_section(),
            backbone=backbone_section(),
            teacher=teacher_section(),
            tokenizer=tokenizer_section(),
            latents=latents_section(),
            diffusion=diffusion_section(),
            sample=sample_section(),
            evaluate=evaluate_section(),
            reference=reference_section(),
            likelihood=likelihood_section(),
            bench=bench_section(),
            plan=plan_section(),
            doctor=doctor_section(),
            import_torch=import_torch_section(),
            export_torch=export_torch_section(),
        )
    )
    return config.lock()
