"""The version, on its own so that any module may import it. `setup.py` says it too."""

__version__ = "0.1.0"
