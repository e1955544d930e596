"""A text-to-image model as torch modules: the shipped one, a diffusers folder, a hub id or a single-file checkpoint.

Supported are Stable Diffusion 1.x and 2.x and what is built like them: CLIPTokenizer, CLIPTextModel, a
UNet2DConditionModel that is conditioned on text alone, AutoencoderKL. Weights are read from safetensors only.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from torch import nn

from engines.bundle import digest_json, staging
from engines.contract import Dims, NetworkName
from engines.paths import expanded, recorded
from engines.torch_modes import default_modes
from smooth_rt.checkpoint import (
    HUB_ID,
    NETWORK_PARTS,
    SUPPORTED,
    Parts,
    quiet,
    read_folder,
    read_hub,
)
from smooth_rt.digests import digest_tensors
from smooth_rt.errors import BundleError, InputError, ModelError, reason
from smooth_rt.sample_size import correct_sample_size, latent_size
from smooth_rt.scheduler_config import corrected_config, finite_config, read_scheduler
from smooth_rt.single_file import read_file

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    from smooth_rt.lora.read import Lora

__all__ = ["Model", "PipelineConfig", "default_lora", "default_model", "load_model", "read_config"]

# Keys of a transformers config that change no number.
NEUTRAL_KEYS = ("architectures", "dtype", "torch_dtype", "transformers_version")


@dataclass(frozen=True)
class PipelineConfig:
    """What a pipeline needs beside its networks: prompts to ids, the noise schedule, the latent's scale.

    `decoder_channels` is how many numbers the VAE's decoder holds at once, at the least, for each pixel: what its last
    block takes in and leaves. 0 where a bundle was built before that was written down.
    """

    tokenizer: CLIPTokenizer
    scheduler_config: dict[str, Any]
    scaling_factor: float
    decoder_channels: int = 0

    @property
    def sampling_config(self) -> dict[str, Any]:
        """`scheduler_config` as diffusers' StableDiffusionPipeline corrects it; see `corrected_config`."""
        return corrected_config(self.scheduler_config)

    def scheduler(self) -> DDIMScheduler:
        """Return the scheduler that the model is sampled with; see `read_scheduler`."""
        return read_scheduler(self.scheduler_config)


@dataclass
class Model:
    """Torch modules in fp32, in eval mode, without gradients.

    Args:
        source: the model as the caller named it.
        revision: the hub's commit, where the weights came from there.
        scheduler_config: of any diffusers scheduler; the pipeline makes its DDIM schedule from it.
        digests: sha256 of text_encoder, unet, vae (weights and config), tokenizer and scheduler. They are those of the
            weights as loaded: `smooth_rt.lora.fuse` changes the UNet and leaves them, since a bundle's key holds the
            LoRA's digest beside them.
        lora: one that was not fused, so that its strength can be set as it runs.
        config_source: of a single-file checkpoint, the configs that the caller named, if any.
        path, config_path: absolute paths of `source` and `config_source` where these are files or folders.
    """

    source: str
    revision: str | None
    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    scheduler_config: dict[str, Any]
    dims: Dims
    digests: dict[str, str]
    lora: Lora | None = None
    config_source: str | None = None
    path: str | None = None
    config_path: str | None = None

    def config(self) -> PipelineConfig:
        """What `write_config` writes, without the detour through files."""
        return PipelineConfig(self.tokenizer, self.scheduler_config, **self._vae_facts())

    def _vae_facts(self) -> dict[str, Any]:
        channels = self.vae.config.block_out_channels
        return {
            "scaling_factor": float(self.vae.config.scaling_factor),
            "decoder_channels": channels[min(1, len(channels) - 1)] + channels[0],
        }

    def write_config(self, folder: Path) -> None:
        """Write what a bundle needs to run without the model; `read_config` reads it back."""
        folder.mkdir(parents=True, exist_ok=True)
        _save_tokenizer(self.tokenizer, folder / "tokenizer")
        _write_json(folder / "scheduler_config.json", finite_config(self.scheduler_config))
        _write_json(folder / "model.json", self._vae_facts())

    def network_configs(self) -> dict[NetworkName, dict[str, Any]]:
        """Each network's config as `save` writes it, for `export.layout`; the VAE's stands for both its networks.

        The text encoder's `max_position_embeddings` is the number of tokens that its graph takes: readers of graphs
        size their ids by it.
        """
        text = {**self.text_encoder.config.to_diff_dict(), "max_position_embeddings": self.dims.tokens}
        unet, vae = (json.loads(module.to_json_string()) for module in (self.unet, self.vae))
        for config in (unet, vae):
            config.pop("_name_or_path", None)  # this machine's folders
        return {"text_encoder": text, "unet": unet, "vae_encoder": vae, "vae_decoder": vae}

    def save(self, folder: Path) -> None:
        """Write a complete diffusers folder (fp32 safetensors), whole or not at all.

        Raises:
            InputError: `folder` exists and is not empty, is a file or lies under one, or the disk refuses.
        """
        folder = expanded(folder)
        if folder.is_dir() and any(folder.iterdir()):
            raise InputError(f"{folder}: holds something already; name a new or an empty folder")
        import diffusers

        scheduler_class = str(self.scheduler_config.get("_class_name", "DDIMScheduler"))
        index: dict[str, Any] = {
            "_class_name": "StableDiffusionPipeline",
            "_diffusers_version": diffusers.__version__,
            "feature_extractor": [None, None],
            "image_encoder": [None, None],
            "requires_safety_checker": False,
            "safety_checker": [None, None],
            "scheduler": ["diffusers", scheduler_class],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        }
        try:
            with staging(folder) as partial, quiet():
                for name in NETWORK_PARTS:
                    getattr(self, name).save_pretrained(partial / name, safe_serialization=True)
                _save_tokenizer(self.tokenizer, partial / "tokenizer")
                (partial / "scheduler").mkdir()
                scheduler_config = {**self.scheduler_config, "_class_name": scheduler_class}
                _write_json(partial / "scheduler" / "scheduler_config.json", scheduler_config)
                _write_json(partial / "model_index.json", index)
        except BundleError as error:  # no bundle is written here, and it is the path or the disk that is at fault
            raise InputError(f"model folder {error}") from error
        except SafetensorError as error:
            raise InputError(
                f"model folder {folder}: cannot be written ({reason(error)}); free space or name another folder"
            ) from error


