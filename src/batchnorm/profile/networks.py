"""Layer shapes of real networks, for images of 224 × 224.

ResNet-50 follows the paper, with the stride in the first convolution of a block.
"""

from collections import Counter
from collections.abc import Mapping

Shape = tuple[int, ...]

LAYERS = ((32, 64, 56, 56), (32, 128, 28, 28), (32, 256, 14, 14), (32, 2048, 7, 7), (1, 64, 112, 112))
LAYERS_QUICK = ((2, 64, 56, 56), (2, 256, 14, 14), (2, 512, 7, 7))


def _densenet121() -> Mapping[tuple[int, int], int]:
    layers, channels = Counter({(64, 112): 1}), 64
    for depth, size in ((6, 56), (12, 28), (24, 14), (16, 7)):
        for _ in range(depth):
            layers.update([(channels, size), (128, size)])
            channels += 32
        layers[channels, size] += 1
        channels //= 2
    return layers


# fmt: off
NETWORKS: dict[str, Mapping[tuple[int, int], int]] = {
    "resnet50": {
        (64, 112): 1, (64, 56): 6, (256, 56): 4, (128, 28): 8, (512, 28): 5, (256, 14): 12, (1024, 14): 7,
        (512, 7): 6, (2048, 7): 4,
    },
    "densenet121": _densenet121(),
    "mobilenet_v2": {
        (32, 112): 2, (16, 112): 1, (96, 112): 1, (96, 56): 1, (24, 56): 2, (144, 56): 3, (144, 28): 1, (32, 28): 3,
        (192, 28): 5, (192, 14): 1, (64, 14): 4, (384, 14): 8, (96, 14): 3, (576, 14): 5, (576, 7): 1, (160, 7): 3,
        (960, 7): 6, (320, 7): 1, (1280, 7): 1,
    },
}
# fmt: on
"""Channels and size (height and width): how many layers have them."""


def layers_of(network: str, batch: int) -> dict[Shape, int]:
    """The shapes of x, channels second, and how many layers have each."""
    return {(batch, channels, size, size): count for (channels, size), count in NETWORKS[network].items()}
