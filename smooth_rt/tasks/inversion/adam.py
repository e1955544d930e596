"""Adam: Kingma & Ba 2015, arXiv 1412.6980, by torch's formula, each row with a count of its own: rows may stop."""

from __future__ import annotations

import numpy as np
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
        """One step of the rows named by a mask [N], along `grad` [N, ...].

        All rows are computed and those that rest put back, with numpy's root: indexing by a tensor and torch's own root
        wake torch's threads for values this few, which then keep an engine's waiting.
        """

        def a_row(factors: Tensor) -> Tensor:
            return factors.to(grad.dtype).reshape(-1, *[1] * (grad.ndim - 1))

        on = rows.reshape(-1, *[1] * (grad.ndim - 1))
        self._steps = self._steps + rows
        mean = self._mean.lerp(grad, 1 - BETA)
        square = self._square * BETA_SQUARE + (1 - BETA_SQUARE) * grad * grad
        root = torch.from_numpy(np.sqrt(square.numpy()))
        spread = root / a_row((1 - BETA_SQUARE**self._steps).sqrt()) + EPSILON
        values = self.values - a_row(self.rate / (1 - BETA**self._steps)) * (mean / spread)
        self._mean = torch.where(on, mean, self._mean)
        self._square = torch.where(on, square, self._square)
        self.values = torch.where(on, values, self.values)
