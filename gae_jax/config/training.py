"""How a stage trains: sections that several stages have."""

import ml_collections

from gae_jax.config.choices import choice
from gae_jax.config.precision import dtype_like, same_as


def optim(**changes) -> ml_collections.ConfigDict:
    """The optimizer section (AdamW) as the autoencoder and the teacher have it. [paper]"""
    section = ml_collections.ConfigDict(
        dict(
            learning_rate=2e-4,  # peak
            end_learning_rate=2e-5,  # where the cosine ends; equal to the peak: constant
            warmup_steps=8_000,
            b1=0.9,
            b2=0.98,
            weight_decay=0.05,  # none on tensors of one dimension
            clip_norm=0.0,  # global gradient norm; 0 switches clipping off
            decay=choice("cosine", "linear"),  # from the peak to the end
            hold_steps=0,  # at the peak, after the warm-up and before the decay
            # factors of the learning rate, (regex of paths within the network, factor); the first
            # that matches counts
            scales=(),
            restart=False,  # warm-up and cosine anew in each of the tokenizer's phases
        )
    )
    section.update(changes)
    return section


def train(**changes) -> ml_collections.ConfigDict:
    """How long a stage trains, and how often it reports and saves."""
    section = ml_collections.ConfigDict(
        dict(
            steps=250_000,
            batch_size=1024,  # global, whatever the number of devices
            log_every=100,
            eval_every=5_000,  # 0: never
            save_every=5_000,
            keep=2,  # checkpoints kept
            # figure of the evaluations, such as "eval/fid", whose best checkpoint is kept and is
            # the stage's result; empty: the last one is
            best_metric="",
            best_mode=choice("min", "max"),
        )
    )
    section.update(changes)
    return section


def compute(precision: dict, default: str = "float32") -> ml_collections.ConfigDict:
    """How a stage's step is computed. [ours]

    Args:
      precision: ``train`` of the section ``precision``, which all fields but one follow.
      default: the dtype where that is "auto".
    """
    return ml_collections.ConfigDict(
        dict(
            accumulate=1,  # parts that a batch is computed in, one after the other
            # of activations; parameters and losses are always fp32
            dtype=dtype_like(precision["dtype"], default),
            # none, or the name of a policy of jax.checkpoint_policies
            remat=same_as(precision["remat"]),
            # auto: on a GPU in bf16 triton where tokens and heads fit, else cudnn where the heads
            # fit, else xla | xla | cudnn | triton
            attention=same_as(precision["attention"]),
            # norms, gates and SwiGLU: auto: triton on a GPU in bf16 where the sizes fit, else xla
            # | xla | triton
            kernels=same_as(precision["kernels"]),
        )
    )
