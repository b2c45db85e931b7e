"""What the pipeline knows of a tokenizer besides its module (`tokenizers.base`)."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Kind:
    """A tokenizer by name, as the pipeline builds, checks and shards it.

    A section is the mapping ``tokenizer.SECTION`` of a config. This file and the ``*_kind`` files
    import no Flax: configs ask them for default sizes. Functions import networks when called.

    Attributes:
      sizes: () -> the defaults of its section: arguments of the module.
      build: (section, backbone, *, image_size, dtype, remat, attention, rngs) -> module;
        ``backbone`` is a function of ``rngs`` that makes the run's backbone.
      latent_shape: (section, backbone section, image_size) -> (h, w, d). Raises ValueError, its
        message starting with the name of a field, for sizes that do not fit.
      terms: losses that it can compute.
      section: name of its section; "": its own name.
      backbone: "" | "frozen" | "trained": whether the module holds the run's backbone as its
        attribute ``encoder``. Training starts from the weights of the stage ``backbone``.
      modes: names that a phase may pass to ``forward``.
      kernels: whether ``build`` also takes ``kernels``, as `kernels.norm.KERNELS`.
      encoder_last: path of the kernel of the encoder's last layer, at which
        align.weight="adaptive" compares gradients; "": not available.
      training_fields: fields of the section that only training reads: a run may change them.
      start_fields: fields of the section that only step 0 reads.
      choices: field of the section -> the values that it may have.
      checks: (config) -> problems of the complete config that concern this tokenizer only.
      rules: sharding rules, (regex of a parameter's path, mesh axis or None per dimension), for
        parameters that `runtime.sharding.RULES` does not match or would split otherwise.
      torch: () -> its `Counterpart`; None: no released torch weights.
    """

    sizes: Callable[[], dict]
    build: Callable
    latent_shape: Callable[..., tuple[int, int, int]]
    terms: tuple[str, ...]
    section: str = ""
    backbone: str = ""
    modes: tuple[str, ...] = ("",)
    kernels: bool = False
    encoder_last: str = ""
    training_fields: tuple[str, ...] = ()
    start_fields: tuple[str, ...] = ()
    choices: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    checks: Callable[[Any], list[str]] = lambda config: []
    rules: tuple[tuple[str, tuple[str | None, ...]], ...] = ()
    torch: Callable[[], "Counterpart"] | None = None

    @property
    def counterpart(self) -> "Counterpart":
        """The released torch module; raises ValueError for a tokenizer without released weights."""
        if self.torch is None:
            raise ValueError("this tokenizer has no released torch weights")
        return self.torch()


def _section_alone(section: Mapping, backbone: Mapping, image_size: int) -> dict:
    del backbone, image_size
    return dict(section)


@dataclasses.dataclass(frozen=True)
class Counterpart:
    """The released torch module of a tokenizer.

    Attributes:
      table: its `nn.torch_names.Table`.
      entry: where a torch checkpoint holds its state dict.
      read_sizes: (shapes of a file's tensors, section) -> the sizes that they show, by field; with
        "width" for `Heads` whose section has no width.
      heads: `nn.torch_names.Heads` of its parts.
      kv_heads: (shapes, section, heads) -> the fields that follow from the number of heads.
      key: attribute of our module that corresponds to the released one; "": the module itself.
      arguments: (section, backbone section, image_size) -> arguments of the table's module; the
        section of tokenizers without a backbone is {}.
      describe: (section) -> the entry "tokenizer" of an export's config.json; None: not exported.
      described_heads: path of the number of heads in that file.
    """

    table: Any
    entry: str
    read_sizes: Callable[[Mapping, Mapping], dict]
    heads: tuple = ()
    kv_heads: Callable[[Mapping, Mapping, int | None], dict] = lambda shapes, section, heads: {}
    key: str = ""
    arguments: Callable[[Mapping, Mapping, int], dict] = _section_alone
    describe: Callable[[Mapping], dict] | None = None
    described_heads: tuple[str, ...] = ()
