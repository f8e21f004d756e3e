"""State files with any damage: an error that names the file, or a layer whose numbers are all legal. Never a crash."""

import os
import sys
import tempfile
import zipfile
from functools import cache
from io import BytesIO
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from fuzz.source import choose, main

import batchnorm as bn

FOLDER = tempfile.TemporaryDirectory()
PATH = os.path.join(FOLDER.name, "layer")


@cache
def good(features, momentum, affine, track_running_stats, dtype):
    """The parts of a file that `save` writes."""
    bn.BatchNorm(features, momentum=momentum, affine=affine, track_running_stats=track_running_stats, dtype=dtype).save(
        PATH
    )
    with zipfile.ZipFile(PATH) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def overwrite(source, content):
    content = bytearray(content)
    for _ in range(source.integer(1, 4) if content else 0):
        content[source.integer(0, len(content) - 1)] = source.integer(0, 255)
    return bytes(content)


def target(source):
    settings = ([0, 1, 2, 3, 4], [None, 0.5], [True, False], [True, False], ["f4", "f8"])
    parts = dict(good(*(choose(source, options) for options in settings)))
    how = source.integer(0, 4)
    if how == 0:
        content = source.data(source.integer(0, 400))
    else:
        if how == 1:
            name = choose(source, list(parts))
            parts[name] = overwrite(source, parts[name])
        elif how == 2:
            name = choose(source, [*parts, "weight.npy", "eps", "x.npy"])
            array = np.frombuffer(
                source.data(8 * source.integer(0, 5)), choose(source, ["<f4", "<f8", "<i8", ">f8", "u1"])
            )
            file = BytesIO()
            np.save(file, choose(source, [array, array[:1].reshape(array[:1].shape[1:]) if array.size else array]))
            parts[name] = file.getvalue()
        file = BytesIO()
        with zipfile.ZipFile(file, "w", choose(source, [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])) as archive:
            for name, data in parts.items():
                archive.writestr(name, data)
        content = file.getvalue()
        if how == 3:
            content = overwrite(source, content)
        elif how == 4:
            content = content[: source.integer(0, len(content))]
    with open(PATH, "wb") as file:
        file.write(content)
    try:
        layer = bn.BatchNorm.load(PATH, max_bytes=1 << 20)
    except ValueError as error:
        if not str(error).startswith(f"{PATH!r} must be "):
            raise
        return "refused"
    for name, array in layer.state_dict().items():
        assert np.isfinite(array).all(), name
        assert array.shape in ((layer.num_features,), ()), name
    assert layer.running_var is None or (layer.running_var >= 0).all()
    assert 0 <= layer.eps < np.inf
    return "loaded"


if __name__ == "__main__":
    main(target, __doc__)
