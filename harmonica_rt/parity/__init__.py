"""Parity: verifies the compiled model against the reference, step by step and image by image."""
