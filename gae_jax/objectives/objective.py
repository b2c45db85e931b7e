"""The objective of a tokenizer: named terms, and their gradients by way of image and latents.

A term is a function of the outputs of the tokenizer's pass (reconstruction, latents, extras), never
of the parameters. So each term's gradient is taken with respect to those first; their weighted sum
then goes back through decoder and encoder once. That gives every term's gradient at the decoder's
last layer for one small matmul, which the adaptive weight of the adversarial term and the health
figures need. The adaptive weight of the alignment (`align_weight`) asks for gradients at the
encoder's last layer: the reconstruction's goes back through the decoder alone for it, which the
compiler finds in the way back of the sum, unless an adversarial term is in that.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from einops import rearrange

from gae_jax.nn import losses
from gae_jax.nn.network import Network, Params, variables_of
from gae_jax.nn.pixels import to_float, to_uint8
from gae_jax.objectives.align_weight import adapts, align_scale, vjp_by_parts
from gae_jax.tokenizers import pae_losses
from gae_jax.tokenizers.base import Decoded, Encoded, Tokenizer, needed
from gae_jax.train.state import where_trainable

ALIGNMENTS: dict[str, Callable] = {
    "mse": lambda tokens, target, config: losses.mse(tokens, target),
    "cosine": lambda tokens, target, config: losses.cosine_distance(tokens, target),
    "vf": lambda tokens, target, config: losses.vf_loss(
        tokens,
        target,
        cos_margin=config.cos_margin,
        distance_margin=config.distance_margin,
        cos_weight=config.cos_weight,
        distance_weight=config.distance_weight,
    ),
}
# Index of the discriminator's randomness: no split of a step's key has so many parts.
VIEW = 2**16
DISCRIMINATOR_LOSSES = {
    "hinge": losses.hinge_discriminator,
    "vanilla": losses.vanilla_discriminator,
}


@dataclasses.dataclass(frozen=True)
class Phase:
    """Static settings of a step.

    Attributes:
      discriminator: it learns.
      gan: the generator sees it.
      terms: names of the terms that count.
      trainable: regex of the parameters that learn; see `train.state.apply_gradients`.
      mode: of the tokenizer's pass, where it has several.
      follows: the snapshot that latents are aligned with later is taken anew after the step.
    """

    discriminator: bool
    gan: bool
    terms: tuple[str, ...]
    trainable: str = ""
    mode: str = ""
    follows: bool = False


@dataclasses.dataclass(frozen=True)
class Targets:
    """Targets of the terms; None where no term needs one.

    Attributes:
      aligned: tokens [B, N, C] of the teacher, its backbone, or an earlier self.
      perceptual: image -> distance from the real image.
      apart: two images -> the same distance between them.
      look: (images, key) -> what the discriminator is called with; None: the images.
    """

    aligned: jax.Array | None
    perceptual: Callable[[jax.Array], jax.Array] | None
    apart: Callable[[jax.Array, jax.Array], jax.Array] | None = None
    look: Callable[[jax.Array, jax.Array], Any] | None = None


def _continuity(decoded: Decoded, apart: Callable) -> jax.Array:
    """Compute PAE's continuity loss on images in [0, 1]."""
    decoded_images = (
        needed(decoded.images, "image"),
        decoded.extras["middle"],
        decoded.extras["far"],
    )
    restored, middle, far = ((images + 1) / 2 for images in decoded_images)
    return pae_losses.continuity(restored, middle, far, lambda a, b: apart(2 * a - 1, 2 * b - 1))


# Loss terms besides those of GAE, from the outputs of the pass and the targets.
TERMS: dict[str, Callable[[Encoded, Decoded, Targets], jax.Array]] = {
    "structure": lambda encoded, decoded, targets: pae_losses.structure(
        encoded.latents, needed(targets.aligned, "target")
    ),
    "semantics": lambda encoded, decoded, targets: pae_losses.semantics(
        encoded.latents, needed(targets.aligned, "target")
    ),
    "continuity": lambda encoded, decoded, targets: _continuity(
        decoded, needed(targets.apart, "distance")
    ),
    "velocity": lambda encoded, decoded, targets: jnp.mean(
        jnp.square(decoded.extras["velocity_error"])
    ),
    "features": lambda encoded, decoded, targets: losses.mse(
        decoded.extras["features"],
        jax.lax.stop_gradient(needed(encoded.features, "features")),
    ),
}


