"""What the pipeline knows of a tokenizer beside its module (`models.tokenizer`)."""

import dataclasses
from collections.abc import Callable


@dataclasses.dataclass(frozen=True)
class Kind:
    """A tokenizer by name, as the pipeline builds it.

    Attributes:
      sizes: () -> the defaults of its section ``tokenizer.NAME``: arguments of the module.
      build: (section, backbone, *, image_size, dtype, remat, attention, rngs) -> module;
        ``backbone`` is a function of ``rngs`` that makes the run's backbone.
      latent_shape: (section, backbone section, image_size) -> (h, w, d).
      terms: losses that it can serve.
      backbone: "" | "frozen" | "trained": whether the module holds the run's backbone as its
        attribute ``encoder``. Training starts from the weights of the stage ``backbone``.
      modes: names that a phase may give to ``forward``.
      kernels: whether ``build`` takes ``kernels`` too, as `models.kernels.KERNELS`.
      encoder_last: path of the kernel of the encoder's last layer, at which
        align.weight="adaptive" compares gradients; "": it cannot be had.
    """

    sizes: Callable[[], dict]
    build: Callable
    latent_shape: Callable[..., tuple[int, int, int]]
    terms: tuple[str, ...]
    backbone: str = ""
    modes: tuple[str, ...] = ("",)
    kernels: bool = False
    encoder_last: str = ""
