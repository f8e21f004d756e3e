"""Convolutions tap by tap in long double, for any number of spatial axes, as PyTorch and Keras define them.

x is (N, C, *spatial). Weights have the axes of the framework named in each function; dense layers have no spatial axes.
Nothing here knows about batch norm.
"""

import numpy as np


def window(tap, places, stride):
    """The values that a tap sees from all places, as a slice."""
    return (slice(None), *(slice(t, t + stride * n, stride) for t, n in zip(tap, places, strict=True)))


def padded(x, width, value=0.0):
    """x with a border of one value, or of one value per channel."""
    N, C, *spatial = x.shape
    wide = np.empty((N, C, *(n + 2 * width for n in spatial)), np.longdouble)
    wide[...] = np.broadcast_to(value, C).reshape(C, *[1] * len(spatial))
    wide[(slice(None), slice(None), *(slice(width, width + n) for n in spatial))] = x
    return wide


def convolution(x, weight, bias, groups=1, stride=1):
    """PyTorch's convolution, with weight (out, in/groups, *kernel)."""
    outputs, inputs, *kernel = weight.shape
    places = [(n - k) // stride + 1 for n, k in zip(x.shape[2:], kernel, strict=True)]
    y = np.zeros((len(x), outputs, *places), np.longdouble)
    for group in range(groups):
        for o in range(group * (outputs // groups), (group + 1) * (outputs // groups)):
            y[:, o] += bias[o]
            for i in range(inputs):
                plane = x[:, group * inputs + i]
                for tap in np.ndindex(*kernel):
                    y[:, o] += weight[(o, i, *tap)].astype(np.longdouble) * plane[window(tap, places, stride)]
    return y


def transposed(x, weight, bias, groups=1, stride=1):
    """PyTorch's transposed convolution, with weight (in, out/groups, *kernel)."""
    inputs, outputs, *kernel = weight.shape
    places = [(n - 1) * stride + k for n, k in zip(x.shape[2:], kernel, strict=True)]
    y = np.zeros((len(x), outputs * groups, *places), np.longdouble)
    for group in range(groups):
        for o in range(outputs):
            plane = y[:, group * outputs + o]
            plane += bias[group * outputs + o]
            for i in range(group * (inputs // groups), (group + 1) * (inputs // groups)):
                for tap in np.ndindex(*kernel):
                    plane[window(tap, x.shape[2:], stride)] += weight[(i, o, *tap)].astype(np.longdouble) * x[:, i]
    return y


def depthwise(x, weight, bias, groups=1, stride=1):
    """Keras's depthwise convolution, with weight (*kernel, in, multiplier); outputs of one input are neighbours."""
    inputs, multiplier = weight.shape[-2:]
    planes = []
    for i in range(inputs):
        for m in range(multiplier):
            plane = weight[..., i, m][None, None]
            planes.append(convolution(x[:, [i]], plane, bias[[i * multiplier + m]], stride=stride))
    return np.concatenate(planes, axis=1)
