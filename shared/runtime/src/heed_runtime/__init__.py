"""The uniform program of every heed domain: recipes, run folders, commands."""

__version__ = "0.1.0"
