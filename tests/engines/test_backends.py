"""The engines on a graph of one convolution: same numbers, own outputs, errors in one line."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import openvino
import pytest
import torch
from torch import Tensor

from engines import ov
from engines.base import Engine
from engines.contract import Dims, Network, contract
from engines.eager import EagerEngine
from engines.errors import EngineError, InputError
from engines.ort import OrtEngine
from engines.ov import OvEngine
from engines.select import open_engine

BACKENDS = ("eager", "onnxruntime", "openvino")


@pytest.fixture(params=BACKENDS)
def engine(request: pytest.FixtureRequest, network: Network, module: Any, write_graph: Any, tmp_path: Path) -> Engine:
    if request.param == "eager":
        return EagerEngine(network, module)
    return open_engine(request.param, network, write_graph(tmp_path / "graph.onnx"))


def image(dims: Dims, batch: int = 2, height: int = 3, width: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(batch)
    shape = (batch, dims.image_channels, height * dims.vae_factor, width * dims.vae_factor)
    return torch.randn(shape, generator=generator)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 3, 2), (65, 2, 5)])
def test_matches_torch_at_every_size(engine: Engine, module: Any, dims: Dims, sizes: tuple[int, int, int]) -> None:
    sample = image(dims, *sizes)
    outputs = engine.infer(sample=sample)
    mean, logvar = module(sample)
    torch.testing.assert_close(outputs["latent_mean"], mean.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(outputs["latent_logvar"], logvar.detach(), rtol=1e-5, atol=1e-5)


def test_outputs_are_the_callers_own(engine: Engine, dims: Dims) -> None:
    first = engine.infer(sample=image(dims, 2))["latent_mean"]
    kept = first.clone()
    engine.infer(sample=image(dims, 2) + 1)
    assert torch.equal(first, kept)
    first += 1  # a caller may work in place
    assert not first.requires_grad


def test_inputs_are_left_as_they_are(engine: Engine, dims: Dims) -> None:
    sample = image(dims).permute(0, 1, 3, 2).requires_grad_()
    before = sample.detach().clone()
    straight = engine.infer(sample=sample.detach().contiguous())["latent_mean"]
    assert torch.equal(engine.infer(sample=sample)["latent_mean"], straight)
    assert torch.equal(sample, before)


def test_a_closed_engine_refuses(engine: Engine, dims: Dims) -> None:
    with engine:
        engine.infer(sample=image(dims))
    engine.close()
    with pytest.raises(EngineError, match="closed; open it again"):
        engine.infer(sample=image(dims))


def test_wrong_inputs_are_named(engine: Engine, dims: Dims) -> None:
    with pytest.raises(InputError, match="unknown input 'image'"):
        engine.infer(image=image(dims))
    with pytest.raises(InputError, match="sample is not a CPU torch tensor"):
        engine.infer(sample=image(dims).numpy())  # type: ignore[arg-type]
    with pytest.raises(InputError, match="sample is not a CPU torch tensor"):
        engine.infer(sample=image(dims).to("meta"))


class Tampering(Engine):
    """Answers with whatever it was given."""

    backend = "tampering"

    def __init__(self, network: Network, answer: Callable[[], dict[str, Tensor]]) -> None:
        super().__init__(network)
        self.answer = answer

    def infer_impl(self, inputs: dict[str, Tensor], profile: int | None) -> dict[str, Tensor]:
        return {**inputs, **self.answer()}


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ({}, "noise_pred as None"),
        ({"noise_pred": torch.zeros(1, 3, 4, 2)}, "not float32 \\(2, 3, 4, 2\\)"),
        ({"noise_pred": torch.zeros(2, 3, 4, 2, dtype=torch.float64)}, "as float64"),
    ],
)
def test_an_output_that_breaks_the_contract_is_an_error(dims: Dims, answer: dict[str, Tensor], said: str) -> None:
    engine = Tampering(contract("unet", dims), lambda: answer)
    with pytest.raises(EngineError, match=said):
        engine.infer(
            sample=torch.zeros(2, dims.latent_channels, 4, 2),
            timestep=torch.tensor([7]),
            encoder_hidden_states=torch.zeros(2, dims.tokens, dims.text_width),
        )


def test_one_timestep_serves_the_whole_batch(dims: Dims) -> None:
    class Recording(Tampering):
        def infer_impl(self, inputs: dict[str, Tensor], profile: int | None) -> dict[str, Tensor]:
            self.timestep = inputs["timestep"]
            return {"noise_pred": inputs["sample"]}

    engine = Recording(contract("unet", dims), dict)
    engine.infer(
        sample=torch.zeros(3, dims.latent_channels, 4, 2),
        timestep=torch.tensor([7]),
        encoder_hidden_states=torch.zeros(3, dims.tokens, dims.text_width),
    )
    assert engine.timestep.tolist() == [7, 7, 7]


def test_a_failing_backend_says_so_in_one_line(dims: Dims) -> None:
    def fail() -> dict[str, Tensor]:
        raise RuntimeError("no memory\nin a long story")

    engine = Tampering(contract("vae_encoder", dims), fail)
    with pytest.raises(EngineError, match=r"vae_encoder: tampering failed: no memory$"):
        engine.infer(sample=image(dims))


@pytest.mark.parametrize("kind", [OrtEngine, OvEngine])
def test_a_graph_with_other_names_is_refused(kind: Any, network: Network, write_graph: Any, tmp_path: Path) -> None:
    graph = write_graph(tmp_path / "graph.onnx", outputs=("latent_mean", "variance"))
    with pytest.raises(EngineError, match="outputs are latent_mean, variance, not latent_logvar, latent_mean"):
        kind(network, graph)


@pytest.mark.parametrize("kind", [OrtEngine, OvEngine])
@pytest.mark.parametrize("content", [None, b"", b"\x00garbage" * 100])
def test_a_graph_that_cannot_be_read(kind: Any, network: Network, content: bytes | None, tmp_path: Path) -> None:
    graph = tmp_path / "graph.onnx"
    if content is not None:
        graph.write_bytes(content)
    with pytest.raises(EngineError, match=r"graph\.onnx: .* cannot open it") as caught:
        kind(network, graph)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [OrtEngine, OvEngine])
def test_an_operator_that_nobody_knows(kind: Any, network: Network, write_graph: Any, tmp_path: Path) -> None:
    path = write_graph(tmp_path / "graph.onnx")
    model = onnx.load(path)
    model.graph.node[0].op_type, model.graph.node[0].domain = "Frobnicate", "nobody"
    model.opset_import.append(onnx.helper.make_opsetid("nobody", 1))
    onnx.save(model, path)
    with pytest.raises(EngineError, match=r"graph\.onnx: \w+ cannot open it") as caught:
        kind(network, path)
    assert "\n" not in str(caught.value)
    assert "Frobnicate" in str(caught.value)


@pytest.mark.parametrize("hint", ["f32", "bf16"])
def test_openvino_is_always_told_its_precision(
    monkeypatch: pytest.MonkeyPatch, network: Network, write_graph: Any, tmp_path: Path,
    caplog: pytest.LogCaptureFixture, hint: str,
) -> None:  # fmt: skip
    asked = []
    ov._say_no_bf16.cache_clear()
    compile_model = openvino.Core.compile_model

    def spy(core: Any, model: str, device: str, config: dict[str, str]) -> Any:
        asked.append(config)
        return compile_model(core, model, device, config)

    monkeypatch.setattr(openvino.Core, "compile_model", spy)
    OvEngine(network, write_graph(tmp_path / "graph.onnx"), (), hint)
    assert asked == [{"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": torch.get_num_threads()}]
    has = "BF16" in ov.core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    assert ("this processor has no bf16" in caplog.text) == (hint == "bf16" and not has)


def test_a_signal_is_heard_after_engines_have_come_and_gone(
    dims: Dims, write_graph: Any, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    """In a process of its own: what it guards against is a segmentation fault (see engines.ov.core)."""
    code = f"""
import os, signal
from pathlib import Path
from engines.contract import Dims, contract
from engines.ov import OvEngine
open_it = lambda: OvEngine(contract("vae_encoder", {dims!r}), Path({str(write_graph(tmp_path / "graph.onnx"))!r}))
first, second = open_it(), open_it()
del first
del second
signal.signal(signal.SIGTERM, lambda *_: print("heard"))
os.kill(os.getpid(), signal.SIGTERM)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=pytestconfig.rootpath,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (0, "heard\n"), done.stderr
