"""Adapters of PEFT and files of other trainers: fused as PEFT or diffusers does, or refused by name."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    VeraConfig,
    get_peft_model,
    get_peft_model_state_dict,
)
from peft.tuners.lora.config import BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor

from smooth_rt.errors import ModelError
from smooth_rt.lora import fuse, read_lora
from smooth_rt.model import load_model

PROJECTIONS = ["attn1.to_q", "attn2.to_v", "to_out.0"]
LAYER = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
PAIR = {f"unet.{LAYER}.lora_A.weight": torch.ones(2, 32), f"unet.{LAYER}.lora_B.weight": torch.ones(32, 2)}
KOHYA = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"


@cache
def loaded_unet(folder: Path) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(folder, subfolder="unet").eval().requires_grad_(False)


def new_unet(folder: Path) -> UNet2DConditionModel:
    return deepcopy(loaded_unet(folder))


def forward(unet: torch.nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    sample = torch.randn(2, 4, 8, 8, generator=generator)
    context = torch.randn(2, 12, 32, generator=generator)
    with torch.no_grad():
        return unet(sample, torch.tensor([500, 20]), context, return_dict=False)[0]


def fused(model: Path, lora: Path) -> Tensor:
    unet = new_unet(model)
    fuse(unet, read_lora(lora))
    return forward(unet)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def quietly(call: Callable[[], Any]) -> Any:
    """Call PEFT, which warns of settings that do not fit each other."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call()


