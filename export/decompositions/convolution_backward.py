"""The gradient of a convolution with respect to its input."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["convolution_backward"]


def convolution_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_sizes: Sequence[int] | None,  # noqa: ARG001 - aten's signature
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],  # noqa: ARG001
    groups: int,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, None, None]:
    """The convolution with the weight turned around.

    At stride 1 that is an ordinary convolution with the weight's two channel axes exchanged and its kernel reversed:
    every backend has that fastest. At other strides it is the transposed convolution, padded at the far ends by what
    the stride passed over.

    Args:
        weight: [out, in, kh, kw]; `grad` is shaped as the output, the result as `x`.

    Raises:
        NotImplementedError: of a transposed convolution, or with respect to the weight.
    """
    if transposed or output_mask[1] or output_mask[2] or x.ndim != 4:
        raise NotImplementedError("a convolution's gradient is taken of plain ones with respect to the input alone")
    if not output_mask[0]:
        return None, None, None
    kernel = weight.shape[2:]
    if all(one == 1 for one in (*stride, *dilation, groups)):
        turned = weight.transpose(0, 1)
        turned = turned if tuple(kernel) == (1, 1) else turned.flip(2, 3)
        back = [size - 1 - pad for size, pad in zip(kernel, padding, strict=True)]
        return torch.nn.functional.conv2d(grad, turned, padding=back), None, None
    missing = [
        x.shape[2 + axis]
        - ((grad.shape[2 + axis] - 1) * stride[axis] - 2 * padding[axis] + dilation[axis] * (kernel[axis] - 1) + 1)
        for axis in range(2)
    ]
    made = torch.nn.functional.conv_transpose2d(
        grad, weight, None, stride, padding, output_padding=missing, groups=groups, dilation=dilation
    )
    return made, None, None
