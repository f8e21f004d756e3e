"""Batch normalization and its gradient in long double, one channel after the other, to be differentiated numerically.

Written from the definition, independently of the package: y from x, and the results of `backward` by the chain rule.
"""

from typing import NamedTuple

import numpy as np

STEP = np.longdouble(2) ** -10
"""The error of the five-point rule is about STEP⁴ times the fifth derivative."""


def slope(f, step=STEP):
    """The derivative of f at 0, by the five-point rule and one step of Richardson's extrapolation: exact to step⁶."""

    def rule(h):
        return (f(-2 * h) - 8 * f(-h) + 8 * f(h) - f(2 * h)) / (12 * h)

    return (16 * rule(step / 2) - rule(step)) / 15


class Case(NamedTuple):
    """Channels with n values each, (…, C, n), and numbers per channel, (…, C, 1), all long double."""

    x: np.ndarray
    gamma: np.ndarray
    beta: np.ndarray
    add: np.ndarray
    share: np.ndarray  # of each value in the moments; 0 where it is masked
    counts: np.ndarray  # 0 where it is masked, else 1
    eps: np.longdouble
    through: tuple[str, ...]
    held: tuple[np.ndarray | None, np.ndarray | None]  # mean and var if they are constants and not functions of x
    activation: object

    def moments(self):
        mean, var = self.held
        if mean is None:
            mean = (self.share * self.x).sum(axis=-1, keepdims=True)
        if var is None:
            var = (self.share * (self.x - mean) ** 2).sum(axis=-1, keepdims=True)
        return mean, var

    def pre(self):
        mean, var = self.moments()
        return self.gamma * (self.x - mean) / np.sqrt(var + self.eps) + self.beta + self.add

    def passing(self):
        """act′, or 0 where a place does not count."""
        if self.activation is None:
            return self.counts + 0 * self.x
        slope = 0 if self.activation == "relu" else self.activation[1]
        return np.where(self.pre() > 0, np.longdouble(1), np.longdouble(slope)) * self.counts

    def gradients(self, dy, passing):
        """dx, dgamma, dbeta and dadd, with act′ held fixed, because the activation has no second derivative."""
        mean, var = self.moments()
        dy, rstd = dy * passing, 1 / np.sqrt(var + self.eps)
        xhat = (self.x - mean) * rstd
        dbeta, dgamma = dy.sum(axis=-1, keepdims=True), (dy * xhat).sum(axis=-1, keepdims=True)
        dx = self.gamma * rstd * dy
        dx = dx - ("mean" in self.through) * self.gamma * rstd * self.share * dbeta
        dx = dx - ("variance" in self.through) * self.gamma * rstd * self.share * xhat * dgamma
        return dx, dgamma, dbeta, dy
