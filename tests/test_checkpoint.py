"""What a diffusers folder's index says, and the libraries' long messages as one short line of ours."""

from __future__ import annotations

import json
import re
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


ATTENTION = "mid_block.attentions.0.transformer_blocks.0.attn1"


def add(path: Path, **tensors: torch.Tensor) -> None:
    """Write tensors into a weight file; `/` stands for the dot in their names."""
    more = {name.replace("/", "."): tensor for name, tensor in tensors.items()}
    save_file({**load_file(path), **more}, path, {"format": "pt"})


@pytest.mark.parametrize(
    ("part", "key", "said"),
    [
        (
            "unet",
            f"{ATTENTION}.processor.to_q_lora.down.weight",
            "LoRA weights; fuse them .* name the LoRA with --lora",
        ),
        ("unet", f"{ATTENTION}.to_q.lora_A.default.weight", "LoRA weights"),
        ("unet", "conv_in.weight_scale", "scales of quantised weights; name a model in 16 or 32 bits"),
        ("unet", "down_blocks.5.resnets.0.conv1.weight", "of layers that the config does not have"),
        ("unet", "vision_model.x", "nothing here reads them"),
        ("vae", "quant_conv.scale_weight", "scales of quantised weights"),
        ("vae", "encoder.surprise", "nothing here reads them; name a model without them"),
        ("text_encoder", "text_model.encoder.layers.0.self_attn.q_proj.lora_A.default.weight", "LoRA weights"),
        ("text_encoder", "text_model.encoder.layers.9.layer_norm1.bias", "of layers that the config does not have"),
    ],
)
def test_a_folder_with_unread_weights_is_refused(copy: Path, part: str, key: str, said: str) -> None:
    add(next((copy / part).glob("*.safetensors")), **{key: torch.zeros(2)})
    refusal(lambda: load_model(copy), rf"model/{part}: 1 weight would be ignored \({re.escape(key)}\): {said}")


def test_a_unet_with_injected_peft_layers_is_refused(copy: Path) -> None:
    path = copy / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = {name.replace(".to_q.weight", ".to_q.base_layer.weight"): one for name, one in load_file(path).items()}
    save_file(tensors, path, {"format": "pt"})
    refusal(lambda: load_model(copy), r"would be ignored \(.*\.to_q\.base_layer\.weight, .*\): LoRA weights")


def shard(folder: Path, marked: str, index: str) -> None:
    """Cut the weight file of a UNet in two, with their index."""
    path = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    path.unlink()
    names = sorted(tensors)
    places = {}
    for number, part in ((1, names[::2]), (2, names[1::2])):
        file = f"{marked}-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, {"format": "pt"})
        places |= dict.fromkeys(part, file)
    (folder / index).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))


@pytest.mark.parametrize(
    ("marked", "index"),
    [
        ("diffusion_pytorch_model", "diffusion_pytorch_model.safetensors.index.json"),
        ("diffusion_pytorch_model.fp16", "diffusion_pytorch_model.safetensors.index.fp16.json"),
    ],
)
def test_every_shard_of_a_network_is_checked(tiny_model: Path, copy: Path, marked: str, index: str) -> None:
    shard(copy / "unet", marked, index)
    assert load_model(copy).digests == load_model(tiny_model).digests
    # Not in the index, so that diffusers does not count it.
    add(copy / "unet" / f"{marked}-00002-of-00002.safetensors", **{"conv_in/scale_weight": torch.zeros(1)})
    refusal(lambda: load_model(copy), r"1 weight would be ignored \(conv_in\.scale_weight\)")


