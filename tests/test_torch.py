"""The modules for PyTorch against PyTorch's own, in float64 where there is a right number to know."""

import copy
import doctest
import importlib
import io
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import library  # noqa: E402
from torch.autograd import forward_ad  # noqa: E402

from batchnorm.torch import (  # noqa: E402
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    SyncBatchNorm,
    batch_norm,
    convert,
    revert,
    tensors,
)

FORMATS = {3: torch.contiguous_format, 4: torch.channels_last, 5: torch.channels_last_3d}
CASES = [
    (BatchNorm1d, (12, 5), torch.contiguous_format),
    (BatchNorm1d, (4, 5, 7), torch.contiguous_format),
    (BatchNorm2d, (4, 5, 6, 3), torch.contiguous_format),
    (BatchNorm2d, (4, 5, 6, 3), torch.channels_last),
    (BatchNorm3d, (2, 5, 3, 4, 2), torch.contiguous_format),
    (BatchNorm3d, (2, 5, 3, 4, 2), torch.channels_last_3d),
]
OPTIONS = [
    {},
    {"momentum": None},
    {"momentum": 0.3, "eps": 0.1},
    {"affine": False},
    {"track_running_stats": False},
    {"affine": False, "track_running_stats": False},
]
ACTIVATIONS = {
    None: lambda y: y,
    "relu": torch.relu,
    ("leaky_relu", 0.2): lambda y: torch.nn.functional.leaky_relu(y, 0.2),
    ("clip", -0.5, 1.5): lambda y: y.clamp(-0.5, 1.5),
}

pytestmark = pytest.mark.once  # other tests compare the levels


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(20150211)


def theirs(kind):
    return getattr(torch.nn, kind.__name__)


def close(got, expected, digits=1e-5):
    """The same within `digits` of the largest value."""
    got, expected = got.detach(), expected.detach()
    assert got.shape == expected.shape
    if expected.numel():
        scale = max(1.0, float(expected.abs().max()))
        assert float((got.double() - expected.double()).abs().max()) <= digits * scale


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("kind", "shape", "memory"), CASES)
def test_twenty_steps_of_training_and_evaluation(kind, shape, memory, options):
    """Against the float64 module of PyTorch: y, all gradients, running statistics and counter, each step."""
    modules = kind(5, **options), theirs(kind)(5, **options).double()
    for step in range(22):
        if step == 20:
            for module in modules:
                module.eval()
        x, dy = (torch.randn(shape) * 2 + step).to(memory_format=memory), torch.randn(shape)
        results = []
        for module, dtype in zip(modules, (torch.float32, torch.float64), strict=True):
            leaf = x.detach().to(dtype).requires_grad_()
            module.zero_grad()
            y = module(leaf)
            y.backward(dy.to(dtype))
            gradients = [parameter.grad.clone() for parameter in module.parameters()]
            results.append((y.detach(), leaf.grad, *gradients))
            with torch.no_grad():
                for parameter, gradient in zip(module.parameters(), gradients, strict=True):
                    parameter -= 0.02 * gradient
        for got, expected in zip(*results, strict=True):
            assert got.dtype == torch.float32
            close(got, expected)
        assert results[0][0].stride() == results[0][1].stride() == x.stride()
        compare_states(*modules)


