"""Statements of a single-file checkpoint on its UNet's prediction and noise schedule.

Weights do not tell the noise from the velocity, nor a schedule that ends in pure noise (zero terminal SNR,
arXiv 2305.08891) from one that does not. Files say it in these ways, and the first that speaks decides:

1. the tensor `v_pred`, which ComfyUI and trainers write: the velocity;
2. `NAME.yaml` beside `NAME.safetensors`, the original code's configuration as the Stable Diffusion web UIs read it: its
   `parameterization`. Its `use_ema` is not read: of two sets of weights the plain ones are used, as in diffusers;
3. metadata `modelspec.prediction_type` of the ModelSpec standard, `modelspec.predict_key` (ComfyUI),
   `ss_v_parameterization` (kohya's sd-scripts), `modelspec.architecture`. ModelSpec's resolution, encoder layer and
   usage hint are not read: they are advice on images and prompts;
4. whatever marks zero terminal SNR: only a velocity can be predicted from pure noise.

Zero terminal SNR is said by the tensor `ztsnr`, by the metadata `ss_zero_terminal_snr` or by a table `alphas_cumprod`
that ends at 0. Sampling then begins at the last timestep, as in those programs: `timestep_spacing` is "trailing".
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from safetensors import safe_open

from smooth_rt.errors import ModelError, reason
from smooth_rt.ranges import shown
from smooth_rt.scheduler_config import stated_values
from smooth_rt.text_files import read_text
from smooth_rt.weight_header import Header

__all__ = ["Markers", "marked_schedule", "read_markers"]

log = logging.getLogger("smooth_rt")

PREDICTIONS = {"v": "v_prediction", "v_prediction": "v_prediction", "epsilon": "epsilon", "eps": "epsilon"}
BOOLEANS = {"true": "v_prediction", "false": "epsilon"}
# alpha-bar of the last timestep. Published schedules end at 0.0047; the web UIs' own table for zero SNR ends at 5e-8.
ZERO_ALPHA = 1e-6


@dataclass(frozen=True)
class Markers:
    """The statements of a checkpoint on its prediction and its schedule.

    Args:
        prediction: "epsilon" or "v_prediction"; None where the file does not say.
        zero_snr: the noise schedule ends in pure noise.
    """

    prediction: str | None
    zero_snr: bool


def read_markers(path: Path, header: Header) -> Markers:
    """Read what the checkpoint at `path` says of its prediction and its schedule; contradictions are logged.

    Args:
        header: of the file.

    Raises:
        ModelError: the .yaml beside it is damaged, or it says that it predicts the noise with zero terminal SNR.
    """
    zero_snr = (
        "ztsnr" in header.shapes
        or header.metadata.get("ss_zero_terminal_snr", "").lower() == "true"
        or _ends_at_zero(path, header)
    )
    statements = list(_predictions(path, header))
    if not statements:
        return Markers("v_prediction" if zero_snr else None, zero_snr)
    where, prediction = statements[0]
    for other, contrary in statements[1:]:
        if contrary != prediction:
            log.warning("%s: its %s says %s and its %s %s; the first is used", path, where, prediction, other, contrary)
    if zero_snr and prediction == "epsilon":
        raise ModelError(
            f"{path}: its {where} says epsilon, and it is marked as of zero terminal SNR, where only a velocity can be "
            "predicted; correct the one that is wrong"
        )
    return Markers(prediction, zero_snr)


def _predictions(path: Path, header: Header) -> Iterator[tuple[str, str]]:
    """Yield each place where the file states its prediction, with the prediction; the decisive one first."""
    if "v_pred" in header.shapes:
        yield "tensor v_pred", "v_prediction"
    said = _original_config(path)
    if said is not None:
        yield ".yaml", said
    for key, values in (
        ("modelspec.prediction_type", PREDICTIONS),
        ("modelspec.predict_key", PREDICTIONS),
        ("ss_v_parameterization", BOOLEANS),
    ):
        stated = header.metadata.get(key, "")
        said = values.get(stated.strip().lower())
        if said is not None:
            yield f"metadata {key}", said
        elif stated and values is PREDICTIONS:
            log.warning("%s: its metadata %s says %s, which is unknown and ignored", path, key, shown(stated))
    architecture = header.metadata.get("modelspec.architecture", "").lower()
    if architecture.startswith("stable-diffusion-v2") and architecture.endswith(("-v", "-512")):
        yield "metadata modelspec.architecture", "v_prediction" if architecture.endswith("-v") else "epsilon"


def _original_config(path: Path) -> str | None:
    """The prediction by the original code's configuration of the same name, if there is one."""
    file = path.with_suffix(".yaml")
    try:
        config = yaml.safe_load(read_text(file))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ModelError(
            f"{file}: not readable YAML ({reason(error)}); correct it, or move it away from the checkpoint"
        ) from error
    said = _at(config, "model", "params", "parameterization")
    scaling = _at(config, "model", "params", "denoiser_config", "params", "scaling_config", "target")
    if isinstance(scaling, str) and said is None:
        said = {"VScaling": "v", "EpsScaling": "eps"}.get(scaling.rpartition(".")[2])
    if said is None:
        return None
    found = PREDICTIONS.get(said.strip().lower()) if isinstance(said, str) else None
    if found is None:
        raise ModelError(
            f"{file}: parameterization is {shown(said)}, and only eps and v can be sampled; correct it, or move the "
            "file away from the checkpoint"
        )
    return found


def _at(value: Any, *keys: str) -> Any:
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _ends_at_zero(path: Path, header: Header) -> bool:
    """Return whether the file's table of alpha-bar is one of zero terminal SNR."""
    if len(header.shapes.get("alphas_cumprod", ())) != 1:
        return False
    with safe_open(path, "pt") as tensors:
        alphas = tensors.get_tensor("alphas_cumprod").double()
    # A table of another form, such as one of zeros that a merge left, is no schedule.
    falls = len(alphas) > 1 and bool((alphas.diff() <= 0).all()) and 0.9 < float(alphas[0]) <= 1
    return falls and 0 <= float(alphas[-1]) < ZERO_ALPHA


def marked_schedule(path: Path, config: Mapping[str, Any], markers: Markers) -> dict[str, Any]:
    """Return a scheduler's configuration with what a checkpoint says of itself.

    Args:
        path: the checkpoint, for the message.
        config: of a diffusers scheduler.
        markers: of the checkpoint.

    Raises:
        ModelError: the noise is predicted with zero terminal SNR.
    """
    changes: dict[str, Any] = {}
    if markers.prediction is not None:
        changes["prediction_type"] = markers.prediction
    if markers.zero_snr:  # PNDMScheduler, which the configs may name, knows no rescaling
        changes |= {
            "_class_name": "DDIMScheduler",
            "rescale_betas_zero_snr": True,
            "timestep_spacing": "trailing",
        }
    # diffusers fills in the defaults of the class that a config names, and lists them; a folder's config is read as is.
    merged = {**stated_values(config), **changes}
    if merged.get("rescale_betas_zero_snr") and merged.get("prediction_type", "epsilon") == "epsilon":
        raise ModelError(
            f"{path}: predicts epsilon, and its config rescales to zero terminal SNR, where only a velocity can be "
            "predicted; name another config with --model-config (in Python: config=)"
        )
    return merged
