"""Table 11: DINOv2-L or MAE-L as the network behind the semantic teacher, at the paper's size.

    python launch/sweep.py configs/sweeps/teacher_networks.py --config.data.root=IMAGENET

This needs ImageNet, accelerators and released weights, which are not bundled: put the files that
are named below into ``weights/``. Nobody has run it yet. The Frechet distance of our evaluation
means something for digits only, so the table has no generated images.
"""

from gae_jax.sweep import Metric, Point, Sweep


def get_sweep():
    return Sweep(
        title="The network behind the teacher (Table 11)",
        config="configs/gae_ablation.py",
        points=(
            Point(
                "mae",
                {
                    "backbone.name": "mae",
                    "import_torch.backbone": "weights/vit-mae-large.safetensors",
                },
            ),
            Point(
                "dinov2",
                {
                    "backbone.name": "dinov2",
                    "import_torch.backbone": "weights/dinov2_vitl14_pretrain.pth",
                },
            ),
        ),
        seeds=(0,),
        commands=(
            *("import-torch", "teacher", "teacher-probe"),
            *("tokenizer", "latent-probe", "evaluate"),
        ),
        overrides={
            "import_torch.vgg": "weights/vgg16-397923af.pth",
            "import_torch.lpips_heads": "weights/lpips_vgg.pth",
        },
        metrics=(
            Metric("probe ↑", "flat", "{:.1%}", folder="latent-probe"),
            Metric("probe of the mean ↑", "mean", "{:.1%}", folder="latent-probe"),
            Metric("PSNR, dB ↑", "tokenizer.psnr"),
            Metric("SSIM ↑", "tokenizer.ssim", "{:.3f}"),
            Metric("the teacher's probe ↑", "flat", "{:.1%}", folder="teacher-probe"),
        ),
        source="Table 11",
        paper={
            "mae": {
                "LP ↑": "29.8",
                "PSNR ↑": "28.71",
                "SSIM ↑": "0.813",
                "rFID ↓": "0.36",
                "gFID ↓": "4.20",
                "the teacher's LP ↑": "33.9",
            },
            "dinov2": {
                "LP ↑": "69.2",
                "PSNR ↑": "27.37",
                "SSIM ↑": "0.774",
                "rFID ↓": "0.45",
                "gFID ↓": "2.36",
                "the teacher's LP ↑": "76.0",
            },
        },
        expectation="MAE gives the better reconstruction, DINOv2 by far the better probe.",
        check=check,
    )


def check(means):
    return [
        (
            "reconstruction: MAE better than DINOv2",
            means["mae"]["PSNR, dB ↑"] > means["dinov2"]["PSNR, dB ↑"],
        ),
        ("probe: DINOv2 better than MAE", means["dinov2"]["probe ↑"] > means["mae"]["probe ↑"]),
    ]
