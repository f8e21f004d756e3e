"""What batch normalization is in each system: one table, without a class per system.

Decisions:

- The words are the system's own. `momentum` is the number that its users write, with what that number weighs; names are
  those in its files, with {} for the path of the layer.
- The table holds defaults. A user's own choice (eps, momentum, the channel axis) is not in the arrays and must be
  given.
- A system that is not here is one of these with other fields: `dataclasses.replace(convention("torch"), eps=1e-3)`.
  All functions accept that instead of a name.
- Sources of the facts are in docs/conventions.md.
"""

from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal

from .. import _arrays
from ..layer import BatchNorm

ROLES = ("gamma", "beta", "running_mean", "running_var", "num_batches_tracked", "factor")
"""The roles of arrays; each is a field of `Convention`."""


@dataclass(frozen=True, kw_only=True)
class Convention:
    """One system's batch normalization: its defaults and its names.

    Parameters
    ----------
    name : str
    eps : float
        The default.
    momentum : float
        The default, in the system's direction.
    momentum_weighs : "new batch" or "old value"
        What momentum weighs when the running statistics move.
    unbiased : bool
        Whether the running variance follows n/(n − 1) times the variance that normalizes a batch.
    gamma, beta, running_mean, running_var : str
        The names of the arrays, with {} for the path of the layer.
    num_batches_tracked : str, optional
        The name of the counter, if there is one.
    factor : str, optional
        The name of the number by which the statistics must be divided (Caffe).
    order : tuple of str
        The roles of the arrays in a plain list; empty if there is no usual order.
    axis : int
        The channel axis of x.
    initial_mean, initial_var : float
        The statistics of a new layer.
    eps_outside : bool
        False: (x − μ)/√(σ² + eps). True: (x − μ)/(√σ² + eps), as in Darknet.
    debiased : bool
        Whether mean and variance are stored as `average`, corrected for the initial zeros, with the uncorrected
        `hidden` and a counter (Haiku).
    always_affine : bool
        Whether a layer always has gamma and beta.
    cumulative : bool
        Whether momentum may be None, for the mean of all batches.
    eps_argument, momentum_argument, axis_argument, size_argument : str, optional
        The constructor's names for eps, momentum, the channel axis and the number of channels.

    Examples
    --------
    >>> import batchnorm as bn
    >>> print(bn.convention("keras"))
    keras: gamma·(x − μ)/√(σ² + epsilon) + beta, channels along axis -1
      epsilon = 0.001, momentum = 0.99 (weight of the old value)
      the running variance is biased; mean and variance start at 0 and 1
      names: {}/gamma, {}/beta, {}/moving_mean, {}/moving_variance
      a list: gamma, beta, running_mean, running_var
    """

    name: str
    eps: float = 1e-5
    momentum: float
    momentum_weighs: Literal["new batch", "old value"]
    unbiased: bool
    gamma: str
    beta: str
    running_mean: str
    running_var: str
    num_batches_tracked: str | None = None
    factor: str | None = None
    order: tuple[str, ...] = ()
    axis: int = 1
    initial_mean: float = 0.0
    initial_var: float = 1.0
    eps_outside: bool = False
    debiased: bool = False
    always_affine: bool = False
    cumulative: bool = False
    eps_argument: str | None = "eps"
    momentum_argument: str | None = "momentum"
    axis_argument: str | None = None
    size_argument: str | None = None

    def __str__(self) -> str:
        eps = self.eps_argument or "eps"
        below = f"(√σ² + {eps})" if self.eps_outside else f"√(σ² + {eps})"
        debiased = ", as averages without the weight of that start" if self.debiased else ""
        lines = [
            f"{self.name}: gamma·(x − μ)/{below} + beta, channels along axis {self.axis}",
            f"{eps} = {self.eps:g}, {self.momentum_argument or 'momentum'} = {self.momentum:g} "
            f"(weight of the {self.momentum_weighs})",
            f"the running variance is {'unbiased' if self.unbiased else 'biased'}; "
            f"mean and variance start at {self.initial_mean:g} and {self.initial_var:g}{debiased}",
            f"names: {', '.join(self.names('{}').values())}",
        ]
        return "\n  ".join(lines + [f"a list: {', '.join(self.order)}"] * bool(self.order))

    def names(self, path: str = "") -> dict[str, str]:
        """The names of the arrays of the layer at a path, by their role.

        Parameters
        ----------
        path : str, default ""
            The layer's path in the network, joined as in the system.

        Examples
        --------
        >>> import batchnorm as bn
        >>> bn.convention("flax").names("net/bn")["running_var"]
        'batch_stats/net/bn/var'
        >>> bn.convention("torch").names()["gamma"]
        'weight'
        """
        named = {role: getattr(self, role) for role in ROLES}
        joined = {role: name for role, name in named.items() if name is not None}
        return {role: name.format(path) if path else _at_the_root(name) for role, name in joined.items()}

    def arguments(self, layer: BatchNorm, *, eps: float | None = None) -> dict[str, Any]:
        """The constructor's arguments for the layer that loads `to_state(layer, name, eps=eps)`.

        Parameters
        ----------
        layer : BatchNorm
        eps : float, optional
            As in `to_state`: the system's default unless given.

        Raises
        ------
        ValueError
            If the layer's momentum is None, the mean of all batches, which few systems have.

        Examples
        --------
        >>> import batchnorm as bn
        >>> layer = bn.BatchNorm(64)
        >>> bn.convention("keras").arguments(layer)
        {'axis': 1, 'epsilon': 0.001, 'momentum': 0.9}
        >>> bn.convention("torch").arguments(layer)
        {'num_features': 64, 'eps': 1e-05, 'momentum': 0.1}
        """
        given: dict[str | None, Any] = {
            self.size_argument: layer.num_features,
            self.axis_argument: layer.axis,
            self.eps_argument: self.eps if eps is None else _arrays.as_eps(eps),
        }
        if self.momentum_argument is not None:
            given[self.momentum_argument] = self.momentum_of(layer)
        return {name: value for name, value in given.items() if name is not None}

    def momentum_of(self, layer: BatchNorm) -> float | None:
        """The layer's momentum in the system's direction.

        Parameters
        ----------
        layer : BatchNorm

        Raises
        ------
        ValueError
            If the momentum is None, the mean of all batches, and the system does not have that.
        """
        if layer.momentum is None and not self.cumulative:
            those = ", ".join(system.name for system in CONVENTIONS.values() if system.cumulative)
            raise ValueError(
                f"momentum=None, the mean of all batches, exists in {those} but not in {self.name}: "
                "give layer.momentum a number first"
            )
        return None if layer.momentum is None else self.weight_of_new(layer.momentum)

    def weight_of_new(self, momentum: float) -> float:
        """Convert the system's momentum to the weight of the new batch, or back: 1 − momentum or momentum itself.

        Parameters
        ----------
        momentum : float
        """
        if self.momentum_weighs == "new batch":
            return momentum
        return float(1 - Decimal(repr(float(momentum))))  # 0.99 ↔ 0.01, not 0.010000000000000009


