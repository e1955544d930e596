"""Attention alone: OpenVINO's, this project's kernel and torch's, in turn.

    python docs/experiments/native_kernels.py --tokens 4096 --heads 8 --width 40

Two rows, as with guidance. The floor is the FLOPs of both products over the machine's fp32 matrix rate; that of bf16 is
half of it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import openvino
import torch
from openvino import opset13 as ops
from rich.console import Console
from rich.table import Table

from bench.floor import matrix_rates
from engines.ov import core
from export.rewrites.native import native_attention

ROWS = 2


def model(tokens: int, heads: int, width: int) -> openvino.Model:
    """Attention of [rows, tokens, heads * width], as a transformer block has it."""
    inputs = [ops.parameter([ROWS, tokens, heads * width], np.float32) for _ in range(3)]
    turn = ops.constant(np.array([0, 2, 1, 3]))
    apart = ops.constant(np.array([ROWS, tokens, heads, width]))
    found = ops.scaled_dot_product_attention(*(ops.transpose(ops.reshape(x, apart, False), turn) for x in inputs))
    together = ops.constant(np.array([ROWS, tokens, heads * width]))
    return openvino.Model([ops.result(ops.reshape(ops.transpose(found, turn), together, False))], inputs, "attention")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--width", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    generator = np.random.default_rng(0)
    size = (ROWS, options.tokens, options.heads * options.width)
    feed = [generator.standard_normal(size).astype(np.float32) for _ in range(3)]
    heads = [torch.from_numpy(x).view(ROWS, options.tokens, options.heads, options.width).transpose(1, 2) for x in feed]
    wanted = torch.nn.functional.scaled_dot_product_attention(*(x.double() for x in heads))
    wanted = wanted.transpose(1, 2).reshape(size)

    def compiled(native: bool, hint: str) -> Callable[[], torch.Tensor]:
        graph = model(options.tokens, options.heads, options.width)
        if native:
            native_attention(graph, bf16=hint == "bf16")
        request = core().compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": hint}).create_infer_request()
        return lambda: torch.from_numpy(request.infer(feed, share_inputs=True)[0])

    def eager() -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).reshape(size)

    forms = {"torch fp32": eager}
    for hint in ("f32", "bf16"):
        forms |= {f"openvino {hint}": compiled(False, hint), f"native {hint}": compiled(True, hint)}
    errors = {name: float((form() - wanted).norm() / wanted.norm()) for name, form in forms.items()}
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(options.rounds):
        for name, form in forms.items():
            started = time.perf_counter()
            form()
            seconds[name].append(time.perf_counter() - started)
    flop = 4 * ROWS * options.tokens**2 * options.heads * options.width
    floor = flop / max(rate.gflop_per_s for rate in matrix_rates(2048, 3)) / 1e9
    what = f"{ROWS} x {options.tokens} tokens, {options.heads} heads of {options.width}"
    table = Table("", "ms", "fastest", "x fp32 floor", "error", title=what)
    for name, times in seconds.items():
        middle = sorted(times)[len(times) // 2]
        figures = (1e3 * middle, 1e3 * min(times))
        table.add_row(name, *(f"{ms:.1f}" for ms in figures), f"{middle / floor:.2f}", f"{errors[name]:.1e}")
    Console(width=100).print(table)
    print(f"fp32 floor {1e3 * floor:.1f} ms")


if __name__ == "__main__":
    main()
