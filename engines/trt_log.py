"""TensorRT's logger: keeps what went wrong for the one line of an error, and prints nothing."""

from __future__ import annotations

from typing import Any

__all__ = ["quiet_log"]


def quiet_log(trt: Any) -> Any:
    """A logger of the module `trt`, tensorrt or tensorrt_rtx, with `fault()`: the last error that it was told."""

    class Log(trt.ILogger):  # type: ignore[misc]
        """Keeps what went wrong, and prints nothing."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.faults: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.faults.append(" ".join(message.split()))

        def fault(self) -> str:
            """The last of it, shortened."""
            return self.faults[-1][:200] if self.faults else "it did not say why"

    return Log()
