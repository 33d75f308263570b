"""Predictions: the possible answers to a query, and a query's own prediction in regime `implicit`."""
