"""Write a LoRA: diffusers' format (`StableDiffusionPipeline.load_lora_weights` reads it) or the authors' own."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor

from engines.paths import expanded
from engines.staging import abandoned
from smooth_rt.errors import InputError, ModelError, reason
from smooth_rt.lora.read import METADATA_KEY, Lora, LoraLayer

__all__ = ["LoraFormat", "write_lora"]

LoraFormat = Literal["diffusers", "attn-procs"]

ATTENTION_PROJECTION = re.compile(r"(?P<attention>.+)\.(?P<projection>to_q|to_k|to_v|to_out)(?:\.0)?")


def write_lora(lora: Lora, path: Path, format: LoraFormat = "diffusers") -> Path:
    """Write `lora` as a safetensors file, whole or not at all; `read_lora` gives the same tensors back.

    Args:
        format: "diffusers" (`unet.{path}.lora_A.weight`; alphas as metadata) or "attn-procs", the authors'
            (`{path}.processor.to_q_lora.down.weight`; alphas, which their file has not, as `.alpha` keys).

    Raises:
        InputError: the format is unknown, or the file cannot be written.
        ModelError: the LoRA holds a layer that the authors' format has no key for.
    """
    path, metadata = expanded(path), {"format": "pt"}
    if format == "diffusers":
        tensors = {
            f"unet.{name}.lora_{side}.weight": tensor
            for name, layer in lora.layers.items()
            for side, tensor in (("A", layer.down), ("B", layer.up))
        }
        if any(layer.alpha is not None for layer in lora.layers.values()):
            metadata[METADATA_KEY] = json.dumps(_peft_config(lora.layers), sort_keys=True)
    elif format == "attn-procs":
        tensors = {}
        for name, layer in lora.layers.items():
            tensors |= _authors_keys(name, layer)
    else:
        raise InputError(f"format={format!r} is unknown; it is one of {', '.join(get_args(LoraFormat))}")
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in abandoned(path.parent, path.name):  # of a process that was killed
            left.unlink(missing_ok=True)
        # Clones: safetensors refuses tensors that share memory.
        content = save(
            {key: tensor.clone(memory_format=torch.contiguous_format) for key, tensor in tensors.items()}, metadata
        )
        # Not its own save_file, which shuts out all but the owner.
        partial.write_bytes(content)
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be written ({reason(error)}); free space or name another path") from error
    finally:
        if partial.is_file():
            partial.unlink()
    return path


def _authors_keys(name: str, layer: LoraLayer) -> dict[str, Tensor]:
    match = ATTENTION_PROJECTION.fullmatch(name)
    if match is None:
        raise ModelError(f"{name}: the attn-procs format holds attention projections only; write format diffusers")
    stem = f"{match['attention']}.processor.{match['projection']}_lora"
    tensors = {f"{stem}.down.weight": layer.down, f"{stem}.up.weight": layer.up}
    if layer.alpha is not None:
        tensors[f"{stem}.alpha"] = torch.tensor(layer.alpha, dtype=torch.float64)
    return tensors


def _peft_config(layers: dict[str, LoraLayer]) -> dict[str, Any]:
    """The keywords of PEFT's LoraConfig, under the prefix by which diffusers finds the UNet's."""
    ranks = {name: layer.rank for name, layer in layers.items()}
    alphas = {name: float(layer.rank) if layer.alpha is None else layer.alpha for name, layer in layers.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    config = {
        "r": rank,
        "lora_alpha": alpha,
        # PEFT reads the patterns as regular expressions that may match the end of a longer path.
        "rank_pattern": {f"^{re.escape(name)}": r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {f"^{re.escape(name)}": a for name, a in alphas.items() if a != alpha},
        "target_modules": sorted(layers),
    }
    return {f"unet.{key}": value for key, value in config.items()}
