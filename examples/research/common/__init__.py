"""What the scripts share: training, plots, where a figure comes from."""
