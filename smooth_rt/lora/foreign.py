"""Tensors and headers of LoRA files that mean more than W + alpha / r * B @ A, refused by their names."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping

from smooth_rt.errors import ModelError

__all__ = ["check_header", "check_keys", "is_ignored", "merge_with_diffusers"]

# What training alone used: the projections of VeLoRA's backward pass, the noise of MonteCLoRA.
IGNORED = re.compile(r".+\.lora_(?:velora_embed|monteclora_sampler)\b.*")

# In this order: a file's special tensors come before the plain ones beside them.
KINDS = tuple(
    (re.compile(pattern), kind)
    for pattern, kind in (
        (r"\.(?:dora_scale|lora_magnitude_vector)\b", "the magnitude of a DoRA"),
        (r"\.hada_", "a factor of LoHa"),
        (r"\.lokr_", "a factor of LoKr"),
        (r"\.(?:oft|boft)_", "a rotation of OFT"),
        (r"\.diff(?:_b)?$", "a difference of whole weights"),
        (r"\.[wb]_norm$", "a difference of a norm's weights"),
        (r"\.(?:lora_|lora\.)?mid(?:\.weight)?$", "the core of a Tucker decomposition"),
        (r"\.(?:on_input|ia3_l)\b", "a factor of IA3"),
        (r"\.(?:a[12]|b[12]|bm[12])\.weight$", "a factor of GLoRA"),
        (r"\.lora_E\b|\.ranknum\b", "a singular value of AdaLoRA"),
        (r"\.lora_diag\b", "a singular value of KaSA"),
        (r"\.lora_embedding_[AB]\b", "a LoRA of an embedding"),
        (r"\.(?:scalar|rescale)$", "a scale of its own"),
        (r"\.(?:modules_to_save|base_layer|original_module)\b", "a whole module beside the LoRA"),
        (r"^(?:bundle_emb|emb_params|learned_embeds)\b", "a textual inversion"),
        (r"\.bias$", "a trained bias"),
    )
)
# What diffusers loads into a UNet and fuses, unless it is in kohya's layout.
OF_DIFFUSERS = re.compile(r".+\.(?:lora_magnitude_vector\b.*|lokr_.+|lora_B\.bias)")
TEXT_ENCODER = re.compile(r"^(?:base_model\.model\.)?(?:text_encoder(?:_\d)?\.|text_model\.)")
KOHYA = re.compile(r"^(?:lora|lycoris)_(?:unet|te\d?)_")
PLAIN_KOHYA = (".lora_down.weight", ".lora_up.weight", ".alpha")
PLAIN_MODULES = ("networks.lora", "networks.lora_fa", "networks.dylora", "lycoris.kohya", "locon.locon_kohya")
PLAIN_ALGORITHMS = ("lora", "locon", "dylora")
ELSEWHERE = (
    "merge it into its model with the tool that trained it (LyCORIS: python tools/merge.py MODEL LORA OUTPUT) and give "
    "--model OUTPUT --lora none"
)


def merge_with_diffusers(path: str) -> str:
    """Return the advice for a LoRA that diffusers can fuse and `smooth_rt.lora` cannot."""
    return (
        f"merge it into its model with diffusers (pipe = StableDiffusionPipeline.from_pretrained(MODEL); "
        f"pipe.load_lora_weights({path!r}, low_cpu_mem_usage=False); pipe.fuse_lora(); pipe.unload_lora_weights(); "
        "pipe.save_pretrained(FOLDER)) and give --model FOLDER --lora none"
    )


def is_ignored(key: str) -> bool:
    """Return whether a tensor was of use in training alone."""
    return IGNORED.fullmatch(key) is not None


def check_keys(keys: Collection[str], shown: str) -> None:
    """Refuse tensors by which a weight changes in another way than by a pair of LoRA, or that are not of the UNet.

    Args:
        keys: All names in the file.
        shown: The file, as messages name it.

    Raises:
        ModelError: a tensor is of another method, of the text encoder or in kohya's layout; the line names it.
    """
    merge = merge_with_diffusers(shown)
    for pattern, kind in KINDS:
        if key := _first(pattern, keys):
            advice = merge if OF_DIFFUSERS.fullmatch(key) and not KOHYA.match(key) else ELSEWHERE
            raise ModelError(f"{shown}: {key} is {kind}, and only plain LoRAs are fused; {advice}")
    if key := _first(KOHYA, keys):
        odd = next((name for name in keys if KOHYA.match(name) and not name.endswith(PLAIN_KOHYA)), None)
        if odd is not None:
            raise ModelError(f"{shown}: {odd} is no tensor of a plain LoRA, and only those are fused; {ELSEWHERE}")
        raise ModelError(f"{shown}: {key} is in kohya's layout, which is not read; {merge}")
    if key := _first(TEXT_ENCODER, keys):
        raise ModelError(f"{shown}: {key} changes the text encoder; only LoRAs of the UNet are supported; {merge}")


def _first(pattern: re.Pattern[str], keys: Collection[str]) -> str | None:
    return next((key for key in keys if pattern.search(key)), None)


def check_header(metadata: Mapping[str, str], shown: str) -> None:
    """Refuse a file whose trainer wrote into its header that it is no plain LoRA.

    A conversion may have dropped the tensors that would show it: diffusers leaves out the magnitudes of a DoRA.

    Args:
        metadata: The header of the safetensors file.
        shown: The file, as messages name it.

    Raises:
        ModelError: the trainer's module or algorithm is none of plain LoRAs.
    """
    module = metadata.get("ss_network_module") or PLAIN_MODULES[0]
    if module not in PLAIN_MODULES:
        raise ModelError(
            f"{shown}: its header names the training module {module}, which is none of {', '.join(PLAIN_MODULES)}; "
            f"{ELSEWHERE}"
        )
    try:
        arguments = json.loads(metadata.get("ss_network_args") or "{}")
    except (ValueError, RecursionError):
        arguments = {}
    if not isinstance(arguments, dict):
        return
    algorithm = str(arguments.get("algo") or PLAIN_ALGORITHMS[0])
    decomposed = [name for name in ("dora_wd", "weight_decompose") if str(arguments.get(name)).lower() in ("true", "1")]
    if decomposed or algorithm.lower() not in PLAIN_ALGORITHMS:
        said = f"{decomposed[0]}, so it is a DoRA" if decomposed else f"the algorithm {algorithm}"
        raise ModelError(f"{shown}: its header names {said}, and only plain LoRAs are fused; {ELSEWHERE}")
