"""Reading, fusing and writing LoRAs: held to PEFT's unfused forward, and one line for everything that does not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from smooth_rt.errors import InputError, ModelError
from smooth_rt.lora import Lora, LoraLayer, fuse, fuse_to_folder, fused_with, read_lora, write_lora
from smooth_rt.model import load_model

PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
Tensors = dict[str, Tensor]


def new_unet(folder: Path) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(folder, subfolder="unet").eval().requires_grad_(False)


def pairs(
    unet: torch.nn.Module, rank: int = 3, names: tuple[str, ...] = PROJECTIONS
) -> dict[str, tuple[Tensor, Tensor]]:
    """Random (down, up) for every projection whose path ends in one of `names`."""
    generator = torch.Generator().manual_seed(1)
    found = {}
    for path, module in unet.named_modules():
        if path.endswith(names) and hasattr(module, "weight"):
            out, into, *kernel = module.weight.shape
            down = torch.randn([rank, into, *kernel], generator=generator) * 0.3
            up = torch.randn([out, rank, *(1 for _ in kernel)], generator=generator) * 0.3
            found[path] = (down, up)
    return found


def authors(layers: dict[str, tuple[Tensor, Tensor]]) -> Tensors:
    tensors = {}
    for path, (down, up) in layers.items():
        attention, _, projection = path.removesuffix(".0").rpartition(".")
        tensors[f"{attention}.processor.{projection}_lora.down.weight"] = down
        tensors[f"{attention}.processor.{projection}_lora.up.weight"] = up
    return tensors


def peft(layers: dict[str, tuple[Tensor, Tensor]], form: str = "unet.{}.lora_{}.weight") -> Tensors:
    sides = ("down", "up") if "lora.{}" in form else ("A", "B")
    return {form.format(path, side): t for path, pair in layers.items() for side, t in zip(sides, pair, strict=True)}


FORMATS: dict[str, Callable[[dict[str, tuple[Tensor, Tensor]]], Tensors]] = {
    "authors": authors,
    "diffusers": peft,
    "diffusers, old": lambda layers: peft(layers, "unet.{}.lora.{}.weight"),
    "PEFT": lambda layers: peft(layers, "base_model.model.{}.lora_{}.weight"),
    "PEFT, named adapter": lambda layers: peft(layers, "base_model.model.{}.lora_{}.default.weight"),
    "bare": lambda layers: peft(layers, "{}.lora_{}.weight"),
}


def saved(tensors: Tensors, folder: Path, **metadata: str) -> Path:
    path = folder / "lora.safetensors"
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, path, metadata or None)
    return path


def forward(unet: torch.nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    sample = torch.randn(2, 4, 8, 8, generator=generator)
    context = torch.randn(2, 12, 32, generator=generator)
    with torch.no_grad():
        return unet(sample, torch.tensor([500, 20]), context, return_dict=False)[0]


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def refusal(read: Callable[[], object], *said: str) -> None:
    with pytest.raises(ModelError) as error:
        read()
    assert "\n" not in str(error.value)
    assert all(part in str(error.value) for part in said), str(error.value)


@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_fused_equals_peft_unfused_and_differs_from_the_base(tiny_model: Path, tmp_path: Path, strength: float) -> None:
    unfused = new_unet(tiny_model)
    layers = pairs(unfused)
    assert len(layers) == 4 * 2 * 7  # 7 transformer blocks of two attentions
    base = forward(unfused)
    unfused.load_lora_adapter(authors(layers), prefix=None, adapter_name="smooth")
    unfused.set_adapters("smooth", strength)
    expected = forward(unfused)

    fused = new_unet(tiny_model)
    fuse(fused, read_lora(saved(authors(layers), tmp_path)), strength)
    assert relative(forward(fused), expected) <= 1e-5
    assert relative(expected, base) > 1e-2


def test_convolutions_and_alphas_equal_peft(tiny_model: Path, tmp_path: Path) -> None:
    unfused = new_unet(tiny_model)
    layers = pairs(unfused, 4, ("proj_in", "proj_out", "to_q", "conv1"))
    assert {down.ndim for down, _ in layers.values()} == {2, 4}
    lora = Lora({path: LoraLayer(*pair, alpha=2.0 if "mid" in path else 8.0) for path, pair in layers.items()}, "", "")
    path = write_lora(lora, tmp_path / "lora.safetensors")
    base = forward(unfused)
    with safe_open(path, "pt") as file:
        stored = json.loads(file.metadata()["lora_adapter_metadata"])
    unfused.load_lora_adapter(load_file(path), prefix="unet", metadata=stored)
    fused = new_unet(tiny_model)
    fuse(fused, read_lora(path))
    assert relative(forward(fused), forward(unfused)) <= 1e-5
    assert relative(forward(fused), base) > 1e-2


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_reads_to_the_same_lora(tiny_model: Path, tmp_path: Path, name: str) -> None:
    layers = pairs(new_unet(tiny_model))
    lora = read_lora(saved(FORMATS[name](layers), tmp_path))
    assert lora.layers.keys() == layers.keys()
    for path, (down, up) in layers.items():
        assert torch.equal(lora.layers[path].down, down)
        assert torch.equal(lora.layers[path].up, up)
        assert (lora.layers[path].alpha, lora.layers[path].scale) == (None, 1.0)
    other = tmp_path / "other"
    other.mkdir()
    assert read_lora(saved(authors(layers), other)).digest == lora.digest


def test_the_released_files_keys() -> None:
    """256 keys and 1,594,368 parameters for SD1.5's 32 attention modules, by the topology alone."""
    places = [(f"down_blocks.{b}", 2, (320, 640, 1280)[b]) for b in range(3)]
    places += [("mid_block", 1, 1280), *((f"up_blocks.{b}", 3, (1280, 640, 320)[b - 1]) for b in range(1, 4))]
    tensors, expected = {}, set()
    for block, count, width in places:
        for i in range(count):
            for attention in ("attn1", "attn2"):
                stem = f"{block}.attentions.{i}.transformer_blocks.0.{attention}"
                for projection in ("q", "k", "v", "out"):
                    into = 768 if attention == "attn2" and projection in ("k", "v") else width
                    tensors[f"{stem}.processor.to_{projection}_lora.down.weight"] = torch.zeros(8, into)
                    tensors[f"{stem}.processor.to_{projection}_lora.up.weight"] = torch.zeros(width, 8)
                    expected.add(f"{stem}.to_{projection}" + (".0" if projection == "out" else ""))
    assert len(tensors) == 256
    assert sum(tensor.numel() for tensor in tensors.values()) == 1_594_368
    from smooth_rt.lora.read import parse

    layers = parse(tensors, "released", "released").layers
    assert len(layers) == 128
    assert layers.keys() == expected
    assert all((layer.rank, layer.scale) == (8, 1.0) for layer in layers.values())