def default_model() -> Path:
    """The folder of the model that ships with the project."""
    return Path(__file__).parent / "assets" / "model"


def default_lora() -> Path:
    """The file of the Smooth-LoRA that ships with the project and fits `default_model`."""
    return Path(__file__).parent / "assets" / "smooth_lora.safetensors"


@default_modes()
def load_model(
    model: str | Path = "default", *, revision: str | None = None, config: str | Path | None = None
) -> Model:
    """Load a model's torch modules on the CPU.

    Args:
        model: "default" (shipped with the project), a diffusers folder, a hub id such as
            "stable-diffusion-v1-5/stable-diffusion-v1-5", or a single-file checkpoint (.safetensors).
        revision: branch, tag or commit of a hub id.
        config: for a single-file checkpoint, a diffusers folder or a hub id of the same architecture; its weights are
            not read. Without it the configs that ship with the project are taken, by what the weights are.

    Raises:
        InputError: `config` is given with another kind of model.
        ModelError: nothing is there, a part is missing, damaged or not safetensors, or the architecture is another.
    """
    source = str(model)
    path = expanded(source)
    if source != "default" and path.is_file():
        given: dict[str, Any] = {"path": recorded(path)}
        if config is not None:
            given["config_source"] = str(config)
            given["config_path"] = recorded(config) if expanded(config).is_dir() else None
        return replace(_assemble(source, read_file(path, config)), **given)
    if config is not None:
        raise InputError(f"{source}: is no file; --model-config (in Python: config=) is for a .safetensors checkpoint")
    if source == "default":
        folder = default_model()
        if not folder.is_dir():
            raise ModelError(f"default model: {folder} is missing; install smooth-rt again or name a model")
        return _assemble(source, read_folder(folder, source))
    if path.is_dir():
        return replace(_assemble(source, read_folder(path, source)), path=recorded(path))
    if not HUB_ID.fullmatch(source) or path.suffix in (".safetensors", ".ckpt"):
        raise ModelError(f"{source}: no such folder or file; name a diffusers folder, a checkpoint or a hub id")
    return _assemble(source, read_hub(source, revision))


def read_config(folder: Path) -> PipelineConfig:
    """Read what `Model.write_config` wrote.

    Raises:
        BundleError: a file is missing or damaged.
    """
    from transformers import CLIPTokenizer

    try:
        scheduler_config = json.loads((folder / "scheduler_config.json").read_text(encoding="utf-8"))
        if not isinstance(scheduler_config, dict):
            raise TypeError("scheduler_config.json holds no object")
        facts = json.loads((folder / "model.json").read_text(encoding="utf-8"))
        scaling_factor, decoder_channels = float(facts["scaling_factor"]), int(facts.get("decoder_channels", 0))
        if not (folder / "tokenizer" / "tokenizer.json").is_file():
            raise FileNotFoundError("tokenizer/tokenizer.json is missing")
        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    except Exception as error:  # the tokenizer's library raises bare Exception
        raise BundleError(f"{folder}: unreadable ({reason(error)}); run smooth-rt build-engine again") from error
    return PipelineConfig(tokenizer, scheduler_config, scaling_factor, decoder_channels)