def lora_config(**settings: Any) -> LoraConfig:
    return quietly(lambda: LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": PROJECTIONS, **settings}))


def trained(model: Path, config: Any, folder: Path) -> Any:
    """Make an adapter, save it before and after what stands for a training, and return it."""

    def made() -> Any:
        torch.manual_seed(0)
        adapter = get_peft_model(new_unet(model), config).eval()
        adapter.save_pretrained(folder / "initial")
        with torch.no_grad():
            for parameter in adapter.parameters():
                if parameter.requires_grad:
                    parameter += 0.05 * torch.randn_like(parameter)
        adapter.save_pretrained(folder / "adapter")
        return adapter

    return quietly(made)


def reloaded(model: Path, adapter: Path) -> Tensor:
    return forward(quietly(lambda: PeftModel.from_pretrained(new_unet(model), adapter)))


def refused(lora: Path) -> str:
    with pytest.raises(ModelError) as error:
        read_lora(lora)
    message = str(error.value)
    assert "\n" not in message
    return message


def edited(adapter: Path, **settings: Any) -> Path:
    """Change settings in an adapter's configuration; None removes one."""
    path = adapter / "adapter_config.json"
    stored = {**json.loads(path.read_text()), **settings}
    path.write_text(json.dumps({key: value for key, value in stored.items() if value is not None}))
    return adapter


@pytest.fixture(scope="module")
def plain(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a plain adapter."""
    folder = tmp_path_factory.mktemp("plain")
    trained(tiny_model, lora_config(), folder)
    return folder / "adapter"


@pytest.fixture
def adapter(plain: Path, tmp_path: Path) -> Path:
    """A copy of the plain adapter, to be edited."""
    for file in plain.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


PLAIN: dict[str, dict[str, Any]] = {
    "random init": {"init_lora_weights": False},
    "gaussian init": {"init_lora_weights": "gaussian"},
    "orthogonal init": {"init_lora_weights": "orthogonal"},
    "MiCA": {"init_lora_weights": "mica"},
    "EVA": {"init_lora_weights": "eva"},
    "rsLoRA": {"use_rslora": True},
    "patterns": {"rank_pattern": {"attn1.to_q": 2}, "alpha_pattern": {".*attn2.to_[kv]": 1}},
    "rsLoRA with patterns": {"use_rslora": True, "rank_pattern": {"to_v": 2}, "alpha_pattern": {"to_q": 3}},
    "convolutions": {"target_modules": ["conv1", "proj_in", "to_q"]},
    "every linear layer": {"target_modules": "all-linear"},
    "regular expression": {"target_modules": r".*attn1\.to_q"},
    "excluded modules": {"exclude_modules": ["attn2.to_v"]},
    "chosen layers": {"layers_to_transform": [0], "layers_pattern": "attentions"},
    "dropout": {"lora_dropout": 0.3},
    "settings without effect": {"fan_in_fan_out": True, "ensure_weight_tying": True, "qalora_group_size": 8},
    "VeLoRA": {"velora_config": VeloraConfig(num_groups=4)},
    "MonteCLoRA": {"monteclora_config": MontecloraConfig(), "target_modules": [LAYER]},
}


@pytest.mark.parametrize("name", PLAIN)
def test_read_lora_plain_adapter_fuses_as_peft(tiny_model: Path, tmp_path: Path, name: str) -> None:
    trained(tiny_model, lora_config(**PLAIN[name]), tmp_path)
    expected = reloaded(tiny_model, tmp_path / "adapter")
    assert relative(fused(tiny_model, tmp_path / "adapter"), expected) <= 1e-5
    assert relative(forward(new_unet(tiny_model)), expected) > 1e-3


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_read_lora_converted_adapter_fuses_as_trained(tiny_model: Path, tmp_path: Path, init: str) -> None:
    adapter = trained(tiny_model, lora_config(init_lora_weights=init), tmp_path)
    expected = forward(adapter)
    assert f'init_lora_weights is "{init}", which changed the base weights' in refused(tmp_path / "adapter")
    initial = str(tmp_path / "initial")
    quietly(lambda: adapter.save_pretrained(tmp_path / "lora", path_initial_model_for_weight_conversion=initial))
    assert relative(fused(tiny_model, tmp_path / "lora"), expected) <= 1e-5
    assert relative(fused(tiny_model, tmp_path / "lora"), reloaded(tiny_model, tmp_path / "lora")) <= 1e-5


@pytest.mark.parametrize("init", ["loftq", "corda", "lora_ga", "a_later_one"])
def test_read_lora_init_of_base_weights_is_refused(adapter: Path, init: str) -> None:
    message = refused(edited(adapter, init_lora_weights=init))
    assert f'adapter_config.json: init_lora_weights is "{init}"' in message
    assert ("path_initial_model_for_weight_conversion=INITIAL" in message) == (init in ("corda", "lora_ga"))


MERGED: dict[str, tuple[Callable[[], Any], str]] = {
    "PiSSA": (lambda: lora_config(init_lora_weights="pissa"), 'init_lora_weights is "pissa"'),
    "OLoRA": (lambda: lora_config(init_lora_weights="olora"), 'init_lora_weights is "olora"'),
    "DoRA": (lambda: lora_config(use_dora=True), "use_dora is true, so it is DoRA"),
    "LoRA biases": (lambda: lora_config(lora_bias=True, target_modules=["to_out.0"]), "lora_bias is true"),
    "biases": (lambda: lora_config(bias="lora_only"), 'bias is "lora_only"'),
    "whole modules": (lambda: lora_config(modules_to_save=["conv_out"]), 'modules_to_save is ["conv_out"]'),
    "parameters": (lambda: lora_config(target_modules=[], target_parameters=["to_q.weight"]), "target_parameters is"),
    "KaSA": (lambda: lora_config(kasa_config=KasaConfig()), "kasa_config is"),
    "BD-LoRA": (
        lambda: lora_config(use_bdlora=BdLoraConfig(["to_out.0"], ["to_q", "to_v"], nblocks=2)),
        "use_bdlora is",
    ),
    "AdaLoRA": (lambda: AdaLoraConfig(target_modules=PROJECTIONS, total_step=9), "peft_type is ADALORA"),
    "LoHa": (lambda: LoHaConfig(r=4, target_modules=PROJECTIONS), "peft_type is LOHA"),
    "LoKr": (lambda: LoKrConfig(r=4, target_modules=PROJECTIONS), "peft_type is LOKR"),
    "OFT": (lambda: OFTConfig(oft_block_size=4, target_modules=PROJECTIONS), "peft_type is OFT"),
    "VeRA": (lambda: VeraConfig(r=4, target_modules=PROJECTIONS), "peft_type is VERA"),
    "IA3": (lambda: IA3Config(target_modules=PROJECTIONS, feedforward_modules=[]), "peft_type is IA3"),
}


@pytest.mark.parametrize("name", MERGED)
def test_read_lora_refusal_gives_advice_that_works(tiny_model: Path, tmp_path: Path, name: str) -> None:
    config, said = MERGED[name]
    expected = forward(trained(tiny_model, quietly(config), tmp_path))
    message = refused(tmp_path / "adapter")
    assert f"adapter_config.json: {said}" in message
    advice = re.search(r"with PEFT \((.+\(FOLDER\))\) and give --model FOLDER --lora none", message)
    assert advice is not None
    names = {"StableDiffusionPipeline": StableDiffusionPipeline, "PeftModel": PeftModel}
    quietly(lambda: exec(advice[1], {**names, "MODEL": tiny_model, "FOLDER": tmp_path / "merged"}))
    assert relative(forward(load_model(tmp_path / "merged").unet), expected) <= 1e-5


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("alora_invocation_tokens", [1, 2]),
        ("arrow_config", {"top_k": 3}),
        ("layer_replication", [[0, 2], [1, 3]]),
        ("megatron_config", {"hidden_size": 8}),
        ("trainable_token_indices", [1]),
        ("use_qalora", True),
        ("a_later_setting", {"strength": 2}),
        ("another", 1),
    ],
)
def test_read_lora_other_setting_is_refused_by_name(adapter: Path, setting: str, value: Any) -> None:
    assert f"adapter_config.json: {setting} is {json.dumps(value)}, " in refused(edited(adapter, **{setting: value}))


@pytest.mark.parametrize(
    "settings",
    [
        {"layers_pattern": "("},
        {"layers_pattern": ["("]},
        {"layers_pattern": 5},
        {"layers_to_transform": 0.5},
        {"layers_to_transform": "abc"},
        {"target_modules": ["to_k", "to_v", "to_out.0"], "layers_pattern": "("},
    ],
)
def test_read_lora_unreadable_layers_are_refused(adapter: Path, settings: dict[str, Any]) -> None:
    given = {"target_modules": ["to_q"], "layers_to_transform": [0], **settings}
    assert "adapter_config.json: its PEFT configuration is unreadable (" in refused(edited(adapter, **given))


@pytest.mark.parametrize("kind", ["XLORA", "PREFIX_TUNING", "LILY", "A_LATER_ONE"])
def test_read_lora_other_type_without_its_weights_is_named(tmp_path: Path, kind: str) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": kind}))
    assert f"peft_type is {kind}, and only LORA is fused; " in refused(tmp_path)


def test_read_lora_empty_settings_are_accepted(tiny_model: Path, plain: Path, adapter: Path) -> None:
    empty = {"a_later_setting": False, "another": [], "third": "", "modules_to_save": [], "rank_pattern": {}}
    edited(adapter, **empty, enable_lora=0, loftq_config={"loftq_bits": 4}, eva_config={"rho": 2.0}, peft_version="9.9")
    assert read_lora(adapter).digest == read_lora(plain).digest


def test_read_lora_alpha_left_out_is_that_of_peft(tiny_model: Path, adapter: Path) -> None:
    edited(adapter, lora_alpha=None, r=None, rank_pattern={"to_q|to_v|to_out.0": 4})
    assert relative(fused(tiny_model, adapter), reloaded(tiny_model, adapter)) <= 1e-5


def test_read_lora_settings_of_another_adapter_are_refused(adapter: Path) -> None:
    assert "attn1.to_out.0 rank 8, and " in refused(edited(adapter, r=8))
    assert "leaves out down_blocks" in refused(edited(adapter, r=4, target_modules=["to_q", "to_v"]))
    assert "leaves out mid_block" in refused(edited(adapter, target_modules=PROJECTIONS, exclude_modules=[LAYER]))
    assert "unreadable" in refused(edited(adapter, exclude_modules=[], target_modules="("))
    assert "unreadable" in refused(edited(adapter, target_modules=PROJECTIONS, use_rslora="yes"))
    assert "r: no rank" in refused(edited(adapter, use_rslora=False, r=0))


def test_read_lora_peft_weights_need_their_settings(adapter: Path) -> None:
    (adapter / "adapter_config.json").unlink()
    assert "adapter_config.json is missing beside it" in refused(adapter)


def test_read_lora_renamed_peft_weights_keep_their_settings(plain: Path, adapter: Path) -> None:
    renamed = (adapter / "adapter_model.safetensors").rename(adapter / "mine.safetensors")
    assert read_lora(renamed).digest == read_lora(plain).digest
    assert "use_dora" in (edited(adapter, use_dora=True) and refused(renamed))


def test_read_lora_alpha_tensor_must_agree_with_settings(plain: Path, adapter: Path) -> None:
    weights = adapter / "adapter_model.safetensors"
    tensors = load_file(weights)
    save_file({**tensors, f"base_model.model.{LAYER}.alpha": torch.tensor(6.0)}, weights)
    assert read_lora(adapter).digest == read_lora(plain).digest
    save_file({**tensors, f"base_model.model.{LAYER}.alpha": torch.tensor(2.0)}, weights)
    assert f"{LAYER}.alpha is 2, and its PEFT configuration gives 6" in refused(adapter)


def saved_by_diffusers(model: Path, folder: Path, metadata: bool, **settings: Any) -> Path:
    """Save the UNet's LoRA as diffusers' training scripts do, with PEFT's settings in the header or without."""
    torch.manual_seed(0)
    unet = new_unet(model)
    unet.add_adapter(lora_config(**settings))
    for name, parameter in unet.named_parameters():
        if "lora_" in name:
            parameter.data += 0.05 * torch.randn_like(parameter)
    stored = {"unet_lora_adapter_metadata": unet.peft_config["default"].to_dict()} if metadata else {}
    layers = quietly(lambda: get_peft_model_state_dict(unet))
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=layers, **stored)
    return folder / "pytorch_lora_weights.safetensors"


@pytest.mark.parametrize("metadata", [True, False])
@pytest.mark.parametrize("name", ["gaussian init", "rsLoRA", "patterns", "convolutions"])
def test_read_lora_diffusers_file_fuses_as_diffusers(
    tiny_model: Path, tmp_path: Path, name: str, metadata: bool
) -> None:
    path = saved_by_diffusers(tiny_model, tmp_path, metadata, **PLAIN[name])
    pipe = StableDiffusionPipeline.from_pretrained(tiny_model)
    pipe.load_lora_weights(str(path))
    assert relative(fused(tiny_model, path), forward(pipe.unet)) <= 1e-5


@pytest.mark.parametrize(
    ("settings", "metadata", "said"),
    [
        ({"use_dora": True}, True, "use_dora is true"),
        ({"use_dora": True}, False, "lora_magnitude_vector is the magnitude of a DoRA"),
        ({"init_lora_weights": "pissa"}, True, 'init_lora_weights is "pissa"'),
        ({"lora_bias": True, "target_modules": ["to_out.0"]}, True, "lora_bias is true"),
        ({"lora_bias": True, "target_modules": ["to_out.0"]}, False, "lora_B.bias is a trained bias"),
    ],
    ids=["DoRA", "DoRA without a header", "PiSSA", "biases", "biases without a header"],
)
def test_read_lora_diffusers_refusal_gives_advice_that_works(
    tiny_model: Path, tmp_path: Path, settings: dict[str, Any], metadata: bool, said: str
) -> None:
    path = saved_by_diffusers(tiny_model, tmp_path, metadata, **settings)
    message = refused(path)
    assert said in message
    pipe = StableDiffusionPipeline.from_pretrained(tiny_model)
    pipe.load_lora_weights(str(path), low_cpu_mem_usage=False)
    merge(message, tiny_model, tmp_path / "merged")
    assert relative(forward(load_model(tmp_path / "merged").unet), forward(pipe.unet)) <= 1e-5


def merge(message: str, model: Path, folder: Path) -> None:
    """Follow the advice of a message, word by word."""
    advice = re.search(r"with diffusers \((.+\(FOLDER\))\) and give --model FOLDER --lora none", message)
    assert advice is not None
    names = {"StableDiffusionPipeline": StableDiffusionPipeline, "MODEL": model, "FOLDER": folder}
    quietly(lambda: exec(advice[1], names))


def test_read_lora_kohya_file_gives_advice_that_works(tiny_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "kohya.safetensors"
    tensors = {f"{KOHYA}.lora_down.weight": torch.ones(2, 32) * 0.1, f"{KOHYA}.lora_up.weight": torch.ones(32, 2) * 0.1}
    save_file({**tensors, f"{KOHYA}.alpha": torch.tensor(1.0)}, path, {"ss_network_module": "networks.lora"})
    message = refused(path)
    assert f"{KOHYA}.alpha is in kohya's layout" in message
    merge(message, tiny_model, tmp_path / "merged")
    expected = new_unet(tiny_model)
    expected.get_submodule(LAYER).weight.data += 0.5 * 2 * 0.01
    assert relative(forward(load_model(tmp_path / "merged").unet), forward(expected)) <= 1e-5


@pytest.mark.parametrize(
    ("key", "said"),
    [
        (f"{KOHYA}.dora_scale", "the magnitude of a DoRA"),
        (f"unet.{LAYER}.lora_magnitude_vector.weight", "the magnitude of a DoRA"),
        (f"{KOHYA}.hada_w1_a", "a factor of LoHa"),
        (f"unet.{LAYER}.lokr_w1", "a factor of LoKr"),
        (f"{KOHYA}.oft_blocks", "a rotation of OFT"),
        (f"{KOHYA}.diff", "a difference of whole weights"),
        (f"{KOHYA}.diff_b", "a difference of whole weights"),
        (f"{KOHYA}.w_norm", "a difference of a norm's weights"),
        (f"{KOHYA}.lora_mid.weight", "the core of a Tucker decomposition"),
        (f"unet.{LAYER}.lora.mid.weight", "the core of a Tucker decomposition"),
        (f"{KOHYA}.on_input", "a factor of IA3"),
        (f"{KOHYA}.a1.weight", "a factor of GLoRA"),
        (f"{LAYER.removesuffix('.to_q')}.processor.to_q_lora.up.bias", "a trained bias"),
        ("base_model.model.conv_in.bias", "a trained bias"),
        ("base_model.model.conv_out.modules_to_save.weight", "a whole module beside the LoRA"),
        ("bundle_emb.thing.string_to_param.*", "a textual inversion"),
        (f"{KOHYA}.q_layer.weight", "no tensor of a plain LoRA"),
        ("lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", "is in kohya's layout"),
        ("lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha", "is in kohya's layout"),
        ("text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_A.weight", "changes the text encoder"),
        (f"unet.{LAYER}.vera_lambda_b", "is not a LoRA key"),
    ],
)
def test_read_lora_tensor_of_another_kind_is_refused(tmp_path: Path, key: str, said: str) -> None:
    save_file({**PAIR, key: torch.ones(2)}, tmp_path / "lora.safetensors")
    message = refused(tmp_path / "lora.safetensors")
    assert key in message
    assert said in message
    assert "; " in message


@pytest.mark.parametrize(
    ("module", "arguments", "said"),
    [
        ("networks.oft", None, "the training module networks.oft"),
        ("lycoris.kohya", {"algo": "loha"}, "the algorithm loha"),
        ("lycoris.kohya", {"algo": "full", "conv_dim": "8"}, "the algorithm full"),
        ("lycoris.kohya", {"algo": "lora", "dora_wd": "True"}, "dora_wd, so it is a DoRA"),
    ],
)
def test_read_lora_header_of_another_method_is_refused(
    tmp_path: Path, module: str, arguments: dict[str, str] | None, said: str
) -> None:
    header = {"ss_network_module": module, "ss_network_args": json.dumps(arguments)}
    save_file(PAIR, tmp_path / "lora.safetensors", header)
    assert said in refused(tmp_path / "lora.safetensors")


@pytest.mark.parametrize("arguments", ["null", "{}", "", '{"algo": "locon", "dora_wd": "False"}', "not json"])
def test_read_lora_header_of_a_plain_lora_is_accepted(tmp_path: Path, arguments: str) -> None:
    header = {"ss_network_module": "lycoris.kohya", "ss_network_args": arguments, "modelspec.title": "a LoRA"}
    save_file(PAIR, tmp_path / "lora.safetensors", header)
    assert list(read_lora(tmp_path / "lora.safetensors").layers) == [LAYER]


@pytest.mark.parametrize("stored", ["[]", "3", "{", '{"unet.r": "four"}'])
def test_read_lora_unreadable_header_is_refused(tmp_path: Path, stored: str) -> None:
    save_file(PAIR, tmp_path / "lora.safetensors", {"lora_adapter_metadata": stored})
    assert "its PEFT configuration is unreadable" in refused(tmp_path / "lora.safetensors")


def test_read_lora_targets_of_a_header_are_unused(tmp_path: Path) -> None:
    stored = {"unet.r": 2, "unet.lora_alpha": 1, "unet.target_modules": ["to_k"], "unet.exclude_modules": ["to_q"]}
    save_file(PAIR, tmp_path / "lora.safetensors", {"lora_adapter_metadata": json.dumps(stored)})
    assert read_lora(tmp_path / "lora.safetensors").layers[LAYER].scale == 0.5


def test_read_lora_header_of_the_text_encoder_alone_is_unused(tmp_path: Path) -> None:
    save_file(PAIR, tmp_path / "lora.safetensors", {"lora_adapter_metadata": '{"text_encoder.use_dora": true}'})
    assert read_lora(tmp_path / "lora.safetensors").layers[LAYER].scale == 1.0
