"""Arrays of other libraries: the bits of NumPy's own, without a copy where that is promised, or refused in a sentence.

What a call should give is said by the call on NumPy's array, and where memory lies by its own library.
"""

import doctest
import re
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np
import pytest

import batchnorm as bn

X = np.random.default_rng(0).standard_normal((6, 3)).astype(np.float32)
DY = X[::-1] * X
ONES = np.ones(3, np.float32)
SAVED = bn.forward(X, ONES, ONES)[1]
CPU, CUDA, CUDA_PINNED, ROCM_PINNED = (1, 0), (2, 0), (3, 0), (11, 0)


pytestmark = pytest.mark.once  # the kernels see NumPy's arrays


def peer(name):
    """The library; where it is missing, the test is skipped."""
    return pytest.importorskip(name, exc_type=ImportError)


class OnlyDLPack:
    """An array that nothing but DLPack can read."""

    def __init__(self, array, device=CPU):
        self.array, self.device = array, device

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.device


def numpys(values):
    return values


def mapped(values):
    with TemporaryFile() as file:
        array = np.memmap(file, values.dtype, "w+", shape=values.shape)
    array[...] = values
    return array


def read_only(values):
    values = values.copy()
    values.flags.writeable = False
    return values


def frame(library, values):
    """One column after the other."""
    return peer(library).DataFrame({str(i): column.copy() for i, column in enumerate(values.T)})


def address(values):
    return values.ctypes.data


# what makes the peer's array, and where its own library says that it lies; None where there is no such promise
TYPES = {
    "np.matrix": (lambda x: x.view(np.matrix), address),
    "np.memmap": (mapped, address),
    "read-only": (read_only, address),
    "memoryview": (memoryview, lambda x: address(x.obj)),
    "DLPack": (OnlyDLPack, lambda x: address(x.array)),
    "pinned for CUDA": (lambda x: OnlyDLPack(x, CUDA_PINNED), lambda x: address(x.array)),
    "pinned for ROCm": (lambda x: OnlyDLPack(x, ROCM_PINNED), lambda x: address(x.array)),
    "torch": (lambda x: peer("torch").tensor(x), lambda x: x.data_ptr()),
    "torch, transposed": (lambda x: peer("torch").tensor(x.T).T, lambda x: x.data_ptr()),
    "torch by DLPack": (lambda x: OnlyDLPack(peer("torch").tensor(x)), lambda x: x.array.data_ptr()),
    "jax": (lambda x: peer("jax.numpy").asarray(x), lambda x: x.unsafe_buffer_pointer()),
    "pandas": (lambda x: peer("pandas").DataFrame(x), lambda x: address(x.to_numpy())),
    "pandas, columns": (lambda x: frame("pandas", x), None),
    "polars": (lambda x: frame("polars", x), None),
    "polars, Fortran order": (
        lambda x: peer("polars").DataFrame(np.asfortranarray(x)),
        lambda x: address(x.to_numpy(allow_copy=False)),
    ),
    "pyarrow.Tensor": (lambda x: peer("pyarrow").Tensor.from_numpy(x), lambda x: address(x.to_numpy())),
    "pyarrow.Table": (lambda x: peer("pyarrow").table(list(x.T.copy()), [str(i) for i in range(x.shape[1])]), None),
    "xarray": (lambda x: peer("xarray").DataArray(x, dims=("n", "c")), lambda x: address(x.values)),
    "dask": (lambda x: peer("dask.array").from_array(x, chunks=2), None),
}


@pytest.mark.parametrize(("make", "at"), TYPES.values(), ids=TYPES)
def test_results_are_those_of_numpy(make, at):
    """Types and bits, of everything that reads an array like x."""
    calls = {
        "forward": lambda of: bn.forward(of(X), ONES, ONES)[0],
        "add": lambda of: bn.forward(X, add=of(DY))[0],
        "weights": lambda of: bn.forward(X, weights=of(X[:, :1] ** 2))[0],
        "backward": lambda of: bn.backward(of(DY), SAVED).dx,
        "jvp": lambda of: bn.jvp(of(DY), SAVED).dy,
        "double_backward": lambda of: bn.double_backward(of(DY), of(X), SAVED).x,
        "inference": lambda of: bn.inference(of(X), ONES, ONES),
        "inference_backward": lambda of: bn.inference_backward(of(DY), of(X), ONES, ONES).dx,
        "Moments": lambda of: bn.Moments.of(of(X)).mean,
        "population": lambda of: bn.population([of(X), of(DY)]).m2,
        "training": lambda of: bn.BatchNorm(3)(of(X)),
        "evaluation": lambda of: bn.BatchNorm(3).eval()(of(X)),
        "Plan": lambda of: bn.Plan(ONES, ONES)(of(X)),
    }
    for name, call in calls.items():
        got = call(make)
        assert type(got) is np.ndarray, name
        np.testing.assert_array_equal(got, call(numpys), name, strict=True)


