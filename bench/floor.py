"""The floor of a computation on this machine: its FLOPs, counted, over the best matrix rate, measured."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bench.results import MatrixRate
from bench.timing import interleave
from smooth_rt.errors import EngineError

__all__ = ["count_flop", "floor_seconds", "matrix_rates"]


def count_flop(module: nn.Module, inputs: Sequence[Tensor]) -> int:
    """Floating-point operations of one forward, 2 per multiply-add; matrix products and convolutions only.

    Attention is run in its math form, as two matrix products: the counter has no formula for the CPU's fused kernel
    and would silently count it as nothing.
    """
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        module(*inputs)
    return int(counter.get_total_flops())


def floor_seconds(flop: int, rate: MatrixRate) -> float:
    """Seconds that `flop` operations take at `rate`."""
    return flop / (rate.gflop_per_s * 1e9)


def matrix_rates(side: int, repeats: int) -> tuple[MatrixRate, ...]:
    """The best fp32 rate of a square matrix product in torch, in numpy's BLAS and, where installed, in OpenVINO.

    OpenVINO has one factor as a constant, which it packs beforehand, like the weights of a network. Each product is
    compared with float64, so that no library wins by computing in fewer bits.

    Raises:
        EngineError: a library computed in less than fp32.
    """
    random = np.random.default_rng(0)
    a = random.standard_normal((side, side), dtype=np.float32)
    b = random.standard_normal((side, side), dtype=np.float32)
    torch_a, torch_b = torch.from_numpy(a), torch.from_numpy(b)
    products: dict[str, Callable[[], np.ndarray]] = {
        "torch": lambda: torch.mm(torch_a, torch_b).numpy(),
        f"numpy ({_numpy_blas()})": lambda: a @ b,
    }
    if importlib.util.find_spec("openvino") is not None:
        products["openvino"] = _openvino_product(a, b)
    _check_fp32(products, a, b)
    seconds = interleave(products, repeats, warmup=1)
    flop = 2 * side**3
    return tuple(
        MatrixRate(library=name, side=side, gflop_per_s=flop / min(runs) / 1e9) for name, runs in seconds.items()
    )


def _numpy_blas() -> str:
    return str(np.show_config(mode="dicts")["Build Dependencies"]["blas"]["name"])


def _openvino_product(a: np.ndarray, b: np.ndarray) -> Callable[[], np.ndarray]:
    import openvino as ov
    from openvino import opset13 as opset

    from engines.ov import core

    left = opset.parameter(list(a.shape), np.float32)
    model = ov.Model([opset.matmul(left, opset.constant(b), False, False)], [left])
    # Without the hint the plugin computes in bf16 by itself where the processor can.
    compiled = core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"})
    request = compiled.create_infer_request()

    def product() -> np.ndarray:
        request.infer({0: a}, share_inputs=True)
        return np.asarray(request.get_output_tensor(0).data)

    return product


def _check_fp32(products: dict[str, Callable[[], np.ndarray]], a: np.ndarray, b: np.ndarray) -> None:
    rows = a[:8].astype(np.float64) @ b.astype(np.float64)
    for name, product in products.items():
        error = float(np.abs(product()[:8] - rows).max() / np.abs(rows).max())
        # fp32 leaves about 1e-6 here, bf16 and tf32 about 1e-3.
        if error > 1e-4:
            raise EngineError(
                f"{name}: its fp32 matrix product has a relative error of {error:.0e}, so it computes in fewer bits; "
                "unset what lowers the precision, such as torch.set_float32_matmul_precision"
            )
