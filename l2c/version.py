"""The version of l2c, also written into router files."""

__version__ = "0.1.0"