def test_a_vae_of_early_diffusers_is_loaded(attentive_model: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(attentive_model, tmp_path / "model")
    path = copy / "vae" / "diffusion_pytorch_model.safetensors"
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    tensors = load_file(path)
    for new, early in old.items():
        tensors = {name.replace(new, early): one for name, one in tensors.items()}
    assert any(".proj_attn." in name for name in tensors)
    save_file(tensors, path, {"format": "pt"})
    assert load_model(copy).digests == load_model(attentive_model).digests
    add(path, **{"encoder/mid_block/attentions/0/to_q/weight": torch.zeros(32, 32)})
    refusal(lambda: load_model(copy), r"attentions\.0\.to_q\.weight is there twice \(as .*\.query\.weight too\)")


def test_what_a_whole_clip_holds_besides_is_not_read(tiny_model: Path, copy: Path) -> None:
    path = copy / "text_encoder" / "model.safetensors"
    add(
        path,
        **{
            "text_model/embeddings/position_ids": torch.arange(12)[None],
            "text_projection/weight": torch.zeros(2, 2),
            "visual_projection/weight": torch.zeros(2, 2),
            "vision_model/embeddings/class_embedding": torch.zeros(2),
            "logit_scale": torch.zeros(()),
        },
    )
    add(copy / "vae" / "diffusion_pytorch_model.safetensors", **{"loss/logvar": torch.zeros(())})
    assert load_model(copy).digests == load_model(tiny_model).digests


def test_a_weight_of_whole_numbers_is_refused(copy: Path) -> None:
    path = copy / "unet" / "diffusion_pytorch_model.safetensors"
    add(path, conv_in=torch.zeros(1))
    tensors = {name: one for name, one in load_file(path).items() if name != "conv_in"}
    tensors["conv_in.weight"] = torch.zeros_like(tensors["conv_in.weight"], dtype=torch.int8)
    save_file(tensors, path, {"format": "pt"})
    refusal(lambda: load_model(copy), r"unet: the weight conv_in\.weight is stored as I8, as quantised models are")


def test_a_git_lfs_pointer_is_named(copy: Path) -> None:
    path = copy / "unet" / "diffusion_pytorch_model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 123\n")
    refusal(lambda: load_model(copy), r"safetensors: a Git LFS pointer, not the weights; run `git lfs pull`")
    refusal(lambda: load_model(path), r"safetensors: a Git LFS pointer")


def test_a_peft_adapter_in_place_of_weights_is_refused(copy: Path) -> None:
    (copy / "text_encoder" / "adapter_config.json").write_text('{"base_model_name_or_path": "nobody/nothing"}')
    refusal(lambda: load_model(copy), r"text_encoder: holds a PEFT adapter \(adapter_config\.json\); fuse it")


@pytest.mark.parametrize(
    ("part", "changes", "said"),
    [
        ("text_encoder", {"use_attention_mask": True}, r"masks the padding of prompts \(use_attention_mask=True\)"),
        ("unet", {"encoder_hid_dim": 32}, r"asks for more than text \(encoder_hid_dim=32\)"),
        ("unet", {"class_embed_type": "timestep"}, r"asks for more than text \(class_embed_type='timestep'\)"),
        ("unet", {"dual_cross_attention": True}, r"asks for more than text \(dual_cross_attention=True\)"),
        ("vae", {"latents_mean": [0.1] * 4}, r"normalises the latent \(latents_mean="),
        ("vae", {"latents_std": [0.1] * 4}, r"normalises the latent \(latents_std="),
        ("vae", {"use_quant_conv": False}, r"2 weights would be ignored \(quant_conv\.bias, quant_conv\.weight\)"),
        (
            "unet",
            {"quantization_config": {"quant_method": "gguf"}},
            r"its unet is quantised \(quantization_config: gguf",
        ),
        ("text_encoder", {"quantization_config": {"load_in_8bit": True}}, r"its text_encoder is quantised"),
    ],
)
def test_an_option_that_nothing_acts_on_is_refused(copy: Path, part: str, changes: dict[str, Any], said: str) -> None:
    path = copy / part / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    refusal(lambda: load_model(copy), said)


def test_a_vae_without_quant_conv_is_loaded(copy: Path) -> None:
    folder = copy / "vae"
    config = folder / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "use_quant_conv": False, "shift_factor": 0.0}))
    path = folder / "diffusion_pytorch_model.safetensors"
    tensors = {name: one for name, one in load_file(path).items() if not name.startswith("quant_conv.")}
    save_file(tensors, path, {"format": "pt"})
    assert load_model(copy).vae.quant_conv is None


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
