"""Classifiers that learn by reading labelled texts or vectors."""
