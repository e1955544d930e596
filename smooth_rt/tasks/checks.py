"""Checks of what a caller hands a task that need the model's sizes, or are of prompts and tensors.

Each says in one line what is wrong and what would be right. `smooth_rt.ranges` checks what needs no model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Generator, Tensor

from engines.contract import Dims
from engines.machine import available_memory
from engines.staging import said_size
from smooth_rt.errors import InputError
from smooth_rt.ranges import check_dense, check_side, check_text, shown
from smooth_rt.text_files import without_marks

if TYPE_CHECKING:
    from smooth_rt.pipeline import SmoothPipeline

__all__ = [
    "answer",
    "as_prompts",
    "embeds",
    "image_side",
    "image_size",
    "latents",
    "memory",
    "one_each",
    "per_image",
    "rows",
]


def as_prompts(prompts: str | Sequence[str], name: str = "prompt") -> list[str]:
    """One prompt or many as a list that is not empty; without byte order marks, which come from text files."""
    found = [prompts] if isinstance(prompts, str) else list(prompts) if isinstance(prompts, Sequence) else None
    if found is None or not all(isinstance(prompt, str) for prompt in found):
        raise InputError(f"{name}: give a str or a list of str")
    if not found:
        raise InputError(f"{name}: the list is empty; give at least one prompt (the empty string is one)")
    for prompt in found:
        check_text(name, prompt)
    return [without_marks(prompt) for prompt in found]


def one_each(prompts: str | Sequence[str] | None, count: int, name: str, of: str) -> list[str]:
    """As many prompts as there are `of` (images, prompts); a single one serves them all, None is the empty one."""
    found = as_prompts("" if prompts is None else prompts, name)
    if len(found) == 1:
        found = found * count
    if len(found) != count:
        raise InputError(f"{name}: {len(found)} for {count} {of}; give one for all or one each")
    return found


def image_size(
    height: int | None, width: int | None, dims: Dims, default: tuple[int, int] | None = None
) -> tuple[int, int]:
    """Height and width in pixels; None is the `default`, or the size that the model was trained at."""
    own = default or dims.image_size
    return image_side("height", height, dims, own[0]), image_side("width", width, dims, own[1])


def image_side(name: str, value: int | None, dims: Dims, default: int | None = None) -> int:
    """Return a side in pixels; None is the `default`, or the height of the images that the model was trained on.

    Raises:
        InputError: it is not a multiple of `dims.image_multiple`. diffusers' UNets take other sides as well, but
            engines do not.
    """
    given = check_side(name, value)
    side = given or default or dims.image_size[0]
    multiple = dims.image_multiple
    if side % multiple:
        nearest = max(1, (side + (multiple - 1) // 2) // multiple) * multiple
        if not given:
            raise InputError(f"{name}: its default is {side}; name a multiple of {multiple}, such as {nearest}")
        raise InputError(f"{name}={side}: give a multiple of {multiple}; the nearest is {nearest}")
    return side


def memory(height: int, width: int, channels: int) -> None:
    """Refuse an image of so many pixels that what its decoder holds at once, at the least, is not there.

    Args:
        channels: see `PipelineConfig.decoder_channels`.
    """
    needed, there = 4 * height * width * channels, available_memory()
    if there is not None and needed > there:
        raise InputError(
            f"height={height}, width={width}: an image takes more than {said_size(needed)} of memory and "
            f"{said_size(there)} are there; give fewer pixels"
        )


def latents(pipe: SmoothPipeline, value: Tensor, count: int, height: int | None, width: int | None) -> Tensor:
    """Latents [count, C, H/f, W/f], float32, finite, of images that `pipe` can make (`image_size`). Where height or
    width is None, the latents say it."""
    dims = pipe.dims
    value = _floats(value, "latents")
    rows, columns = (None if side is None else side // dims.vae_factor for side in (height, width))
    wanted: tuple[Any, ...] = (count, dims.latent_channels, rows or "h", columns or "w")
    fits = value.ndim == 4 and all(isinstance(w, str) or s == w for s, w in zip(value.shape, wanted, strict=True))
    if not fits or any(side < 1 or side % dims.latent_multiple for side in value.shape[2:]):
        sides = f", h and w multiples of {dims.latent_multiple}"
        raise InputError(f"latents: shape {list(value.shape)}; give [{', '.join(map(str, wanted))}]{sides}")
    pipe.image_size(*(side * dims.vae_factor for side in value.shape[2:]))
    return value


def rows(dims: Dims, **tensors: Tensor) -> int:
    """How many images all of these are of: `latents` [N, C, h, w], `prompt_embeds` and `negative_prompt_embeds`
    [N, L, D], and whatever else has a row for each. That of calls in a loop, so it looks at no values.

    Raises:
        InputError: one is no dense tensor, of another type or shape, or of other rows than the first.
    """
    count = 0
    first = next(iter(tensors))
    for name, value in tensors.items():
        if not isinstance(value, Tensor) or not value.ndim or not len(value):
            said = f"shape {list(value.shape)}" if isinstance(value, Tensor) else shown(value)
            raise InputError(f"{name}: {said} is no torch tensor with a row for each image; give one")
        check_dense(name, value)
        wanted: tuple[Any, ...] | None = None  # of the rest the engine says what it takes
        if name == "latents":
            wanted = (dims.latent_channels, *(value.shape[2:] if value.ndim == 4 else ("h", "w")))
        elif name.endswith("embeds"):
            wanted = (dims.tokens, dims.text_width)
        if wanted is not None and (value.dtype != torch.float32 or tuple(value.shape[1:]) != wanted):
            shape = ", ".join(map(str, ("N", *wanted)))
            raise InputError(f"{name}: {value.dtype} of shape {list(value.shape)}; give a float32 tensor [{shape}]")
        count = count or len(value)
        if len(value) != count:
            raise InputError(f"{name}: {len(value)} rows for {first} of {count}; give one for each image")
    return count


def embeds(value: Tensor, count: int | None, dims: Dims, name: str) -> Tensor:
    """Text embeddings [count, L, D], float32, finite; any positive count where it is None."""
    wanted = ("N" if count is None else count, dims.tokens, dims.text_width)
    value = _floats(value, name)
    if value.ndim != 3 or not len(value) or any(w != "N" and s != w for s, w in zip(value.shape, wanted, strict=True)):
        raise InputError(f"{name}: shape {list(value.shape)}; give [{', '.join(map(str, wanted))}]")
    return value


def answer(value: Any, latents: Tensor) -> Tensor:
    """The latents to go on from after a callback returned `value`: its own, or `latents`."""
    name = "callback_on_step_end"
    if value is None:
        return latents
    if not isinstance(value, Mapping) or not set(value) <= {"latents"}:
        kind = shown(list(value)) if isinstance(value, Mapping) else type(value).__name__
        raise InputError(f"{name}: returned {kind}; return None or a dict of latents alone")
    if "latents" not in value:
        return latents
    found = _floats(value["latents"], f"{name}: latents returned")
    if found.shape != latents.shape:
        raise InputError(f"{name}: latents returned: shape {list(found.shape)}; give {list(latents.shape)}")
    return found


def _floats(value: Any, name: str) -> Tensor:
    """A dense float32 tensor of finite values, on the CPU."""
    if not isinstance(value, Tensor) or value.dtype != torch.float32:
        raise InputError(f"{name}: {getattr(value, 'dtype', type(value).__name__)}; give a float32 torch tensor")
    check_dense(name, value)
    found: Tensor = value.detach().cpu()
    if not bool(torch.isfinite(found).all()):
        raise InputError(f"{name}: NaN or infinite values; give finite ones")
    return found


def per_image(generator: Generator | Sequence[Generator] | None, count: int) -> list[Generator | None]:
    """The generator of each image; a single one is drawn from image after image, None is torch's own."""
    if generator is None or isinstance(generator, Generator):
        found: list[Generator | None] = [generator] * count
    else:
        found = list(generator) if isinstance(generator, Sequence) else [generator]
    if len(found) != count:
        raise InputError(f"generator: {len(found)} for {count} images; give one for all or one each")
    for one in found:
        if one is not None and (not isinstance(one, Generator) or one.device.type != "cpu"):
            raise InputError("generator: give torch.Generator on the CPU, so that every engine starts from one noise")
    return found
