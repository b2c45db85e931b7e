"""How a stage trains: sections that several stages have."""

import ml_collections

from gae_jax.config.choices import choice


def optim(*, phases: bool = False, **changes) -> ml_collections.ConfigDict:
    """The optimizer section (AdamW) as the autoencoder and the teacher have it. [paper]

    Args:
      phases: whether the stage can train in phases.
    """
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
            # warm-up and cosine anew in each phase
            **(dict(restart=False) if phases else {}),
        )
    )
    section.update(changes)
    return section


def train(*, accumulate: bool = True, **changes) -> ml_collections.ConfigDict:
    """How long a stage trains, and how often it reports and saves.

    Args:
      accumulate: whether the stage can compute its batch in parts.
    """
    section = ml_collections.ConfigDict(
        dict(
            steps=250_000,
            batch_size=1024,  # global, whatever the number of devices
            # parts that a batch is computed in, one after the other [ours]
            **(dict(accumulate=1) if accumulate else {}),
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
