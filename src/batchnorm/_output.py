"""Files that commands write: refused before there is anything to write, and what their options have in common."""

import argparse
import os
from pathlib import Path

PICTURES = (".png", ".pdf", ".svg")
"""What a plot can be."""


def file(text: str) -> Path:
    """An argument that names a file to be written."""
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(
            f"must be a file that can be written, in a directory that exists, got {text!r}"
        )
    return path


def picture(text: str) -> Path:
    """An argument that names a picture to be drawn."""
    if Path(text).suffix.lower() not in PICTURES:
        raise argparse.ArgumentTypeError(f"must end in {' or '.join(PICTURES)}, got {text!r}")
    return file(text)
