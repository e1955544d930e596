"""Headers of safetensors files: the names, shapes and types of tensors, read without their values."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from smooth_rt.errors import ModelError, reason

__all__ = ["Header", "read_header"]

# A repository that was cloned without Git LFS holds a text file of this form in place of each weight file.
LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class Header:
    """Contents of a safetensors header.

    Args:
        shapes: shape of each tensor by its name.
        dtypes: type of each tensor by its name, as the format spells it ("F16").
        metadata: the file's own metadata.
    """

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """Read the header of the safetensors file at `path`.

    Raises:
        ModelError: the file is truncated, damaged or a Git LFS pointer.
    """
    try:
        with path.open("rb") as file:
            start = file.read(len(LFS_POINTER))
        if start == LFS_POINTER:
            raise ModelError(f"{path}: a Git LFS pointer, not the weights; run `git lfs pull` or download it again")
        with safe_open(path, "pt") as tensors:
            slices = {key: tensors.get_slice(key) for key in tensors.keys()}  # noqa: SIM118 (no mapping)
            return Header(
                {key: tuple(one.get_shape()) for key, one in slices.items()},
                {key: str(one.get_dtype()) for key, one in slices.items()},
                tensors.metadata() or {},
            )
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path}: truncated or damaged ({reason(error)}); download it again") from error
