"""Associative recall and long conversations."""
