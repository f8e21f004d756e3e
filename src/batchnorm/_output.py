"""Output files of commands: paths are checked before there is anything to write."""

import argparse
import os
from pathlib import Path

PICTURES = (".png", ".pdf", ".svg")
"""The file formats of plots."""


def file(text: str) -> Path:
    """A command line argument that names a file to write."""
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(
            f"must be a file that can be written, in a directory that exists, got {text!r}"
        )
    return path


def picture(text: str) -> Path:
    """A command line argument that names a picture to draw."""
    if Path(text).suffix.lower() not in PICTURES:
        raise argparse.ArgumentTypeError(f"must end in {' or '.join(PICTURES)}, got {text!r}")
    return file(text)
