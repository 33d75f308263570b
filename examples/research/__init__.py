"""The scripts behind every measured figure, one folder for each topic."""
