"""gae_jax: semantically aligned image tokenizers for latent diffusion, in JAX and Flax NNX.

``python -m gae_jax --help`` lists the commands; docs/architecture.md says how the parts meet.
"""

__version__ = "0.1.0"
