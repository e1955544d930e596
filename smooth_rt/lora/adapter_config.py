"""PEFT's configuration of a LoRA: the scale of each layer, and a refusal of each setting that the scale cannot express.

A layer is fused as W + alpha / r * B @ A. PEFT's adapters can mean more: other methods, biases, weights that were
changed before training, ... The settings under which PEFT itself computes the sum above are listed; a setting outside
the list must be empty or have the default value of the installed PEFT.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from copy import copy
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from smooth_rt.errors import ModelError, reason
from smooth_rt.lora.foreign import merge_with_diffusers
from smooth_rt.text_files import read_json

__all__ = ["CONFIG_FILE", "LARGEST_ALPHA", "AdapterConfig", "read_adapter_config", "read_stored_config"]

CONFIG_FILE = "adapter_config.json"
LARGEST_ALPHA = 1e6  # far over any rank: more overflows in half precision, if not before
ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"  # a module that most LoRAs change
LONGEST_VALUE = 60  # characters of a setting's value in a message

# Initialisations that leave the base weights as they are, when the adapter is made and when PEFT loads it.
PLAIN_INITS = ("gaussian", "orthogonal", "mica", "eva")
# Those that change the base weights, by the start of their names. Only the first two give the same weights again when
# PEFT loads the adapter: the iterations of PiSSA begin at random, and CorDA and LoRA-GA read data of the training.
CHANGING_INITS = ("pissa", "olora", "loftq", "pissa_niter_", "corda", "lora_ga")
REPEATABLE_INITS = ("pissa", "olora", "loftq")

# Settings that `AdapterConfig` computes with.
APPLIED = ("peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "init_lora_weights")
TARGETS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
# Settings that change no weight of a UNet: records, training alone, or kinds of layers that a UNet has not.
NEUTRAL = (
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "fan_in_fan_out",
    "inference_mode",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "monteclora_config",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
    "velora_config",
)
# Settings by which an adapter is another method: what it is, and whether PEFT can merge it into a UNet.
METHODS = {
    "use_dora": ("DoRA", True),
    "lora_bias": ("a LoRA with biases", True),
    "bias": ("a LoRA with trained biases", True),
    "modules_to_save": ("a LoRA with whole modules beside it", True),
    "target_parameters": ("a LoRA of parameters in the place of modules", True),
    "kasa_config": ("KaSA", True),
    "use_bdlora": ("BD-LoRA", True),
    "trainable_token_indices": ("a LoRA with trained tokens", False),
    "layer_replication": ("a LoRA of replicated layers", False),
    "alora_invocation_tokens": ("aLoRA", False),
    "arrow_config": ("an Arrow router of LoRAs", False),
    "use_qalora": ("QA-LoRA", False),
    "megatron_config": ("a LoRA of Megatron layers", False),
}
# Types of adapters that PEFT cannot merge, or that are for language models alone.
UNMERGED_TYPES = (
    "ADAPTION_PROMPT",
    "BEFT",
    "CARTRIDGE",
    "CPT",
    "LILY",
    "MULTITASK_PROMPT_TUNING",
    "POLY",
    "PREFIX_TUNING",
    "PROMPT_TUNING",
    "P_TUNING",
    "SHADOW",
    "TRAINABLE_TOKENS",
    "XLORA",
)
RETRAIN = "train it again as a plain LoRA"


@dataclass(frozen=True)
class AdapterConfig:
    """The settings of a LoRA that `read_lora` applies.

    Attributes:
        source: The file that the settings are from, as messages name it.
        rank, alpha: Of the layers that no pattern names. A rank of None is not checked.
        rank_pattern, alpha_pattern: By PEFT's patterns of module paths.
        rank_stabilised: Whether alpha is divided by the root of the rank (rsLoRA).
        targets: A `LoraConfig` that says which modules PEFT loads, or None for all.
    """

    source: str
    rank: int | None
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    rank_stabilised: bool
    targets: Any = None

    def check_layer(self, path: str, key: str, rank: int, dimensions: int) -> None:
        """Check that PEFT would load a layer as it is in the file.

        Args:
            path: The module's path in the UNet.
            key: The name of the layer's `down` in the file.
            rank: The rank of the layer's tensors.
            dimensions: 2 for a linear layer, 4 for a convolution.

        Raises:
            ModelError: the settings leave the module out, or give it another rank.
        """
        if self.targets is not None and not self._is_target(path, dimensions):
            raise ModelError(
                f"{self.source}: leaves out {path}, for which the file has {key}, so PEFT would not load it; "
                "repair target_modules and its companions, or remove the tensors"
            )
        expected = self._of_pattern(self.rank_pattern, path, self.rank)
        if expected is not None and expected != rank:
            raise ModelError(
                f"{self.source}: gives {path} rank {expected}, and {key} has {rank}; take the configuration and the "
                "tensors from one adapter"
            )

    def alpha_of(self, path: str, rank: int) -> float:
        """Return the alpha by which `alpha / rank` is the scale of PEFT."""
        alpha = float(self._of_pattern(self.alpha_pattern, path, self.alpha))
        return alpha * math.sqrt(rank) if self.rank_stabilised else alpha

    def _of_pattern(self, pattern: Mapping[str, Any], path: str, default: Any) -> Any:
        from peft.utils.other import get_pattern_key

        return pattern.get(get_pattern_key(list(pattern), path), default)

    def _is_target(self, path: str, dimensions: int) -> bool:
        from peft.tuners.tuners_utils import check_target_module_exists

        targets = copy(self.targets)
        if str(targets.target_modules).lower() == "all-linear":
            targets.target_modules = {path} if dimensions == 2 else set()
        try:
            return bool(check_target_module_exists(targets, path))
        except (ValueError, TypeError, AttributeError, re.error) as error:
            raise _unreadable(self.source, error) from error


def read_adapter_config(path: Path) -> AdapterConfig:
    """Read the adapter_config.json that PEFT writes beside its weights.

    Raises:
        ModelError: the file cannot be read, or a setting is refused; the line names it.
    """
    merge = (
        "merge it into its model with PEFT (pipe = StableDiffusionPipeline.from_pretrained(MODEL); pipe.unet = "
        f"PeftModel.from_pretrained(pipe.unet, {str(path.parent)!r}).merge_and_unload(); pipe.save_pretrained(FOLDER)) "
        "and give --model FOLDER --lora none"
    )
    try:
        stored = read_json(path)
    except (OSError, ValueError, RecursionError) as error:
        raise _unreadable(path, error) from error
    return _checked(stored, path, merge)


def read_stored_config(text: str, path: Path) -> AdapterConfig | None:
    """Read the configuration that diffusers writes into the header of a safetensors file.

    Args:
        text: The value of "lora_adapter_metadata": JSON, whose keys begin with the network's name ("unet.r"), or have
            no such beginning where one network was saved alone.
        path: The safetensors file.

    Returns:
        The UNet's settings, or None where there are none.

    Raises:
        ModelError: as `read_adapter_config`.
    """
    merge = merge_with_diffusers(str(path))
    try:
        stored = json.loads(text)
        of_unet = {key.removeprefix("unet."): value for key, value in stored.items() if key.startswith("unet.")}
        settings = of_unet or {key: value for key, value in stored.items() if "." not in key}
        # diffusers gives a LoRA to each module that the file has tensors for.
        settings = {key: value for key, value in settings.items() if key not in TARGETS}
    except (ValueError, AttributeError, RecursionError) as error:
        raise _unreadable(path, error) from error
    return _checked(settings, path, merge) if settings else None


def _checked(settings: Any, path: Path, merge: str) -> AdapterConfig:
    if not isinstance(settings, dict):
        raise _unreadable(path, TypeError(f"{type(settings).__name__}, not settings by name"))
    from peft import LoraConfig

    _check_method(settings, path, merge)
    _check_init(settings.get("init_lora_weights", True), path, merge)
    defaults = {
        field.name: field.default if field.default_factory is MISSING else field.default_factory()
        for field in fields(LoraConfig)
    }
    for name, value in settings.items():
        _check_setting(name, value, defaults.get(name), path, merge)
    try:
        ranks, alphas = settings.get("rank_pattern") or {}, settings.get("alpha_pattern") or {}
        for name in (*ranks, *alphas):
            re.compile(name)  # as PEFT reads them
        rank = settings.get("r")
        for name, value in (("r", rank), *ranks.items()):
            if (name, value) != ("r", None) and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"{name}: no rank of 1 or more")
        alpha = settings.get("lora_alpha", defaults["lora_alpha"])
        for name, value in (("lora_alpha", alpha), *alphas.items()):
            # A bool is an int to Python; by the comparison NaN is refused too.
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not (number and abs(value) <= LARGEST_ALPHA):
                raise ValueError(f"{name}: no number from -{LARGEST_ALPHA:g} to {LARGEST_ALPHA:g}")
        if not isinstance(settings.get("use_rslora", False), bool):
            raise ValueError("use_rslora: neither true nor false")
        targets = {name: settings[name] for name in TARGETS if settings.get(name) is not None}
        checked = LoraConfig(**targets) if targets.get("target_modules") is not None else None
        stabilised = bool(settings.get("use_rslora"))
        config = AdapterConfig(str(path), rank, float(alpha), ranks, alphas, stabilised, checked)
        if checked is not None:
            config._is_target(ATTENTION, 2)  # compiles the regular expressions, before a layer is looked at
    except (ValueError, TypeError, AttributeError, re.error) as error:
        raise _unreadable(path, error) from error
    return config


def _check_method(settings: Mapping[str, Any], path: Path, merge: str) -> None:
    kind = settings.get("peft_type") or "LORA"
    if str(kind).upper() != "LORA":
        advice = RETRAIN if str(kind).upper() in UNMERGED_TYPES else f"{merge}, or {RETRAIN}"
        raise ModelError(f"{path}: peft_type is {kind}, and only LORA is fused; {advice}")


def _check_init(init: Any, path: Path, merge: str) -> None:
    """Refuse an initialisation under which the base weights were changed, so that the factors alone are no LoRA."""
    name = init.lower() if isinstance(init, str) else init
    if not name or name is True or name in PLAIN_INITS:
        return
    if not isinstance(name, str) or not name.startswith(CHANGING_INITS):
        raise ModelError(
            f"{path}: init_lora_weights is {_shown(init)}, of which it is unknown whether it changes the base weights; "
            f"{merge}"
        )
    convert = (
        "convert it where it was trained (model.save_pretrained(FOLDER, path_initial_model_for_weight_conversion="
        "INITIAL), INITIAL being the adapter as saved before the training)"
    )
    # LoftQ quantises the base weights, for which PEFT has no conversion.
    advice = merge if name == "loftq" else f"{convert}, or {merge}" if name in REPEATABLE_INITS else convert
    raise ModelError(f"{path}: init_lora_weights is {_shown(init)}, which changed the base weights as well; {advice}")


def _check_setting(name: str, value: Any, default: Any, path: Path, merge: str) -> None:
    if name in APPLIED or name in TARGETS or name in NEUTRAL or not value or value == default:
        return
    if name not in METHODS:
        raise ModelError(
            f"{path}: {name} is {_shown(value)}, a setting that is unknown here and may change the weights; {merge}"
        )
    method, mergeable = METHODS[name]
    advice = f"{merge}, or {RETRAIN}" if mergeable else RETRAIN
    raise ModelError(f"{path}: {name} is {_shown(value)}, so it is {method}, and only plain LoRAs are fused; {advice}")


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}..."


def _unreadable(path: str | Path, error: BaseException) -> ModelError:
    return ModelError(f"{path}: its PEFT configuration is unreadable ({reason(error)}); repair it")