@pytest.mark.parametrize(
    ("make", "at"), [pytest.param(*case, id=name) for name, case in TYPES.items() if case[1] is not None]
)
def test_nothing_is_copied(make, at):
    x = make(X)
    assert address(bn.forward(x)[1].x) == at(x)


@pytest.mark.parametrize(
    "make",
    [
        lambda values: peer("torch").tensor(values),
        lambda values: peer("jax.numpy").asarray(values),
        lambda values: peer("pandas").Series(values),
        lambda values: peer("polars").Series(values),
        lambda values: peer("pyarrow").array(values),
        lambda values: peer("xarray").DataArray(values),
    ],
    ids=["torch", "jax", "pandas", "polars", "pyarrow", "xarray"],
)
def test_numbers_per_channel_and_what_selects(make):
    gamma, var = np.array([2, 3, 4], np.float32), np.array([1.0, 2.0, 5.0], np.float32)
    np.testing.assert_array_equal(bn.forward(X, make(gamma), make(var))[0], bn.forward(X, gamma, var)[0])
    np.testing.assert_array_equal(bn.inference(X, make(gamma), make(var)), bn.inference(X, gamma, var))
    mask = X[:, 0] > 0
    np.testing.assert_array_equal(bn.forward(X, mask=make(mask))[0], bn.forward(X, mask=mask)[0])
    x, lengths = X.reshape(2, 3, 3), np.array([1, 3])
    np.testing.assert_array_equal(bn.forward(x, lengths=make(lengths))[0], bn.forward(x, lengths=lengths)[0])
    layer = bn.BatchNorm(3)
    layer.load_state_dict(layer.state_dict() | {"weight": make(gamma)})
    np.testing.assert_array_equal(layer.gamma, gamma)


GIVEN = {name: np.array([1, i, 4], np.float32) for i, name in enumerate(("mean", "var", "gamma", "beta"))}


class OwnArray(np.ndarray):
    pass


@pytest.mark.parametrize("name", GIVEN)
@pytest.mark.parametrize(
    "make",
    [
        list,
        memoryview,
        mapped,
        read_only,
        lambda values: values.view(OwnArray),
        lambda values: values.astype(np.dtype(np.float32, metadata={"unit": "m"})),
        lambda values: values.astype(">f4"),
        lambda values: values.astype(">f2"),
        lambda values: np.repeat(values, 2)[::2],
        lambda values: np.frombuffer(b"-" + values.tobytes(), np.float32, offset=1),
    ],
    ids=[
        "list",
        "memoryview",
        "memmap",
        "read-only",
        "own",
        "metadata",
        "foreign",
        "foreign half",
        "gaps",
        "misaligned",
    ],
)
def test_given_statistics_and_parameters(make, name):
    given = GIVEN | {name: make(GIVEN[name])}
    np.testing.assert_array_equal(bn.inference(X, **given), bn.inference(X, **GIVEN))
    for need in ("dx", "dgamma", "dmean", "dvar"):
        got, expected = (getattr(bn.inference_backward(DY, X, **each, need=need), need) for each in (given, GIVEN))
        np.testing.assert_allclose(got, expected, rtol=1e-3 if got.itemsize == 2 else 1e-6)
        assert got.dtype.isnative


@pytest.mark.parametrize("name", GIVEN)
def test_given_masked_arrays_are_refused(name):
    given = GIVEN | {name: np.ma.array(GIVEN[name])}
    for call in (lambda: bn.inference(X, **given), lambda: bn.inference_backward(DY, X, **given)):
        with pytest.raises(TypeError, match=f"{name} must not be a masked array"):
            call()


