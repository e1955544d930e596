"""Adam: Kingma & Ba 2015, arXiv 1412.6980, by torch's formula, each row with a count of its own: rows may stop."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Adam"]

BETA, BETA_SQUARE, EPSILON = 0.9, 0.999, 1e-8


class Adam:
    """Values [N, ...], each row of which is optimised alone.

    Args:
        values: where it begins; not written to.
        rate: the learning rate.

    Attributes: `values` as they are now.
    """

    def __init__(self, values: Tensor, rate: float) -> None:
        self.values = values.clone()
        self.rate = rate
        self._mean = torch.zeros_like(values)
        self._square = torch.zeros_like(values)
        self._steps = torch.zeros(len(values), dtype=torch.float64)

    def step(self, grad: Tensor, rows: Tensor) -> None:
        """One step of the rows named by a mask [N], along `grad` [N, ...]."""
        on = rows.nonzero()[:, 0]
        grad = grad[on]
        self._steps[on] += 1
        self._mean[on] = self._mean[on].lerp(grad, 1 - BETA)
        self._square[on] = self._square[on] * BETA_SQUARE + (1 - BETA_SQUARE) * grad * grad

        def a_row(factors: Tensor) -> Tensor:
            return factors.to(grad.dtype).reshape(-1, *[1] * (grad.ndim - 1))

        steps = self._steps[on]
        spread = self._square[on].sqrt() / a_row((1 - BETA_SQUARE**steps).sqrt()) + EPSILON
        self.values[on] = self.values[on] - a_row(self.rate / (1 - BETA**steps)) * (self._mean[on] / spread)
