"""Measures of reconstructions, latents and samples, as functions of arrays."""
