"""The commands of `hf-iai`."""
