"""Tangents and second gradients beside those of PyTorch and JAX, where they are installed."""

import numpy as np
import pytest

import batchnorm as bn

SHAPES = [((7, 3), 1), ((4, 3, 5), 1), ((2, 4, 3, 3), 1), ((2, 3, 3, 4), -1), ((2, 2, 2, 3, 2), 3)]
EPS = 0.02

pytestmark = pytest.mark.once  # other tests compare the levels


@pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=str)
def test_gradcheck_and_gradgradcheck_of_torch(shape, axis, rng):
    torch = pytest.importorskip("torch")

    class Backward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, dy, x, gamma):
            _, ctx.saved = bn.forward(x.numpy(), gamma.numpy(), np.zeros(shape[axis]), axis=axis, eps=EPS)
            ctx.dy = dy.numpy()
            return tuple(map(torch.from_numpy, bn.backward(ctx.dy, ctx.saved)))

        @staticmethod
        def backward(ctx, u, a, b):
            second = bn.double_backward(u.numpy(), ctx.dy, ctx.saved, ddgamma=a.numpy(), ddbeta=b.numpy())
            return tuple(map(torch.from_numpy, second))

    class Norm(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, gamma, beta):
            ctx.save_for_backward(x, gamma)
            y, _ = bn.forward(x.numpy(), gamma.numpy(), beta.numpy(), axis=axis, eps=EPS)
            return torch.from_numpy(y)

        @staticmethod
        def backward(ctx, dy):
            return Backward.apply(dy.contiguous(), *ctx.saved_tensors)

    x, *parameters = (torch.from_numpy(rng.standard_normal(s)).requires_grad_() for s in (shape, *[(shape[axis],)] * 2))
    assert torch.autograd.gradcheck(Norm.apply, (x, *parameters))
    assert torch.autograd.gradgradcheck(Norm.apply, (x, *parameters))
    seen = x.movedim(axis, 1)
    y = torch.nn.functional.batch_norm(seen, None, None, *parameters, training=True, eps=EPS)
    dy, u = torch.from_numpy(rng.standard_normal((2, *shape))).requires_grad_()
    gradients = torch.autograd.grad(y, (x, parameters[0]), dy.movedim(axis, 1), create_graph=True)
    a = torch.from_numpy(rng.standard_normal(shape[axis]))
    theirs = torch.autograd.grad(gradients, (dy, x, parameters[0]), (u, a))
    _, saved = bn.forward(*(t.detach().numpy() for t in (x, *parameters)), axis=axis, eps=EPS)
    ours = bn.double_backward(u.detach().numpy(), dy.detach().numpy(), saved, ddgamma=a.numpy())
    for got, expected in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(got, expected.numpy(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=str)
def test_nested_derivatives_of_jax(shape, axis, fixed, rng):
    jax = pytest.importorskip("jax")
    jnp = jax.numpy
    others = tuple(i for i in range(len(shape)) if i != axis % len(shape))
    channels = shape[axis]
    mean, var = rng.standard_normal(channels), rng.random(channels) + 0.5

    def norm(x, gamma, beta, mean, var):
        if not fixed:
            mean, var = x.mean(axis=others), x.var(axis=others)
        mean, var, gamma, beta = (jnp.expand_dims(row, others) for row in (mean, var, gamma, beta))
        return gamma * (x - mean) / jnp.sqrt(var + EPS) + beta

    x, dx, dy, u = rng.standard_normal((4, *shape))
    gamma, beta, dgamma, dbeta, dmean, dvar, a, b = rng.standard_normal((8, channels))
    if not fixed:
        dmean = dvar = np.zeros(channels)
    through = () if fixed else ("mean", "variance")
    known = {"moments": bn.Moments(1, mean, var)} if fixed else {}
    _, saved = bn.forward(x, gamma, beta, axis=axis, eps=EPS, **known)
    with jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64():
        _, tangent = jax.jvp(norm, (x, gamma, beta, mean, var), (dx, dgamma, dbeta, dmean, dvar))

        def product(dy, x, gamma):
            _, pull = jax.vjp(lambda *arguments: norm(*arguments, mean, var), x, gamma, jnp.asarray(beta))
            return sum((g * w).sum() for g, w in zip(pull(dy), (u, a, b), strict=True))

        theirs = jax.grad(product, (0, 1, 2))(*map(jnp.asarray, (dy, x, gamma)))
        ours = bn.jvp(dx, saved, dgamma=dgamma, dbeta=dbeta, dmean=dmean, dvar=dvar, through=through)
        np.testing.assert_allclose(ours.dy, tangent, rtol=1e-10, atol=1e-11)
        second = bn.double_backward(u, dy, saved, ddgamma=a, ddbeta=b, through=through)
        for got, expected in zip(second, theirs, strict=True):
            np.testing.assert_allclose(got, expected, rtol=1e-10, atol=1e-11)
