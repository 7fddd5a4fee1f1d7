"""Capture: a model and one call -> one graph with every site marked."""
