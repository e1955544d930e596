"""What the system or a library said, to stand in a line of ours."""

from __future__ import annotations

__all__ = ["reason"]


def reason(error: BaseException) -> str:
    """On one line, without the number and the path that an OSError shows; the type where nothing was said."""
    said = error.strerror if isinstance(error, OSError) else None
    return " ".join((said or str(error) or type(error).__name__).split())
