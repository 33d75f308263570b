"""Memory of a real language model, before any training."""
