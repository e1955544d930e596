"""Read a LoRA of the UNet from safetensors: the authors' format, diffusers' and PEFT's.

    authors    {path}.processor.to_q_lora.down.weight   (`to_out_lora` means `to_out.0`)
    diffusers  unet.{path}.to_q.lora_A.weight, unet.{path}.to_q.lora.down.weight
    PEFT       base_model.model.{path}.to_q.lora_A[.adapter].weight

`down` (A) is [r, in], `up` (B) is [out, r]; for a convolution [r, in, kh, kw] and [out, r, 1, 1]. A weight changes by
`alpha / r * up @ down`. Alpha is read from `.alpha` keys, from diffusers' metadata in the file or from PEFT's
adapter_config.json beside it; where none of them speaks, alpha is r. Files that mean more than that are refused by
`adapter_config` and `foreign`.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engines.lora import LoraWeights
from engines.paths import expanded, recorded
from engines.torch_modes import default_modes
from smooth_rt.checkpoint import HUB_ID, download
from smooth_rt.errors import ModelError, reason
from smooth_rt.lora.adapter_config import (
    CONFIG_FILE,
    LARGEST_ALPHA,
    AdapterConfig,
    read_adapter_config,
    read_stored_config,
)
from smooth_rt.lora.foreign import check_header, check_keys, is_ignored
from smooth_rt.model import default_lora
from smooth_rt.ranges import shown as as_shown

__all__ = ["METADATA_KEY", "Lora", "LoraLayer", "digest_weights", "read_lora"]

METADATA_KEY = "lora_adapter_metadata"  # where diffusers' save_lora_weights puts PEFT's configuration
PEFT_FILE = "adapter_model.safetensors"
WEIGHT_FILES = ("smooth_lora.safetensors", "pytorch_lora_weights.safetensors", PEFT_FILE)
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
ALPHA_TOLERANCE = 1e-2  # of an alpha that is stored in bf16
PEFT_PREFIX = "base_model.model."
PREFIX = re.compile(r"(?:(?:base_model\.model|unet)\.)*")
AUTHORS = re.compile(r"(?P<path>.+?)(?:\.processor)?\.(?P<projection>to_(?:q|k|v|out))_lora\.(?P<part>.+)")
PAIR = re.compile(r"(?P<path>.+)\.lora_(?P<side>[AB])(?:\.[^.]+)?\.weight")
OLD_PAIR = re.compile(r"(?P<path>.+)\.lora\.(?P<part>down\.weight|up\.weight|alpha)")
ALPHA = re.compile(r"(?P<path>.+)\.alpha")
PARTS = {"A": "down", "B": "up", "down.weight": "down", "up.weight": "up", "alpha": "alpha"}


@dataclass(frozen=True)
class LoraLayer:
    """One projection's change: `down` [r, in, ...] and `up` [out, r, ...]. `key` is `down`'s name in the file."""

    down: Tensor
    up: Tensor
    alpha: float | None = None
    key: str = field(default="", compare=False)

    @property
    def rank(self) -> int:
        return int(self.down.shape[0])

    @property
    def scale(self) -> float:
        """alpha / r, or 1 where the file gives no alpha."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


@dataclass(frozen=True)
class Lora:
    """A LoRA by the UNet's module path, such as "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q".

    `digest` is a sha256 over paths, tensors and scales: the same for the same change in any of the formats. `path` is
    the absolute path of `source` where that is a file or a folder.
    """

    layers: dict[str, LoraLayer]
    source: str
    digest: str
    path: str | None = field(default=None, compare=False)