def compare_states(ours, other):
    got, expected = ours.state_dict(), other.state_dict()
    assert list(got) == list(expected)
    for name, value in expected.items():
        if name == "num_batches_tracked":
            assert got[name] == value
            assert got[name].dtype == torch.int64
        else:
            assert got[name].dtype == torch.float32
            close(got[name], value)


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("affine", ["none", "weight", "both"])
def test_gradcheck_and_gradgradcheck(fixed, activation, affine):
    x = torch.randn(3, 2, 3, 2, dtype=torch.float64).to(memory_format=torch.channels_last)
    mean, var, weight, bias = torch.randn(4, 2, dtype=torch.float64).abs() + 0.5
    parameters = {"none": (), "weight": (weight,), "both": (weight, bias)}[affine]
    running = (mean, var) if fixed else (None, None)

    def norm(x, *parameters):
        return batch_norm(x, *running, *parameters, training=not fixed, eps=0.02, activation=activation)

    leaves = [t.clone(memory_format=torch.preserve_format).requires_grad_() for t in (x, *parameters)]
    assert torch.autograd.gradcheck(norm, leaves)
    assert torch.autograd.gradgradcheck(norm, leaves)
    given = [*parameters, None, None][:2]
    right = torch.nn.functional.batch_norm(x, *running, *given, training=not fixed, eps=0.02)
    close(norm(*leaves), ACTIVATIONS[activation](right), 1e-13)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("limits", [[], [0.0, float("inf"), 0.0]], ids=str)
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        *(((2, 3, 4, 5), dtype) for dtype in tensors.DTYPES),
        *((shape, torch.float32) for shape in [(8, 3), (2, 1, 4, 5), (2, 3, 1, 1), (0, 3, 2, 2), (2, 3, 2, 2, 2)]),
    ],
    ids=str,
)
def test_opcheck(shape, dtype, limits):
    if dtype is torch.bfloat16:
        pytest.importorskip("ml_dtypes")
    calls, channels = torch.ops.batchnorm, shape[1]
    x = torch.randn(shape).to(dtype).to(memory_format=FORMATS.get(len(shape), torch.contiguous_format))
    weight, bias, mean, var = torch.rand(4, channels) + 0.5
    running, counter = (torch.zeros(channels), torch.ones(channels)), torch.tensor(3)
    nothing_moves = (None, None, None, None, 0.1, limits)
    y, statistics = calls.forward(x.requires_grad_(), weight, bias, *nothing_moves)
    assert y.stride() == x.stride()
    assert (y.requires_grad, statistics.requires_grad) == (True, False)
    y, x = y.detach(), x.detach()
    common = (x, statistics, weight, 0.1, limits, False)
    for call, arguments in (
        (calls.forward, (x.requires_grad_(), weight.requires_grad_(), None, *nothing_moves)),
        (calls.forward, (x, weight, None, *running, None, counter, 0.1, limits)),
        (calls.forward, (x.detach(), None, None, *running, 0.3, None, 0.1, limits)),
        (calls.inference, (x, mean, var, weight, bias.requires_grad_(), 0.1, limits)),
        (calls.backward, (y.requires_grad_(), *common)),
        (calls.double_backward, tuple(t.detach() for t in (y, weight, bias, y, x, statistics, weight)) + common[3:]),
    ):
        assert set(library.opcheck(call.default, arguments).values()) == {"SUCCESS"}


@pytest.mark.parametrize("arrange", ["gaps", "expanded", "transposed", "permuted"])
def test_other_orders_in_memory(arrange):
    """Dense tensors keep their order, others become contiguous; the fake kernels know."""
    x = {
        "gaps": lambda: torch.randn(4, 6, 5)[:, ::2],
        "expanded": lambda: torch.randn(4, 1, 5).expand(4, 3, 5),
        "transposed": lambda: torch.randn(4, 5, 3).transpose(1, 2),
        "permuted": lambda: torch.randn(3, 4, 5, 2).permute(1, 0, 3, 2),
    }[arrange]()
    arguments = (x, *[None] * 6, 1e-5, [])
    assert set(library.opcheck(torch.ops.batchnorm.forward.default, arguments).values()) == {"SUCCESS"}
    y, _ = torch.ops.batchnorm.forward(*arguments)
    assert y.stride() == (x.stride() if arrange in ("transposed", "permuted") else x.contiguous().stride())
    close(y, torch.nn.functional.batch_norm(x.double(), None, None, training=True))


