"""What type checkers know about calls: mypy and pyright check every line; the file never runs."""

from typing import Any, Literal, assert_type

import numpy as np
from numpy.typing import ArrayLike, NDArray

import batchnorm as bn
from batchnorm.mpi import SyncBatchNorm

Array = NDArray[np.floating[Any]]
Single = NDArray[np.float32]
Half = NDArray[np.float16]


def results_have_the_type_of_x(x: Single, h: Half, given: ArrayLike) -> Single:
    y, saved = bn.forward(x, out=x.copy())
    assert_type(y, Single)
    assert_type(saved, bn.Saved[np.float32])
    assert_type(saved.x, Single)
    assert_type(bn.forward(h)[0], Half)
    assert_type(bn.forward(given), tuple[Array, bn.Saved])
    assert_type(bn.inference(h, [0.0], [1.0]), Half)
    assert_type(bn.inference([[1.0]], [0.0], [1.0]), Array)
    assert_type(bn.Plan([0.0], [1.0])(x), Array)
    activation: bn.Activation = "leaky_relu", 0.1
    assert_type(bn.forward(h, activation=activation, add=h)[0], Half)
    assert_type(bn.forward(h, activation=("clip", 0, 6), add=h)[0], Half)
    assert_type(bn.forward(h, lengths=[1, 2], fill=1.0)[0], Half)
    assert_type(bn.inference(h, [0.0], [1.0], mask=[[True]]), Half)
    assert_type(bn.Moments.of(x, weights=x).weight, float)
    return y


def gradients_are_there_by_default(x: Single, given: ArrayLike, need: bn.functional.Need) -> None:
    _, saved = bn.forward(x)
    dx, dgamma, dbeta = bn.backward(given, saved)
    assert_type(dx, Single)
    assert_type(dgamma, Array | Any)
    assert_type(dbeta, Array | Any)
    assert_type(bn.backward(x, saved), bn.Gradients[Single])
    assert_type(bn.backward(x, saved).dadd, Array | Any)
    assert_type(bn.backward(x, saved, need="dx", through="mean").dx, Single)
    assert_type(bn.backward(x, saved, need="dbeta", through=("mean",)).dx, Single | None)
    assert_type(bn.backward(x, saved, need=("dx",), through=["mean"]).dx, Single | None)
    assert_type(bn.backward(x, saved, need=["dx", "dadd"], through={"variance"}).dx, Single | None)
    assert_type(bn.backward(x, saved, need=need, through=()).dx, Single | None)
    assert_type(bn.backward(given, bn.forward(given)[1]).dx, Array)

    fixed = bn.inference_backward(given, x, [0.0], [1.0])
    assert_type(fixed, bn.InferenceGradients[Single])
    assert_type(fixed.dx, Single)
    assert_type(fixed.dmean, Array | Any)
    assert_type(bn.inference_backward(given, given, [0.0], [1.0]).dx, Array)
    assert_type(bn.inference_backward(x, x, [0.0], [1.0], need=("dx", "dmean")).dx, Single | None)
    assert_type(bn.inference_backward(x, given, [0.0], [1.0], need="dvar").dx, Array | None)

    assert_type(bn.jvp(given, saved, through=()), bn.Tangents[np.float32])
    assert_type(bn.jvp(given, saved).dy, Single)
    assert_type(bn.jvp(given, bn.forward(given)[1]).dy, Array)
    assert_type(bn.double_backward(given, x, saved), bn.SecondGradients[Single])
    assert_type(bn.double_backward(given, x, saved, need="x", through="mean").x, Single | None)
    assert_type(bn.double_backward(x, x, saved).gamma, Array | Any)
    assert_type(bn.grad_sums(x, saved) + bn.grad_sums(x, saved), bn.GradientSums)
    assert_type(bn.pathways(x, saved).mean, Array)


def layers_too(x: Single, h: Half, given: ArrayLike, layer: bn.BatchNorm, parallel: SyncBatchNorm) -> None:
    assert_type(layer.train()(h), Half)
    assert_type(bn.BatchNorm(3, activation="relu")(x, add=x), Single)
    assert_type(layer(x, weights=x), Single)
    assert_type(layer(given), Array)
    assert_type(layer.backward(x), Single)
    assert_type(layer.backward(given), Array)
    assert_type(layer.backward(x, need="dgamma"), Single | None)
    assert_type(layer.backward(given, need=["dbeta", "dx"]), Array | None)
    assert_type(layer.dgamma, Array | Any)
    assert_type(layer.gamma, Array | Any)
    assert_type(layer.jvp(x).dy, Single)
    assert_type(layer.jvp(given).dy, Array)
    assert_type(layer.double_backward(x, x).x, Single)
    assert_type(layer.double_backward(given, x).x, Array)
    assert_type(parallel.eval()(x), Single)
    assert_type(parallel(given), Array)
    assert_type(parallel.backward(x), Single)
    assert_type(parallel.train(), SyncBatchNorm)
    assert_type(SyncBatchNorm.load("layer.npz"), SyncBatchNorm)
    trained = bn.BatchNorm(3, statistics="running", update=False)
    assert_type(trained.renorm, tuple[float, float] | None)
    assert_type(trained.ghost, int | None)
    assert_type(trained.statistics, Literal["batch", "running"])
    trained.renorm, trained.ghost, trained.update = (3, 5), None, True
    trained.gamma = [1, 2, 3]
    converted = bn.from_state({"running_mean": x, "running_var": x}, bn.convention("torch"))
    assert_type(converted, bn.BatchNorm)
    assert_type(bn.from_state([x, x, x, x], "keras", momentum=0.9), bn.BatchNorm)
    assert_type(bn.to_state(layer, "flax", eps=1e-3), dict[str, NDArray[Any]])
    assert_type(bn.convention("keras").unbiased, bool)


def folded_weights(weight: Single, layer: bn.BatchNorm) -> None:
    folded = bn.fold(weight, None, layer.running_mean, layer.running_var, layer.gamma, layer.beta, layout="IO")
    assert_type(folded, bn.Folded[np.float32])
    assert_type(folded.weight, Single)
    assert_type(bn.fold_next(weight, [1.0], [0.0], [1.0], padded=True).pad, Single | None)
    bare, bias = bn.fold([[1.0]], None, [0.0], [1.0])
    assert_type(bare, Array)
    assert_type(bias, Array)


def a_gradient_of_ones_own(dx: Single, dy: Single, saved: bn.Saved) -> bool:
    assert_type(saved.x, Array)
    return bn.diagnose(dx, dy, saved).correct


def what_is_refused(x: Single, saved: bn.Saved) -> None:
    """Each line has one mistake; a checker that does not find it reports an unused comment."""
    bn.forward(x, axes=1)  # type: ignore[call-overload]
    bn.backward(x, saved, need="dw")  # type: ignore[arg-type]
    bn.backward(x, saved, through=["var"])  # type: ignore[list-item]
    bn.BatchNorm(3)(x, lenghts=[1])  # type: ignore[call-overload]
    bn.BatchNorm(3, statistics="moving")  # type: ignore[arg-type]
