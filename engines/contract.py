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
    "DERIVED",
    "FEATURES",
    "GRADIENTS",
    "LARGEST_STRENGTH",
    "LORA_STRENGTH",
    "NETWORKS",
    "OF",
    "WRT",
    "Axis",
    "Dims",
    "Network",
    "NetworkName",
    "TensorSpec",
    "contract",
    "features_contract",
    "gradient_contract",
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
    "unet_features",
    "unet_vjp_text",
    "unet_vjp_sample",
    "unet_vjp",
    "unet_features_vjp",
]
# Those that every bundle has.
NETWORKS: tuple[NetworkName, ...] = ("text_encoder", "unet", "vae_encoder", "vae_decoder")
# The UNet's gradients, each a network of its own so that one that is not asked for costs nothing: by the inputs that
# they are taken with respect to. Eager has them by autograd, a bundle those that it was built with.
WRT: dict[NetworkName, tuple[str, ...]] = {
    "unet_vjp_text": ("encoder_hidden_states",),
    "unet_vjp_sample": ("sample",),
    "unet_vjp": ("sample", "encoder_hidden_states"),
    "unet_features_vjp": ("sample",),
}
# What those gradients are of: the UNet's output, or features within it; what comes after those is not computed.
OF: dict[NetworkName, str] = {name: "features" if name == "unet_features_vjp" else "noise_pred" for name in WRT}
FEATURES: NetworkName = "unet_features"  # the features alone
# What is made of the UNet and a bundle may have beside `NETWORKS`, in the order that it is built in.
DERIVED: tuple[NetworkName, ...] = (FEATURES, *WRT)
# What a user calls them.
GRADIENTS: dict[str, tuple[NetworkName, ...]] = {
    "text": ("unet_vjp_text",),
    "sample": ("unet_vjp_sample",),
    "both": ("unet_vjp",),
    "features": (FEATURES, "unet_features_vjp"),
}
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
        sample_size: the latent side that the model was trained at; the default.
        feature_channels: of the features that drag editing follows, the output of the last up block but one: 640 for
            SD1.x. None where they are not known.
    """

    tokens: int
    text_width: int
    vocabulary: int
    latent_channels: int
    image_channels: int
    vae_factor: int
    latent_multiple: int
    sample_size: int
    feature_channels: int | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            size = getattr(self, field.name)
            if size is not None and size < 1:
                raise ValueError(f"{field.name}={size}: a size is at least 1")

    @property
    def image_multiple(self) -> int:
        """Image sides are multiples of this number of pixels."""
        return self.vae_factor * self.latent_multiple


@dataclass(frozen=True)
class Axis:
    """A size that a caller chooses: `factor * symbol`."""

    symbol: str
    factor: int = 1

    def __str__(self) -> str:
        return self.symbol if self.factor == 1 else f"{self.factor}*{self.symbol}"


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
        return tuple(a if isinstance(a, int) else a.factor * sizes[a.symbol] for a in self.axes)

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype} [{', '.join(str(a) for a in self.axes)}]"


@dataclass(frozen=True)
class Network:
    """One network's inputs, in order, and outputs, in order. `multiples`: what each symbol's size is a multiple of.
    `within` are tensors on the way to the outputs that other networks are cut off at."""

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
            multiple = axis.factor * self.multiples.get(axis.symbol, 1)
            if size < 1 or size % multiple:
                raise InputError(f"{wanted}; {size} is not a positive multiple of {multiple}")
            bound = sizes.setdefault(axis.symbol, size // axis.factor)
            if bound * axis.factor != size:
                raise InputError(f"{wanted}; another input has {axis.symbol}={bound}")


def contract(name: NetworkName, dims: Dims, *, lora_strength: bool = False) -> Network:
    """The tensors of network `name` for a model of sizes `dims`; `Variant.network` gives those of a variant.

    Args:
        lora_strength: whether the LoRA's strength is an input of the UNet: 1 is as trained, 0 is none, each row's own
            or one for all.

    Raises:
        InputError: the network is cut off at the UNet's features, and `dims` does not know those.
    """
    if name in WRT:
        return gradient_contract(contract("unet", dims, lora_strength=lora_strength), name)
    if name == FEATURES:
        return features_contract(contract("unet", dims, lora_strength=lora_strength))
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
    channels = dims.feature_channels
    within = () if channels is None else (TensorSpec("features", f32, (batch, channels, height, width)),)
    return Network(name, inputs, outputs, {"height": dims.latent_multiple, "width": dims.latent_multiple}, within)


def features_contract(unet: Network) -> Network:
    """The tensors of the network that ends at the features of the UNet whose tensors `unet` are.

    Raises:
        InputError: they are not known.
    """
    return Network(FEATURES, unet.inputs, (_differentiated(unet, FEATURES, "features"),), unet.multiples)


def gradient_contract(unet: Network, name: NetworkName) -> Network:
    """The tensors of the gradient network `name`, a key of `WRT`, of the UNet whose tensors `unet` are.

    Its gradients are those of the sum of `y * c`, where `y` is the output `OF[name]` and
    `c = cotangent + cotangent_scale * y` is held constant.

    Raises:
        InputError: they are those of features that are not known.
    """
    output = _differentiated(unet, name, OF[name])
    inputs = {spec.name: spec for spec in unet.inputs}
    grads = (replace(inputs[of], name=f"grad_{of}") for of in WRT[name])
    cotangent = replace(output, name="cotangent")
    scale = TensorSpec("cotangent_scale", output.dtype, output.axes[:1], shared=True)
    return Network(name, (*unet.inputs, cotangent, scale), (output, *grads), unet.multiples)


def undifferentiated(network: Network) -> Network:
    """The tensors of the forward pass that a gradient network differentiates."""
    name: NetworkName = FEATURES if OF[network.name] == "features" else "unet"
    return Network(name, network.inputs[:-2], network.outputs[:1], network.multiples)


def _differentiated(unet: Network, name: NetworkName, of: str) -> TensorSpec:
    """The tensor `of` that the network `name` ends at."""
    for spec in (*unet.outputs, *unet.within):
        if spec.name == of:
            return spec
    raise InputError(f"{name}: the sizes of the UNet's {of} are not known; load the model, or build its bundle, again")


def gradients_named(words: Collection[str]) -> tuple[NetworkName, ...]:
    """The networks of `DERIVED` that a user calls so.

    Raises:
        InputError: a word is none of `GRADIENTS`.
    """
    for word in words:
        if word not in GRADIENTS:
            raise InputError(f"gradients={word}: unknown; choose from {', '.join(GRADIENTS)}")
    named = {name for word in words for name in GRADIENTS[word]}
    return tuple(name for name in DERIVED if name in named)


def gradient_word(wrt: Collection[str]) -> str:
    """What a user calls the gradient of the UNet's output with respect to these of its inputs."""
    return said_gradients([name for name in WRT if OF[name] == "noise_pred" and set(WRT[name]) == set(wrt)])[0]


def said_gradients(names: Collection[NetworkName]) -> list[str]:
    """What a user calls the networks of `DERIVED` among `names`; the inverse of `gradients_named`."""
    return [word for word, named in GRADIENTS.items() if set(named) & set(names)]