@pytest.mark.parametrize("parameters", [torch.float32, None], ids=["float32", "same"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bits(dtype, parameters):
    """Rounded once from a right result, within half a place; parameters of 16 bits too."""
    if dtype is torch.bfloat16:
        pytest.importorskip("ml_dtypes")
    module, other = BatchNorm2d(5).to(parameters or dtype), torch.nn.BatchNorm2d(5).double()
    x, dy = (torch.randn(4, 5, 6, 6).to(dtype).to(memory_format=torch.channels_last) for _ in range(2))
    leaves = [x.clone(memory_format=torch.preserve_format).requires_grad_(), x.double().requires_grad_()]
    ys = module(leaves[0]), other(leaves[1])
    for y in ys:
        y.backward(dy.to(y.dtype))
    half = torch.finfo(dtype).eps / 2
    for got, expected in ((ys[0], ys[1]), (leaves[0].grad, leaves[1].grad)):
        assert got.dtype == dtype
        assert got.stride() == x.stride()
        assert bool(((got.double() - expected).abs() <= half * expected.abs() + 1e-6).all())
    for name in ("weight", "bias"):
        gradient = getattr(module, name).grad
        assert gradient.dtype == (parameters or dtype)
        close(gradient, getattr(other, name).grad, 1e-5 if parameters else half)
    for name in ("running_mean", "running_var"):
        assert getattr(module, name).dtype == (parameters or dtype)
        close(getattr(module, name), getattr(other, name), 1e-6 if parameters else half)


def test_nothing_is_copied():
    """What the kernels read is the tensor's memory, and a result is theirs."""
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    pytest.importorskip("ml_dtypes")
    for tensor in (x, x.double(), x.half(), x.bfloat16()):
        array = tensors.as_array(tensor)
        assert array.__array_interface__["data"][0] == tensor.data_ptr()
        assert tensors.as_tensor(array).data_ptr() == tensor.data_ptr()
        assert tensors.dense(tensor) is tensor


def test_a_refused_batch_changes_nothing():
    """Neither the counter nor the statistics."""
    for module, x in (
        (BatchNorm1d(3), torch.ones(1, 3)),
        (BatchNorm1d(3), torch.ones(4, 2)),
        (BatchNorm1d(3, affine=False), torch.ones(4, 2)),
        (BatchNorm1d(3), torch.ones(4, 3, dtype=torch.int64)),
    ):
        before = copy.deepcopy(module.state_dict())
        with pytest.raises((ValueError, TypeError)):
            module(x)
        for name, value in module.state_dict().items():
            assert torch.equal(value, before[name])


class Derived(torch.nn.BatchNorm2d):
    """What somebody else has changed."""


class Block(torch.nn.Module):
    def __init__(self, width, stride):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn1 = torch.nn.BatchNorm2d(width)
        self.conv2 = torch.nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = torch.nn.BatchNorm2d(width)
        self.short = torch.nn.Sequential(torch.nn.Conv2d(width, width, 1, stride), torch.nn.BatchNorm2d(width))

    def forward(self, x):
        h = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(h)) + self.short(x))


def residual_network():
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), Block(8, 2), Block(8, 1),
        torch.nn.Flatten(), torch.nn.LazyLinear(6), torch.nn.BatchNorm1d(6),
    )  # fmt: skip


def test_a_converted_network_trains_as_before():
    network = residual_network()
    network(torch.randn(2, 3, 9, 9))
    other = copy.deepcopy(network).double()
    steps = [torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9) for model in (network, other)]
    assert convert(network) is network  # after the optimizer was made
    for _ in range(5):
        x = torch.randn(6, 3, 9, 9)
        for model, step in zip((network, other), steps, strict=True):
            step.zero_grad()
            model(x.to(next(model.parameters()).dtype)).square().mul(torch.arange(6)).mean().backward()
            step.step()
    for name, value in other.state_dict().items():
        close(network.state_dict()[name], value, 1e-4)


