"""Which Stable Diffusion a single-file checkpoint is, by the names and shapes in its header.

The configs of the architectures that are known ship with the project, one diffusers folder each beside one tokenizer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smooth_rt.checkpoint import NAME_CONFIG, SUPPORTED
from smooth_rt.errors import ModelError
from smooth_rt.markers import read_markers
from smooth_rt.original_layout import PREFIXES, plain_name
from smooth_rt.weight_header import read_header

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

__all__ = ["Architecture", "recognise", "shipped_tokenizer"]

CONFIGS = Path(__file__).parent / "assets" / "configs"
UNET, TEXT_ENCODER, VAE = PREFIXES["unet"], PREFIXES["text_encoder"], PREFIXES["vae"]

Shapes = Mapping[str, Sequence[int]]

# A key of this form tells a file that is no whole Stable Diffusion 1.x or 2.x, whatever else it holds.
FOREIGN = (
    (r"(^|\.)joint_blocks\.", f"Stable Diffusion 3; {SUPPORTED}"),
    (r"(^|\.)double_blocks\.", f"FLUX; {SUPPORTED}"),
    (r"^control_model\.|^controlnet_|(^|\.)input_hint_block\.", f"a ControlNet; {SUPPORTED}"),
    (r"\.motion_modules\.|\.time_stack\.|\.temporal_transformer", f"a video model; {SUPPORTED}"),
    (r"^conditioner\.embedders\.1\.", f"Stable Diffusion XL; {SUPPORTED}"),
    (r"^edm_(mean|std)$|^edm_vpred\.", f"an EDM model, as Playground 2.5 and CosXL are; {SUPPORTED}"),
)
# The widths of text that other UNets of this layout take, and the channels of those that are given more than noise.
FOREIGN_WIDTHS = {2048: "Stable Diffusion XL", 1280: "the refiner of Stable Diffusion XL"}
FOREIGN_CHANNELS = {
    5: "a depth-to-image model",
    7: "an upscaler",
    8: "an InstructPix2Pix model",
    9: "an inpainting model",
}
# What a file without a UNet under its prefix is, by the form of its keys.
ALONE = (
    (r"(^|[._])lora[._](up|down|A|B|linear_layer)\b|\.(hada_w1_a|lokr_w[12])\b", "a LoRA; name it with --lora"),
    (r"^(emb_params|string_to_param|clip_[lg])\b", f"a textual inversion; {SUPPORTED}"),
    (r"^(first_stage_model\.)?(encoder|decoder)\.(conv_in|down|up|mid)", "a VAE alone; name the whole checkpoint"),
    (r"^input_blocks\.", "a UNet alone; name the whole checkpoint"),
    (r"^(conv_in|down_blocks|up_blocks)\b", "a UNet in diffusers' layout; name the diffusers folder it belongs to"),
    (r"(^|\.)(text_model|resblocks)\.", "a text encoder alone; name the whole checkpoint"),
)


@dataclass(frozen=True)
class Architecture:
    """What a header tells.

    Args:
        folders: configs that fit, by what their UNet predicts ("epsilon", "v_prediction"): weights alone do not tell
            one from the other.
        said: what the file itself says of its prediction, where it does.
        zero_snr: the file is marked as of zero terminal SNR.
    """

    folders: dict[str, Path]
    said: str | None
    zero_snr: bool = False


def recognise(path: Path) -> Architecture:
    """The shipped configs that fit the checkpoint at `path`; only its header is read.

    Raises:
        ModelError: it is damaged, incomplete or of another architecture, which the message names.
    """
    header = read_header(path)
    shapes = {plain_name(key): shape for key, shape in header.shapes.items()}
    other = _foreign(shapes)
    if other is not None:
        raise ModelError(f"{path}: seems to be {other}")
    for prefix, part in ((TEXT_ENCODER, "text encoder"), (VAE, "VAE")):
        if not any(key.startswith(prefix) for key in shapes):
            raise ModelError(f"{path}: the {part} is missing (no {prefix}*); name a complete checkpoint")
    folders = {}
    for folder in sorted(CONFIGS.glob("*/")):
        if (folder / "model_index.json").is_file() and _fits(folder, shapes):
            folders[_read(folder / "scheduler" / "scheduler_config.json").get("prediction_type", "epsilon")] = folder
    if not folders:
        raise ModelError(f"{path}: its UNet ({_described(shapes)}) is of no architecture that ships; {NAME_CONFIG}")
    markers = read_markers(path, header)
    return Architecture(folders, markers.prediction, markers.zero_snr)


def shipped_tokenizer(folder: Path) -> CLIPTokenizer:
    """The tokenizer of one of the shipped configs; they share a vocabulary and pad with different tokens."""
    from transformers import CLIPTokenizer

    shared = CONFIGS / "tokenizer"
    files = {"vocab": str(shared / "vocab.json"), "merges": str(shared / "merges.txt")}
    return CLIPTokenizer.from_pretrained(folder / "tokenizer", **files)


def _foreign(shapes: Shapes) -> str | None:
    for pattern, what in FOREIGN:
        if any(re.search(pattern, key) for key in shapes):
            return what
    if not any(key.startswith(UNET) for key in shapes):
        for pattern, what in ALONE:
            if any(re.search(pattern, key) for key in shapes):
                return what
        first = f"its first key is {min(shapes)[:60]}" if shapes else "it is empty"
        return f"no checkpoint of a Stable Diffusion model ({first}); {SUPPORTED}"
    width, channels = _text_width(shapes), _channels(shapes)
    if width in FOREIGN_WIDTHS:
        return f"{FOREIGN_WIDTHS[width]}; {SUPPORTED}"
    if channels is not None and channels[1] in FOREIGN_CHANNELS:
        return f"{FOREIGN_CHANNELS[channels[1]]} (its UNet takes {channels[1]} channels); {SUPPORTED}"
    if any(key.startswith(f"{UNET}label_emb.") for key in shapes):
        return f"a model that asks for more than text (label_emb, as unCLIP has it); {SUPPORTED}"
    return None


def _text_width(shapes: Shapes) -> int | None:
    keys = (key for key in shapes if key.startswith(UNET) and key.endswith(".attn2.to_k.weight"))
    return next((shapes[key][-1] for key in keys if shapes[key]), None)


def _channels(shapes: Shapes) -> tuple[int, int] | None:
    """Channels out of and into the first convolution."""
    shape = shapes.get(f"{UNET}input_blocks.0.0.weight", ())
    return (shape[0], shape[1]) if len(shape) == 4 else None


def _blocks(shapes: Shapes) -> int:
    return len({key.split(".")[3] for key in shapes if key.startswith(f"{UNET}input_blocks.")})


def _fits(folder: Path, shapes: Shapes) -> bool:
    unet = _read(folder / "unet" / "config.json")
    sizes = unet["block_out_channels"]
    return (
        _text_width(shapes) == unet["cross_attention_dim"]
        and _channels(shapes) == (sizes[0], unet["in_channels"])
        and _blocks(shapes) == len(sizes) * (unet["layers_per_block"] + 1)
    )


def _described(shapes: Shapes) -> str:
    channels = _channels(shapes)
    first = f"{channels[1]} channels in, {channels[0]} in its first block" if channels else "no first convolution"
    return f"text of width {_text_width(shapes)}, {first}, {_blocks(shapes)} input blocks"


def _read(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return value
