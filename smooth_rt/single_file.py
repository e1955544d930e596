"""Read a single-file checkpoint in the layout of the original Stable Diffusion code, strictly.

It holds weights alone. The configs and the tokenizer are those that ship with the project, by what the weights are, or
those that the caller names.
"""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from engines.paths import expanded
from smooth_rt.architecture import recognise, shipped_tokenizer
from smooth_rt.checkpoint import (
    CONFIG_FILES,
    HUB_ID,
    NAME_CONFIG,
    NETWORK_PARTS,
    UNUSED_PARTS,
    Parts,
    check_folder,
    download,
    empty_network,
    quiet,
)
from smooth_rt.errors import ModelError, reason
from smooth_rt.markers import Markers, marked_schedule, read_markers
from smooth_rt.original_layout import destinations, part_of, plain_name, state_of
from smooth_rt.text_files import readable_folder
from smooth_rt.weight_header import read_header
from smooth_rt.weight_keys import check_dtypes, check_unused, is_ignored

__all__ = ["predicts_noise", "read_file"]

log = logging.getLogger("smooth_rt")


def read_file(path: Path, config: str | Path | None = None) -> Parts:
    """The parts of a single-file checkpoint.

    Args:
        config: a diffusers folder of its architecture or a hub id, of which only the configs and the tokenizer are
            read. None: the shipped configs that fit the weights. What the file itself says of its prediction and its
            noise schedule (`smooth_rt.markers`) comes before either.

    Raises:
        ModelError: the file is no complete safetensors checkpoint, holds weights that nothing reads, is of an
            architecture that does not ship, or does not fit `config`.
    """
    if path.suffix != ".safetensors":
        raise ModelError(f"{path}: only .safetensors checkpoints are loaded, pickles never; convert it first")
    if config is not None:
        markers = read_markers(path, read_header(path))
        pipe = _load(path, _config_folder(str(config)), f"check that {config} is of its architecture")
        named = pipe.scheduler.config.get("prediction_type", "epsilon")
        if markers.prediction not in (None, named):
            log.warning(
                "%s: says that it predicts %s, and so it is run; %s says %s", path, markers.prediction, config, named
            )
        return _parts(pipe, marked_schedule(path, pipe.scheduler.config, markers))

    found = recognise(path)
    # Where the file does not say, it is asked: the last of the folders is loaded, and the other where that was wrong.
    prediction = found.said or list(found.folders)[-1]
    folder = found.folders.get(prediction) or next(iter(found.folders.values()))
    pipe = _load_shipped(path, folder)
    if found.said is None and len(found.folders) > 1:
        prediction = "epsilon" if predicts_noise(pipe) else "v_prediction"
        if found.folders[prediction] != folder:
            folder = found.folders[prediction]
            del pipe
            pipe = _load_shipped(path, folder)
        log.info("%s: its UNet predicts %s, by what it makes of noise", path, prediction)
    log.info("%s: taken for %s", path, folder.name)
    return _parts(pipe, marked_schedule(path, pipe.scheduler.config, Markers(prediction, found.zero_snr)))


@torch.no_grad()
def predicts_noise(pipe: Any) -> bool:
    """Whether a UNet predicts the noise; else it is the velocity.

    At the last timestep the latent is all but pure noise. What predicts the noise gives it back there; the velocity is
    then, up to its sign, the image, which has little to do with the noise.
    """
    unet, tokenizer = pipe.unet.float().eval(), pipe.tokenizer
    ids = tokenizer("", padding="max_length", max_length=tokenizer.model_max_length, return_tensors="pt").input_ids
    text = pipe.text_encoder.float().eval()(ids)[0]
    side = 2 ** (len(unet.config.block_out_channels) + 1)  # small, and four pixels on the UNet's lowest level
    noise = torch.randn(
        (1, unet.config.in_channels, side, side), generator=torch.Generator().manual_seed(0), dtype=torch.float32
    )
    made = unet(noise, pipe.scheduler.config.num_train_timesteps - 1, text).sample
    return float(torch.corrcoef(torch.stack([noise.flatten(), made.flatten()]))[0, 1]) > 0.5