def test_convert_and_revert_exchange_nothing_but_the_class():
    network = torch.nn.ModuleList(
        [Block(4, 1), torch.nn.BatchNorm2d(4), torch.nn.SyncBatchNorm(3), torch.nn.LazyBatchNorm2d(), Derived(4)]
    )
    seen = []
    network[1].register_forward_hook(lambda *_: seen.append(True))
    network[1].momentum = None
    network[0].bn2.weight.requires_grad_(False)
    network[0].bn2.eval()
    before = [(module, type(module), dict(vars(module))) for module in network.modules()]
    assert convert(network) is network
    others = torch.nn.ModuleList([torch.nn.BatchNorm1d(2), torch.nn.BatchNorm3d(2)])
    assert [type(module) for module in convert(others)] == [BatchNorm1d, BatchNorm3d]
    for module, kind, state in before:
        assert type(module) is {torch.nn.BatchNorm2d: BatchNorm2d, torch.nn.SyncBatchNorm: SyncBatchNorm}.get(
            kind, kind
        )
        assert vars(module).keys() == state.keys()
        assert all(vars(module)[name] is value for name, value in state.items())
    network[1](torch.randn(2, 4, 3, 3))
    assert seen == [True]
    revert(network)
    assert [(module, type(module)) for module in network.modules()] == [(module, kind) for module, kind, _ in before]
    network[1](torch.randn(2, 4, 3, 3))
    assert seen == [True, True]


def test_revert_refuses_to_lose_an_activation():
    model = torch.nn.Sequential(BatchNorm1d(3), BatchNorm1d(3, activation="relu"))
    with pytest.raises(ValueError, match=r"no activation in its batch norm modules, got 'relu' in '1'"):
        revert(model)
    assert type(model[0]) is BatchNorm1d
    model[1].activation = None
    assert [type(module) for module in revert(model)] == [torch.nn.BatchNorm1d] * 2


def test_state_dicts_are_interchangeable():
    ours, other = BatchNorm2d(4), torch.nn.BatchNorm2d(4)
    for _ in range(3):
        ours(torch.randn(2, 4, 3, 3))
    other.load_state_dict(ours.state_dict())
    again = BatchNorm2d(4)
    again.load_state_dict(other.state_dict())
    assert again.num_batches_tracked == 3
    x = torch.randn(2, 4, 3, 3)
    close(again.eval()(x), other.eval()(x), 1e-6)
    assert torch.equal(again(x), ours.eval()(x))


@pytest.mark.parametrize("activation", [None, ("leaky_relu", 0.1)])
def test_copies_and_pickles(activation):
    module = BatchNorm2d(3, activation=activation)
    x = torch.randn(2, 3, 4, 4)
    module(x)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    copies = [copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(file, weights_only=False)]
    for other in copies:
        assert type(other) is BatchNorm2d
        assert other.activation == activation
        assert repr(other) == repr(module)
    expected = module(x)
    for other in copies:
        assert torch.equal(other(x), expected)
        assert torch.equal(other.running_var, module.running_var)
    assert repr(BatchNorm1d(2)) == repr(torch.nn.BatchNorm1d(2))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"affine": False}, {"activation": "relu"}], ids=str)
def test_compile_without_graph_breaks(options, backend):
    torch._dynamo.reset()
    module = BatchNorm2d(3, **options)
    compiled = torch.compile(copy.deepcopy(module), fullgraph=True, backend=backend)
    x = torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last)
    for mode in (True, True, False):
        results = []
        for each in (module, compiled):
            leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
            y = each.train(mode)(leaf)
            y.square().mul(torch.arange(5)).sum().backward()
            results.append((y.detach(), leaf.grad, *each.buffers()))
        for got, expected in zip(results[1], results[0], strict=True):
            close(got, expected, 1e-6)
        assert results[1][0].stride() == x.stride()


