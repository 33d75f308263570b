"""What the commands of `hf-iai` do."""
