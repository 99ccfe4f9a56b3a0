"""Which version of ttmfs this is. pyproject.toml reads it here: to ask what is installed takes 80 ms of each start."""

__all__ = ["__version__"]

__version__ = "0.1.0"
