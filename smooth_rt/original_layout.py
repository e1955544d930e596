"""Names of the original Stable Diffusion code, and their way into the networks of diffusers and transformers.

diffusers converts the names; a name that it does not know, it drops without a word. So each conversion is run twice:
with stand-ins for the tensors, which tell from the header alone where each of them goes, and then with the tensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Self

__all__ = ["CHECKPOINT", "PREFIXES", "destinations", "part_of", "plain_name", "state_of"]

PREFIXES = {
    "text_encoder": "cond_stage_model.",
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
}
CHECKPOINT = "checkpoint"  # the part of a name that has none of the prefixes
TRANSFORMERS, OPEN_CLIP = "cond_stage_model.transformer.", "cond_stage_model.model."

# Other spellings of names, as programs wrote them, and the original's.
SPELLINGS = (
    (r"^conditioner\.embedders\.0\.", "cond_stage_model."),  # of Stability AI's later code
    # transformers had no `text_model` in its first versions, nor has it from 5.6 on.
    (r"^(cond_stage_model\.transformer\.)(?=(embeddings|encoder|final_layer_norm)\.)", r"\1text_model."),
    # The VAE's attention under the names of diffusers, which converters left as they were.
    (r"^(first_stage_model\.\w+\.mid\.attn_1\.)(to_q|query)\.", r"\1q."),
    (r"^(first_stage_model\.\w+\.mid\.attn_1\.)(to_k|key)\.", r"\1k."),
    (r"^(first_stage_model\.\w+\.mid\.attn_1\.)(to_v|value)\.", r"\1v."),
    (r"^(first_stage_model\.\w+\.mid\.attn_1\.)(to_out\.0|proj_attn)\.", r"\1proj_out."),
    (r"^(first_stage_model\.\w+\.mid\.attn_1\.)group_norm\.", r"\1norm."),
)


def plain_name(key: str) -> str:
    """Return the name that the original code gives to the tensor `key`."""
    for pattern, replacement in SPELLINGS:
        key = re.sub(pattern, replacement, key)
    return key


def part_of(name: str) -> tuple[str, str]:
    """Return the part that a tensor belongs to, "unet" and so on or `CHECKPOINT`, and its name inside the part."""
    if name.startswith((TRANSFORMERS, OPEN_CLIP)):
        return "text_encoder", name.split(".", 2)[2]
    for part, prefix in PREFIXES.items():
        if name.startswith(prefix):
            return part, name.removeprefix(prefix)
    return CHECKPOINT, name


class _StandIn:
    """Tensor without values, which knows its name whatever a conversion makes of it."""

    def __init__(self, name: str, shape: tuple[int, ...]) -> None:
        self.name, self.shape, self.ndim = name, shape, len(shape)

    @property
    def T(self) -> Self:  # noqa: N802 (a tensor's own name for it)
        return self

    def __getitem__(self, _: object) -> Self:
        return self

    def clone(self) -> Self:
        return self

    detach = contiguous = clone


def destinations(part: str, module: Any, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """Find which tensor each weight of a network comes from.

    Args:
        part: "text_encoder", "unet" or "vae".
        module: the network, which may have no weights yet.
        shapes: shapes of a checkpoint's tensors by their plain names.

    Returns:
        The plain names of tensors by the names of weights of `module`; a weight that the checkpoint lacks is left out.
    """
    stand_ins = {name: _StandIn(name, shape) for name, shape in shapes.items()}
    return {key: tensor.name for key, tensor in state_of(part, module, stand_ins).items()}


def state_of(part: str, module: Any, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a checkpoint's tensors to the weights of a network.

    Args:
        part: "text_encoder", "unet" or "vae".
        module: the network, which may have no weights yet.
        tensors: a checkpoint's tensors by their plain names; those of other parts are left out.

    Returns:
        Tensors by the names of weights of `module`.
    """
    from diffusers.loaders import single_file_utils as convert

    own = {name: tensor for name, tensor in tensors.items() if name.startswith(PREFIXES[part])}
    if part == "unet":
        state = convert.convert_ldm_unet_checkpoint(own, config=module.config)
    elif part == "vae":
        state = convert.convert_ldm_vae_checkpoint(own, config=module.config)
    elif any(name.startswith(TRANSFORMERS) for name in own):
        state = convert.convert_ldm_clip_checkpoint(own)
    else:
        state = convert.convert_open_clip_checkpoint(module, own, prefix=OPEN_CLIP)
    if part == "text_encoder" and not hasattr(module, "text_model"):
        state = {name.removeprefix("text_model."): tensor for name, tensor in state.items()}
    expected = module.state_dict().keys()
    # Where one of a pair is missing, a conversion puts None in its place.
    return {name: tensor for name, tensor in state.items() if name in expected and tensor is not None}
