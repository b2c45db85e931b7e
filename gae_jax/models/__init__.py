"""Networks as Flax NNX modules. They carry no sharding: `gae_jax.parallel` has the rules."""
