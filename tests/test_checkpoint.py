"""What a diffusers folder's index says, and the libraries' long messages as one short line of ours."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import errors
from safetensors.torch import load_file, save_file

from smooth_rt.errors import ModelError
from smooth_rt.lora import read_lora
from smooth_rt.model import load_model

SUPPORTED = r"; supported are Stable Diffusion 1\.x and 2\.x$"


@pytest.fixture
def copy(tiny_model: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_model, tmp_path / "model")


def refusal(read: Callable[[], object], said: str) -> None:
    with pytest.raises(ModelError, match=said) as error:
        read()
    assert "\n" not in str(error.value)
    assert len(str(error.value)) <= 300


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, r"model: model_index\.json is missing; a diffusers folder holds model_index\.json, text_encoder"),
        ("{,", r"model/model_index\.json: not readable JSON \(.*\); download it again"),
        ("", r"model/model_index\.json: not readable JSON"),
        ("[" * 100_000, r"model/model_index\.json: not readable JSON"),
        ("[]", r"model/model_index\.json: holds a list, not an object; download it again"),
    ],
)
def test_a_damaged_or_missing_index(copy: Path, text: str | None, said: str) -> None:
    path = copy / "model_index.json"
    path.unlink() if text is None else path.write_text(text)
    refusal(lambda: load_model(copy), said)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"_class_name": "StableDiffusionXLPipeline"}, "names 'StableDiffusionXLPipeline', not 'StableDiffusionPipel"),
        ({"_class_name": "FluxPipeline"}, "names 'FluxPipeline'"),
        ({"_class_name": None}, "names None"),
        ({"unet": ["diffusers", "UNetMotionModel"]}, "names 'UNetMotionModel' as unet, not 'UNet2DConditionModel'"),
        ({"text_encoder": ["transformers", "T5EncoderModel"]}, "names 'T5EncoderModel' as text_encoder"),
        ({"tokenizer": ["transformers", "T5Tokenizer"]}, "names 'T5Tokenizer' as tokenizer, not 'CLIPTokenizer'"),
        ({"vae": [None, None]}, "names None as vae, not 'AutoencoderKL'"),
        ({"unet": "UNet2DConditionModel"}, "names no unet"),
        (
            {"text_encoder_2": ["transformers", "CLIPTextModelWithProjection"]},
            r"names a text_encoder_2 too \(CLIPTextModelWithProjection\)",
        ),
        ({"controlnet": ["diffusers", "ControlNetModel"]}, r"names a controlnet too \(ControlNetModel\)"),
    ],
)
def test_an_index_of_another_architecture(copy: Path, changes: dict[str, Any], said: str) -> None:
    path = copy / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    refusal(lambda: load_model(copy), rf"model: model_index\.json {said}.*{SUPPORTED}")


def test_an_index_with_optional_parts(tiny_model: Path, copy: Path) -> None:
    path = copy / "model_index.json"
    changes = {
        "_class_name": "StableDiffusionImg2ImgPipeline",
        "tokenizer": ["transformers", "CLIPTokenizerFast"],
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "text_encoder_2": [None, None],
    }
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    assert load_model(copy).digests == load_model(tiny_model).digests


@pytest.mark.parametrize(
    ("part", "key", "said"),
    [
        ("unet", "conv_in.bias", r"unet: cannot be loaded \(.*conv_in\.bias expected shape .*\); download it again"),
        ("text_encoder", "text_model.final_layer_norm.bias", r"final_layer_norm\.bias is \[3\], not \[32\] as its con"),
    ],
)
def test_a_weight_of_another_shape_is_named(copy: Path, part: str, key: str, said: str) -> None:
    path = next((copy / part).glob("*.safetensors"))
    tensors = load_file(path)
    (found,) = (name for name in tensors if name == key or f"text_model.{name}" == key)
    save_file({**tensors, found: torch.zeros(3)}, path, {"format": "pt"})
    refusal(lambda: load_model(copy), said)


def answered(kind: type[errors.HfHubHTTPError]) -> errors.HfHubHTTPError:
    response: Any = SimpleNamespace(headers={}, request=None)  # which HTTP library it is of, changes with versions
    return kind("404 Client Error. (Request ID: Root=1-2-3)\n\nA page of advice.", response=response)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (errors.LocalEntryNotFoundError("Cannot find it. " * 30), "it cannot be reached, and nothing was downloaded"),
        (answered(errors.RepositoryNotFoundError), "it has none of this name, or it is private"),
        (answered(errors.GatedRepoError), "it is gated: accept its terms there and run `hf auth login`"),
        (answered(errors.RevisionNotFoundError), "it has no revision None"),
        (OSError("The proxy is wrong. " * 30), r"\(The proxy is wrong\)"),
    ],
)
@pytest.mark.parametrize("read", [load_model, read_lora])
def test_what_the_hub_says(
    monkeypatch: pytest.MonkeyPatch, error: Exception, said: str, read: Callable[[str], object]
) -> None:
    def download(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    refusal(lambda: read("nobody/nothing"), rf"^nobody/nothing: no such file or folder, .*{said}.*; pass a")
