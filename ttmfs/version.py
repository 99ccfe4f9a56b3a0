"""The version of ttmfs. pyproject.toml reads it from here: importlib.metadata would add 80 ms to each start."""

__all__ = ["__version__"]

__version__ = "0.1.0"