@pytest.mark.parametrize("alpha", [None, 6.0])
def test_diffusers_loads_what_was_written(tiny_model: Path, tmp_path: Path, alpha: float | None) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(tiny_model)
    base = forward(pipe.unet)
    layers = {path: LoraLayer(*pair, alpha) for path, pair in pairs(pipe.unet).items()}
    path = write_lora(Lora(layers, "", ""), tmp_path / "lora.safetensors")
    pipe.load_lora_weights(path)
    fused = new_unet(tiny_model)
    fuse(fused, read_lora(path))
    assert relative(forward(fused), forward(pipe.unet)) <= 1e-5
    assert relative(forward(fused), base) > 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("format", ["diffusers", "attn-procs"])
@pytest.mark.parametrize("alpha", [None, 5.0])
def test_round_trip_is_bit_for_bit(
    tiny_model: Path, tmp_path: Path, dtype: torch.dtype, format: str, alpha: float | None
) -> None:
    found = pairs(new_unet(tiny_model))
    layers = {path: LoraLayer(down.to(dtype), up.to(dtype), alpha) for path, (down, up) in found.items()}
    path = write_lora(Lora(layers, "", ""), tmp_path / "new" / "lora.safetensors", format)  # type: ignore[arg-type]
    back = read_lora(path)
    assert back.layers.keys() == layers.keys()
    for name, layer in back.layers.items():
        assert layer.alpha == alpha
        assert layer.down.dtype == layer.up.dtype == dtype
        assert torch.equal(layer.down, layers[name].down)
        assert torch.equal(layer.up, layers[name].up)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_alphas_come_from_the_file_and_from_beside_it(tiny_model: Path, tmp_path: Path) -> None:
    layers = pairs(new_unet(tiny_model), rank=4)
    first, second, *_ = layers
    tensors = peft(layers, "base_model.model.{}.lora_{}.weight")
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = {"r": 4, "lora_alpha": 8, "alpha_pattern": {first: 2}, "use_rslora": False}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    scales = {path: layer.scale for path, layer in read_lora(tmp_path).layers.items()}
    assert (scales[first], scales[second]) == (0.5, 2.0)
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "use_rslora": True}))
    assert read_lora(tmp_path).layers[second].scale == 4.0  # 8 / sqrt(4)
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    refusal(lambda: read_lora(tmp_path), "DoRA")
    (tmp_path / "adapter_config.json").write_text("{,")
    refusal(lambda: read_lora(tmp_path), "configuration is unreadable")
    for odd in (True, 10**400, 1e308, "8", [8]):
        (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": odd}))
        refusal(lambda: read_lora(tmp_path), "lora_alpha: no number from -1e+06 to 1e+06")
    for odd in ({"(": 2}, {first: None}, [2]):
        (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "alpha_pattern": odd}))
        refusal(lambda: read_lora(tmp_path), "configuration is unreadable")
    (tmp_path / "adapter_config.json").write_text("[" * 100_000)
    refusal(lambda: read_lora(tmp_path), "configuration is unreadable")
    own = saved({**authors(layers), **{f"{first}.alpha": torch.tensor(1.0)}}, tmp_path)
    assert read_lora(own).layers[first].scale == 0.25


