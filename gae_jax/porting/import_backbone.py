"""The frozen encoder in a released file, which may hold more than that."""

import dataclasses

from gae_jax.interop.convert import ConversionError
from gae_jax.interop.vision_files import encoder_tensors, kind_of_names, set_aside, shown_heads
from gae_jax.pretrained.backbone import RELEASED
from gae_jax.runtime.errors import ConfigError, number_of


def encoder_of(config, source):
    """The encoder in a file; what is left aside is told as such.

    Args:
      config: the section ``backbone``.
      source: the file's tensors, as `import_torch.Source`.

    Raises:
      ConfigError: if the section names no released encoder.
      ConversionError: if the file holds another one than the section names.
    """
    kind, holds = config.name, kind_of_names(source.tensors)
    if kind == "vit":
        raise ConfigError(
            "backbone.name is 'vit', which is trained here; to import a backbone pass "
            f"--config.backbone.name={holds or ' or '.join(RELEASED)}"
        )
    if holds and holds != kind:
        raise ConversionError(
            f"{source} holds the encoder {holds!r} by the names of its tensors, but backbone.name "
            f"is {kind!r}; pass --config.backbone.name={holds}"
        )
    if kind == "efficientnet_lite0":
        return source
    told = tuple(
        f"{part}* ({number_of(count, 'tensor')})" if part.endswith(".") else part
        for part, count in set_aside(kind, source.tensors).items()
    )
    shown = shown_heads(kind, source.tensors)
    heads = shown or config[kind].num_attention_heads
    tensors = encoder_tensors(kind, source.tensors, num_heads=heads)
    return dataclasses.replace(
        source,
        tensors=tensors,
        left_out=(*source.left_out, *told),
        shown={"num_attention_heads": shown} if shown else {},
    )