def _at_the_root(name: str) -> str:
    """The name without the path and its separator."""
    before, _, after = name.partition("{}")
    return before + after[1:]


_LIKE_TORCH: dict[str, Any] = {
    "gamma": "{}.weight",
    "beta": "{}.bias",
    "running_mean": "{}.running_mean",
    "running_var": "{}.running_var",
    "momentum": 0.1,
    "momentum_weighs": "new batch",
    "unbiased": True,
    "size_argument": "num_features",
}
_LIKE_KERAS: dict[str, Any] = {
    "eps": 1e-3,
    "momentum": 0.99,
    "momentum_weighs": "old value",
    "axis": -1,
    "order": ("gamma", "beta", "running_mean", "running_var"),
    "eps_argument": "epsilon",
    "axis_argument": "axis",
}
_LIKE_FLAX: dict[str, Any] = {
    "momentum": 0.99,
    "momentum_weighs": "old value",
    "unbiased": False,
    "axis": -1,
    "eps_argument": "epsilon",
    "axis_argument": "axis",
}

_SYSTEMS = (
    Convention(
        name="torch",
        **_LIKE_TORCH,
        num_batches_tracked="{}.num_batches_tracked",
        order=("gamma", "beta", "running_mean", "running_var", "num_batches_tracked"),
        cumulative=True,
    ),
    Convention(
        name="keras",
        **_LIKE_KERAS,
        unbiased=False,
        gamma="{}/gamma",
        beta="{}/beta",
        running_mean="{}/moving_mean",
        running_var="{}/moving_variance",
    ),
    Convention(
        name="keras2",
        **_LIKE_KERAS,
        unbiased=True,
        gamma="{}/gamma:0",
        beta="{}/beta:0",
        running_mean="{}/moving_mean:0",
        running_var="{}/moving_variance:0",
    ),
    Convention(
        name="tensorflow",
        eps=1e-3,
        momentum=1.0,
        momentum_weighs="new batch",
        unbiased=True,
        gamma="{}/scale",
        beta="{}/offset",
        running_mean="{}/mean",
        running_var="{}/variance",
        order=("gamma", "beta", "running_mean", "running_var"),
        axis=-1,
        always_affine=True,
        eps_argument="epsilon",
        momentum_argument="exponential_avg_factor",
    ),
    Convention(
        name="flax",
        **_LIKE_FLAX,
        gamma="params/{}/scale",
        beta="params/{}/bias",
        running_mean="batch_stats/{}/mean",
        running_var="batch_stats/{}/var",
    ),
    Convention(
        name="nnx",
        **_LIKE_FLAX,
        gamma="{}/scale",
        beta="{}/bias",
        running_mean="{}/mean",
        running_var="{}/var",
        size_argument="num_features",
    ),
    Convention(
        name="haiku",
        momentum=0.9,  # Haiku has no default; this is the one of hk.nets.ResNet
        momentum_weighs="old value",
        unbiased=False,
        gamma="{}/scale",
        beta="{}/offset",
        running_mean="{}/~/mean_ema/average",
        running_var="{}/~/var_ema/average",
        num_batches_tracked="{}/~/mean_ema/counter",
        axis=-1,
        initial_var=0.0,
        debiased=True,
        momentum_argument="decay_rate",
    ),
    Convention(
        name="onnx",
        momentum=0.9,
        momentum_weighs="old value",
        unbiased=False,
        gamma="{}/scale",
        beta="{}/B",
        running_mean="{}/input_mean",
        running_var="{}/input_var",
        order=("gamma", "beta", "running_mean", "running_var"),
        always_affine=True,
        eps_argument="epsilon",
    ),
    Convention(
        name="caffe",
        momentum=0.999,
        momentum_weighs="old value",
        unbiased=True,
        gamma="{}/scale",  # blobs have no names: these are ours, the order is Caffe's
        beta="{}/bias",
        running_mean="{}/mean",
        running_var="{}/variance",
        factor="{}/factor",
        order=("running_mean", "running_var", "factor", "gamma", "beta"),
        initial_var=0.0,
        momentum_argument="moving_average_fraction",
    ),
    Convention(
        name="darknet",
        eps=1e-6,
        momentum=0.99,
        momentum_weighs="old value",
        unbiased=True,
        gamma="{}/scales",
        beta="{}/biases",
        running_mean="{}/rolling_mean",
        running_var="{}/rolling_variance",
        order=("beta", "gamma", "running_mean", "running_var"),
        initial_var=0.0,
        eps_outside=True,
        always_affine=True,
        eps_argument=None,
        momentum_argument=None,
    ),
    Convention(name="mlx", **_LIKE_TORCH, axis=-1),
    Convention(
        name="paddle",
        momentum=0.9,
        momentum_weighs="old value",
        unbiased=False,
        gamma="{}.weight",
        beta="{}.bias",
        running_mean="{}._mean",
        running_var="{}._variance",
        order=("gamma", "beta", "running_mean", "running_var"),
        eps_argument="epsilon",
        size_argument="num_features",
    ),
)

