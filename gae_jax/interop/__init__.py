"""Weights to and from the released PyTorch checkpoints; torch itself is not needed."""
