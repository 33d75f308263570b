"""String functions by refinement."""