def test_digest_depends_on_tensors_and_scale(tiny_model: Path, tmp_path: Path) -> None:
    layers = pairs(new_unet(tiny_model))
    first = next(iter(layers))
    digests = {read_lora(saved(authors(layers), tmp_path)).digest}
    digests.add(read_lora(saved({**authors(layers), f"{first}.alpha": torch.tensor(1.0)}, tmp_path)).digest)
    layers[first][0][0, 0] += 0.01
    digests.add(read_lora(saved(authors(layers), tmp_path)).digest)
    assert len(digests) == 3
    digests.add(read_lora(saved(dict(reversed(authors(layers).items())), tmp_path)).digest)
    assert len(digests) == 3


def test_unusual_files_are_refused_by_key(tiny_model: Path, tmp_path: Path) -> None:
    tensors = authors(pairs(new_unet(tiny_model)))
    down = next(iter(tensors))
    up = down.replace(".down.", ".up.")
    rest = {key: value for key, value in tensors.items() if key != up}

    def reading(changed: Tensors) -> Callable[[], object]:
        return lambda: read_lora(saved(changed, tmp_path))

    refusal(reading(rest), down, "no up")
    refusal(reading({k: v for k, v in tensors.items() if k != down}), up, "no down")
    refusal(reading({**rest, up: tensors[up][:, :2].contiguous()}), down, up, "rank 3")
    refusal(reading({**rest, up: tensors[up] / 0}), up, "not finite")
    refusal(reading({**rest, up: tensors[up].to(torch.float8_e4m3fn)}), up, "float8_e4m3fn; convert it to")
    refusal(reading({**tensors, f"{down.split('.processor')[0]}.to_q.alpha": torch.tensor(1e30)}), "1e+06 is the most")
    refusal(
        reading({**tensors, "lora_unet_mid_block.lora_down.weight": torch.ones(1)}), "lora_unet_mid_block.lora_down"
    )
    refusal(reading({**tensors, "text_encoder.layers.0.q.lora_A.weight": torch.ones(1)}), "text_encoder.layers.0")
    refusal(reading({**rest, up: torch.ones(16, 3, 1)}), up, "not a matrix")
    attention = down.split(".processor")[0]
    refusal(reading({**tensors, f"{attention}.to_q.lora_A.weight": torch.ones(3, 16)}), "same part")


def test_layers_that_do_not_fit_leave_the_unet_as_it_was(tiny_model: Path, tmp_path: Path) -> None:
    unet = new_unet(tiny_model)
    before = {key: value.clone() for key, value in unet.state_dict().items()}
    layers = pairs(unet)
    last = list(layers)[-1]
    stranger = {**layers, "up_blocks.9.attentions.0.transformer_blocks.0.attn1.to_q": layers[last]}
    wide = {**layers, last: (torch.ones(3, 99), layers[last][1])}
    norm = {**layers, "conv_norm_out": layers[last]}
    for changed, said in ((stranger, "up_blocks.9.attentions.0"), (wide, last), (norm, "conv_norm_out")):
        lora = read_lora(saved(peft(changed), tmp_path))
        refusal(lambda lora=lora: fuse(unet, lora), f"unet.{said}")
    assert all(torch.equal(before[key], value) for key, value in unet.state_dict().items())
    assert fused_with(unet) is None


def test_fusing_needs_pristine_fp32_weights_and_a_finite_strength(tiny_model: Path, tmp_path: Path) -> None:
    unet = new_unet(tiny_model)
    lora = read_lora(saved(authors(pairs(unet)), tmp_path))
    for strength in (float("nan"), float("-inf"), 1e9):
        with pytest.raises(InputError, match=f"{strength}: give a number from -100 to 100"):
            fuse(unet, lora, strength)
    refusal(lambda: fuse(new_unet(tiny_model).half(), lora), "float16")
    fuse(unet, lora, 0.5)
    assert fused_with(unet) == (lora.digest, 0.5)
    refusal(lambda: fuse(unet, lora), "fused in already")


def test_weights_beyond_fp32_are_refused_and_leave_the_unet_as_it_was(tiny_model: Path) -> None:
    unet = new_unet(tiny_model)
    before = {name: weight.clone() for name, weight in unet.state_dict().items()}
    (path, (down, up)), (other, (large, same)) = list(pairs(unet).items())[:2]
    lora = Lora({path: LoraLayer(down, up), other: LoraLayer(large * 1e30, same * 1e30, key=f"{other}.down")}, "x", "")
    with pytest.raises(ModelError, match=rf"^x: {other}.down at strength 0.5 gives weights beyond fp32; lower"):
        fuse(unet, lora, 0.5)
    assert all(torch.equal(weight, before[name]) for name, weight in unet.state_dict().items())


def test_fuse_to_folder(tiny_model: Path, tmp_path: Path) -> None:
    lora = read_lora(saved(authors(pairs(new_unet(tiny_model))), tmp_path))
    output = fuse_to_folder(load_model(tiny_model), lora, 0.6, tmp_path / "fused")
    expected = new_unet(tiny_model)
    fuse(expected, lora, 0.6)
    pipe = StableDiffusionPipeline.from_pretrained(output)
    assert torch.equal(forward(pipe.unet), forward(expected))
    with pytest.raises(InputError, match="holds something already"):
        fuse_to_folder(load_model(tiny_model), lora, 0.6, output)
