"""Import and export of released checkpoints and latents as operations on run directories."""
