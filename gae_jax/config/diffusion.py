"""The sections ``diffusion`` and ``sample``."""

from gae_jax.config.training import compute, optim, train


def diffusion_section() -> dict:
    """The diffusion model on the latents."""
    return dict(
        name="lightningdit",  # lightningdit | ddt: it makes the conditions of RAE's wide head
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
            path="linear",  # [paper] linear | gvp | vp
            prediction="velocity",  # [paper] velocity | noise | score
            geometry="flat",  # [paper] flat | sphere, ours: geodesics from token to token
            weighting="none",  # [code] none | velocity | likelihood, of noise and score
            time="logit_normal",  # [code] logit_normal | uniform
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
        compute=compute(dtype="bfloat16"),  # [code]
    )


def sample_section() -> dict:
    """What is drawn from it, and how."""
    return dict(
        sets=("sde", "ode"),  # what is drawn, each with the section of that name
        labels="uniform",  # [paper] uniform: per_class of each | random: as many, drawn | file
        labels_file="",  # with labels="file": one class per line, or an .npy file; kept in order
        per_class=50,  # [paper]
        classes=(),  # only these; empty: all
        batch_size=256,
        # that networks compute in; bfloat16 [ours] is several times faster on accelerators
        dtype="float32",
        # same: products are of numbers of that dtype | fp8 [ours]: of float8_e4m3fn in the large
        # layers of diffusion models, on NVIDIA's Ada, Hopper and later; see docs/performance.md
        products="same",
        decode_products="same",  # of the decoder, likewise
        attention="auto",  # of the diffusion model, as compute.attention
        png=False,  # a folder of PNG files beside samples.npz
        weaker="",  # autoguidance: a run with a weaker diffusion model on the same latents
        sde=dict(
            method="euler",  # [paper] euler (Maruyama) | heun, with twice the calls
            steps=250,  # [paper] points of the grid; the last step starts from the last of them
            start=1e-5,  # [code]
            time_shift=0.4,  # [paper]
            # g(t), the noise that is added and taken away again: sbdm [code] | sigma | linear |
            # constant | decreasing | increasing-decreasing
            form="sbdm",
            norm=1.0,  # [code] factor of g
            # mean [ours] goes to the end | reference [code] stops short of it, see
            # docs/training.md | tweedie | euler | none
            last_step="mean",
            last_step_size=0.004,  # [code] the grid ends so far from 1, before it is shifted
            guidance=1.0,  # [paper] 1: none
            guidance_start=0.0,
            guidance_end=1.0,
            guidance_channels=0,
            guidance_parts=(),
        ),
        ode=dict(  # [paper] 80-epoch setting
            method="euler",  # [paper] euler | heun | adams_bashforth | dopri5, which is adaptive
            steps=250,  # [paper] points of the grid, one more than steps
            end=1.0,  # [ours] of the grid before it is shifted; RAE stops at 0.999
            time_shift=0.4,  # [paper]
            rtol=1e-3,  # [code] of dopri5
            atol=1e-6,  # [code] of dopri5
            guidance=2.5,  # [paper]
            guidance_start=0.25,  # [paper]
            guidance_end=1.0,
            guidance_channels=0,  # only the first so many; 0: all
            # tuples of (last time, scale), from noise on, in the place of the other three, such as
            # FAE's ((0.1, 0.9), (0.3, 1.0), (1.0, 2.5)); empty: none, and with them guidance=1
            guidance_parts=(),
        ),
    )