class Objective:
    """Gradients of generator and discriminator on one batch, or part of one.

    Args:
      config: the tokenizer's section.
      tokenizer, discriminator: their networks.
      aligner: network on the latents or features before they are aligned, or None.
    """

    def __init__(
        self,
        config,
        *,
        tokenizer: Network[Tokenizer],
        discriminator: Network | None,
        aligner: Network | None,
    ):
        self.config = config
        self.tokenizer, self.discriminator, self.aligner = tokenizer, discriminator, aligner

    def gradients(
        self,
        params: dict[str, Params],
        rest: dict[str, Params],
        images: jax.Array,
        targets: Targets,
        key: jax.Array,
        ramp: jax.Array,
        phase: Phase,
    ) -> tuple[dict[str, Params], Params | None, dict[str, jax.Array]]:
        """Compute gradients by network, the discriminator's updated statistics, and metrics.

        Args:
          params, rest: of the networks, by name.
          images: [B, S, S, 3] in [-1, 1].
          key: of the noise on the latents.
          ramp: share of its weight that the adversarial term has.
        """
        adaptive = adapts(self.config, phase.terms)
        vjp: Callable = vjp_by_parts if adaptive else partial(jax.vjp, has_aux=True)
        (encoded, decoded), back, hidden = vjp(
            lambda p: self._forward(p, rest["tokenizer"], images, key, phase), params["tokenizer"]
        )
        reconstruction = decoded.images
        judged = self._judge(params, rest, images, reconstruction, targets.look, key, phase)
        values, on_image = self._image_terms(images, reconstruction, targets, judged, phase)
        model = self.tokenizer(params["tokenizer"], rest["tokenizer"])
        scale, norms = self._scales(on_image, model, hidden, ramp)
        aligner = params.get("aligner"), rest.get("aligner")
        at_encoder: dict[str, jax.Array] = {}
        terms = tuple(name for name in phase.terms if not (adaptive and name == "align"))
        other_values, (on_encoded, on_decoded, on_aligner) = self._other_terms(
            encoded, decoded, *aligner, targets, terms
        )
        values |= other_values
        scale |= {name: self.config.losses[name] for name in other_values}
        if adaptive:
            values["align"], (on_tokens, on_aligner) = jax.value_and_grad(self._alignment, (0, 1))(
                encoded, *aligner, targets.aligned
            )
            pixels = {name: g for name, g in on_image.items() if name != "gan"}
            on_pixels = jax.tree.map(jnp.zeros_like, decoded)._replace(
                images=_weighted_sum(pixels, scale, reconstruction)
            )
            scale["align"], at_encoder = align_scale(
                self.config, *back(on_pixels, 1), *back(on_tokens, 0)
            )
            on_tokens, on_aligner = jax.tree.map(
                lambda g: scale["align"] * g, (on_tokens, on_aligner)
            )
            on_encoded = jax.tree.map(jnp.add, on_encoded, on_tokens)
        if reconstruction is not None:
            on_decoded = on_decoded._replace(
                images=on_decoded.images + _weighted_sum(on_image, scale, reconstruction)
            )
        (grads,) = back((on_encoded, on_decoded))
        # here, so that the way back to what does not learn is not computed for the figures
        nothing = jax.tree.map(jnp.zeros_like, grads)
        grads = where_trainable(grads, nothing, "tokenizer", phase.trainable)
        by_network = {"tokenizer": grads}
        if self.aligner is not None:
            by_network["aligner"] = on_aligner
        if judged.grads is not None:
            by_network["discriminator"] = judged.grads
        figures = {
            "total": sum(scale[name] * value for name, value in values.items()),
            **values,
            "grad_norm": optax.tree.norm(grads),
            **{f"last_layer/{name}": scale[name] * norm for name, norm in norms.items()},
            **at_encoder,
            "latent/mean": jnp.mean(encoded.latents),
            "latent/std": jnp.std(encoded.latents),
            **judged.figures,
        }
        if self.config.gan.weight == "adaptive" and "gan" in scale:
            figures["gan_weight"] = scale["gan"]
        return by_network, judged.rest, figures

    def _forward(self, params, rest, images, key, phase: Phase):
        model = self.tokenizer(params, rest)
        encoded, decoded = model.forward(images, key, terms=phase.terms, mode=phase.mode)
        return (encoded, decoded._replace(hidden=None)), decoded.hidden

    def judge_anew(
        self,
        params: dict[str, Params],
        rest: dict[str, Params],
        images: jax.Array,
        look: Callable[[jax.Array, jax.Array], Any] | None,
        key: jax.Array,
    ) -> tuple[Params | None, Params | None, dict[str, jax.Array]]:
        """Run the discriminator's own pass (``gan.fresh``): `gradients` of that network alone.

        It sees what the tokenizer makes of the images without perturbation, in 8 bits.
        """
        model = self.tokenizer(params["tokenizer"], rest["tokenizer"])
        reconstruction = to_float(to_uint8(model.decode(model.encode(images)), "round"))
        judged = self._discriminate(
            params, rest, images, reconstruction, look, key, learns=True, gan=False
        )
        return judged.grads, judged.rest, judged.figures

    def _judge(self, params, rest, images, reconstruction, look, key, phase) -> "_Judged":
        """Run the discriminator once on each of real and reconstruction, for both of its uses.

        But with ``gan.fresh``, where it learns in `judge_anew`.
        """
        learns = phase.discriminator and not self.config.gan.fresh
        if not (learns or phase.gan):
            return _Judged(None, None, rest.get("discriminator"), {})
        return self._discriminate(
            params, rest, images, reconstruction, look, key, learns=learns, gan=phase.gan
        )

    def _discriminate(
        self, params, rest, images, reconstruction, look, key, *, learns: bool, gan: bool
    ) -> "_Judged":
        """Compute what the discriminator learns from and, with ``gan``, what the generator does."""
        name = "discriminator"
        keys = jax.random.split(jax.random.fold_in(key, VIEW))
        moves = learns or not self.config.gan.fresh

        def judge(params, rest, images, key):
            assert self.discriminator is not None  # where the GAN's weight is 0
            model = self.discriminator(params, rest)
            logits = model(images if look is None else look(images, key), train=moves)
            return logits, variables_of(model)[1]

        state = rest[name]
        real: jax.Array | None = None
        if learns:
            real, back_real, state = jax.vjp(
                lambda p: judge(p, state, images, keys[0]), params[name], has_aux=True
            )
        fake, back_fake, state = jax.vjp(
            lambda p, x: judge(p, state, x, keys[1]), params[name], reconstruction, has_aux=True
        )
        to_image = None
        if gan:
            value, on_logits = jax.value_and_grad(losses.hinge_generator)(fake)
            to_image = value, back_fake(on_logits)[1]
        grads = None
        figures: dict[str, jax.Array] = {}
        if real is not None:
            loss = DISCRIMINATOR_LOSSES[self.config.gan.loss]
            value, (on_real, on_fake) = jax.value_and_grad(loss, (0, 1))(real, fake)
            grads = jax.tree.map(jnp.add, back_real(on_real)[0], back_fake(on_fake)[0])
            figures = {
                f"{name}/logits_real": jnp.mean(real),
                f"{name}/logits_fake": jnp.mean(fake),
                f"{name}/accuracy": (jnp.mean(real > 0) + jnp.mean(fake < 0)) / 2,
                f"{name}/loss": value,
            }
        return _Judged(to_image, grads, state, figures)

    def _image_terms(self, images, reconstruction, targets: Targets, judged: "_Judged", phase):
        """Return ({name: value}, {name: gradient with respect to the reconstruction})."""
        functions: dict[str, Callable[[jax.Array], jax.Array]] = {}
        if "l1" in phase.terms:
            functions["l1"] = lambda x: losses.l1(x, images)
        if "perceptual" in phase.terms:
            functions["perceptual"] = needed(targets.perceptual, "perceptual distance")
        pairs = {name: jax.value_and_grad(f)(reconstruction) for name, f in functions.items()}
        if judged.to_image is not None:
            pairs["gan"] = judged.to_image
        return {name: p[0] for name, p in pairs.items()}, {name: p[1] for name, p in pairs.items()}

    def _scales(self, on_image: dict, model, hidden: jax.Array | None, ramp: jax.Array):
        """Return ({name: weight}, {name: norm of the gradient at the decoder's last layer})."""
        weights, at_last_layer = {name: self.config.losses[name] for name in on_image}, {}
        if hidden is not None:
            at_last_layer = {name: model.at_last_layer(hidden, g) for name, g in on_image.items()}
        norms = {name: jnp.linalg.norm(gradient) for name, gradient in at_last_layer.items()}
        if "gan" in weights:
            weights["gan"] *= ramp
            if self.config.gan.weight == "adaptive":
                reconstruction = sum(
                    weights[name] * at_last_layer[name] for name in at_last_layer if name != "gan"
                )
                weights["gan"] *= losses.adaptive_weight(
                    jnp.linalg.norm(reconstruction), norms["gan"], eps=self.config.gan.eps
                )
        return weights, norms

    def _other_terms(self, encoded, decoded, aligner, aligner_rest, targets: Targets, names):
        """Return ({name: value}, gradients by encoding, decoding and the aligner's parameters)."""

        def terms(encoded, decoded, aligner):
            values = {
                name: term(encoded, decoded, targets)
                for name, term in TERMS.items()
                if name in names
            }
            if "align" in names:
                values["align"] = self._alignment(encoded, aligner, aligner_rest, targets.aligned)
            if "kl" in names:
                values["kl"] = losses.gaussian_kl(encoded.latents, encoded.logvar)
            total = sum((self.config.losses[name] * v for name, v in values.items()), 0.0)
            return jnp.asarray(total, jnp.float32), values

        grads, values = jax.grad(terms, (0, 1, 2), has_aux=True)(encoded, decoded, aligner)
        return values, grads

    def _alignment(self, encoded, aligner, aligner_rest, target):
        config = self.config.align
        if config.point == "pre":
            tokens = encoded.features
        else:
            tokens = rearrange(encoded.latents, "b h w d -> b (h w) d")
        if self.aligner is not None:
            tokens = self.aligner(aligner, aligner_rest)(tokens)
        return ALIGNMENTS[config.loss](tokens.astype(jnp.float32), target, config)


@dataclasses.dataclass(frozen=True)
class _Judged:
    """Results of the discriminator.

    Attributes:
      to_image: (generator's term, its gradient by the reconstruction), or None.
      grads: of the discriminator's own loss, or None.
      rest: its moved batch statistics.
      figures: logits, accuracy, loss.
    """

    to_image: tuple | None
    grads: Params | None
    rest: Params | None
    figures: dict[str, jax.Array]


def _weighted_sum(gradients: dict, scale: dict, like: jax.Array) -> jax.Array:
    return sum((scale[name] * g for name, g in gradients.items()), jnp.zeros_like(like))
