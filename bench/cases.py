"""What is measured: shapes of real layers, each for a reason, and a few that belong to no network."""

import math
from typing import NamedTuple

from batchnorm.profile.networks import layers_of

ITEM_SIZES = {"float32": 4, "float64": 8, "float16": 2, "bfloat16": 2}


class Case(NamedTuple):
    shape: tuple[int, ...]
    axis: int
    why: str
    dtypes: tuple[str, ...] = tuple(ITEM_SIZES)
    network: str = ""  # whose layers are added up
    layers: int = 1  # of the network, with this shape

    @property
    def layout(self) -> str:
        if len(self.shape) == 2:
            return "(N, C)"
        return "channels-first" if self.axis == 1 else "channels-last"

    @property
    def label(self) -> str:
        return f"{'×'.join(map(str, self.shape))} {'last' if self.layout == 'channels-last' else ''}".strip()

    def megabytes(self, dtype: str) -> float:
        return math.prod(self.shape) * ITEM_SIZES[dtype] / 1e6


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
    Case((16, 3, 224, 224), FIRST, "three channels for all threads"),
    Case((1, 1024, 14, 14), FIRST, "a single image"),
    Case((1, 256, 14, 14), FIRST, "a single image, in cache"),
    Case((1, 64, 112, 112), FIRST, "a single image, a large plane"),
    Case((1, 112, 112, 32), LAST, "first layer of MobileNet, a single image"),
    Case((64, 512), FIRST, "a small hidden layer"),
    Case((256, 1024), FIRST, "a hidden layer"),
    Case((16, 861, 512), LAST, "audio, odd length, channels last"),
    Case((16, 512, 861), FIRST, "audio, odd length"),
    Case((8, 128, 500), FIRST, "a short sequence"),
    Case((1, 64, 16, 56, 56), FIRST, "video"),
    Case((2, 32, 16, 32, 32), FIRST, "a small volume"),
    Case((32, 64), FIRST, "a small layer"),
)

# Shapes of no network, which the others do not cover, to see where a kernel is weak.
OTHERS = (
    Case((2, 640, 1024, 8), LAST, "few channels"),
    Case((4096, 64), FIRST, "tall"),
    Case((128, 8192), FIRST, "wide"),
    Case((16, 4096), FIRST, "few rows of many channels"),
    Case((512, 64, 10, 10), FIRST, "a large batch of short rows"),
    Case((512, 512, 5, 5), FIRST, "a large batch of rows shorter than two lines"),
    Case((100, 500), FIRST, "the CS231n exercise", ("float64",)),
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

MOBILENET = tuple(
    Case(shape, FIRST, "MobileNetV2", network=f"MobileNetV2, batch {batch}", layers=layers)
    for batch in (1, 8, 32)
    for shape, layers in layers_of("mobilenet_v2", batch).items()
)

SETS = {
    "core": CORE,
    "topologies": TOPOLOGIES,
    "mobilenet": MOBILENET,
    "others": OTHERS,
    "all": CORE + TOPOLOGIES + MOBILENET + OTHERS,
    "quick": (
        Case((4, 8, 14, 14), FIRST, "small", network="three layers", layers=2),
        Case((4, 6, 6, 8), LAST, "small", network="three layers"),
        Case((32, 64), FIRST, "small"),
    ),
}
