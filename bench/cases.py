"""What is measured: shapes of real layers, each for a reason."""

import math
from typing import NamedTuple


class Case(NamedTuple):
    shape: tuple[int, ...]
    axis: int
    why: str
    dtypes: tuple[str, ...] = ("float32", "float64")

    @property
    def layout(self) -> str:
        if len(self.shape) == 2:
            return "(N, C)"
        return "channels-first" if self.axis == 1 else "channels-last"

    @property
    def label(self) -> str:
        return f"{'×'.join(map(str, self.shape))} {'last' if self.layout == 'channels-last' else ''}".strip()

    def megabytes(self, dtype: str) -> float:
        return math.prod(self.shape) * {"float32": 4, "float64": 8}[dtype] / 1e6


FIRST, LAST = 1, -1

CORE = (
    Case((32, 64, 56, 56), FIRST, "the workhorse, 25 MB"),
    Case((32, 56, 56, 64), LAST, "the same, channels last"),
    Case((32, 256, 14, 14), FIRST, "the most frequent layer of ResNet-50"),
    Case((32, 14, 14, 256), LAST, "the same, channels last"),
    Case((32, 2048, 7, 7), FIRST, "many channels, rows of 49"),
    Case((32, 7, 7, 512), LAST, "late layers, channels last"),
    Case((8, 64, 112, 112), FIRST, "a large plane"),
    Case((8, 112, 112, 64), LAST, "the same, channels last"),
    Case((2, 640, 1024, 8), LAST, "few channels"),
    Case((16, 3, 224, 224), FIRST, "three channels for all threads"),
    Case((1, 1024, 14, 14), FIRST, "a single image"),
    Case((1, 64, 112, 112), FIRST, "a single image, a large plane"),
    Case((1, 112, 112, 32), LAST, "first layer of MobileNet, a single image"),
    Case((4096, 64), FIRST, "tall"),
    Case((256, 1024), FIRST, "a hidden layer"),
    Case((128, 8192), FIRST, "wide"),
    Case((100, 500), FIRST, "the CS231n exercise", ("float64",)),
    Case((16, 861, 512), LAST, "audio, odd length, channels last"),
    Case((16, 512, 861), FIRST, "audio, odd length"),
    Case((1, 64, 16, 56, 56), FIRST, "video"),
    Case((32, 64), FIRST, "a small layer"),
    Case((4, 5), FIRST, "the call itself"),
)

# oneDNN's benchdnn list shapes_topologies_small, with batches of 16 instead of 50 and 96.
TOPOLOGIES = tuple(
    Case((16, channels, size, size), FIRST, network)
    for network, layers in {
        "ResNet-50": ((64, 112), (256, 56), (128, 28), (1024, 14), (512, 7)),
        "GoogLeNet v2": ((224, 14), (320, 7)),
        "GoogLeNet v3": ((64, 147), (80, 73), (96, 35), (160, 17), (384, 8)),
    }.items()
    for channels, size in layers
)

SETS = {
    "core": CORE,
    "topologies": TOPOLOGIES,
    "all": CORE + TOPOLOGIES,
    "quick": (Case((4, 8, 14, 14), FIRST, "small"), Case((4, 6, 6, 8), LAST, "small"), Case((32, 64), FIRST, "small")),
}
