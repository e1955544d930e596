"""TensorRT's engine without a GPU: what it makes of weights for TensorRT itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engines.trt import given_weights


@pytest.mark.parametrize(("kind", "dtype"), [("FLOAT", torch.float32), ("HALF", torch.float16)])
def test_weights_as_tensorrt_itself_reads_them(kind: str, dtype: torch.dtype) -> None:
    trt: Any = pytest.importorskip("tensorrt_rtx", reason="reads them; pip install 'smooth-rt[tensorrt-rtx]'")
    # As a refit asks: by the type of the weights that stand in the engine.
    prototype = trt.Weights(getattr(trt.DataType, kind))
    tensor = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).T
    given, memory = given_weights(trt, prototype.dtype, tensor.requires_grad_())
    assert (given.dtype, given.size) == (prototype.dtype, 12)
    assert torch.equal(torch.from_numpy(given.numpy()).reshape(3, 4), tensor.detach().to(dtype))
    assert memory.data_ptr() == given.numpy().ctypes.data
