"""Compiles one exported program to native code. `to_inductor` starts it as a process of its own, once a network.

In the caller's process the compiler's caches, which torch remembers the place of, would have to stay; what it prints
could not be caught; an interruption would leave the C++ compiler running; and a crash would be the caller's.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
from pathlib import Path
from typing import Any

JOB, PROGRAM, RESULT = "job.json", "program.pt2", "result.json"


def main(folder: Path) -> None:
    """Read the job and the program in `folder`; write the package that the job names there, and what went wrong."""
    threading.Thread(target=_end_with_the_caller, args=(folder,), daemon=True).start()
    job: dict[str, Any] = json.loads((folder / JOB).read_text(encoding="utf-8"))
    try:
        _compile(folder, job)
        fault = None
    except Exception as error:
        fault = str(error) or type(error).__name__
    (folder / RESULT).write_text(json.dumps({"fault": fault}), encoding="utf-8")


def _compile(folder: Path, job: dict[str, Any]) -> None:
    import torch
    from torch._inductor import aot_compile
    from torch._inductor.package.package import package_aoti

    program = torch.export.load(folder / PROGRAM)
    (folder / PROGRAM).unlink()  # as large as the weights, which are in memory now
    if job["device"] != "cpu":
        from torch.export.passes import move_to_device_pass

        program = move_to_device_pass(program, job["device"])
    args, kwargs = program.example_inputs
    module = program.module()
    del program
    if job["precision"] == "fp32":  # by this the compiler chooses kernels, see `engines.tf32`; the process is our own
        torch.backends.cudnn.allow_tf32 = False
        torch.set_float32_matmul_precision("highest")
    with torch.no_grad():
        files: Any = aot_compile(module, args, kwargs, options=job["options"])
    # Without the sources: they are not needed to run, and hold this machine's folders.
    kept = [file for file in files if not str(file).endswith(".cpp")]
    package_aoti(str(folder / job["name"]), {"model": kept})


def _end_with_the_caller(folder: Path) -> None:
    """The caller holds our standard input open for as long as it lives, even if it is killed."""
    while os.read(0, 1):
        pass
    shutil.rmtree(folder, ignore_errors=True)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
