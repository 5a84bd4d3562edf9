"""The version of the package, in a file of its own that everything may import."""

__version__ = "0.1.0"