@default_modes()
def read_lora(source: str | Path = "default") -> Lora:
    """Read a LoRA and check that it is whole; whether it fits a UNet is seen by `fuse`.

    Args:
        source: "default" (shipped with the project), a .safetensors file, a folder or a hub id that holds
            smooth_lora.safetensors, pytorch_lora_weights.safetensors or adapter_model.safetensors.

    Raises:
        ModelError: nothing is there, it is a pickle or damaged, its settings make it more than a plain LoRA (DoRA,
            PiSSA, ...), or it holds a key that is not understood, half of a pair, a pair of two ranks or a value that
            is not finite. The line names the setting or the key.
    """
    if not str(source).strip():
        raise ModelError('lora: the name is empty; give "default", a .safetensors file, a folder or a hub id')
    try:
        path = _locate(str(source))
    except OSError as error:  # a name that is too long, a folder that may not be read
        raise ModelError(f"{as_shown(source)}: cannot be read ({reason(error)}); name another") from error
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path}: truncated or no safetensors file ({reason(error)}); download it again") from error
    check_header(metadata, str(path))
    found = parse(tensors, str(source), str(path), _adapter_config(path, tensors, metadata))
    local = source != "default" and expanded(source).exists()
    return replace(found, path=recorded(source)) if local else found


def parse(tensors: dict[str, Tensor], source: str, shown: str, config: AdapterConfig | None = None) -> Lora:
    """A LoRA from a state dict; `shown` is its name in messages, `config` PEFT's configuration where there is one."""
    check_keys(tensors, shown)
    found: dict[str, dict[str, tuple[str, Tensor]]] = {}
    for key, tensor in tensors.items():
        if is_ignored(key):
            continue
        path, part = _split(key, shown)
        parts = found.setdefault(path, {})
        if part in parts:
            raise ModelError(f"{shown}: {parts[part][0]} and {key} are the same part; keep one adapter in the file")
        if tensor.dtype not in DTYPES:
            raise ModelError(f"{shown}: {key} is {tensor.dtype}; convert it to one of {', '.join(map(str, DTYPES))}")
        if not torch.isfinite(tensor).all():
            raise ModelError(f"{shown}: {key} holds values that are not finite; the training went wrong")
        parts[part] = (key, tensor)
    if not found:
        raise ModelError(f"{shown}: holds no tensors; name a LoRA")
    layers = {path: _layer(path, parts, shown, config) for path, parts in sorted(found.items())}
    return Lora(layers, source, _digest(layers))


def _locate(source: str) -> Path:
    if source == "default":
        if not default_lora().is_file():
            mend = "install smooth-rt again, name a LoRA, or give `--lora none`"
            raise ModelError(f"default LoRA: {default_lora()} is missing; {mend}")
        return default_lora()
    path = expanded(source)
    if path.suffix in PICKLES:
        raise ModelError(f"{path}: pickles are never loaded; convert it to .safetensors")
    if path.is_file():
        return path
    if path.is_dir():
        files = [path / name for name in WEIGHT_FILES if (path / name).is_file()]
        if files:
            return files[0]
        pickled = next((file for file in sorted(path.iterdir()) if file.suffix in PICKLES), None)
        if pickled is not None:
            raise ModelError(f"{pickled}: pickles are never loaded; convert it to .safetensors")
        if (path / CONFIG_FILE).is_file():  # of another method, such as X-LoRA, whose weights have other names
            read_adapter_config(path / CONFIG_FILE)
        raise ModelError(f"{path}: holds none of {', '.join(WEIGHT_FILES)}; name the file")
    if not HUB_ID.fullmatch(source) or path.suffix == ".safetensors":
        what = "neither file nor folder" if path.exists() else "no such file or folder"
        raise ModelError(f"{source}: {what}; name a .safetensors file, a folder or a hub id")
    return _locate(str(download(source, [*WEIGHT_FILES, CONFIG_FILE], "pass a file")))


def _split(key: str, shown: str) -> tuple[str, str]:
    """A key's module path in the UNet and its part: down, up or alpha."""
    bare = PREFIX.sub("", key, count=1)
    if (match := AUTHORS.fullmatch(bare)) and match["part"] in PARTS:
        projection = "to_out.0" if match["projection"] == "to_out" else match["projection"]
        return f"{match['path']}.{projection}", PARTS[match["part"]]
    if match := PAIR.fullmatch(bare):
        return match["path"], PARTS[match["side"]]
    if match := OLD_PAIR.fullmatch(bare):
        return match["path"], PARTS[match["part"]]
    if match := ALPHA.fullmatch(bare):
        return match["path"], "alpha"
    raise ModelError(f"{shown}: {key} is not a LoRA key of the authors', diffusers' or PEFT's format; convert the file")


