"""What a type checker knows of calls: mypy, which nobody has to run this for, checks every line."""

from typing import Any, Literal, assert_type

import numpy as np
from numpy.typing import NDArray

import batchnorm as bn


def results_have_the_type_of_x(x: NDArray[np.float32], h: NDArray[np.float16]) -> NDArray[np.float32]:
    y, saved = bn.forward(x, out=x.copy())
    assert_type(y, NDArray[np.float32])
    assert_type(bn.forward(h)[0], NDArray[np.float16])
    assert_type(bn.inference(h, [0.0], [1.0]), NDArray[np.float16])
    assert_type(bn.BatchNorm(3)(h), NDArray[np.float16])
    assert_type(bn.inference([[1.0]], [0.0], [1.0]), NDArray[np.floating[Any]])
    assert_type(bn.backward(y, saved).dx, NDArray[np.floating[Any]] | None)
    assert_type(bn.backward(y, saved).dadd, NDArray[np.floating[Any]] | None)
    activation: bn.Activation = "leaky_relu", 0.1
    assert_type(bn.forward(h, activation=activation, add=h)[0], NDArray[np.float16])
    assert_type(bn.forward(h, activation=("clip", 0, 6), add=h)[0], NDArray[np.float16])
    assert_type(bn.BatchNorm(3, activation="relu")(x, add=x), NDArray[np.float32])
    assert_type(bn.forward(h, lengths=[1, 2], fill=1.0)[0], NDArray[np.float16])
    assert_type(bn.inference(h, [0.0], [1.0], mask=[[True]]), NDArray[np.float16])
    assert_type(bn.BatchNorm(3)(x, weights=x), NDArray[np.float32])
    assert_type(bn.Moments.of(x, weights=x).weight, float)
    trained = bn.BatchNorm(3, statistics="running", update=False)
    assert_type(trained.renorm, tuple[float, float] | None)
    assert_type(trained.ghost, int | None)
    assert_type(trained.statistics, Literal["batch", "running"])
    trained.statistics, trained.update, trained.renorm, trained.ghost = "batch", True, (3, 5), None
    layer = bn.from_state({"running_mean": x, "running_var": x}, bn.convention("torch"))
    assert_type(layer, bn.BatchNorm)
    assert_type(bn.from_state([x, x, x, x], "keras", momentum=0.9), bn.BatchNorm)
    assert_type(bn.to_state(layer, "flax", eps=1e-3), dict[str, NDArray[Any]])
    assert_type(bn.convention("keras").unbiased, bool)
    return y


def names_that_are_imported_late(dx: NDArray[np.float32], dy: NDArray[np.float32], saved: bn.Saved) -> bool:
    assert_type(bn.pathways(dy, saved).mean, NDArray[np.floating[Any]])
    folded = bn.fold(dx, None, [0.0], [1.0], layout="IO")
    assert_type(folded, bn.Folded[np.float32])
    assert_type(folded.weight, NDArray[np.float32])
    assert_type(bn.fold_next(dx, dy, [0.0], [1.0], padded=True).pad, NDArray[np.float32] | None)
    weight, bias = bn.fold([[1.0]], None, [0.0], [1.0])
    assert_type(weight, NDArray[np.floating[Any]])
    assert_type(bias, NDArray[np.floating[Any]])
    return bn.diagnose(dx, dy, saved).correct
