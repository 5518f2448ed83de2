"""One attention call for every model, which can be watched and steered."""

__version__ = "0.1.0"
