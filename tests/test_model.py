"""Loading a model: the sizes, the digests, the round trip, and one line for everything that can be wrong."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engines.contract import Dims
from smooth_rt.errors import BundleError, InputError, ModelError
from smooth_rt.model import Model, load_model, read_config

IDS = "red apple on blue background"


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Model:
    return load_model(tiny_model)


@pytest.fixture
def copy(tiny_model: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_model, tmp_path / "model")


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def message(error: pytest.ExceptionInfo[Exception]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def test_dims_come_from_the_configs(model: Model) -> None:
    assert model.dims == Dims(
        tokens=12, text_width=32, vocabulary=model.text_encoder.config.vocab_size, latent_channels=4,
        image_channels=3, vae_factor=2, latent_multiple=4, sample_size=8, up_channels=(32, 32, 16),
    )  # fmt: skip


def test_modules_are_fp32_frozen_and_in_eval_mode(model: Model) -> None:
    for module in (model.text_encoder, model.unet, model.vae):
        assert not module.training
        assert all(p.dtype == torch.float32 and not p.requires_grad for p in module.parameters())


def test_loading_prints_nothing(tiny_model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load_model(tiny_model)
    assert capfd.readouterr() == ("", "")


def test_digests_depend_on_content_alone(model: Model, copy: Path) -> None:
    assert set(model.digests) == {"text_encoder", "unet", "vae", "tokenizer", "scheduler"}
    assert load_model(copy).digests == model.digests


def test_using_the_tokenizer_leaves_its_digest(tiny_model: Path, model: Model, tmp_path: Path) -> None:
    loaded = load_model(tiny_model)
    loaded.tokenizer([IDS], padding="max_length", truncation=True, max_length=5)
    loaded.save(tmp_path / "saved")
    assert load_model(tmp_path / "saved").digests == model.digests


@pytest.mark.parametrize("part", ["text_encoder", "unet", "vae"])
def test_one_changed_weight_changes_one_digest(model: Model, copy: Path, part: str) -> None:
    def nudge(tensors: dict[str, torch.Tensor]) -> None:
        tensors[min(tensors)].view(-1)[0] += 0.25

    edit_weights(next((copy / part).glob("*.safetensors")), nudge)
    changed = load_model(copy).digests
    assert {name for name in changed if changed[name] != model.digests[name]} == {part}


@pytest.mark.parametrize(
    "change", [{"padding_side": "left"}, {"truncation_side": "left"}, {"split_special_tokens": True}]
)
def test_digests_depend_on_options_of_the_tokenizer(
    model: Model, copy: Path, tmp_path: Path, change: dict[str, object]
) -> None:
    edit_json(copy / "tokenizer" / "tokenizer_config.json", **change)
    changed = load_model(copy)
    assert {name for name in changed.digests if changed.digests[name] != model.digests[name]} == {"tokenizer"}
    changed.write_config(tmp_path / "config")
    (option,) = change.items()
    assert getattr(read_config(tmp_path / "config").tokenizer, option[0]) == option[1]


def test_one_changed_setting_changes_one_digest(model: Model, copy: Path) -> None:
    edit_json(copy / "scheduler" / "scheduler_config.json", prediction_type="v_prediction")
    changed = load_model(copy).digests
    assert {name for name in changed if changed[name] != model.digests[name]} == {"scheduler"}


def test_save_writes_a_folder_that_diffusers_samples(model: Model, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    folder = tmp_path / "new" / "saved"
    model.save(folder)
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    assert pipe(IDS, num_inference_steps=2, output_type="np").images.shape == (1, 16, 16, 3)
    for name in ("text_encoder", "unet", "vae"):
        saved = getattr(pipe, name).state_dict()
        assert all(torch.equal(saved[key], value) for key, value in getattr(model, name).state_dict().items())
    assert {p.name for p in (folder / "tokenizer").iterdir()} >= {"tokenizer.json", "vocab.json", "merges.txt"}


def test_network_configs_are_those_of_the_folder(model: Model, tiny_model: Path, copy: Path) -> None:
    for name, config in model.network_configs().items():
        folder = tiny_model / ("vae" if name.startswith("vae_") else name)
        assert config == json.loads((folder / "config.json").read_text())
    edit_json(copy / "tokenizer" / "tokenizer_config.json", model_max_length=7)
    assert load_model(copy).network_configs()["text_encoder"]["max_position_embeddings"] == 7


def test_save_leaves_a_folder_in_use_alone(model: Model, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="holds something already") as error:
        model.save(tmp_path)
    assert str(tmp_path) in message(error)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_save_under_a_file_or_on_a_full_disk_leaves_nothing(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "model", tmp_path / "file"):
        with pytest.raises(InputError, match=rf"^model folder {path}: .*is a file") as error:
            model.save(path)
        assert "bundle" not in message(error)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model.vae, "save_pretrained", full)
    with pytest.raises(InputError, match=rf"^model folder {tmp_path}/model: the disk is full") as error:
        model.save(tmp_path / "model")
    message(error)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_config_round_trip(model: Model, tmp_path: Path) -> None:
    model.write_config(tmp_path)
    config = read_config(tmp_path)
    assert config.scheduler_config == model.scheduler_config
    assert config.scaling_factor == model.vae.config.scaling_factor
    arguments = {"padding": "max_length", "truncation": True}
    assert config.tokenizer([IDS, ""], **arguments).input_ids == model.tokenizer([IDS, ""], **arguments).input_ids


@pytest.mark.parametrize("name", ["model.json", "scheduler_config.json", "tokenizer/tokenizer.json"])
@pytest.mark.parametrize("damage", ["missing", "broken"])
def test_damaged_config(model: Model, tmp_path: Path, name: str, damage: str) -> None:
    model.write_config(tmp_path)
    if damage == "missing":
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_text("{,")
    with pytest.raises(BundleError, match="build-engine") as error:
        read_config(tmp_path)
    message(error)


def test_missing_folder_and_unreachable_hub(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such folder or file"):
        load_model(tmp_path / "nothing")
    with pytest.raises(ModelError, match=r"nobody/nothing: .* pass a diffusers folder") as error:
        load_model("nobody/nothing")
    message(error)


def test_hub_id_loads_a_snapshot_and_names_its_commit(
    model: Model, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = shutil.copytree(tiny_model, tmp_path / "snapshots" / "0123abcd")
    asked: dict[str, object] = {}

    def download(repository: str, **options: object) -> str:
        asked.update(options, repository=repository)
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    loaded = load_model("some-body/some.model", revision="main")
    assert (loaded.source, loaded.revision) == ("some-body/some.model", "0123abcd")
    assert loaded.digests == model.digests
    assert (asked["repository"], asked["revision"]) == ("some-body/some.model", "main")
    assert not [pattern for pattern in asked["allow_patterns"] if pattern.endswith((".bin", "*.safetensors*"))]  # type: ignore[attr-defined]


@pytest.mark.parametrize("part", ["text_encoder", "unet", "vae", "tokenizer", "scheduler"])
def test_missing_component(copy: Path, part: str) -> None:
    shutil.rmtree(copy / part)
    with pytest.raises(ModelError, match=rf"{part}/.* missing") as error:
        load_model(copy)
    message(error)


@pytest.mark.parametrize("part", ["text_encoder", "unet", "vae"])
def test_truncated_weights(copy: Path, part: str) -> None:
    path = next((copy / part).glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ModelError, match=rf"{path.name}: truncated") as error:
        load_model(copy)
    message(error)


@pytest.mark.parametrize("part", ["text_encoder", "unet", "vae"])
def test_missing_weight(copy: Path, part: str) -> None:
    path = next((copy / part).glob("*.safetensors"))
    edit_weights(path, lambda tensors: tensors.pop(min(tensors)).zero_())
    with pytest.raises(ModelError, match="is missing") as error:
        load_model(copy)
    message(error)


def test_misshapen_weight(copy: Path) -> None:
    path = copy / "unet" / "diffusion_pytorch_model.safetensors"
    edit_weights(path, lambda tensors: tensors.update({"conv_in.bias": torch.zeros(3)}))
    with pytest.raises(ModelError, match="cannot be loaded") as error:
        load_model(copy)
    message(error)


@pytest.mark.parametrize(
    "name", ["text_encoder/config.json", "unet/config.json", "vae/config.json", "scheduler/scheduler_config.json"]
)
def test_broken_json(copy: Path, name: str) -> None:
    for text in ("{,", "[]"):
        (copy / name).write_text(text)
        with pytest.raises(ModelError, match=name) as error:
            load_model(copy)
        message(error)


def test_pickles_are_refused(copy: Path, tmp_path: Path) -> None:
    path = copy / "unet" / "diffusion_pytorch_model.safetensors"
    path.rename(path.with_suffix(".bin"))
    with pytest.raises(ModelError, match=r"\.bin pickles.*save_pretrained") as error:
        load_model(copy)
    message(error)
    checkpoint = tmp_path / "model.ckpt"
    checkpoint.write_bytes(b"\x80\x02.")
    with pytest.raises(ModelError, match="pickles never"):
        load_model(checkpoint)


def test_half_precision_variant_is_found(model: Model, copy: Path) -> None:
    for path in copy.glob("*/*.safetensors"):
        save_file(
            {k: v.half() for k, v in load_file(path).items()}, path.with_suffix(".fp16.safetensors"), {"format": "pt"}
        )
        path.unlink()
    loaded = load_model(copy)
    reference = dict(model.unet.named_parameters())
    for name, parameter in loaded.unet.named_parameters():
        assert torch.equal(parameter, reference[name].half().float())


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("unet/config.json", {"addition_embed_type": "text_time"}, "addition_embed_type"),
        ("unet/config.json", {"time_cond_proj_dim": 256}, "time_cond_proj_dim"),
        ("unet/config.json", {"_class_name": "SD3Transformer2DModel"}, "SD3Transformer2DModel"),
        ("vae/config.json", {"shift_factor": 0.1}, "shift"),
        ("vae/config.json", {"scaling_factor": 0}, "scaling_factor is 0; give a number above 0"),
        ("vae/config.json", {"scaling_factor": math.nan}, "scaling_factor is nan; give a number above 0"),
        ("text_encoder/config.json", {"architectures": ["T5EncoderModel"]}, "T5EncoderModel"),
    ],
)
def test_other_architectures_are_refused(copy: Path, name: str, changes: dict[str, object], said: str) -> None:
    edit_json(copy / name, **changes)
    with pytest.raises(ModelError, match=rf"{said}.*Stable Diffusion 1\.x and 2\.x") as error:
        load_model(copy)
    message(error)


def test_tokenizer_without_a_length(copy: Path) -> None:
    path = copy / "tokenizer" / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["model_max_length"]
    path.write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"model_max_length is 1e\+30 .* takes 12") as error:
        load_model(copy)
    message(error)
