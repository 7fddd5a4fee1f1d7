"""The version, on its own so that any module may import it. `setup.py` repeats it: change both."""

__version__ = "0.1.0"