def test_threads_are_those_of_torch(monkeypatch):
    """What is asked for in each call; the bits are the same."""
    asked = []
    monkeypatch.setattr("batchnorm._threads.threads_for", lambda *call, **_: asked.append(call[1]) or 1)
    before = torch.get_num_threads()
    module, x = BatchNorm1d(3), torch.randn(4, 3, requires_grad=True)
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            (dx,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
            dx.square().sum().backward()
            module.eval()(x)
            assert set(asked) == {threads}
            asked.clear()
            module.train()
    finally:
        torch.set_num_threads(before)


def test_errors_say_what_to_do(monkeypatch):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        elsewhere = torch.empty(2, 3, device="cuda")
    module = BatchNorm1d(3)
    for x, kind, message in (
        (elsewhere, ValueError, r"input must be on the CPU, got cuda:0: .*revert\(model\).* input\.cpu\(\)"),
        (torch.ones(2, 3, dtype=torch.int32), TypeError, r"one of the dtypes .*, got torch\.int32: input\.float\(\)"),
        (torch.ones(2, 3, dtype=torch.complex64), TypeError, r"one of the dtypes .*, got torch\.complex64"),
        (torch.ones(2, 3).to_sparse(), TypeError, r"input must be dense, got torch\.sparse_coo: input\.to_dense\(\)"),
        (torch.ones(2, 4), ValueError, r"running_mean must have shape \(4,\), got \(3,\)"),
        (torch.ones(1, 3), ValueError, r"more than one value per channel in training, got shape \(1, 3\)"),
        (torch.ones(3), ValueError, "expected 2D or 3D input"),
    ):
        with pytest.raises(kind, match=message):
            module(x)
    with pytest.raises(ValueError, match="activation must be None, 'relu'"):
        BatchNorm1d(3, activation="gelu")
    with pytest.raises(ValueError, match="running_mean and running_var must be given if training is false"):
        batch_norm(torch.ones(2, 3), None, None)
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(ImportError, match="needs the package ml_dtypes for bfloat16: python -m pip install ml_dtypes"):
        module(torch.ones(2, 3, dtype=torch.bfloat16))


@pytest.mark.filterwarnings("ignore")
def test_what_there_is_no_derivative_of_says_so():
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)

    def norm(x):
        return batch_norm(x, None, None, training=True)

    for fixed in (x, x.detach()):
        with pytest.raises(NotImplementedError, match="no forward mode"), forward_ad.dual_level():
            norm(forward_ad.make_dual(fixed, fixed))
    for transform in (torch.func.grad, torch.vmap, torch.func.jacfwd):
        with pytest.raises(RuntimeError, match="functorch"):
            transform(lambda x: norm(x).pow(3).sum())(x.detach()[..., None])
    (first,) = torch.autograd.grad(norm(x).pow(3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="no third derivative"):
        torch.autograd.grad(second.square().sum(), x)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [BatchNorm1d, BatchNorm2d, BatchNorm3d])
@pytest.mark.parametrize("training", [True, False])
def test_the_samples_of_torch_itself(kind, training):
    try:
        common = importlib.import_module("torch.testing._internal.common_modules")
    except ImportError as error:
        pytest.skip(f"PyTorch's own tests need {error.name}")
    (info,) = (info for info in common.module_db if info.module_cls is theirs(kind))
    samples = info.module_inputs_func(info, "cpu", torch.float64, True, training)
    assert samples
    for sample in samples:
        make, call = sample.constructor_input, sample.forward_input
        ours, other = (
            cls(*make.args, **make.kwargs, dtype=torch.float64).train(training) for cls in (kind, info.module_cls)
        )
        (x,) = call.args
        ys = [module(x) for module in (ours, other)]
        close(*ys, 1e-13)
        dy = torch.randn_like(ys[0])
        close(*(torch.autograd.grad(y, x, dy)[0] for y in ys), 1e-12)
        for name, value in other.state_dict().items():
            close(ours.state_dict()[name], value, 1e-14)


def test_examples_in_docstrings():
    failed, tried = doctest.testmod(importlib.import_module("batchnorm.torch.modules"))
    assert (failed, tried > 0) == (0, True)


def test_the_page_is_true():
    page = Path(__file__).parents[1] / "docs" / "torch.md"
    failed, tried = doctest.testfile(str(page), module_relative=False)
    assert (failed, tried > 0) == (0, True)


def test_equal_bits_for_any_number_of_threads():
    """What PyTorch's own module does not promise."""
    x = torch.randn(16, 8, 32, 32)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            leaf = x.clone().requires_grad_()
            y = BatchNorm2d(8)(leaf)
            y.backward(x.flip(0))
            found.append((y.detach().numpy().tobytes(), leaf.grad.numpy().tobytes()))
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1] == found[2]
    assert np.frombuffer(found[0][0], np.float32).size == x.numel()
