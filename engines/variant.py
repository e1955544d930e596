"""A variant: one way of building and running the whole model, and the sizes that it takes.

A bundle holds several: of other backends, precisions and ways of holding the LoRA. What a user asks for in images and
pixels is a `Profile`; what a graph takes, in the contract's symbols, are `Bounds`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    PositiveInt,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from engines.contract import DERIVED, NETWORKS, Dims, Network, NetworkName, contract
from engines.errors import InputError

__all__ = [
    "CONVOLUTIONS",
    "GUIDED",
    "KERNELS",
    "LARGEST",
    "LORA_MODES",
    "PRECISIONS",
    "Bounds",
    "Convolution",
    "Kernels",
    "LoraMode",
    "Order",
    "Place",
    "Precision",
    "Profile",
    "Record",
    "Span",
    "Variant",
    "covers",
    "every_size",
    "few_images",
    "fitting",
    "merged",
]

# Most exact first: what a bundle of several gives to one who names none.
Precision = Literal["fp32", "fp16", "bf16", "int8"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "bf16", "int8")
LoraMode = Literal["fused", "refit", "runtime"]
LORA_MODES: tuple[LoraMode, ...] = ("fused", "refit", "runtime")
Convolution = Literal["direct", "winograd"]
CONVOLUTIONS: tuple[Convolution, ...] = ("direct", "winograd")
Kernels = Literal["backend", "native"]
KERNELS: tuple[Kernels, ...] = ("backend", "native")

# By symbol of the contract (batch, height, width): the least size, the one to be fastest at, the greatest (None: any).
Bounds = dict[str, tuple[int, int, int | None]]

GUIDED: tuple[NetworkName, ...] = ("unet", "text_encoder")  # which take both halves of guidance: two rows an image
LARGEST = 10_000  # images, and pixels a side: more is a slip of the keyboard

_SPAN = re.compile(r"[0-9]{1,9}(:[0-9]{1,9}){0,2}")


class Record(BaseModel):
    """A part of the manifest: frozen, and with no field that this version does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Span(Record):
    """The sizes from `min` to `max` (None: without end), fastest at `opt`. In a manifest it is "min:opt:max".

    Raises:
        InputError: one is missing or no whole number above 0, or they are out of order.
    """

    min: PositiveInt
    opt: PositiveInt
    max: PositiveInt | None

    def __init__(self, **sizes: int | None) -> None:
        try:
            super().__init__(**sizes)
        except ValidationError as error:
            given = ", ".join(f"{name}={value!r}" for name, value in sizes.items())
            raise InputError(
                f"Span({given:.80}): min, opt and max must rise, from 1 on (max None: without end); give for example "
                "Span(min=1, opt=4, max=8)"
            ) from error

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.opt < self.min or (self.max is not None and self.max < self.opt):
            raise ValueError(f"{self} is not in the order min <= opt <= max")
        return self

    @classmethod
    def parse(cls, text: str, name: str) -> Span:
        """Read "4" (that size alone), "1:4" (min and max, fastest at max) or "1:4:32" (min, opt, max).

        Raises:
            InputError: it is none of these, a size is 0, or they are out of order; `name` is what it is said of.
        """
        text = text.strip()
        if not _SPAN.fullmatch(text):
            raise InputError(f"{name}={text}: no size; give one number, min:max or min:opt:max")
        sizes = [int(part) for part in text.split(":")]
        least, most = sizes[0], sizes[-1]
        best = sizes[1] if len(sizes) == 3 else most
        if not 1 <= least <= best <= most:
            raise InputError(f"{name}={text}: min, opt and max must rise, from 1 on; give for example 1:4:8")
        return cls(min=least, opt=best, max=most)

    @property
    def static(self) -> bool:
        """Whether it is one size."""
        return self.min == self.max

    def scaled(self, factor: int) -> tuple[int, int, int | None]:
        """Divided by `factor`, which must divide it."""
        return self.min // factor, self.opt // factor, None if self.max is None else self.max // factor

    def __str__(self) -> str:
        return str(self.min) if self.static else f"{self.min}:{self.opt}:{self.max or '*'}"

    @model_serializer
    def _written(self) -> str:
        return f"{self.min}:{self.opt}:{self.max or '*'}"


def _read_span(value: Any) -> Any:
    """A span as the manifest holds it."""
    if not isinstance(value, str):
        return value
    parts = value.split(":")
    if len(parts) != 3:
        raise ValueError(f"{value!r} is not min:opt:max")
    least, best, most = parts
    return Span(min=int(least), opt=int(best), max=None if most == "*" else int(most))


SpanText = Annotated[Span, BeforeValidator(_read_span)]


