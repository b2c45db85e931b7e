"""Frozen networks with released weights: encoders, LPIPS, Inception."""
