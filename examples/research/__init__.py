"""Scripts behind the measured results, by topic."""