def _load_shipped(path: Path, folder: Path) -> Any:
    tokenizer = shipped_tokenizer(folder)
    return _load(path, folder, f"name a complete checkpoint, or {NAME_CONFIG}", tokenizer=tokenizer)


def _load(path: Path, folder: Path, advice: str, **given: Any) -> Any:
    """The checkpoint as a diffusers pipeline, with the configs of `folder`; every weight is the file's."""
    with quiet(), warnings.catch_warnings():
        from diffusers import StableDiffusionPipeline

        # The pipeline warns of each value of an old config that it corrects.
        warnings.simplefilter("ignore", FutureWarning)
        try:
            with readable_folder(folder) as readable:
                networks = {name: empty_network(name, readable / name) for name in NETWORK_PARTS}
                for name, sources in _sources(path, networks).items():
                    with safe_open(path, "pt") as file:
                        tensors = {plain: file.get_tensor(key) for plain, key in sources.items()}
                    networks[name].load_state_dict(state_of(name, networks[name], tensors), assign=True)
                return StableDiffusionPipeline.from_pretrained(
                    str(readable), local_files_only=True, **networks, **dict.fromkeys(UNUSED_PARTS[1:]), **given
                )
        except ModelError:
            raise
        except Exception as error:  # whatever the libraries make of it
            raise ModelError(
                f"{path}: not loaded as a Stable Diffusion checkpoint ({reason(error)}); {advice}"
            ) from error


def _sources(path: Path, networks: dict[str, Any]) -> dict[str, dict[str, str]]:
    """Find by the header which tensors of the checkpoint each network takes.

    Returns:
        By part: the file's names of its tensors, by their plain names.

    Raises:
        ModelError: a network lacks a weight, or a tensor is of no use to any of them.
    """
    header = read_header(path)
    keys: dict[str, str] = {}
    for key in header.shapes:
        plain = plain_name(key)
        other = keys.setdefault(plain, key)
        if other != key:
            keys[plain] = _same(path, plain, key, other)
    shapes = {plain: header.shapes[key] for plain, key in keys.items()}
    found = {name: destinations(name, network, shapes) for name, network in networks.items()}
    read = {plain for sources in found.values() for plain in sources.values()}
    unread = [plain for plain in keys if plain not in read and not is_ignored(*part_of(plain))]
    check_unused(f"{path}", [keys[plain] for plain in unread])
    for name, network in networks.items():
        missing = next((key for key in network.state_dict() if key not in found[name]), None)
        if missing is not None:
            raise ModelError(f"{path}: the {name}'s weight {missing} is missing; name a complete checkpoint")
    check_dtypes(f"{path}", {keys[plain]: header.dtypes[keys[plain]] for plain in read})
    return {name: {plain: keys[plain] for plain in sources.values()} for name, sources in found.items()}


def _same(path: Path, plain: str, key: str, other: str) -> str:
    """One of two tensors that are the same weight under two names.

    Raises:
        ModelError: they differ.
    """
    with safe_open(path, "pt") as file:
        if torch.equal(file.get_tensor(key).float(), file.get_tensor(other).float()):
            return plain if plain in (key, other) else key
    raise ModelError(f"{path}: {key} and {other} are one weight and differ; remove the one that is wrong")


def _parts(pipe: Any, scheduler_config: dict[str, Any]) -> Parts:
    return Parts(pipe.tokenizer, {name: getattr(pipe, name) for name in NETWORK_PARTS}, scheduler_config)


def _config_folder(config: str) -> Path:
    """The folder that `config` names, checked; a hub id is downloaded, without its weights."""
    folder = expanded(config)
    if not folder.is_dir():
        if not HUB_ID.fullmatch(config):
            raise ModelError(f"{config}: no such folder; as a checkpoint's config, name a diffusers folder or a hub id")
        folder = download(config, CONFIG_FILES, "name a diffusers folder as the checkpoint's config")
    check_folder(config, folder)
    return folder
