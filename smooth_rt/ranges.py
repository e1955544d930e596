"""What can be said of an option before a model is read: one table, asked by the commands and by Python's entry points.

What depends on the model (multiples of the VAE's factor, the number of timesteps) is in `smooth_rt.tasks.checks` and
`smooth_rt.schedule`.
"""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Callable, Sequence
from functools import partial
from numbers import Integral, Real
from typing import Any

from engines.contract import LARGEST_STRENGTH, gradients_named
from engines.select import check_backend
from engines.variant import CONVOLUTIONS, KERNELS, LARGEST, LORA_MODES, PRECISIONS
from smooth_rt.errors import InputError

__all__ = [
    "EDIT_METHODS",
    "INVERSION_METHODS",
    "MAX_SIDE",
    "MOST_IMAGES",
    "OUTPUT_TYPES",
    "RANGES",
    "RESCHEDULES",
    "as_whole",
    "check",
    "check_count",
    "check_dense",
    "check_images",
    "check_side",
    "check_text",
    "choice",
    "seeds_from",
    "shown",
]

MAX_SIDE = LARGEST  # pixels
MOST_IMAGES = LARGEST  # more in one call is a slip of the keyboard: the noise alone would fill the memory
LARGEST_GUIDANCE = 1000  # far over any that leaves a picture; its square goes into gradients
SHOWN = 60  # characters of a value, in a message
INVERSION_METHODS = (
    "ddim", "ddim-without-text", "negative-prompt", "null-text", "direct", "fixed-point", "spdinv", "easyinv", "edict",
    "belm",
)  # fmt: skip
RESCHEDULES = ("pixels", "lpips")
EDIT_METHODS = ("eq15", "sdedit")
OUTPUT_TYPES = ("pil", "np", "pt", "latent")


def check(**options: Any) -> tuple[Any, ...]:
    """Check options by their names, which are those of RANGES.

    Returns:
        The values in the order given, with Python's own numbers in the place of numpy's.

    Raises:
        InputError: a value is out of its range; the line names the option. EngineError: there is no such engine.
    """
    return tuple(RANGES[name](name, value) for name, value in options.items())


def choice(name: str, value: Any, known: Sequence[str]) -> str:
    """One of `known`; underscores may stand for dashes."""
    found = value.replace("_", "-") if isinstance(value, str) else value
    if not isinstance(found, str) or found not in known:
        raise InputError(f"{name}={shown(value)} is unknown; it is one of {', '.join(known)}")
    return found


def shown(value: Any) -> str:
    """`value` as a message shows it: a long one is cut."""
    if isinstance(value, int) and value.bit_length() > 4 * SHOWN:  # Python refuses to spell some of them out
        return f"a number of {value.bit_length()} bits"
    said = " ".join(repr(value).split())  # an array's has several lines
    return said if len(said) <= SHOWN else f"{said[:SHOWN]}..."


def as_whole(value: Any) -> int | None:
    """A whole number, Python's or numpy's; None if it is none. A float is none, and neither is a bool."""
    return int(value) if not isinstance(value, bool) and isinstance(value, Integral) else None


def check_images(name: str, each: int, count: int, of: str) -> None:
    """Refuse `name=each` where it is asked for with `count` prompts, and makes too many images in all."""
    if each * count > MOST_IMAGES:
        raise InputError(
            f"{name}={each}: makes {each * count} images with {count} {of}; give at most {MOST_IMAGES} in all"
        )


def check_dense(name: str, tensor: Any) -> None:
    """Refuse a torch tensor whose values do not lie in a plain array: sparse, nested, or without any ("meta")."""
    if tensor.is_meta:
        raise InputError(f"{name}: a tensor on 'meta' has no values; give one on the CPU")
    if tensor.is_nested or str(tensor.layout) != "torch.strided":
        raise InputError(f"{name}: a nested or sparse tensor; give a dense one, such as tensor.to_dense()")


def check_text(name: str, value: str) -> None:
    """Refuse what no tokenizer takes: bytes that are not UTF-8 reach Python as lone surrogates."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        where = f"character {error.start + 1}"
        raise InputError(f"{name}: {where} is not valid UTF-8; type the prompt as UTF-8") from error


def seeds_from(seed: int, count: int) -> range:
    """`count` seeds, the first of which is `seed`.

    Raises:
        InputError: one of them is not in -2**63..2**64 - 1, which torch takes.
    """
    check(seed=seed)
    check(seed=seed + count - 1)
    return range(seed, seed + count)


def _number(value: Any) -> float:
    """A number, Python's or numpy's, as a float; NaN if it is none."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return math.nan
    try:
        return float(value)
    except OverflowError:  # a whole number may be too large for any float
        return math.inf


def _steps(name: str, value: Any) -> int:
    found = as_whole(value)
    if found is None or found < 1:
        raise InputError(f"{name}={shown(value)}: give a whole number of at least 1")
    return found


def check_count(name: str, value: Any, least: int = 1) -> int:
    """A whole number from `least` to MOST_IMAGES.

    Raises:
        InputError: it is none; the line names the option.
    """
    found = as_whole(value)
    if found is None or not least <= found <= MOST_IMAGES:
        raise InputError(f"{name}={shown(value)}: give a whole number from {least} to {MOST_IMAGES}")
    return found


