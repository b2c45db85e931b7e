"""The section ``diffusion`` and its checks."""

from gae_jax.config.checks import accumulation_clashes, start_clashes, training_clashes
from gae_jax.config.choices import choice
from gae_jax.config.training import optim, train


def diffusion_section() -> dict:
    """The diffusion model on the latents."""
    return dict(
        # ddt: it makes the conditions of RAE's wide head
        name=choice("lightningdit", "generators.latent_diffusion:NETWORKS"),
        model=dict(
            patch_size=1,
            hidden_size=1152,
            depth=28,
            num_heads=16,
            mlp_ratio=4.0,
            num_classes=1000,
            class_dropout_prob=0.1,
            use_qknorm=False,  # [code] off for the 80-epoch runs, on for the 800-epoch runs
            use_swiglu=True,
            use_rmsnorm=True,
            use_rope=True,
            use_abs_pos=True,
            wo_shift=False,
        ),
        head=dict(hidden_size=2048, depth=2, num_heads=16),  # of "ddt" (RAE's code)
        flow=dict(
            # [paper] linear | gvp | vp
            path=choice("linear", "generators.flow:PATHS"),
            # [paper] velocity | noise | score
            prediction=choice("velocity", "generators.flow:PREDICTIONS"),
            # [paper] flat | sphere, ours: geodesics from token to token
            geometry=choice("flat", "sphere"),
            # [code] none | velocity | likelihood, of noise and score
            weighting=choice("none", "generators.flow:WEIGHTINGS"),
            time=choice("logit_normal", "generators.flow:TIMES"),  # [code] or uniform
            time_mean=0.0,  # [code]
            time_std=1.0,  # [code]
            time_shift=0.7,  # [code]
            time_least=0.0,  # [ours] logit-normal times are cut off below this, before the shift
            cosine_weight=1.0,  # [code] of velocities
        ),
        latent_multiplier=1.0,  # [code]
        init_from="",  # weights to start from, as tokenizer.init_from
        init_optimizer=False,  # takes Adam's moments along; the schedule starts anew
        ema_decay=0.9999,  # [paper]
        optim=optim(  # [paper]
            end_learning_rate=2e-4, warmup_steps=0, b2=0.95, weight_decay=0.0
        ),
        train=train(steps=100_000),  # [paper] 80 epochs
    )


def diffusion_clashes(diffusion, grid: int) -> list[str]:
    """List the problems of the section ``diffusion``, on latents of ``grid`` x ``grid``."""
    problems, model, head = [], diffusion.model, diffusion.head
    for path, whole, part in (
        ("diffusion.model.patch_size", grid, model.patch_size),
        ("diffusion.model.num_heads", model.hidden_size, model.num_heads),
        ("diffusion.head.num_heads", head.hidden_size, head.num_heads),
    ):
        if whole % part:
            problems.append(f"{path} is {part}, which does not divide {whole}")
    if diffusion.name == "ddt" and diffusion.flow.prediction != "velocity":
        problems.append(
            f"diffusion.flow.prediction is {diffusion.flow.prediction!r}, but "
            "diffusion.name 'ddt' predicts the 'velocity'"
        )
    problems += start_clashes(diffusion, "diffusion")
    problems += flow_clashes(diffusion.flow) + accumulation_clashes(diffusion, "diffusion")
    return problems + training_clashes(diffusion, "diffusion")


def flow_clashes(section) -> list[str]:
    """List the problems of ``diffusion.flow``."""
    problems = []
    if section.time_least and section.time != "logit_normal":
        problems.append(
            f"diffusion.flow.time_least is {section.time_least}, but diffusion.flow.time is "
            f"{section.time!r}; only 'logit_normal' is cut off"
        )
    straight = section.path, section.prediction
    if section.geometry == "sphere" and straight != ("linear", "velocity"):
        problems.append(
            "diffusion.flow.geometry is 'sphere', which has one path and predicts its velocity: "
            "set diffusion.flow.path to 'linear' and diffusion.flow.prediction to 'velocity'"
        )
    return problems
