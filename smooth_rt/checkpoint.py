"""Read a diffusers folder or a hub repository into its parts, strictly.

The libraries fill missing weights with random numbers, fall back to pickles and answer a wrong path with a page of
advice. Here each of these is one `ModelError`.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smooth_rt.errors import ModelError, reason
from smooth_rt.ranges import shown
from smooth_rt.text_files import read_json, readable_folder
from smooth_rt.weight_header import Header, read_header
from smooth_rt.weight_keys import check_dtypes, check_unused, is_ignored

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

__all__ = [
    "CONFIG_FILES",
    "HUB_ID",
    "NAME_CONFIG",
    "NETWORK_PARTS",
    "SUPPORTED",
    "UNUSED_PARTS",
    "Parts",
    "check_folder",
    "download",
    "empty_network",
    "quiet",
    "read_folder",
    "read_hub",
]

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
SUPPORTED = "supported are Stable Diffusion 1.x and 2.x"
NAME_CONFIG = "name a diffusers folder or hub id of its architecture with --model-config (in Python: config=)"
NETWORK_PARTS = ("text_encoder", "unet", "vae")
# Both are the same parts; other pipelines of theirs (inpainting, depth) have another UNet.
PIPELINES = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline")
CLASSES = {"text_encoder": "CLIPTextModel", "unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}
WEIGHTS = {"text_encoder": "model", "unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}
# Parts of model_index.json beside the networks, and those of them that nothing here needs.
TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast")
UNUSED_PARTS = ("scheduler", "safety_checker", "feature_extractor", "image_encoder")
CONFIG_FILES = (
    "model_index.json", "scheduler/scheduler_config.json", "tokenizer/*", "text_encoder/config.json",
    "unet/config.json", "vae/config.json",
)  # fmt: skip
# Names of the layers of an attention in diffusers before 0.14 and since.
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
# Options that a pipeline of text to image would have to act on, by the part whose config asks for them.
UNSUPPORTED_OPTIONS = {
    "text_encoder": (("use_attention_mask", "its text encoder masks the padding of prompts"),),
    "unet": (
        *((key, "its UNet asks for more than text") for key in (
            "addition_embed_type", "class_embed_type", "num_class_embeds", "encoder_hid_dim_type", "encoder_hid_dim",
            "time_cond_proj_dim", "dual_cross_attention",
        )),
    ),
    "vae": (
        ("shift_factor", "its VAE shifts the latent"),
        ("latents_mean", "its VAE normalises the latent"),
        ("latents_std", "its VAE normalises the latent"),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Parts:
    """A model as it was stored: `networks` by NETWORK_PARTS, in the precision of their file."""

    tokenizer: CLIPTokenizer
    networks: dict[str, Any]
    scheduler_config: dict[str, Any]
    revision: str | None = None


def read_hub(source: str, revision: str | None = None) -> Parts:
    """The parts of hub repository `source` at a branch, tag or commit; only the files that are needed are downloaded.

    Raises:
        ModelError: the hub cannot be reached and has not been before, or as `read_folder`.
    """
    # Named one by one: these repositories hold each weight in several formats and precisions.
    patterns = list(CONFIG_FILES)
    for name, stem in WEIGHTS.items():
        files = (f"{stem}.safetensors", f"{stem}-*.safetensors", f"{stem}.safetensors.index.json")
        patterns += [f"{name}/{file}" for file in files]
    folder = download(source, patterns, "pass a diffusers folder", revision)
    return read_folder(folder, source, folder.name)


def download(source: str, patterns: Sequence[str], advice: str, revision: str | None = None) -> Path:
    """The files of hub repository `source` that fit `patterns`, as a folder of the hub's cache.

    Raises:
        ModelError: the hub does not give them; `advice` says what to do instead.
    """
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=list(patterns)))
    except Exception as error:  # the hub's client lets its HTTP library's exceptions through
        if isinstance(error, errors.GatedRepoError):
            said = "it is gated: accept its terms there and run `hf auth login`"
        elif isinstance(error, errors.RepositoryNotFoundError):
            said = "it has none of this name, or it is private"
        elif isinstance(error, errors.RevisionNotFoundError):
            said = f"it has no revision {revision}"
        elif isinstance(error, (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled)):
            said = "it cannot be reached, and nothing was downloaded before"
        else:
            said = reason(error)
        raise ModelError(f"{source}: no such file or folder, and the hub did not give it ({said}); {advice}") from error


def read_folder(folder: Path, source: str, revision: str | None = None) -> Parts:
    """The parts of a diffusers folder; `source` is its name in messages.

    Raises:
        ModelError: a part is missing, damaged or not safetensors, or the architecture is another.
    """
    import diffusers
    import torch
    import transformers

    check_folder(source, folder)
    scheduler_config = _read_json(source, folder, "scheduler/scheduler_config.json")
    if not any((folder / "tokenizer" / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise ModelError(f"{folder}: tokenizer/tokenizer.json (or vocab.json) is missing; download the folder again")
    networks: dict[str, Any] = {}
    with quiet():
        for name in NETWORK_PARTS:
            variant, files = _weight_files(folder, name)
            library = transformers if name == "text_encoder" else diffusers
            # transformers names a weight of another shape in a report that it prints, and here in `info`.
            # Without a dtype the libraries load in torch's default one.
            options: dict[str, Any] = (
                {"ignore_mismatched_sizes": True, "dtype": torch.float32}
                if library is transformers
                else {"torch_dtype": torch.float32}
            )
            try:
                with readable_folder(folder / name) as readable:
                    _check_weights(folder / name, readable, name, files)
                    networks[name], info = getattr(library, CLASSES[name]).from_pretrained(
                        readable, use_safetensors=True, variant=variant, output_loading_info=True, **options
                    )
            except ModelError:
                raise
            except Exception as error:  # whatever the library makes of a broken folder
                raise ModelError(f"{folder / name}: cannot be loaded ({reason(error)}); download it again") from error
            # The libraries fill what is missing with random numbers and only warn.
            if info["missing_keys"]:
                missing = sorted(info["missing_keys"])[0]
                raise ModelError(f"{folder / name}: the weight {missing} is missing; download the folder again")
            if info["mismatched_keys"]:
                key, found, wanted = sorted(info["mismatched_keys"])[0]
                shapes = f"the weight {key} is {list(found)}, not {list(wanted)} as its config says"
                raise ModelError(f"{folder / name}: cannot be loaded ({shapes}); download it again")
        try:
            with readable_folder(folder / "tokenizer") as readable:
                tokenizer = transformers.CLIPTokenizer.from_pretrained(readable)
        except Exception as error:  # the tokenizer's library raises bare Exception
            raise ModelError(f"{folder / 'tokenizer'}: unreadable ({reason(error)}); download it again") from error
    return Parts(tokenizer, networks, scheduler_config, revision)


def check_folder(source: str, folder: Path) -> None:
    """Whether a diffusers folder is, by what its index and its configs say, a model that is supported."""
    index = _read_json(source, folder, "model_index.json")
    pipeline = index.get("_class_name")
    if pipeline not in PIPELINES:
        raise ModelError(f"{source}: model_index.json names {pipeline!r}, not {PIPELINES[0]!r}; {SUPPORTED}")
    # A part is [library, class], or [None, None] where an optional one is left out; other values are settings.
    parts = {name: entry[-1] for name, entry in index.items() if isinstance(entry, list) and entry}
    wanted = {**{name: (one,) for name, one in CLASSES.items()}, "tokenizer": TOKENIZERS}
    for name, classes in wanted.items():
        if parts.get(name) not in classes:
            found = f"names {parts[name]!r} as {name}" if name in parts else f"names no {name}"
            raise ModelError(f"{source}: model_index.json {found}, not {classes[0]!r}; {SUPPORTED}")
    other = next((name for name in parts if name not in (*wanted, *UNUSED_PARTS) and parts[name] is not None), None)
    if other is not None:
        raise ModelError(f"{source}: model_index.json names a {other} too ({parts[other]}); {SUPPORTED}")
    configs = {name: _read_json(source, folder, f"{name}/config.json") for name in NETWORK_PARTS}
    _check_architecture(source, configs)


def _check_architecture(source: str, configs: dict[str, dict[str, Any]]) -> None:
    for name, config in configs.items():
        found = config.get("_class_name") or (config.get("architectures") or [CLASSES[name]])[0]
        if found != CLASSES[name]:
            raise ModelError(f"{source}: its {name} is a {found}, not a {CLASSES[name]}; {SUPPORTED}")
        if config.get("quantization_config"):
            method = _method(config["quantization_config"])
            raise ModelError(
                f"{source}: its {name} is quantised (quantization_config{method}); name a model in 16 or 32 bits"
            )
        for key, said in UNSUPPORTED_OPTIONS[name]:
            if config.get(key):
                raise ModelError(f"{source}: {said} ({key}={shown(config[key])}); {SUPPORTED}")


def _method(quantization: Any) -> str:
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    return f": {method}" if isinstance(method, str) else ""


def _weight_files(folder: Path, name: str) -> tuple[str | None, list[Path]]:
    """The diffusers variant to load, None or "fp16" where only that is there, and its files."""
    stem = WEIGHTS[name]
    if (folder / name / "adapter_config.json").is_file():  # transformers would load the model that it names
        raise ModelError(
            f"{folder / name}: holds a PEFT adapter (adapter_config.json); fuse it into the model, or remove it and "
            "name it with --lora"
        )
    for variant, marked in ((None, stem), ("fp16", f"{stem}.fp16")):
        files = [folder / name / f"{marked}.safetensors", *sorted((folder / name).glob(f"{marked}-*.safetensors"))]
        found = [file for file in files if file.is_file()]
        if found:
            return variant, found
    if any((folder / name).glob("*.bin")):
        convert = "StableDiffusionPipeline.from_pretrained(A, use_safetensors=False).save_pretrained(B)"
        raise ModelError(
            f"{folder / name}: holds .bin pickles, which are never loaded; convert it with diffusers: {convert}"
        )
    raise ModelError(f"{folder}: {name}/{stem}.safetensors is missing; download the folder again")


def empty_network(name: str, folder: Path) -> Any:
    """Build the network `name` by the config in `folder`, without memory for its weights."""
    import accelerate
    import diffusers
    import transformers

    with accelerate.init_empty_weights():
        if name == "text_encoder":
            return transformers.CLIPTextModel(transformers.CLIPTextConfig.from_pretrained(folder))
        network = getattr(diffusers, CLASSES[name])
        return network.from_config(network.load_config(folder))


def _check_weights(folder: Path, readable: Path, name: str, files: Sequence[Path]) -> None:
    """Check by the headers of a part's weight files that every weight in them is read.

    Args:
        folder: the part's, for messages.
        readable: the folder of its config; see `readable_folder`.
        name: the part's.
        files: its weights.

    Raises:
        ModelError: a file is damaged, or holds weights that no network reads.
    """
    headers = [read_header(file) for file in files]
    expected = {_current_name(name, key) for key in empty_network(name, readable).state_dict()}
    for header in headers:
        _check_header(str(folder), name, header, expected)


def _check_header(source: str, name: str, header: Header, expected: Collection[str]) -> None:
    names = {key: key if key in expected else _current_name(name, key) for key in header.shapes}
    check_unused(source, [key for key, new in names.items() if new not in expected and not is_ignored(name, new)])
    twice = next((key for key, new in names.items() if key != new and new in names), None)
    if twice is not None:
        raise ModelError(f"{source}: the weight {names[twice]} is there twice (as {twice} too); remove one of them")
    check_dtypes(source, {key: header.dtypes[key] for key, new in names.items() if new in expected})


def _current_name(name: str, key: str) -> str:
    """The name that the libraries load a weight under, of one that an earlier version of theirs wrote."""
    if name == "text_encoder":
        return re.sub(r"^(clip\.|text_model\.)", "", key)
    for old, new in OLD_ATTENTION.items():
        key = key.replace(f".{old}.", f".{new}.")
    return key


def _read_json(source: str, folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    try:
        value = read_json(path)
    except FileNotFoundError as error:
        holds = ", ".join(["model_index.json", *NETWORK_PARTS, "tokenizer", "scheduler"])
        raise ModelError(f"{source}: {name} is missing; a diffusers folder holds {holds}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not readable JSON ({reason(error)}); download it again") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: holds a {type(value).__name__}, not an object; download it again")
    return value


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the libraries' progress bars and advice; what matters of it is checked here and raised."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries = (diffusers_logging, transformers_logging)
    before = [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    for library in libraries:
        library.set_verbosity(library.CRITICAL)
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, (verbosity, bar) in zip(libraries, before, strict=True):
            library.set_verbosity(verbosity)
            if bar:
                library.enable_progress_bar()
