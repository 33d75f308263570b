"""Gradients and learned optimizers."""
