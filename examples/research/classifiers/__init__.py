"""Classifiers by reading: labelled texts and vectors."""