def _assemble(source: str, parts: Parts) -> Model:
    tokenizer, scheduler = parts.tokenizer, parts.scheduler_config
    read_scheduler(scheduler)  # a model that cannot be sampled is refused before anything is made of it
    correct_sample_size(source, parts.networks["unet"])
    dims = _dims(source, tokenizer, parts.networks)
    digests = {}
    for name, module in parts.networks.items():
        module.float().eval().requires_grad_(False)
        digests[name] = _digest_module(module)
    # The tokenizer remembers how it was last called; that is no property of the model.
    state = {**json.loads(tokenizer.backend_tokenizer.to_str()), "padding": None, "truncation": None}
    specials = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    # Appended only where they differ from CLIP's own, so that the digests of all others stay as they are.
    sides = [tokenizer.padding_side, tokenizer.truncation_side, bool(getattr(tokenizer, "split_special_tokens", False))]
    options = [] if sides == ["right", "right", False] else sides
    digests["tokenizer"] = digest_json([state, specials, tokenizer.model_max_length, *options])
    digests["scheduler"] = digest_json({k: v for k, v in finite_config(scheduler).items() if not k.startswith("_")})
    return Model(
        source=source,
        revision=parts.revision,
        tokenizer=tokenizer,
        **parts.networks,
        scheduler_config=scheduler,
        dims=dims,
        digests=digests,
    )


def _dims(source: str, tokenizer: CLIPTokenizer, networks: dict[str, Any]) -> Dims:
    text, unet, vae = (networks[name].config for name in NETWORK_PARTS)
    if tokenizer.model_max_length > text.max_position_embeddings:
        raise ModelError(
            f"{source}: the tokenizer's model_max_length is {tokenizer.model_max_length:g} and the text encoder takes "
            f"{text.max_position_embeddings}; set it in tokenizer/tokenizer_config.json"
        )
    if len(tokenizer) > text.vocab_size:
        raise ModelError(
            f"{source}: {len(tokenizer)} tokens, and the text encoder knows {text.vocab_size}; use its own"
        )
    for part, size, other, wanted in (
        ("text encoder's hidden_size", text.hidden_size, "the UNet's cross_attention_dim", unet.cross_attention_dim),
        ("UNet's in_channels", unet.in_channels, "the VAE's latent_channels", vae.latent_channels),
        ("UNet's out_channels", unet.out_channels, "the VAE's latent_channels", vae.latent_channels),
    ):
        if size != wanted:
            raise ModelError(f"{source}: the {part} is {size} and {other} {wanted}; {SUPPORTED}")
    factor = vae.scaling_factor
    if not isinstance(factor, (int, float)) or not 0 < factor < math.inf:
        raise ModelError(f"{source}: the VAE's scaling_factor is {factor}; give a number above 0; {SUPPORTED}")
    vae_factor = 2 ** (len(vae.block_out_channels) - 1)
    height, width = latent_size(source, unet, vae, vae_factor)
    return Dims(
        tokens=tokenizer.model_max_length,
        text_width=text.hidden_size,
        vocabulary=text.vocab_size,
        latent_channels=vae.latent_channels,
        image_channels=vae.in_channels,
        vae_factor=vae_factor,
        latent_multiple=2 ** (len(unet.block_out_channels) - 1),
        sample_size=height,
        up_channels=tuple(reversed(unet.block_out_channels)),
        sample_width=None if width == height else width,
    )


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _save_tokenizer(tokenizer: CLIPTokenizer, folder: Path) -> None:
    tokenizer.save_pretrained(folder)
    tokenizer.backend_tokenizer.model.save(str(folder))  # vocab.json and merges.txt, for readers of the older layout


def _plain_config(module: Any) -> dict[str, Any]:
    config = module.config
    return config.to_dict() if hasattr(config, "to_dict") else dict(config)


def _digest_module(module: nn.Module) -> str:
    """sha256 over the config and the weights in the order of their names; class and file layout do not matter."""
    config = {k: v for k, v in _plain_config(module).items() if not k.startswith("_") and k not in NEUTRAL_KEYS}
    return digest_tensors(module.state_dict(), digest_json(config))