def _layer(path: str, parts: dict[str, tuple[str, Tensor]], shown: str, config: AdapterConfig | None) -> LoraLayer:
    for part, other in (("down", "up"), ("up", "down")):
        if part not in parts:
            key = parts[other][0] if other in parts else parts["alpha"][0]
            raise ModelError(f"{shown}: {key} has no {part} beside it; the pair is not whole")
    (key, down), (up_key, up) = parts["down"], parts["up"]
    for name, tensor in (parts["down"], parts["up"]):
        if tensor.ndim not in (2, 4) or 0 in tensor.shape:
            raise ModelError(f"{shown}: {name} has shape {list(tensor.shape)}, not a matrix or a convolution")
    rank = int(down.shape[0])
    if rank != up.shape[1]:
        raise ModelError(f"{shown}: {key} has rank {rank} and {up_key} {up.shape[1]}; the pair does not match")
    alpha: float | None = None
    if config is not None:
        config.check_layer(path, key, rank, down.ndim)
        alpha = config.alpha_of(path, rank)
    if "alpha" in parts:
        alpha = _stored_alpha(*parts["alpha"], shown, alpha)
    return LoraLayer(down, up, alpha, key)


def _stored_alpha(key: str, value: Tensor, shown: str, configured: float | None) -> float:
    """Return the alpha that the file holds as a tensor; PEFT's configuration, where there is one, must agree."""
    if value.numel() != 1:
        raise ModelError(f"{shown}: {key} has shape {list(value.shape)}; alpha is one number")
    alpha = float(value)
    if abs(alpha) > LARGEST_ALPHA:
        raise ModelError(f"{shown}: {key} is {alpha:g}, and {LARGEST_ALPHA:g} is the most; repair it")
    if configured is not None and not math.isclose(alpha, configured, rel_tol=ALPHA_TOLERANCE):
        raise ModelError(
            f"{shown}: {key} is {alpha:g}, and its PEFT configuration gives {configured:g}; keep one of them"
        )
    return alpha if configured is None else configured


def _adapter_config(path: Path, keys: Collection[str], metadata: dict[str, str]) -> AdapterConfig | None:
    """Read PEFT's configuration: from the file that PEFT writes beside its weights, or from the file's metadata."""
    beside = path.parent / CONFIG_FILE
    prefixed = any(key.startswith(PEFT_PREFIX) for key in keys)
    # As PEFT, which reads no other place.
    if (path.name == PEFT_FILE or prefixed) and beside.is_file():
        return read_adapter_config(beside)
    if METADATA_KEY in metadata:
        return read_stored_config(metadata[METADATA_KEY], path)
    if path.name == PEFT_FILE and prefixed:
        raise ModelError(f"{path}: {CONFIG_FILE} is missing beside it, which holds its alpha; copy it there, too")
    return None


def _digest(layers: dict[str, LoraLayer]) -> str:
    return _digest_parts({path: (layer.scale, layer.down, layer.up) for path, layer in layers.items()})


def digest_weights(weights: LoraWeights) -> str:
    """The digest of the LoRA that a bundle keeps beside its engines: that of the `Lora` it was made from."""
    return _digest_parts(
        {
            name.removeprefix("unet.").removesuffix(".weight"): (scale, weights.down[name], weights.up[name])
            for name, scale in weights.scale.items()
        }
    )


def _digest_parts(parts: Mapping[str, tuple[float, Tensor, Tensor]]) -> str:
    digest = hashlib.sha256()
    for path, (scale, down, up) in sorted(parts.items()):
        digest.update(f"{path} {scale!r}\n".encode())
        for tensor in (down, up):
            digest.update(f"{tensor.dtype} {list(tensor.shape)}\n".encode())
            digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
