"""The version, in a room below all others: the build reads it here too."""

__version__ = "0.1.0"
