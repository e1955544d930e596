"""Both recipes from end to end in a few steps, on discs in place of emoji."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from smooth_rt import cli
from smooth_rt.errors import InputError, SmoothRTError
from smooth_rt.lora import fuse, read_lora
from smooth_rt.model import load_model
from smooth_rt.training.data import EmojiScenes
from smooth_rt.training.paths import Lengths, unevenness
from smooth_rt.training.smooth_lora import train_smooth_lora
from smooth_rt.training.smooth_lora_config import SmoothLoraConfig
from smooth_rt.training.svr import VARIATIONS, variation
from smooth_rt.training.tiny import train_tiny
from smooth_rt.training.tiny_networks import TinyConfig
from smooth_rt.training.world import training_device

CONFIG = TinyConfig(
    size=16,
    tokens=12,
    width=32,
    vae_channels=(16, 32),
    unet_channels=(16, 32, 32),
    vae_batch=2,
    unet_batch=2,
    pictures=8,
)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tiny_leaves_a_model_that_diffusers_samples(tmp_path: Path, emoji: Path) -> None:
    assets = train_tiny(tmp_path, emoji, vae_steps=2, unet_steps=2, attribute_steps=2, config=CONFIG)
    pipe = StableDiffusionPipeline.from_pretrained(assets / "model", safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    images = pipe("dog face on blue background", num_inference_steps=2, output_type="np").images
    assert images.shape == (1, 16, 16, 3)
    weights = load_file(assets / "model" / "unet" / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float16}
    assert {"vocab.json", "merges.txt"} <= {path.name for path in (assets / "model" / "tokenizer").iterdir()}
    written = [path.read_text() for path in (assets / "model").rglob("*.json")]
    assert not any(str(tmp_path) in text for text in written)
    tokenizer = pipe.tokenizer
    assert tokenizer.model_max_length == 12
    ids = tokenizer("a 猫 dog").input_ids
    assert tokenizer.eos_token_id not in ids[:-1]
    assert (assets / "examples" / "metadata.jsonl").exists()


def test_stages_say_what_they_need(tmp_path: Path, emoji: Path) -> None:
    with pytest.raises(InputError, match="run the stage 'vae' first"):
        train_tiny(tmp_path, emoji, stages=("latents",), config=CONFIG)
    with pytest.raises(InputError, match=r"stages: 'both' is unknown; choose from tokenizer"):
        train_tiny(tmp_path, emoji, stages=("both",), config=CONFIG)
    assert train_tiny(tmp_path, emoji, stages=("tokenizer",), config=CONFIG) == tmp_path
    assert (tmp_path / "model" / "tokenizer").is_dir()


def test_a_device_that_is_not_there_is_named(tmp_path: Path, emoji: Path) -> None:
    assert training_device("cpu") == torch.device("cpu")
    for name, said in (("cuda:99", "GPUs here"), ("abacus", "unknown"), ("meta", "not supported")):
        with pytest.raises(InputError, match=rf"device='{name}': .*{said}"):
            train_tiny(tmp_path / "run", emoji, config=CONFIG, device=name)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("target", "path_weight"), [("scalar", 0.0), ("per-timestep", 0.0), ("anchored", 0.0), ("anchored", 0.3)]
)
def test_smooth_lora_trains_resumes_and_fuses(
    tmp_path: Path, emoji: Path, tiny_model: Path, target: str, path_weight: float
) -> None:
    config = SmoothLoraConfig(
        batch_size=2, lr=1e-2, svr_target=target, calibration_steps=2, path_weight=path_weight, path_steps=3
    )
    scenes = EmojiScenes(emoji, 16)
    whole = train_smooth_lora(load_model(tiny_model), scenes, tmp_path / "whole", steps=4, config=config)

    def stop(step: int) -> None:
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="interrupted; state saved at step 2; add --resume to go on"):
        train_smooth_lora(load_model(tiny_model), scenes, tmp_path / "two", 4, config=config, every=[(1, stop)])
    resumed = train_smooth_lora(load_model(tiny_model), scenes, tmp_path / "two", 4, resume=True, config=config)
    one, other = load_file(whole), load_file(resumed)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)

    model, base = load_model(tiny_model), load_model(tiny_model)
    fuse(model.unet, read_lora(whole))
    changed = [
        name
        for (name, fused), kept in zip(model.unet.named_parameters(), base.unet.parameters(), strict=True)
        if not torch.equal(fused, kept)
    ]
    assert changed
    assert all(".attn" in name for name in changed)


def test_paths_are_compared_with_those_of_the_model_without_its_lora(
    tmp_path: Path, emoji: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[tuple[Lengths, Lengths]] = []

    def spy(found: Lengths, without_lora: Lengths, *rest: float) -> Tensor:
        compared.append((found, without_lora))
        return unevenness(found, without_lora, *rest)

    monkeypatch.setattr("smooth_rt.training.objective.unevenness", spy)
    config = SmoothLoraConfig(batch_size=2, lr=1e-2, path_weight=1.0, path_steps=2, path_window=2, paths_per_step=1)
    train_smooth_lora(load_model(tiny_model), EmojiScenes(emoji, 16), tmp_path, steps=3, config=config)
    # The LoRA has no effect yet at the first step, and some later.
    assert [torch.equal(found.ends, without.ends) for found, without in compared] == [True, False, False]
    assert all(found.ends.requires_grad and not without.ends.requires_grad for found, without in compared)


def test_a_lora_goes_on_with_its_own_model_and_data_alone(tmp_path: Path, emoji: Path, tiny_model: Path) -> None:
    config, scenes = SmoothLoraConfig(batch_size=1), EmojiScenes(emoji, 16)
    train_smooth_lora(load_model(tiny_model), scenes, tmp_path, 1, config=config)
    other = load_model(tiny_model)
    other.digests = {**other.digests, "unet": "0" * 64}
    with pytest.raises(InputError, match="made with another model;"):
        train_smooth_lora(other, scenes, tmp_path, 2, resume=True, config=config)
    with pytest.raises(InputError, match="made with another data;"):
        train_smooth_lora(load_model(tiny_model), EmojiScenes(emoji, 24), tmp_path, 2, resume=True, config=config)
    # The rate may change, as is advised where the loss is not finite.
    slower = SmoothLoraConfig(batch_size=1, lr=1e-5)
    train_smooth_lora(load_model(tiny_model), scenes, tmp_path, 2, resume=True, config=slower)
    assert (tmp_path / "checkpoint-00000002.safetensors").exists()


def test_a_checkpoint_that_holds_the_rates_still_resumes(tmp_path: Path, emoji: Path) -> None:
    stages = ("tokenizer", "vae")
    train_tiny(tmp_path, emoji, stages, vae_steps=1, config=CONFIG)
    path = tmp_path / "vae" / "checkpoint-00000001.safetensors"
    save_file(load_file(path), path, {"step": "1", "settings": json.dumps(asdict(CONFIG))})
    train_tiny(tmp_path, emoji, stages, vae_steps=2, resume=True, config=CONFIG)
    assert path.with_name("checkpoint-00000002.safetensors").exists()
    with pytest.raises(InputError, match="made with another vae_batch;"):
        train_tiny(tmp_path, emoji, stages, vae_steps=3, resume=True, config=replace(CONFIG, vae_batch=3))


def test_an_interrupted_calibration_leaves_nothing(
    tmp_path: Path, emoji: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(EmojiScenes, "draw", interrupted)
    config = SmoothLoraConfig(batch_size=1, svr_target="anchored")
    with pytest.raises(KeyboardInterrupt):
        train_smooth_lora(load_model(tiny_model), EmojiScenes(emoji, 16), tmp_path / "run", 4, config=config)
    assert not (tmp_path / "run").exists()


def test_a_full_disk_in_a_stage_is_named(tmp_path: Path, emoji: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device", "vocab.json")

    monkeypatch.setattr("smooth_rt.training.tiny.train_tokenizer", refuse)
    with pytest.raises(SmoothRTError, match=r"^vocab\.json: No space left on device; .*--resume"):
        train_tiny(tmp_path, emoji, config=CONFIG)


def test_layers_that_are_not_there_are_named(tmp_path: Path, emoji: Path, tiny_model: Path) -> None:
    config = SmoothLoraConfig(target_modules=("to_q", "to_z"))
    with pytest.raises(InputError, match="target_modules='to_z': no linear layer of the UNet"):
        train_smooth_lora(load_model(tiny_model), EmojiScenes(emoji, 16), tmp_path / "run", 4, config=config)
    assert not (tmp_path / "run").exists()


def test_layers_rank_alpha_and_key_layout_are_those_asked_for(tmp_path: Path, emoji: Path, tiny_model: Path) -> None:
    config = SmoothLoraConfig(batch_size=1, rank=4, lora_alpha=2.0, target_modules=("attn2.to_q", "attn2.to_k"))
    scenes = EmojiScenes(emoji, 16)
    path = train_smooth_lora(load_model(tiny_model), scenes, tmp_path, 1, config=config, format="attn-procs")
    assert all(".processor.to_" in key for key in load_file(path))
    layers = read_lora(path).layers
    assert {name.rpartition("attn")[2] for name in layers} == {"2.to_q", "2.to_k"}
    assert {(layer.rank, layer.scale) for layer in layers.values()} == {(4, 0.5)}


@pytest.mark.parametrize(("weight", "every", "regularised"), [(1.0, 1, 5), (1.0, 2, 3), (1.0, 4, 2), (0.0, 1, 0)])
def test_lazy_regularisation(
    tmp_path: Path, emoji: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, weight: float, every: int,
    regularised: int,
) -> None:  # fmt: skip
    called = []

    def spy(*arguments: Any) -> Any:
        called.append(arguments)
        return variation(*arguments)

    monkeypatch.setitem(VARIATIONS, "exact", spy)
    config = SmoothLoraConfig(batch_size=1, reg_weight=weight, reg_every=every)
    train_smooth_lora(load_model(tiny_model), EmojiScenes(emoji, 16), tmp_path, 5, config=config)
    assert len(called) == regularised


def test_a_rank_above_every_width_is_named(tmp_path: Path, emoji: Path, tiny_model: Path) -> None:
    config = SmoothLoraConfig(rank=33)
    with pytest.raises(InputError, match="rank=33: give at most 32"):
        train_smooth_lora(load_model(tiny_model), EmojiScenes(emoji, 16), tmp_path / "run", 4, config=config)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["smooth-lora", "--rank", "0"], "--rank=0"),
        (["smooth-lora", "--rank", "100000000"], "--rank=100000000"),
        (["smooth-lora", "--lora-alpha", "nan"], "--lora-alpha=nan"),
        (["smooth-lora", "--target-modules", ","], "target_modules: none is named"),
        (["smooth-lora", "--format", "kohya"], "--format='kohya'"),
        (["smooth-lora", "--reg-every", "0"], "--reg-every=0"),
        (["smooth-lora", "--keep", "0"], "--keep=0"),
        (["smooth-lora", "--save-every", "0"], "--save-every=0"),
        (["smooth-lora", "--batch-size", "1000000000"], "--batch-size="),
        (["smooth-lora", "--lr", "nan"], "--lr=nan"),
        (["smooth-lora", "--lr", "inf"], "--lr=inf"),
        (["smooth-lora", "--lr", "1e30"], "--lr=1e+30"),
        (["smooth-lora", "--reg-weight", "nan"], "--reg-weight=nan"),
        (["smooth-lora", "--reg-weight", "-1"], "--reg-weight=-1"),
        (["smooth-lora", "--reg-guidance", "inf"], "--reg-guidance=inf"),
        (["smooth-lora", "--path-weight", "-1"], "--path-weight=-1"),
        (["smooth-lora", "--path-share", "0"], "--path-share=0"),
        (["smooth-lora", "--path-points", "1"], "--path-points=1"),
        (["smooth-lora", "--path-points", "12"], "--path-points=12"),
        (["smooth-lora", "--path-steps", "0"], "--path-steps=0"),
        (
            ["smooth-lora", "--path-steps", "4", "--path-window", "5"],
            "--path-window=5: give a whole number",
        ),
        (["smooth-lora", "--paths-per-step", "0"], "--paths-per-step=0"),
        (["smooth-lora", "--svr-target", "none"], "--svr-target='none'"),
        (["smooth-lora", "--svr-target", "anchored", "--svr-share", "inf"], "--svr-share=inf"),
        (["smooth-lora", "--drop-prompt", "5"], "--drop-prompt=5"),
        (["smooth-lora", "--seed", "-1"], "--seed=-1"),
        (["smooth-lora", "--seed", str(2**70)], f"--seed={2**70}"),
        (["smooth-lora", "--steps", "0"], "--steps=0"),
        (["tiny", "--seed", "-1"], "--seed=-1"),
        (["tiny", "--vae-steps", "0"], "--vae-steps=0"),
        (["tiny", "--unet-steps", "0"], "--unet-steps=0"),
        (["tiny", "--unet-lr", "nan"], "--unet-lr=nan"),
        (["tiny", "--stages", ","], "stages: none is named"),
    ],
)
def test_settings_out_of_range_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, options: list[str], named: str
) -> None:
    def work(*_: Any, **__: Any) -> None:
        raise AssertionError("began to work")

    monkeypatch.setattr("smooth_rt.training.tiny.fetch", work)
    monkeypatch.setattr("smooth_rt.model.load_model", work)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", *options, "--output", "run", "--data", "data"]) == 2
    assert capsys.readouterr().err.startswith(f"error: {named}")
    assert list(tmp_path.iterdir()) == []


def test_parts_of_a_step_add_up_to_it(tmp_path: Path, emoji: Path, tiny_model: Path) -> None:
    """With a target that does not move, a step in parts is the step at once, but for the order of its sums."""
    trained = []
    for accumulate in (1, 2, 4):
        config = SmoothLoraConfig(
            batch_size=4, accumulate=accumulate, lr=1e-3, svr_target="anchored", calibration_steps=2, drop_prompt=0.3,
            path_weight=0.5, path_steps=2, path_window=1, path_points=3,
        )  # fmt: skip
        model = load_model(tiny_model)
        for network in (model.unet, model.vae, model.text_encoder):
            network.double()
        train_smooth_lora(model, EmojiScenes(emoji, 16), tmp_path / str(accumulate), 3, config=config)
        trained.append(load_file(tmp_path / str(accumulate) / "checkpoint-00000003.safetensors"))
    for other in trained[1:]:
        for key, value in trained[0].items():
            if not key.startswith("extra/"):  # the calibration's means are of other groups of four
                continue
            assert value.shape == other[key].shape
        weights = [key for key in trained[0] if key.startswith("weight/")]
        assert all((other[key] - trained[0][key]).norm() <= 2e-2 * trained[0][key].norm() + 1e-4 for key in weights)


@pytest.mark.parametrize("reg_gradient", ["exact", "difference"])
def test_checkpointed_activations_train_the_same(
    tmp_path: Path, emoji: Path, tiny_model: Path, reg_gradient: str
) -> None:
    trained = []
    for checkpointing in (False, True):
        config = SmoothLoraConfig(
            batch_size=2, lr=1e-3, reg_gradient=reg_gradient, gradient_checkpointing=checkpointing
        )
        path = train_smooth_lora(
            load_model(tiny_model), EmojiScenes(emoji, 16), tmp_path / str(checkpointing), 3, config=config
        )
        trained.append(load_file(path))
    for key, value in trained[0].items():
        torch.testing.assert_close(trained[1][key], value, rtol=1e-4, atol=1e-6)


def test_a_loss_that_is_not_finite_names_step_and_pictures(tmp_path: Path, emoji: Path, tiny_model: Path) -> None:
    model, scenes = load_model(tiny_model), EmojiScenes(emoji, 16)
    draw = scenes.draw

    def damaging(stream: str, index: int) -> Any:
        if stream == "smooth-lora" and index == 4:
            with torch.no_grad():
                model.unet.conv_out.weight[0, 0, 0, 0] = float("nan")
        return draw(stream, index)

    scenes.draw = damaging  # type: ignore[method-assign, assignment]
    config = SmoothLoraConfig(batch_size=2, svr_target="per-timestep")
    with pytest.raises(SmoothRTError) as said:
        train_smooth_lora(model, scenes, tmp_path, 5, config=config, save_every=1)
    message = str(said.value)
    assert message.startswith("step 2: the loss is nan, made of emoji scene smooth-lora 4, emoji scene smooth-lora 5; ")
    assert "kept as failed-00000002.safetensors" in message
    assert (tmp_path / "failed-00000002.safetensors").exists()


def test_a_look_while_it_trains(tmp_path: Path, emoji: Path, tiny_model: Path) -> None:
    output = tmp_path / "run"
    command = ["train", "smooth-lora", "--model", str(tiny_model), "--data", str(emoji), "--output", str(output)]
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("dog on blue background\nred apple on white background\n")
    command += ["--steps", "3", "--batch-size", "2", "--watch-every", "2", "--watch-prompts", str(prompts)]
    assert cli.main([*command, "--report-to", "tensorboard", "--device", "cpu"]) == 0
    looks = [json.loads(line) for line in (output / "istd.jsonl").read_text().splitlines()]
    assert [look["step"] for look in looks] == [2, 3]
    assert all(look["istd"] > 0 for look in looks)
    with Image.open(output / "morph-00000002.png") as sheet:
        assert sheet.size == (11 * 16, 2 * 16)
    assert list((output / "tracking").rglob("events.out.tfevents*"))
