"""Building blocks of networks. They carry no sharding: `gae_jax.runtime.mesh` has the rules."""
