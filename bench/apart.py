"""A measurement in a process of its own, so that peaks of memory are apart."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from smooth_rt.errors import EngineError

__all__ = ["apart"]

# What Python puts before an error; of the project's own the line says all.
_OWN = re.compile(r"^engines\.errors\.\w+: ")


def apart(module: str, arguments: Sequence[str], failed: Callable[[object], str], stdin: str | None = None) -> Any:
    """What `python -m module` prints last, as JSON.

    Args:
        failed: the message for a process that failed, from its last line, or its exit code where it said nothing.

    Raises:
        EngineError: the process failed.
    """
    home = str(Path(__file__).resolve().parent.parent)
    paths = [home, *filter(None, [os.environ.get("PYTHONPATH")])]
    ran = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )
    if ran.returncode:
        said = ran.stderr.strip().splitlines()
        raise EngineError(failed(_OWN.sub("", said[-1]) if said else ran.returncode))
    return json.loads(ran.stdout.strip().splitlines()[-1])
