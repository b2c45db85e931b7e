"""The sections of commands beside the pipeline: ``bench`` and ``import_torch``."""

from gae_jax.config import default_config
from gae_jax.config.checks import one_of
from gae_jax.nn.quantized import PRODUCTS

FROM_IMAGES = ("teacher-backbone", "teacher", "tokenizer")  # stages that train on images


def bench_clashes(bench) -> list[str]:
    """What is wrong with the section ``bench``."""
    problems, known = [], default_config().bench.works
    names = {"dtype": ("float32", "bfloat16"), "products": PRODUCTS}
    problems += one_of(bench, names, "bench")
    if odd := [name for name in bench.works if name not in known]:
        problems.append(f"bench.works has {odd}; use some of {', '.join(known)}")
    if odd := [name for name in bench.feeding.stages if name not in FROM_IMAGES]:
        problems.append(f"bench.feeding.stages has {odd}; use some of {', '.join(FROM_IMAGES)}")
    return problems


def import_clashes(import_torch) -> list[str]:
    """What is wrong with the section ``import_torch``."""
    return one_of(import_torch, {"diffusion_entry": ("ema", "model")}, "import_torch")
