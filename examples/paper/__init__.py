"""The experiments of the paper, regenerated."""