class Profile(Record):
    """The requests that engines take: so many images a call, so many pixels high and wide.

    Raises:
        InputError: one is missing or no `Span`.
    """

    batch: SpanText
    height: SpanText
    width: SpanText

    def __init__(self, **spans: Span) -> None:
        try:
            super().__init__(**spans)
        except ValidationError as error:
            given = ", ".join(f"{name}={value}" for name, value in spans.items())
            raise InputError(
                f"Profile({given:.80}): batch, height and width are a Span each; give for example "
                "Profile(batch=Span.parse('1:4', 'batch'), height=…, width=…)"
            ) from error

    def check(self, dims: Dims) -> None:
        """Raise InputError unless a model of these sizes can be asked for all of the profile's images."""
        for name, span in (("batch", self.batch), ("height", self.height), ("width", self.width)):
            most = max(span.opt, span.max or 0)
            if most > LARGEST:
                raise InputError(f"{name}={span}: {most} is too many; give at most {LARGEST}, or leave the end open")
        for name, span in (("height", self.height), ("width", self.width)):
            for side in (span.min, span.opt, span.max):
                if side is not None and side % dims.image_multiple:
                    multiple = dims.image_multiple
                    nearest = max(1, round(side / multiple)) * multiple
                    raise InputError(f"{name}={span}: {side} is no multiple of {multiple}; the nearest is {nearest}")

    def bounds(self, network: Network, dims: Dims) -> list[Bounds]:
        """What `network` is built for. The UNet and the text encoder take both halves of guidance: twice the rows.

        Where the batch is one number there are two bounds of theirs, one for a call with guidance and one for a call
        without, so that both are static.
        """
        rows = [self.batch.scaled(1)]
        if network.name in GUIDED:
            least, best, most = rows[0]
            both = (2 * best, None if most is None else 2 * most)
            rows = [rows[0], (2 * least, *both)] if self.batch.static else [(least, *both)]
        sides = {"height": self.height.scaled(dims.vae_factor), "width": self.width.scaled(dims.vae_factor)}
        return [{symbol: row if symbol == "batch" else sides[symbol] for symbol in network.symbols} for row in rows]

    def __str__(self) -> str:
        return f"batch {self.batch}, height {self.height}, width {self.width}"


def every_size(dims: Dims) -> Profile:
    """Every request that the model takes; of no size in particular, one image of the size it was trained at."""
    unit = dims.image_multiple
    height, width = (Span(min=unit, opt=side, max=None) for side in dims.supported_image_size)
    return Profile(batch=Span(min=1, opt=1, max=None), height=height, width=width)


def few_images(dims: Dims) -> Profile:
    """Up to four images of the size that the model was trained at: for backends that need an end to every size."""
    height, width = (Span(min=side, opt=side, max=side) for side in dims.supported_image_size)
    return Profile(batch=Span(min=1, opt=1, max=4), height=height, width=width)


class Variant(Record):
    """What is built together: every network for one backend, in one precision, with the LoRA held in one way.

    Args:
        backend: one of `select.BACKENDS`, eager left out.
        precision: of the graphs; see `recipes.RECIPES` for what each network gets, and what the backend is told.
        lora_mode: "fused" (into the weights, or no LoRA at all), "refit" (new weights put into the same engine) or
            "runtime" (the strength is an input of the UNet).
        architecture: what the engines run on: `select.architecture`, or a GPU's such as "sm89".
        convolution: "direct", or "winograd": in the graph, 3x3 convolutions take fewer multiplications.
        kernels: "backend", or "native": the UNet computes some of its layers in kernels of this project.
    """

    backend: str
    precision: Precision
    lora_mode: LoraMode
    architecture: str
    convolution: Convolution = "direct"
    kernels: Kernels = "backend"

    @model_serializer(mode="wrap")
    def _written(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without what is as it is where nobody asks for it, so that older keys hold."""
        fields: dict[str, Any] = write(self)
        return {name: value for name, value in fields.items() if value != type(self).model_fields[name].default}

    @property
    def name(self) -> str:
        """Of the folder that holds its graphs."""
        parts = [self.backend, self.precision]
        parts += [] if self.convolution == "direct" else [self.convolution]
        parts += [] if self.kernels == "backend" else [self.kernels]
        parts += [] if self.lora_mode == "fused" else [self.lora_mode]
        parts += [] if self.architecture.startswith("cpu-") else [self.architecture.replace(",", "_")]
        return "-".join(parts)

    def takes_strength(self, name: NetworkName) -> bool:
        """Whether the LoRA's strength is an input of that network."""
        return self.lora_mode == "runtime" and name in ("unet", *DERIVED)

    def network(self, name: NetworkName, dims: Dims) -> Network:
        """The tensors of a network as this variant has it."""
        return contract(name, dims, lora_strength=self.takes_strength(name))


class Order(Record):
    """A variant to be built, the requests that it shall take, and what of `DERIVED` it shall have."""

    variant: Variant
    profiles: tuple[Profile, ...]
    gradients: tuple[NetworkName, ...] = ()

    @property
    def networks(self) -> tuple[NetworkName, ...]:
        """Everything that is to be built, in order."""
        return (*NETWORKS, *(name for name in DERIVED if name in self.gradients))


class Place(Record):
    """Where a torch parameter lies in a graph: the name of its constant there, and whether that is its transpose."""

    name: str
    transposed: bool


def covers(bounds: Bounds, sizes: Mapping[str, int]) -> bool:
    """Whether sizes lie in the bounds, but for a batch that is smaller: it is filled up."""
    return all(
        (least <= sizes[symbol] or symbol == "batch") and (most is None or sizes[symbol] <= most)
        for symbol, (least, _, most) in bounds.items()
    )


def fitting(profiles: Sequence[Bounds], sizes: Mapping[str, int]) -> int | None:
    """The index of the tightest of `profiles` that covers `sizes`, or None.

    Tightest is the one with the least waste: fewest rows to fill up, then the smallest greatest size.
    """
    found = [index for index, bounds in enumerate(profiles) if covers(bounds, sizes)]

    def waste(index: int) -> tuple[int, float]:
        bounds = profiles[index]
        filled = max(0, bounds["batch"][0] - sizes["batch"]) if "batch" in bounds else 0
        return filled, math.prod(math.inf if most is None else most for _, _, most in bounds.values())

    return min(found, key=waste, default=None)


def merged(profiles: Sequence[Profile], more: Sequence[Profile]) -> list[Profile]:
    """Both lists, each profile once."""
    return list(dict.fromkeys([*profiles, *more]))
