"""AlignTok's ablation on the digits: what the second phase costs the latents, and what holds them.

    python launch/sweep.py configs/sweeps/aligntok.py

``stage-1`` trains adapter and decoder on the frozen encoder for as many steps as the others train
in all; these let the encoder learn after a third of them, with the weight w_sp on the distance from
the latents at that time. ``before-adapter`` measures it before the adapter, ``cosine`` by angles;
with ``lora`` the encoder stays and low-rank updates of its layers learn, as in :digits_lora.
Decoder refinement, which leaves the latents as they are, is left out.

The paper's LP is the flat probe. On digits that is near its ceiling for whatever reconstructs them,
so the probe of the mean latent is compared as well. What a weight means depends on the scale of the
latents: the smaller ones are there for the one that costs the probe as little as w_sp = 1 does in
the paper.
"""

from gae_jax.sweep import Metric, Point, Sweep

STEPS, FIRST = 1_200, 400
TERMS = ("l1", "perceptual")
PARTS = r"^tokenizer/(adapter|decoder)/"
TWO = ((FIRST, PARTS, TERMS), (STEPS - FIRST, "", (*TERMS, "align")))
WEIGHTS = (0, 0.03, 0.1, 1, 5)
LORA = {"tokenizer.aligntok.lora.rank": 4, "tokenizer.aligntok.lora.alpha": 4.0}


def point(name, weight, phases=TWO, more=(), **align):
    changes = {f"tokenizer.align.{key}": value for key, value in align.items()} | dict(more)
    return Point(name, {"tokenizer.losses.align": weight, "tokenizer.phases": phases, **changes})


def get_sweep():
    return Sweep(
        title="What holds AlignTok's latents (its ablation, on digits)",
        config="configs/aligntok.py:digits",
        points=(
            point("stage-1", 0.0, ((STEPS, PARTS, TERMS),)),
            *(point(f"w_sp={weight}", float(weight)) for weight in WEIGHTS),
            point("before-adapter", 1.0, point="pre"),
            point("cosine", 1.0, loss="cosine"),
            point("lora", 1.0, more=LORA | {"tokenizer.optim.scales": ()}),
        ),
        commands=("backbone", "tokenizer", "latent-probe", "evaluate"),
        overrides={
            "tokenizer.losses.gan": 0.0,
            "tokenizer.train.steps": STEPS,
            "tokenizer.train.batch_size": 32,
            "tokenizer.train.eval_every": 0,
            "tokenizer.health.probe": 0,
        },
        metrics=(
            Metric("probe of the mean ↑", "mean", "{:.1%}", folder="latent-probe"),
            Metric("probe ↑", "flat", "{:.1%}", folder="latent-probe"),
            Metric("PSNR, dB ↑", "tokenizer.psnr"),
            Metric("SSIM ↑", "tokenizer.ssim", "{:.3f}"),
        ),
        source="the ablation",
        paper={
            "stage-1": {"LP ↑": "41.53", "PSNR ↑": "17.34", "rFID ↓": "1.63", "gFID ↓": "3.00"},
            "w_sp=0": {"LP ↑": "9.50", "rFID ↓": "0.33", "gFID ↓": "3.05"},
            "w_sp=1": {"LP ↑": "35.09", "rFID ↓": "0.36", "gFID ↓": "2.19"},
            "w_sp=5": {"LP ↑": "40.55", "rFID ↓": "0.49", "gFID ↓": "2.48"},
            "before-adapter": {"LP ↑": "15.61", "rFID ↓": "0.34", "gFID ↓": "2.83"},
            "cosine": {"LP ↑": "37.99", "rFID ↓": "0.37", "gFID ↓": "2.23"},
            "lora": {"LP ↑": "18.56", "rFID ↓": "1.35", "gFID ↓": "2.97"},
        },
        expectation=(
            "more weight gives a better probe and a worse reconstruction; without any the probe "
            "falls far below that of the frozen encoder, which has the best probe and by far the "
            "worst reconstruction; before the adapter the weight holds less; low-rank updates "
            "reconstruct little better than the frozen encoder, and its probe is lost all the same."
        ),
        check=check,
    )


def check(means):
    psnr = {name: row["PSNR, dB ↑"] for name, row in means.items()}
    weighted = [f"w_sp={weight}" for weight in WEIGHTS]
    found = []
    for label in ("probe", "probe of the mean"):
        value = {name: row[f"{label} ↑"] for name, row in means.items()}
        rising = [value[name] for name in weighted]
        found += [
            (f"{label}: better with more weight", rising == sorted(rising)),
            (f"{label}: without any worse than stage 1", value["w_sp=0"] < value["stage-1"]),
            (f"{label}: stage 1 best", value["stage-1"] == max(value.values())),
            (
                f"{label}: before the adapter worse than after it",
                value["before-adapter"] < value["w_sp=1"],
            ),
            (f"{label}: low-rank updates worse", value["lora"] < value["w_sp=1"]),
        ]
    falling = [psnr[name] for name in weighted]
    return [
        *found,
        ("reconstruction: worse with more weight", falling == sorted(falling, reverse=True)),
        *(
            (
                f"reconstruction: stage 1 more than 4 dB below {name}",
                psnr["stage-1"] < psnr[name] - 4,
            )
            for name in ("w_sp=0.03", "w_sp=1")
        ),
        (
            "reconstruction: low-rank updates between stage 1 and w_sp=1",
            psnr["stage-1"] < psnr["lora"] < psnr["w_sp=1"],
        ),
    ]