def test_a_tensor_in_channels_last_is_used_where_it_lies():
    torch = peer("torch")
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64).to(memory_format=torch.channels_last)
    y, saved = bn.forward(x)
    assert address(saved.x) == x.data_ptr()
    assert tuple(stride // 8 for stride in y.strides) == x.stride()
    np.testing.assert_array_equal(y, bn.forward(x.numpy())[0])


def test_bfloat16_of_jax_and_uint8_of_torch():
    jnp, torch = peer("jax.numpy"), peer("torch")
    x = jnp.asarray(X, jnp.bfloat16)
    y, saved = bn.forward(x)
    assert (address(saved.x), y.dtype) == (x.unsafe_buffer_pointer(), x.dtype)
    image, plan = np.arange(12, dtype=np.uint8).reshape(4, 3), bn.Plan(ONES, ONES)
    np.testing.assert_array_equal(plan(torch.tensor(image)), plan(image), strict=True)


def test_an_array_of_several_devices():
    """In a process of its own, which pretends to have two."""
    peer("jax")
    from processes import succeeds

    program = (
        "import jax, jax.numpy as jnp, numpy as np, batchnorm as bn; from jax.sharding import *; "
        "x = np.eye(4, 3, dtype='f4'); mesh = Mesh(np.array(jax.devices()), ('n',)); "
        "cut = jax.device_put(x, NamedSharding(mesh, PartitionSpec('n'))); "
        "print(len(cut.devices()), (bn.forward(cut)[0] == bn.forward(x)[0]).all())"
    )
    assert succeeds(program, XLA_FLAGS="--xla_force_host_platform_device_count=2").split() == ["2", "True"]


@pytest.mark.parametrize(
    "make",
    [
        lambda values: frame("pandas", values),
        lambda values: frame("pandas", values).astype("Float32").replace(np.nan, None).astype(np.float32),
        lambda values: peer("polars").DataFrame(values).fill_nan(None),
    ],
    ids=["pandas", "pandas, from nullable", "polars"],
)
def test_missing_values_are_nan(make):
    x = X.copy()
    x[1, 1] = np.nan
    y = bn.forward(make(x))[0]
    assert np.isnan(y).all(axis=0).tolist() == [False, True, False]
    np.testing.assert_array_equal(y, bn.forward(x)[0])


class OnDevice(OnlyDLPack):
    """In the memory of a GPU."""

    def __init__(self):
        super().__init__(X, CUDA)

    def __array__(self, dtype=None, copy=None):
        raise AssertionError("this would copy it")


class OfCuPy(OnDevice):
    def get(self):
        """Copy it into the processor's memory."""


class OfTorch(OnDevice):
    def cpu(self):
        """The same."""


def with_missing(values):
    values = values.astype("Float32")
    values.iloc[0, 0] = None
    return values


OF = "x must have dtype float64, float32, float16 or bfloat16, got "
ELSEWHERE = "x must be in the processor's memory, got an array on another device: pass "
# x, and the whole message
REFUSED = {
    "torch, requires grad": (
        lambda: peer("torch").tensor(X, requires_grad=True),
        "x must not require grad, which would be lost: pass x.detach()",
    ),
    "torch, bfloat16": (
        lambda: peer("torch").tensor(X).bfloat16(),
        "x must be readable as a NumPy array: Got unsupported ScalarType BFloat16; pass x.float()",
    ),
    "torch, sparse": (
        lambda: peer("torch").tensor(X).to_sparse(),
        "x must be readable as a NumPy array: can't convert Sparse layout tensor to numpy. "
        "Use Tensor.to_dense() first.",
    ),
    "torch, complex": (lambda: peer("torch").tensor(X) * 1j, OF + "complex64"),
    "torch, integers": (lambda: peer("torch").tensor(X).int(), OF + "int32"),
    "torch, no memory": (
        lambda: peer("torch").empty(6, 3, device="meta"),
        "x must be readable as a NumPy array: can't convert meta device type tensor to numpy. "
        "Use Tensor.cpu() to copy the tensor to host memory first.",
    ),
    "a GPU, torch": (OfTorch, ELSEWHERE + "x.cpu()"),
    "a GPU, CuPy": (OfCuPy, ELSEWHERE + "x.get()"),
    "a GPU, JAX": (OnDevice, ELSEWHERE + "np.asarray(x)"),
    "jax, float8": (lambda: peer("jax.numpy").asarray(X, "float8_e4m3fn"), OF + "float8_e4m3fn"),
    "masked": (
        lambda: np.ma.masked_less(X, 0),
        "x must not be a masked array: pass x.filled(value), or x.data, and mask= where it counts",
    ),
    "masked nowhere": (
        lambda: np.ma.array(X),
        "x must not be a masked array: pass x.filled(value), or x.data, and mask= where it counts",
    ),
    "scipy, sparse": (lambda: peer("scipy.sparse").csr_array(X), OF + "object: pass x.toarray()"),
    "scipy, sparse matrix": (lambda: peer("scipy.sparse").coo_matrix(X), OF + "object: pass x.toarray()"),
    "pandas, objects": (lambda: frame("pandas", X).astype(object), OF + "object: pass x.astype(np.float32)"),
    "pandas, nullable": (lambda: with_missing(frame("pandas", X)), OF + "object: pass x.astype(np.float32)"),
    "pandas, integers": (lambda: frame("pandas", X.astype(int)), OF + "int64"),
    "polars, text": (lambda: frame("polars", X.astype(str)), OF + "object: pass x.cast(polars.Float32)"),
    "polars, lazy": (lambda: frame("polars", X).lazy(), OF + "object: pass x.collect()"),
    "DLPack, integers": (lambda: OnlyDLPack(X.astype(int)), OF + "int64"),
    "structured": (lambda: np.zeros(3, "f4, f4"), OF + "[('f0', '<f4'), ('f1', '<f4')]"),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused_is_told_what_to_do(make, message):
    x = make()
    for call in (bn.forward, lambda x: bn.inference(x, ONES, ONES), bn.Plan(ONES, ONES), bn.BatchNorm(3)):
        with pytest.raises(TypeError) as caught:
            call(x)
        assert str(caught.value).removesuffix("; uint8 and int8 are also accepted") == message


# what the messages advise, done to x
ADVISED = {
    "detach": lambda: peer("torch").tensor(X, requires_grad=True).detach(),
    "float": lambda: peer("torch").tensor(X).bfloat16().float(),
    "to_dense": lambda: peer("torch").tensor(X).to_sparse().to_dense(),
    "toarray": lambda: peer("scipy.sparse").csr_array(X).toarray(),
    "astype": lambda: with_missing(frame("pandas", X)).astype(np.float32),
    "cast": lambda: frame("polars", X.astype(str)).cast(peer("polars").Float32),
    "collect": lambda: frame("polars", X).lazy().collect(),
    "filled": lambda: np.ma.masked_less(X, 0).filled(1),
    "data": lambda: np.ma.masked_less(X, 0).data,
}


@pytest.mark.parametrize("make", ADVISED.values(), ids=ADVISED)
def test_what_is_advised_is_taken(make):
    y = bn.forward(make())[0]
    assert (type(y), y.dtype, y.shape) == (np.ndarray, np.float32, X.shape)


def test_other_arguments_are_refused_by_their_names():
    torch = peer("torch")
    wants = torch.ones(3, requires_grad=True)
    for name, call in {
        "gamma": lambda: bn.forward(X, wants),
        "dy": lambda: bn.backward(torch.tensor(DY, requires_grad=True), SAVED),
        "mean": lambda: bn.inference(X, wants, ONES),
        "weight": lambda: bn.BatchNorm(3).load_state_dict(bn.BatchNorm(3).state_dict() | {"weight": wants}),
        "running_var": lambda: bn.from_state({"running_mean": ONES, "running_var": wants}, "torch"),
    }.items():
        with pytest.raises(TypeError, match=rf"{name} must not require grad, which would be lost: pass {name}\.detach"):
            call()
    with pytest.raises(TypeError, match="mask must not be a masked array"):
        bn.forward(X, mask=np.ma.array(X[:, 0] > 0, mask=True))


def test_results_go_into_arrays_of_numpy():
    """Also those of a tensor, whose memory they get; where x, dy or dx is one, or a list, it may not overlap."""
    torch = peer("torch")
    out = torch.empty(6, 3)
    for call in (lambda out: bn.forward(X, out=out), lambda out: bn.jvp(DY, SAVED, out=out)):
        with pytest.raises(TypeError, match="out must be a numpy array, got Tensor"):
            call(out)
    with pytest.raises(TypeError, match="running_mean must be a numpy array, because it is changed in place, got Tens"):
        bn.update_running(torch.zeros(3), ONES, SAVED)
    bn.forward(X, out=out.numpy())
    np.testing.assert_array_equal(out, bn.forward(X)[0])
    shifted = torch.empty(7 * 3)
    x, other = shifted[:18].reshape(6, 3), shifted[3:].reshape(6, 3).numpy()
    for call in (
        lambda: bn.forward(x, out=other),
        lambda: bn.inference(x, ONES, ONES, out=other),
        lambda: bn.jvp(x, SAVED, out=other),
    ):
        with pytest.raises(ValueError, match="out must not overlap"):
            call()


def test_tangents_of_lists_go_where_they_should():
    x, dx = X.astype(np.float64), DY.astype(np.float64)
    saved, out = bn.forward(x)[1], np.empty_like(x)
    assert bn.jvp(dx.tolist(), saved, out=out).dy is out
    np.testing.assert_array_equal(out, bn.jvp(dx, saved).dy)


def test_traced_arrays_of_jax_are_named():
    jax = peer("jax")
    with pytest.raises(TypeError) as caught:
        jax.jit(lambda x: bn.forward(x)[0])(X)
    assert re.fullmatch("x must be readable as a NumPy array: .*traced array with shape float32.*", str(caught.value))


def test_the_page():
    for name in ("torch", "pandas"):
        peer(name)
    page = Path(__file__).parents[1] / "docs" / "array-types.md"
    if not page.exists():
        pytest.skip("docs are not beside the tests")
    failed, tried = doctest.testfile(str(page), module_relative=False)
    assert tried > 5
    assert failed == 0
