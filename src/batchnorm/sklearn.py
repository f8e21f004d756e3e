"""`Standardizer`, a transformer that replaces scikit-learn's StandardScaler.

Decisions:

- Names, attributes and the rule for constant columns are StandardScaler's. Unlike it, float32 is never copied to
  float64, `partial_fit` gives the same bits however the data are cut, and NaN is refused, because a mask here applies
  to all columns.
- `partial_fit` holds the rows that do not fill a block, at most 2**20 values. The statistics include them when read.
  `fit` and a pickle end the last block, so nothing is held, and a pickle never contains data.
- The mean is a pair of float64 numbers, as in `Moments`, and `transform` uses both.
- The statistics are properties, so that many small calls of `partial_fit` cost no more than a few large ones.
"""

from __future__ import annotations

from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ._extras import requirements
from .moments import Moments, Numbers, Part, Stream
from .plan import Plan

try:
    from sklearn.base import BaseEstimator, OneToOneFeatureMixin, TransformerMixin
    from sklearn.utils.validation import check_array, check_is_fitted, validate_data
except ImportError as _error:
    _install = f"python -m pip install {requirements('scikit-learn', 'sklearn')}"
    raise ImportError(f"batchnorm.sklearn needs scikit-learn 1.6 or newer: {_install}") from _error

_FLOATS = (np.float64, np.float32, np.float16)