def _batch_size(name: str, value: Any) -> int | str:
    if isinstance(value, str) and value == "auto":
        return value
    found = as_whole(value)
    if found is None or found < 1:
        raise InputError(f"{name}={shown(value)}: give a whole number of at least 1, or 'auto'")
    return found


def check_side(name: str, value: Any) -> int | None:
    """Pixels, as far as no model is asked; None is the model's own.

    Raises:
        InputError: it is no such number; the line names the option.
    """
    if value is None:
        return None
    found = as_whole(value)
    if found is None or found < 1:
        raise InputError(f"{name}={shown(value)}: give a whole number of pixels, at least 1")
    if found > MAX_SIDE:
        raise InputError(f"{name}={shown(value)}: give at most {MAX_SIDE} pixels a side")
    return found


def _guidance(name: str, value: Any) -> float:
    found = _number(value)
    if not abs(found) <= LARGEST_GUIDANCE:  # so written that NaN is refused too
        bound = LARGEST_GUIDANCE
        raise InputError(
            f"{name}={shown(value)}: give a number from -{bound} to {bound}, such as 7.5 (1 is no guidance)"
        )
    return found


def _fraction(name: str, value: Any) -> float:
    found = _number(value)
    if not 0 <= found <= 1:
        raise InputError(f"{name}={shown(value)}: give a number from 0 to 1")
    return found


def _lora_strength(name: str, value: Any) -> float:
    found = _number(value)
    if not abs(found) <= LARGEST_STRENGTH:
        raise InputError(f"{name}={shown(value)}: give a number from -100 to 100; 1.0 is the LoRA as trained")
    return found


def _seed(name: str, value: Any) -> int:
    found = as_whole(value)
    if found is None or not -(2**63) <= found < 2**64:
        raise InputError(f"{name}={shown(value)}: does not fit into 64 bits; give a whole number that does")
    return found


def _seeds(name: str, value: Any) -> tuple[int, ...]:
    return tuple(_seed(name, one) for one in value)


def _engine(name: str, value: Any) -> str:
    """A backend or "auto"; or several with commas between, where a command takes several."""
    if not isinstance(value, str):
        raise InputError(f"{name}={shown(value)}: give the name of one, such as 'openvino', or 'auto'")
    for one in value.split(","):
        if one.strip() not in ("", "auto"):
            check_backend(one.strip())
    return value


def _source(name: str, value: Any) -> str | os.PathLike[str]:
    """A path or a name; whether something is there is found out by who reads it."""
    if not isinstance(value, (str, os.PathLike)):
        raise InputError(f"{name}={shown(value)}: give a path or a name as a str")
    said = os.fspath(value)
    if not isinstance(said, str) or not said.strip():
        raise InputError(f"{name}={shown(value)}: empty; give a path or a name")
    try:
        os.stat(said)
    except ValueError as error:
        raise InputError(f"{name}={shown(value)}: holds a null character; give a path or a name") from error
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise InputError(f"{name}={shown(said)}: {error.strerror}; give a shorter path") from error
    return value


def _callback(name: str, value: Any) -> Any:
    if value is not None and not callable(value):
        raise InputError(f"{name}={shown(value)}: give a function of (pipe, step, timestep, tensors), or None")
    return value


def _precision(name: str, value: Any) -> str | None:
    return None if value is None else choice(name, value, PRECISIONS)


def _gradients(name: str, value: Any) -> list[str]:
    """The words of a list, or of one text with commas between."""
    words = value.split(",") if isinstance(value, str) else value
    if not isinstance(words, Sequence) or not all(isinstance(word, str) for word in words):
        raise InputError(f"{name}={shown(value)}: name them, as 'text' or 'text,sample'")
    found = [word.strip() for word in words if word.strip()]
    gradients_named(found)
    return found


def _output(_: str, value: Any) -> Any:
    from smooth_rt.writers import check_output

    return check_output(value)


def _or_none(name: str, value: Any, kind: Callable[[str, Any], Any]) -> Any:
    return None if value is None else kind(name, value)


RANGES: dict[str, Callable[[str, Any], Any]] = {
    "batch": check_count,
    "batch_size": _batch_size,
    "bundle": _source,
    "callback_on_step_end": _callback,
    "config": partial(_or_none, kind=_source),
    "convolution": partial(_or_none, kind=partial(choice, known=CONVOLUTIONS)),
    "edit_method": partial(choice, known=EDIT_METHODS),
    "edit_strength": _fraction,
    "engine": _engine,
    "frames": partial(check_count, least=2),
    "gradients": _gradients,
    "guidance_scale": _guidance,
    "height": check_side,
    "kernels": partial(_or_none, kind=partial(choice, known=KERNELS)),
    "lora": partial(_or_none, kind=_source),
    "lora_mode": partial(_or_none, kind=partial(choice, known=LORA_MODES)),
    "lora_strength": _lora_strength,
    "model": _source,
    "num_images_per_prompt": check_count,
    "num_inference_steps": _steps,
    "output": _output,
    "precision": _precision,
    "output_type": partial(choice, known=OUTPUT_TYPES),
    "reschedule_passes": partial(_or_none, kind=check_count),
    "reschedule": partial(_or_none, kind=partial(choice, known=RESCHEDULES)),
    "seed": _seed,
    "seeds": _seeds,
    "width": check_side,
}
