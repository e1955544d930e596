"""Every network's tensors: name, dtype, axes. The one table that export, engines and tests read.

An axis is a number (fixed by the model) or a symbol, perhaps with a factor: an image is `vae_factor * height` pixels
high where its latent is `height` high. Names follow diffusers.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Literal

from engines.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "BLOCKS",
    "DERIVED",
    "FEATURES",
    "GRADIENTS",
    "LARGEST_STRENGTH",
    "LORA_STRENGTH",
    "NETWORKS",
    "OF",
    "TEXT",
    "WRT",
    "Axis",
    "Dims",
    "Network",
    "NetworkName",
    "TensorSpec",
    "contract",
    "derived_contract",
    "gradient_word",
    "gradients_named",
    "said_gradients",
    "undifferentiated",
]

NetworkName = Literal[
    "text_encoder",
    "unet",
    "vae_encoder",
    "vae_decoder",
    "unet_vjp_text",
    "unet_vjp_sample",
    "unet_vjp",
    "unet_up_blocks_0",
    "unet_up_blocks_1",
    "unet_up_blocks_2",
    "unet_up_blocks_3",
    "unet_up_blocks_0_vjp",
    "unet_up_blocks_1_vjp",
    "unet_up_blocks_2_vjp",
    "unet_up_blocks_3_vjp",
]
# Those that every bundle has.
NETWORKS: tuple[NetworkName, ...] = ("text_encoder", "unet", "vae_encoder", "vae_decoder")
# The features within the UNet: the outputs of its up blocks, called as diffusers calls those, of which a Stable
# Diffusion has four. Each has a network that ends there, since what comes after is not wanted, and one of its gradient.
BLOCKS: dict[str, tuple[NetworkName, NetworkName]] = {
    "up_blocks.0": ("unet_up_blocks_0", "unet_up_blocks_0_vjp"),
    "up_blocks.1": ("unet_up_blocks_1", "unet_up_blocks_1_vjp"),
    "up_blocks.2": ("unet_up_blocks_2", "unet_up_blocks_2_vjp"),
    "up_blocks.3": ("unet_up_blocks_3", "unet_up_blocks_3_vjp"),
}
# The block that drag editing follows, the last but one: of SD1.x that is `up_blocks.2`, the "UNet feature 3" of
# DragDiffusion (arXiv 2306.14435).
FEATURES = "features"
# What is made of the UNet and a bundle may have beside `NETWORKS`, in the order that it is built in, each a network of
# its own so that one that is not asked for costs nothing: by the tensor of the UNet that it ends at. Eager has them by
# autograd, a bundle those that it was built with.
OF: dict[NetworkName, str] = {
    **{forward: block for block, (forward, _) in BLOCKS.items()},
    "unet_vjp_text": "noise_pred",
    "unet_vjp_sample": "noise_pred",
    "unet_vjp": "noise_pred",
    **{gradient: block for block, (_, gradient) in BLOCKS.items()},
}
DERIVED: tuple[NetworkName, ...] = tuple(OF)
# Those that are gradients of that tensor: by the inputs that they are taken with respect to.
WRT: dict[NetworkName, tuple[str, ...]] = {
    "unet_vjp_text": ("encoder_hidden_states",),
    "unet_vjp_sample": ("sample",),
    "unet_vjp": ("sample", "encoder_hidden_states"),
    **{gradient: ("sample",) for _, gradient in BLOCKS.values()},
}
# What a user calls them. The word `FEATURES` alone is the block that it stands for.
GRADIENTS: dict[str, tuple[NetworkName, ...]] = {
    "text": ("unet_vjp_text",),
    "sample": ("unet_vjp_sample",),
    "both": ("unet_vjp",),
    **{f"{FEATURES}:{block}": networks for block, networks in BLOCKS.items()},
}
TEXT = "encoder_hidden_states"  # the input that the two halves of a call with guidance differ in
LORA_STRENGTH = "lora_strength"  # the input of a UNet whose LoRA takes its strength as it runs
LARGEST_STRENGTH = 100.0  # of a LoRA: beyond it nothing of the model is left


@dataclass(frozen=True)
class Dims:
    """The sizes of one model that its tensors depend on; nothing in the project hard-codes 512, 8 or 77.

    Args:
        tokens: L, the tokenizer's `model_max_length`.
        text_width: D, the width of `encoder_hidden_states`.
        vocabulary: number of token ids.
        latent_channels: channels of the latent (4 for SD1.x).
        image_channels: channels of the image (3).
        vae_factor: f, pixels of the image a side of a latent cell.
        latent_multiple: the UNet halves the latent this many-fold, so latent sides are multiples of it.
        sample_size: the latent height that the model was trained at, and the width unless `sample_width` is another.
        up_channels: of the output of each of the UNet's up blocks, in order: 1280, 1280, 640 and 320 for SD1.x. None
            where they are not known.
        sample_width: the latent width that the model was trained at. None where it is that of a square.
    """

    tokens: int
    text_width: int
    vocabulary: int
    latent_channels: int
    image_channels: int
    vae_factor: int
    latent_multiple: int
    sample_size: int
    up_channels: tuple[int, ...] | None = None
    sample_width: int | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            size = getattr(self, field.name)
            if size is not None and min(size if isinstance(size, tuple) else (size,), default=1) < 1:
                raise ValueError(f"{field.name}={size}: a size is at least 1")

    @property
    def image_multiple(self) -> int:
        """Image sides are multiples of this number of pixels."""
        return self.vae_factor * self.latent_multiple

    @property
    def latent_size(self) -> tuple[int, int]:
        """Height and width of the latents that the model was trained at."""
        return self.sample_size, self.sample_width or self.sample_size

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels of the images that the model was trained at: the default of a request."""
        height, width = self.latent_size
        return height * self.vae_factor, width * self.vae_factor

    @property
    def supported_latent_size(self) -> tuple[int, int]:
        """`latent_size` rounded down to multiples of `latent_multiple`, at least one of them: 60x80 becomes 56x80."""
        unit = self.latent_multiple
        height, width = (max(1, side // unit) * unit for side in self.latent_size)
        return height, width

    @property
    def supported_image_size(self) -> tuple[int, int]:
        """Height and width in pixels of `supported_latent_size`: what engines are built for and verified at."""
        height, width = self.supported_latent_size
        return height * self.vae_factor, width * self.vae_factor

    @property
    def up_blocks(self) -> int:
        """How many up blocks the UNet has: each but the last doubles the sides."""
        return self.latent_multiple.bit_length()


@dataclass(frozen=True)
class Axis:
    """A size that a caller chooses: `factor * symbol / divisor`, a whole number at every size that is allowed."""

    symbol: str
    factor: int = 1
    divisor: int = 1

    def of(self, size: int) -> int:
        """The axis's size where the symbol has that size."""
        return self.factor * size // self.divisor

    def __str__(self) -> str:
        named = self.symbol if self.factor == 1 else f"{self.factor}*{self.symbol}"
        return named if self.divisor == 1 else f"{named}/{self.divisor}"


@dataclass(frozen=True)
class TensorSpec:
    """One tensor: its name, torch dtype name, axes and, where a value outside would be nonsense, its range.

    `limits` are the least and the greatest value, and `mend` what to do about one outside. Token ids have them because
    OpenVINO reads past an embedding table without a word. One row of a `shared` input may serve the whole batch.
    """

    name: str
    dtype: str
    axes: tuple[int | Axis, ...]
    limits: tuple[float, float] | None = None
    shared: bool = False
    mend: str = ""

    @property
    def axis_names(self) -> tuple[int | str, ...]:
        """What a graph calls each axis. The rows of a shared input have a name of their own: they may be one."""
        rows = f"{self.name}s"
        named = (axis if isinstance(axis, int) else str(axis) for axis in self.axes)
        return tuple(rows if self.shared and name == "batch" else name for name in named)

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape where each symbol has the given size."""
        return tuple(a if isinstance(a, int) else a.of(sizes[a.symbol]) for a in self.axes)

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype} [{', '.join(str(a) for a in self.axes)}]"


@dataclass(frozen=True)
class Network:
    """One network's inputs, in order, and outputs, in order. `multiples`: what each symbol's size is a multiple of.
    `within` are tensors on the way to the outputs, in order, that other networks are cut off at."""

    name: NetworkName
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    multiples: Mapping[str, int]
    within: tuple[TensorSpec, ...] = ()

    @property
    def symbols(self) -> tuple[str, ...]:
        """The symbols of the inputs' axes, in order of appearance."""
        seen = [a.symbol for spec in self.inputs for a in spec.axes if isinstance(a, Axis)]
        return tuple(dict.fromkeys(seen))

    def bind(self, inputs: Mapping[str, Tensor]) -> dict[str, int]:
        """The size of each symbol, read from `inputs`.

        Raises:
            InputError: a tensor is missing, unknown, of another dtype or rank, holds a value outside its range, or its
                sizes contradict the contract.
        """
        names = [spec.name for spec in self.inputs]
        for name in inputs:
            if name not in names:
                raise InputError(f"{self.name}: unknown input {name!r}; it takes {', '.join(names)}")
        sizes: dict[str, int] = {}
        for spec in self.inputs:
            if spec.name not in inputs:
                raise InputError(f"{self.name}: input {spec.name!r} is missing; it takes {', '.join(names)}")
            tensor = inputs[spec.name]
            dtype = str(tensor.dtype).removeprefix("torch.")
            if dtype != spec.dtype:
                raise InputError(f"{self.name}: {spec.name} is {dtype}, not {spec.dtype}; convert it first")
            self._bind_shape(spec, tuple(tensor.shape), sizes)
            if spec.limits is not None and tensor.numel():
                low, high = spec.limits
                for value in (tensor.min().item(), tensor.max().item()):
                    if not low <= value <= high:  # so written that NaN is refused too
                        raise InputError(f"{self.name}: {spec.name} holds {value}, outside {low}..{high}; {spec.mend}")
        return sizes

    def _bind_shape(self, spec: TensorSpec, shape: tuple[int, ...], sizes: dict[str, int]) -> None:
        wanted = f"{self.name}: {spec.name} has shape {list(shape)}, not [{', '.join(str(a) for a in spec.axes)}]"
        if len(shape) != len(spec.axes):
            raise InputError(f"{wanted}; give {len(spec.axes)} axes")
        for size, axis in zip(shape, spec.axes, strict=True):
            if isinstance(axis, int):
                if size != axis:
                    raise InputError(f"{wanted}; {size} should be {axis}")
                continue
            multiple = axis.of(self.multiples.get(axis.symbol, 1))
            if size < 1 or size % multiple:
                raise InputError(f"{wanted}; {size} is not a positive multiple of {multiple}")
            bound = sizes.setdefault(axis.symbol, size * axis.divisor // axis.factor)
            if axis.of(bound) != size:
                raise InputError(f"{wanted}; another input has {axis.symbol}={bound}")


def contract(name: NetworkName, dims: Dims, *, lora_strength: bool = False) -> Network:
    """The tensors of network `name` for a model of sizes `dims`; `Variant.network` gives those of a variant.

    Args:
        lora_strength: whether the LoRA's strength is an input of the UNet: 1 is as trained, 0 is none, each row's own
            or one for all.

    Raises:
        InputError: the network ends at a block that the UNet lacks, or whose sizes `dims` does not know.
    """
    if name in OF:
        return derived_contract(contract("unet", dims, lora_strength=lora_strength), name)
    batch, height, width = Axis("batch"), Axis("height"), Axis("width")
    latent: tuple[int | Axis, ...] = (batch, dims.latent_channels, height, width)
    pixels = (Axis("height", dims.vae_factor), Axis("width", dims.vae_factor))
    image: tuple[int | Axis, ...] = (batch, dims.image_channels, *pixels)
    text: tuple[int | Axis, ...] = (batch, dims.tokens, dims.text_width)
    f32, i32, i64 = "float32", "int32", "int64"
    tokenizer = "use the model's own tokenizer"
    limits = (-LARGEST_STRENGTH, LARGEST_STRENGTH)
    strength = TensorSpec(LORA_STRENGTH, f32, (batch,), limits, shared=True, mend="1 is the LoRA as trained")
    # int32 ids: what diffusers' ONNX pipeline feeds and OpenVINO's takes too.
    tensors: dict[NetworkName, tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]] = {
        "text_encoder": (
            (TensorSpec("input_ids", i32, (batch, dims.tokens), (0, dims.vocabulary - 1), mend=tokenizer),),
            (TensorSpec("last_hidden_state", f32, text),),
        ),
        "unet": (
            (
                TensorSpec("sample", f32, latent),
                TensorSpec("timestep", i64, (batch,), shared=True),
                TensorSpec("encoder_hidden_states", f32, text),
                *([strength] if lora_strength else []),
            ),
            (TensorSpec("noise_pred", f32, latent),),
        ),
        # The posterior of AutoencoderKL, not yet multiplied by the VAE's scaling factor.
        "vae_encoder": (
            (TensorSpec("sample", f32, image),),
            (TensorSpec("latent_mean", f32, latent), TensorSpec("latent_logvar", f32, latent)),
        ),
        # Takes the latent already divided by the scaling factor; the image is in -1..1, unclamped.
        "vae_decoder": ((TensorSpec("latent_sample", f32, latent),), (TensorSpec("sample", f32, image),)),
    }
    inputs, outputs = tensors[name]
    if name != "unet":
        return Network(name, inputs, outputs, {})
    within = []
    for index, (block, channels) in enumerate(zip(BLOCKS, dims.up_channels or (), strict=False)):
        # Every block but the last hands on sides that are doubled.
        sides = (Axis(side, divisor=max(1, dims.latent_multiple >> index + 1)) for side in ("height", "width"))
        within.append(TensorSpec(block, f32, (batch, channels, *sides)))
    multiples = {"height": dims.latent_multiple, "width": dims.latent_multiple}
    return Network(name, inputs, outputs, multiples, tuple(within))


def derived_contract(unet: Network, name: NetworkName) -> Network:
    """The tensors of the network `name` of `DERIVED`, of the UNet whose tensors `unet` are.

    A gradient network's gradients are those of the sum of `y * c`, where `y` is the output `OF[name]` and
    `c = cotangent + cotangent_scale * y` is held constant.

    Raises:
        InputError: it ends at a block that the UNet lacks, or whose sizes are not known.
    """
    ends = {spec.name: spec for spec in (*unet.outputs, *unet.within)}
    if OF[name] not in ends:
        if not unet.within:
            raise InputError(f"{name}: the sizes of the UNet's features are not known; load the model again")
        raise InputError(f"{name}: the UNet has no {OF[name]}; its blocks are {', '.join(s.name for s in unet.within)}")
    output = ends[OF[name]]
    if name not in WRT:
        return Network(name, unet.inputs, (output,), unet.multiples)
    inputs = {spec.name: spec for spec in unet.inputs}
    grads = (replace(inputs[of], name=f"grad_{of}") for of in WRT[name])
    cotangent = replace(output, name="cotangent")
    scale = TensorSpec("cotangent_scale", output.dtype, output.axes[:1], shared=True)
    return Network(name, (*unet.inputs, cotangent, scale), (output, *grads), unet.multiples)


def undifferentiated(network: Network) -> Network:
    """The tensors of the forward pass that a gradient network differentiates."""
    of = OF[network.name]
    name: NetworkName = BLOCKS[of][0] if of in BLOCKS else "unet"
    return Network(name, network.inputs[:-2], network.outputs[:1], network.multiples)


def gradients_named(words: Collection[str], blocks: int | None = None) -> tuple[NetworkName, ...]:
    """The networks of `DERIVED` that a user calls so: the keys of `GRADIENTS`, and `FEATURES`.

    Args:
        blocks: how many up blocks the UNet has (`Dims.up_blocks`). None: not known yet, and taken for those of a Stable
            Diffusion.

    Raises:
        InputError: a word is none of these.
    """
    there = list(BLOCKS)[:blocks]
    known = {word: named for word, named in GRADIENTS.items() if OF[named[0]] in ("noise_pred", *there)}
    if len(there) > 1:
        known[FEATURES] = BLOCKS[there[-2]]
    found: set[NetworkName] = set()
    for word in words:
        if word not in known:
            raise InputError(f"gradients={word}: unknown; choose from {', '.join(known)}")
        found |= set(known[word])
    return tuple(name for name in DERIVED if name in found)


def gradient_word(wrt: Collection[str]) -> str:
    """What a user calls the gradient of the UNet's output with respect to these of its inputs."""
    return said_gradients([name for name in WRT if OF[name] == "noise_pred" and set(WRT[name]) == set(wrt)])[0]


def said_gradients(names: Collection[NetworkName]) -> list[str]:
    """What a user calls the networks of `DERIVED` among `names`; the inverse of `gradients_named`."""
    return [word for word, named in GRADIENTS.items() if set(named) & set(names)]