class Standardizer(OneToOneFeatureMixin, TransformerMixin, BaseEstimator):
    """Standardize columns: `y = (x − mean_)/scale_`, with the mean and standard deviation of the training data.

    It replaces StandardScaler. float32 stays float32 and is not copied to float64, and `partial_fit` gives the same
    bits for the same rows in the same order, however they are cut.

    Parameters
    ----------
    with_mean : bool, default True
        Subtract the mean.
    with_std : bool, default True
        Divide by the standard deviation.
    copy : bool, default True
        False writes y over X if X is a float array.
    num_threads : int, optional
        Threads for each call. Results do not depend on it.

    Attributes
    ----------
    mean_ : ndarray of float64, shape (n_features,), or None
        None if `with_mean` and `with_std` are False.
    var_ : ndarray of float64, shape (n_features,), or None
        The biased variance; None if `with_std` is False.
    scale_ : ndarray of float64, shape (n_features,), or None
        The root of `var_`, but 1 for a constant column: one with var ≤ n·ε·var + (n·mean·ε)², ε = 2.2e-16, as in
        StandardScaler.
    n_samples_seen_ : int or float
        n, the number of rows; with weights, their sum.
    n_features_in_ : int
    feature_names_in_ : ndarray of str
        Only if X has column names and all of them are strings.

    Raises
    ------
    ImportError
        On import of this module, if scikit-learn is missing.

    See Also
    --------
    batchnorm.population : the same statistics for a stream of batches.

    Examples
    --------
    >>> import numpy as np
    >>> from batchnorm.sklearn import Standardizer
    >>> x = np.array([[1.0, 5.0], [2.0, 5.0], [6.0, 5.0]], np.float32)
    >>> scaler = Standardizer().fit(x)
    >>> scaler.mean_, scaler.scale_.round(3)
    (array([3., 5.]), array([2.16, 1.  ]))
    >>> scaler.transform(x)
    array([[-0.9258201 ,  0.        ],
           [-0.46291006,  0.        ],
           [ 1.3887302 ,  0.        ]], dtype=float32)
    """

    def __init__(
        self, *, with_mean: bool = True, with_std: bool = True, copy: bool = True, num_threads: int | None = None
    ) -> None:
        self.with_mean = with_mean
        self.with_std = with_std
        self.copy = copy
        self.num_threads = num_threads

    def fit(self, X: Any, y: object = None, sample_weight: ArrayLike | None = None) -> Self:
        """Compute the statistics of X, and forget those of earlier data.

        Parameters
        ----------
        X : array_like, shape (n_samples, n_features)
            Floats of 64, 32 or 16 bits keep their dtype, everything else becomes float64. Sparse X, NaN and infinity
            are refused.
        y : ignored
        sample_weight : array_like, shape (n_samples,), optional
            How much each row counts, at least 0: μ = Σwx/Σw, var = Σw(x − μ)²/Σw.

        Raises
        ------
        TypeError, ValueError
            If X or `sample_weight` is invalid.
        """
        part = self._part(X, sample_weight, reset=True)
        if part.selecting is not None and not part.selecting.any():
            raise ValueError("sample_weight must have a weight above 0, got only zeros")
        stream = Stream()
        stream.add(part, self.num_threads)
        stream.end(self.num_threads)
        self._stream = stream
        return self

    def partial_fit(self, X: Any, y: object = None, sample_weight: ArrayLike | None = None) -> Self:
        """Add the rows of X to the statistics.

        Parameters
        ----------
        X, y, sample_weight
            As in `fit`, with the same errors.
        """
        first = not hasattr(self, "_stream")
        part = self._part(X, sample_weight, reset=first)
        stream = Stream() if first else self._stream
        stream.add(part, self.num_threads)
        self._stream = stream
        return self

    def transform(self, X: Any, copy: bool | None = None) -> Any:
        """`y = (x − mean_)/scale_`, in X's dtype, with more digits of the mean than `mean_` has.

        Parameters
        ----------
        X : array_like, shape (n_samples, n_features)
        copy : bool, optional
            Overrides the estimator's `copy`.
        """
        check_is_fitted(self)
        copy = self.copy if copy is None else copy
        X = validate_data(self, X, reset=False, dtype=_FLOATS, force_writeable=not copy)
        moments, zeros = self._moments, np.zeros(self.n_features_in_)
        var = _spread(moments) if self.with_std else zeros + 1
        if self.with_mean:  # beta carries its low-order part
            plan = Plan(moments.mean, var, None, -moments.mean_low / np.sqrt(var), eps=0.0)
        else:
            plan = Plan(zeros, var, eps=0.0)
        return plan(X, out=None if copy else X, num_threads=self.num_threads)

    def inverse_transform(self, X: Any, copy: bool | None = None) -> Any:
        """`x = y·scale_ + mean_`, in X's dtype.

        Parameters
        ----------
        X, copy
            As in `transform`.
        """
        check_is_fitted(self)
        copy = self.copy if copy is None else copy
        X = check_array(X, dtype=_FLOATS, force_writeable=not copy, input_name="X", estimator=self)
        zeros = np.zeros(self.n_features_in_)
        plan = Plan(zeros, zeros + 1, self.scale_, self._moments.mean if self.with_mean else None, eps=0.0)
        return plan(X, out=None if copy else X, num_threads=self.num_threads)

    @property
    def mean_(self) -> Numbers | None:
        moments = self._moments
        return moments.mean.copy() if self.with_mean or self.with_std else None

    @property
    def var_(self) -> Numbers | None:
        moments = self._moments
        return moments.var() if self.with_std else None

    @property
    def scale_(self) -> Numbers | None:
        moments = self._moments
        return np.sqrt(_spread(moments)) if self.with_std else None

    @property
    def n_samples_seen_(self) -> float:
        return self._moments.weight

    @property
    def _moments(self) -> Moments:
        check_is_fitted(self)
        moments = self._stream.moments(self.num_threads)
        assert moments is not None  # a fitted estimator's stream has a part
        return moments

    def _part(self, X: Any, sample_weight: ArrayLike | None, reset: bool) -> Part:
        X = validate_data(self, X, reset=reset, dtype=_FLOATS)
        if sample_weight is None:
            return Part(X, 1)
        weights = check_array(sample_weight, dtype=np.float64, ensure_2d=False, input_name="sample_weight")
        if weights.shape != (len(X),):
            raise ValueError(f"sample_weight must have shape ({len(X)},), one per row, got {weights.shape}")
        if (weights < 0).any():
            raise ValueError(f"sample_weight must not be negative, got {weights.min()}")
        return Part(X, 1, weights, "weights")

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "_stream")

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32", "float16"]
        return tags


def _spread(moments: Moments) -> Numbers:
    """The variance, or 1 for columns that cannot be distinguished from constant ones."""
    var, error = moments.var(), moments.weight * np.finfo(np.float64).eps
    with np.errstate(over="ignore"):
        constant: NDArray[np.bool_] = var <= error * var + (error * moments.mean) ** 2
    return np.where(constant, 1.0, var)
