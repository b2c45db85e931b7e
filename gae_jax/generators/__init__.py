"""Latent diffusion: networks, flow matching and samplers."""