CONVENTIONS = {system.name: system for system in _SYSTEMS}
"""All systems by name."""


def convention(name: str | Convention) -> Convention:
    """The convention of a system: its eps, its momentum and what that weighs, its running variance and its names.

    Parameters
    ----------
    name : str or Convention
        "torch", "keras" (Keras 3), "keras2" (tf.keras of TensorFlow 2, fused), "tensorflow" (`fused_batch_norm`),
        "flax" (linen), "nnx" (Flax NNX), "haiku", "onnx", "caffe", "darknet", "mlx" or "paddle". A `Convention` is
        returned unchanged.

    Returns
    -------
    Convention

    Raises
    ------
    ValueError
        If the name is none of these.

    Examples
    --------
    >>> import batchnorm as bn
    >>> flax = bn.convention("flax")
    >>> flax.eps, flax.momentum, flax.momentum_weighs, flax.unbiased
    (1e-05, 0.99, 'old value', False)

    MXNet, which is not in the table, differs from Keras in a few fields:

    >>> from dataclasses import replace
    >>> mxnet = replace(bn.convention("keras"), name="mxnet", momentum=0.9, axis=1, running_var="{}/moving_var")
    """
    if isinstance(name, Convention):
        return name
    if name not in CONVENTIONS:
        raise ValueError(f"convention must be one of {', '.join(CONVENTIONS)}, got {name!r}")
    return CONVENTIONS[name]
