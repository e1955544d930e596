"""Does OpenVINO's own cache of compiled models pay at a second start?

    smooth-rt build-engine --backend openvino --output BUNDLE
    python docs/experiments/openvino_cache.py BUNDLE [--rounds 3] [--steps 10]

Each start is a process of its own that opens the bundle and samples one image: without a cache, with a CACHE_DIR that
is filled, and with one that is filled and OpenVINO's CACHE_MODE OPTIMIZE_SIZE, which leaves the weights out; in turns.
Told are the time within `compile_model`, which is all that a cache can save, the whole start, imports included, the
processor's time, and the largest resident set. The start that fills a cache stands apart.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

FORMS: dict[str, dict[str, str]] = {
    "none": {},
    "speed": {"CACHE_MODE": "OPTIMIZE_SPEED"},
    "size": {"CACHE_MODE": "OPTIMIZE_SIZE"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--start", choices=FORMS, help=argparse.SUPPRESS)
    parser.add_argument("--cache", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.start:
        print(json.dumps(_start(options)))
        return
    with tempfile.TemporaryDirectory() as work:
        found: dict[str, list[dict[str, Any]]] = {form: [] for form in FORMS}
        _run(options, "none", work)  # the files are in memory from here on
        for form in list(FORMS)[1:]:
            _tell(f"{form}, filled", [_run(options, form, f"{work}/{form}")])
        for _ in range(options.rounds):
            for form, starts in found.items():
                starts.append(_run(options, form, f"{work}/{form}"))
        for form, starts in found.items():
            _tell(form, starts)
            files = [path for path in Path(work, form).rglob("*") if path.is_file()]
            if files:
                print(f"  {len(files)} files, {sum(path.stat().st_size for path in files) / 2**20:.1f} MiB")
        if len({start["image"] for starts in found.values() for start in starts}) > 1:
            print("the images differ")


def _run(options: argparse.Namespace, form: str, cache: str) -> dict[str, Any]:
    arguments = [str(options.bundle), "--steps", str(options.steps), "--start", form, "--cache", cache]
    ran = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return found


def _start(options: argparse.Namespace) -> dict[str, Any]:
    started = time.perf_counter()
    import openvino
    import torch

    from engines.ov import core
    from smooth_rt.pipeline import SmoothPipeline

    compiles: list[float] = []
    compile_model = openvino.Core.compile_model

    def timed(*given: Any, **named: Any) -> Any:
        begun = time.perf_counter()
        compiled = compile_model(*given, **named)
        compiles.append(time.perf_counter() - begun)
        return compiled

    openvino.Core.compile_model = timed
    if FORMS[options.start]:
        core().set_property({"CACHE_DIR": options.cache})
        core().set_property("CPU", FORMS[options.start])
    pipe = SmoothPipeline.from_engines(options.bundle, "openvino")
    image = pipe(
        "red apple on blue background",
        num_inference_steps=options.steps,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images
    return {
        "compiles": len(compiles),
        "compile_s": sum(compiles),
        "start_s": time.perf_counter() - started,
        "processor_s": time.process_time(),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10,
        "image": hashlib.sha256(torch.as_tensor(image).numpy().tobytes()).hexdigest(),
    }


def _tell(what: str, starts: list[dict[str, Any]]) -> None:
    def told(name: str, unit: str) -> str:
        values = sorted(start[name] for start in starts)
        span = f" ({values[0]:.2f} to {values[-1]:.2f})" if len(values) > 1 else ""
        return f"{statistics.median(values):.2f}{span} {unit}"

    print(
        f"{what}: {starts[0]['compiles']} models compiled in {told('compile_s', 's')}, first image after "
        f"{told('start_s', 's')}, processor {told('processor_s', 's')}, at most {told('peak_mib', 'MiB')}",
        flush=True,
    )


if __name__ == "__main__":
    main()
