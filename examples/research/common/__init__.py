"""Shared by the scripts: training, result files, tables, plots, and where a figure comes from."""
