"""Verify: what was compiled against the reference, step by step and image by image."""
