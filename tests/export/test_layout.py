"""Others open the folders that `smooth-rt build-engine` writes, and sample what the pipeline samples."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray

from engines.contract import NETWORKS, contract
from engines.errors import EngineError, InputError
from engines.ov import core
from export.graphs import Case, random_inputs
from export.layout import Kind, graph_path, write_layout
from smooth_rt import cli
from smooth_rt.model import Model, load_model
from smooth_rt.pipeline import SmoothPipeline

PROMPT = "red apple on blue background"
LONG = "red apple on blue background and dog " * 12
STEPS, GUIDANCE = 5, 4.0
ENOUGH = 35.0  # dB; 8-bit images that are rounded down, as GenAI's, reach about 53


@dataclass
class Written:
    """A model, its graphs as others want them, and what our pipeline samples from `latents`."""

    model: Model
    onnx: Path
    openvino: Path
    latents: torch.Tensor
    denoised: torch.Tensor
    image: NDArray[np.float32]


@pytest.fixture(scope="module", params=["tiny", pytest.param("default", marks=pytest.mark.slow)])
def written(request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Written:
    name = str(tiny_model) if request.param == "tiny" else "default"
    built = tmp_path_factory.mktemp("layout") / "built"
    build = ["build-engine", "--model", name, "--lora", "none", "--backend", "onnx,openvino", "--output", str(built)]
    assert cli.main(build) == 0
    model = load_model(name)
    side = model.dims.sample_size
    latents = torch.randn(1, model.dims.latent_channels, side, side, generator=torch.Generator().manual_seed(3))
    with SmoothPipeline.from_pretrained(model, engine="eager") as pipe:
        result = pipe(PROMPT, latents=latents, num_inference_steps=STEPS, guidance_scale=GUIDANCE, output_type="latent")
        denoised = torch.as_tensor(result.images)
        image = np.asarray(pipe.decode(denoised, "np"))
    assert image.std() > 0.02  # not one flat colour
    return Written(model, built / "onnxruntime-fp32", built / "openvino-fp32", latents, denoised, image)


@pytest.fixture
def genai() -> Any:
    pytest.importorskip("openvino_tokenizers", reason="makes the tokenizer that OpenVINO GenAI reads")
    return pytest.importorskip("openvino_genai", reason="is what opens the folder")


def psnr(image: NDArray[Any], wanted: NDArray[Any]) -> float:
    return float(-10 * np.log10(np.mean((image.astype(np.float64) - wanted) ** 2) + 1e-30))


# Of diffusers: it will drop its ONNX pipeline one day.
@pytest.mark.filterwarnings("ignore:`OnnxRuntimeModel` is deprecated:FutureWarning")
def test_diffusers_samples_from_the_onnx_folder(written: Written) -> None:
    from diffusers import OnnxStableDiffusionPipeline

    theirs = OnnxStableDiffusionPipeline.from_pretrained(written.onnx)
    theirs.set_progress_bar_config(disable=True)
    last: dict[int, NDArray[np.float32]] = {}
    # It takes every VAE's factor for 8 and its scale for 0.18215.
    pixels = 8 * written.model.dims.sample_size
    images = theirs(
        PROMPT,
        pixels,
        pixels,
        STEPS,
        GUIDANCE,
        latents=written.latents.numpy(),
        output_type="np",
        callback=lambda i, _, latents: last.update({i: latents}),
    ).images
    if written.model.config().scaling_factor == 0.18215:
        assert psnr(images, written.image) > ENOUGH
    denoised = torch.from_numpy(last[STEPS - 1])
    assert (denoised - written.denoised).norm() < 1e-3 * written.denoised.norm()
    (decoded,) = theirs.vae_decoder(latent_sample=denoised.numpy() / written.model.config().scaling_factor)
    assert psnr(np.clip(decoded / 2 + 0.5, 0, 1).transpose(0, 2, 3, 1), written.image) > ENOUGH


def test_openvino_genai_samples_from_the_openvino_folder(written: Written, genai: Any) -> None:
    import openvino

    class Given(genai.Generator):  # type: ignore[misc,name-defined]
        """Draws our latents."""

        def randn_tensor(self, shape: Any) -> openvino.Tensor:
            assert list(shape) == list(written.latents.shape)
            return openvino.Tensor(written.latents.numpy())

    theirs = genai.Text2ImagePipeline(written.openvino, "CPU", INFERENCE_PRECISION_HINT="f32")
    generator = Given()
    image = theirs.generate(PROMPT, num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=generator)
    assert psnr(image.data / 255, written.image) > ENOUGH


@pytest.mark.parametrize("prompt", [PROMPT, "", LONG, "Red  DOG!\n don't 猫", "\U0001f34e"])
def test_openvino_genai_reads_prompts_as_the_model_does(written: Written, genai: Any, prompt: str) -> None:
    tokenizer = genai.Tokenizer(written.openvino / "tokenizer")
    ids = tokenizer.encode(prompt).input_ids.data
    assert ids.dtype == np.int32
    padded = [*ids[0].tolist(), *[tokenizer.get_pad_token_id()] * (written.model.dims.tokens - ids.shape[1])]
    ours = written.model.tokenizer(
        prompt, padding="max_length", max_length=written.model.dims.tokens, truncation=True
    ).input_ids
    assert padded == ours


@pytest.mark.parametrize("rows", [1, 3])
def test_one_timestep_serves_the_batch_and_so_does_one_a_row(written: Written, rows: int) -> None:
    dims = written.model.dims
    case = Case({"batch": 3, "height": dims.sample_size, "width": dims.sample_size}, 1.0)
    inputs = random_inputs(contract("unet", dims), dims, case, torch.Generator().manual_seed(5))
    inputs["timestep"] = inputs["timestep"][:rows]
    assert len(inputs["timestep"].unique()) == rows
    with torch.no_grad():
        wanted = written.model.unet(**inputs, return_dict=False)[0].numpy()
    arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
    session = onnxruntime.InferenceSession(str(graph_path(written.onnx, "onnx", "unet")))
    compiled = core().compile_model(
        str(graph_path(written.openvino, "openvino", "unet")), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    for got in (session.run(["noise_pred"], arrays)[0], compiled(arrays)["noise_pred"]):
        assert np.linalg.norm(got - wanted) < 1e-4 * np.linalg.norm(wanted)


def test_the_layout_holds_no_folder_of_this_machine(written: Written) -> None:
    texts = [path.read_text(encoding="utf-8") for path in written.onnx.rglob("*.json")]
    assert len(texts) >= 8
    assert not [text for text in texts if str(Path.home()) in text or "_name_or_path" in text]


@pytest.fixture
def parts(tiny_model: Path, tmp_path: Path) -> dict[str, Any]:
    """Arguments of `write_layout` with made-up configs."""
    return {
        "folder": tmp_path / "built",
        "kind": "openvino",
        "configs": {name: {"of": name} for name in NETWORKS},
        "tokenizer_folder": tiny_model / "tokenizer",
        "scheduler_config": {"_class_name": "PNDMScheduler", "beta_start": 0.25},
    }


@pytest.mark.parametrize("kind", ["onnx", "openvino"])
def test_what_is_written(parts: dict[str, Any], kind: Kind) -> None:
    write_layout(**{**parts, "kind": kind})
    folder = parts["folder"]
    index = json.loads((folder / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "PNDMScheduler"]
    assert json.loads((folder / "scheduler" / "scheduler_config.json").read_text()) == parts["scheduler_config"]
    for name in NETWORKS:
        assert json.loads((folder / name / "config.json").read_text()) == {"of": name}
    assert {"vocab.json", "merges.txt"} <= {path.name for path in (folder / "tokenizer").iterdir()}


@pytest.mark.parametrize(
    ("kind", "name", "expected"),
    [
        ("onnx", "UniPCMultistepScheduler", "UniPCMultistepScheduler"),
        ("openvino", "UniPCMultistepScheduler", "DDIMScheduler"),
        ("openvino", "EulerDiscreteScheduler", "EulerDiscreteScheduler"),
        ("onnx", "BestScheduler", "DDIMScheduler"),
        ("onnx", ["own_scheduler", "OwnScheduler"], "DDIMScheduler"),
        ("openvino", None, "DDIMScheduler"),
    ],
)
def test_write_layout_names_a_scheduler_that_its_reader_has(
    parts: dict[str, Any], kind: Kind, name: Any, expected: str
) -> None:
    write_layout(**{**parts, "kind": kind, "scheduler_config": {"_class_name": name, "beta_start": 0.25}})
    config = json.loads((parts["folder"] / "scheduler" / "scheduler_config.json").read_text())
    assert config == {"_class_name": expected, "beta_start": 0.25}
    assert json.loads((parts["folder"] / "model_index.json").read_text())["scheduler"] == ["diffusers", expected]


def test_without_openvino_tokenizers(
    parts: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "openvino_tokenizers", None)
    with caplog.at_level(logging.DEBUG, "smooth_rt"):
        write_layout(**parts)
    assert "which openvino_genai alone reads" in caplog.text
    assert "pip install 'smooth-rt[genai]'" in caplog.text
    assert str(parts["folder"]) not in caplog.text  # of a build it is a temporary one
    assert (parts["folder"] / "model_index.json").is_file()
    assert not list(parts["folder"].rglob("openvino_tokenizer.*"))


def test_a_tokenizer_that_stands_in_the_layout_already(parts: dict[str, Any]) -> None:
    inside = shutil.copytree(parts["tokenizer_folder"], parts["folder"] / "tokenizer")
    write_layout(**{**parts, "kind": "onnx", "tokenizer_folder": inside})
    assert (inside / "vocab.json").is_file()


def test_refusals(parts: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no config of text_encoder, vae_encoder, vae_decoder; give one"):
        write_layout(**{**parts, "configs": {"unet": {}}})
    with pytest.raises(InputError, match="no such folder; save the tokenizer there first"):
        write_layout(**{**parts, "tokenizer_folder": tmp_path / "none"})
    assert not parts["folder"].exists()


def test_a_tokenizer_that_cannot_be_converted(parts: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("openvino_tokenizers", reason="is what refuses")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "tokenizer.json").write_text("{}")
    with pytest.raises(EngineError, match="openvino-tokenizers cannot convert it") as caught:
        write_layout(**{**parts, "tokenizer_folder": broken})
    assert "\n" not in str(caught.value)
