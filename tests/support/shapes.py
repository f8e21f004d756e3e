"""Views (N, C, S) that take every path through the kernels: both families, tiled and split, short, odd and wide.

Also memory layouts, each as a function that returns its argument's values in that layout.
"""

import numpy as np

VIEWS = {
    "one value": (1, 1, 1),
    "two values": (2, 1, 1),
    "vector of channels": (2, 67, 1),
    "small batch": (32, 64, 1),
    "odd batch": (33, 7, 1),
    "few channels, rows side by side": (3001, 3, 1),
    "one channel in columns": (5003, 1, 1),
    "split rows of columns": (2500, 130, 1),
    "wide tiles": (70, 1100, 1),
    "wide tiles, split": (1300, 520, 1),
    "short rows": (65, 5, 9),
    "short rows, one batch": (1, 40, 49),
    "short rows, few channels": (700, 2, 4),
    "short rows, tiles": (33, 300, 49),
    "short rows, few of them": (9, 40, 49),
    "rows of lanes": (5, 20, 100),
    "rows of whole lanes": (9, 17, 96),
    "lanes of neighbours": (13, 150, 70),
    "lanes of neighbours, blocks of rows": (190, 33, 101),
    "lanes near at hand": (16, 40, 196),
    "lanes near at hand, rows of some vectors and a half": (8, 40, 300),
    "few channels in lanes": (300, 3, 100),
    "one channel in lanes": (3, 1, 5000),
    "segments": (2, 3, 20011),
    "segments, short last": (1, 2, 3 * 8192 + 5),
    "segments, many channels": (2, 18, 9001),
}


def misaligned(a):
    raw = np.empty(a.nbytes + 1, np.uint8)[1:]
    view = raw.view(a.dtype).reshape(a.shape)
    view[...] = a
    return view


def read_only(a):
    a = a.copy()
    a.flags.writeable = False
    return a


ARRANGEMENTS = {
    "C": lambda a: a,
    "F": lambda a: np.asfortranarray(a),
    "channels last in memory": lambda a: np.moveaxis(np.ascontiguousarray(np.moveaxis(a, 1, -1)), -1, 1),
    "axes swapped": lambda a: np.ascontiguousarray(a.swapaxes(0, -1)).swapaxes(0, -1),
    "every second": lambda a: np.repeat(a, 2, axis=-1)[..., ::2],
    "backwards": lambda a: np.ascontiguousarray(a[::-1])[::-1],
    "inside a larger array": lambda a: np.pad(a, 1)[tuple(slice(1, -1) for _ in a.shape)],
    "foreign byte order": lambda a: a.astype(a.dtype.newbyteorder()),
    "misaligned": lambda a: misaligned(a),
    "read-only": lambda a: read_only(a),
}
