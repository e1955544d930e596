"""Figures of winograd.md: SD1.5's UNet eager, on OpenVINO and with Winograd convolutions there, in turn.

    python docs/experiments/winograd.py WORK [ROUNDS]

WORK keeps the graphs, 11 GB. Wants 18 GB of memory. Where others use the machine, processor time tells more than wall
time.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch

from bench.subject import sd15
from engines.base import Engine
from engines.contract import contract
from engines.eager import EagerEngine
from engines.ov import OvEngine
from engines.variant import Bounds
from export.graphs import Case, random_inputs
from export.to_onnx import to_onnx
from export.to_openvino import to_openvino, to_winograd

SIZES = {"batch": 2, "height": 64, "width": 64}
BOUNDS: list[Bounds] = [{symbol: (size, size, size) for symbol, size in SIZES.items()}]


def main() -> None:
    work, rounds = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 3
    modules, dims = sd15()
    network, module = contract("unet", dims), modules["unet"]
    engines: dict[str, Engine] = {"eager": EagerEngine(network, module)}
    onnx = work / "onnx" / "model.onnx"
    paths = {"direct": work / "fp32" / "openvino_model.xml", "winograd": work / "winograd" / "openvino_model.xml"}
    if not onnx.exists():
        to_onnx(module, network, dims, onnx)
    if not paths["direct"].exists():
        to_openvino(onnx, paths["direct"])
    if not paths["winograd"].exists():
        print("convolutions rewritten, by tile:", dict(to_winograd(onnx, paths["winograd"], network, BOUNDS)))
    for name, path in paths.items():
        before = time.perf_counter(), time.process_time()
        engines[name] = OvEngine(network, path, BOUNDS)
        print(
            f"{name}: opened in {time.perf_counter() - before[0]:.0f} s, {time.process_time() - before[1]:.0f} s busy"
        )
    inputs = random_inputs(network, dims, Case(SIZES, 1.0), torch.Generator().manual_seed(0))
    wanted = engines["eager"].infer(**inputs)["noise_pred"]
    for name in paths:
        got = engines[name].infer(**inputs)["noise_pred"]
        print(f"{name}: relative error {float((got - wanted).norm() / wanted.norm()):.1e}", flush=True)
    least: dict[str, tuple[float, float]] = {}
    for number in range(rounds):
        for name, engine in engines.items():
            before = time.perf_counter(), time.process_time()
            engine.infer(**inputs)
            spent = time.perf_counter() - before[0], time.process_time() - before[1]
            least[name] = min(spent[0], least.get(name, spent)[0]), min(spent[1], least.get(name, spent)[1])
            print(f"round {number}: {name} {spent[0]:.2f} s, {spent[1]:.2f} s busy", flush=True)
    for name, (wall, busy) in least.items():
        ratios = least["eager"][0] / wall, least["eager"][1] / busy
        print(f"least: {name} {wall:.2f} s ({ratios[0]:.2f} times eager), {busy:.2f} s busy ({ratios[1]:.2f})")


if __name__ == "__main__":
    main()
