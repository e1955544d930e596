"""ONNX Runtime on a GPU: torch's numbers on each provider, CUDA graphs, buffers that stay, weights put in place.

`python -m pytest -m gpu tests/gpu/test_onnxruntime.py`; each provider is tested if this onnxruntime has it.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from engines.contract import NETWORKS, Network, NetworkName, contract
from engines.device import SHAPES
from engines.eager import gradient_networks, torch_networks
from engines.errors import EngineError
from engines.ort import OrtEngine
from engines.providers import BY_BACKEND
from engines.recipes import RECIPES
from engines.select import ONNX, availability
from engines.variant import Bounds, Place
from export.graphs import Case, cases, random_inputs
from export.half import in_half
from export.to_onnx import to_onnx
from export.verify import verify
from smooth_rt import SmoothPipeline
from smooth_rt.model import load_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU; torch finds none here"),
]

ON_GPU = [name for name in ONNX if name != "onnxruntime"]
GRADIENTS: list[NetworkName] = ["unet_vjp_text", "unet_vjp_sample"]


@pytest.fixture(scope="module")
def model() -> Any:
    return load_model("default")


@pytest.fixture(scope="module")
def graphs(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The path of a network's graph in a precision, exported once."""
    root, networks = tmp_path_factory.mktemp("graphs"), torch_networks(model.text_encoder, model.unet, model.vae)
    networks |= gradient_networks(networks["unet"], GRADIENTS)

    def graph(name: Any, precision: Any) -> tuple[Path, Any]:
        path, network = root / precision / name / "model.onnx", contract(name, model.dims)
        if not path.exists():
            module = networks[name]
            if precision != "fp32":
                module, _ = in_half(module, network, model.dims, precision)
            to_onnx(module, network, model.dims, path)
        return path, networks[name]

    return graph


def opened(backend: str, network: Network, path: Path, bounds: list[Bounds], **options: Any) -> OrtEngine:
    fault = availability(backend)
    if fault is not None:
        pytest.skip(fault)
    try:
        return OrtEngine(network, path, bounds, BY_BACKEND[backend], **options)
    except EngineError as error:
        # TensorRT of another version than onnxruntime's, or a GPU that TensorRT for RTX does not know. The CUDA
        # provider must start wherever it is installed: that one does not get away.
        if backend == "onnxruntime-cuda":
            raise
        pytest.skip(f"{torch.cuda.get_device_name()}: {error}")


def several(network: Network) -> Bounds:
    return {symbol: (1, 2, 4) if symbol == "batch" else (8, 16, 16) for symbol in network.symbols}


def one(network: Network, rows: int) -> Bounds:
    return {symbol: (rows,) * 3 if symbol == "batch" else (16,) * 3 for symbol in network.symbols}


@pytest.mark.parametrize("backend", ON_GPU)
def test_which_providers_start(backend: str, model: Any, graphs: Any) -> None:
    """A probe: its skips say what this machine lacks."""
    network = contract("vae_decoder", model.dims)
    precision = next(reversed(RECIPES[backend]))
    with opened(backend, network, graphs("vae_decoder", precision)[0], [several(network)]) as engine:
        assert engine.backend == backend


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("backend", ON_GPU)
@pytest.mark.parametrize("name", NETWORKS)
def test_torchs_numbers_at_every_corner(backend: str, precision: Any, name: Any, model: Any, graphs: Any) -> None:
    if precision not in RECIPES[backend]:
        pytest.skip(f"{backend} is not built in {precision}")
    network, (path, module) = contract(name, model.dims), graphs(name, precision)
    bounds = [several(network), one(network, 2)]
    with opened(backend, network, path, bounds) as engine:
        tried = cases(network, model.dims, bounds)
        assert verify(engine, module, network, model.dims, precision, 5, tried)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_are_those_of_autograd(name: Any, precision: Any, model: Any, graphs: Any) -> None:
    network, (path, module) = contract(name, model.dims), graphs(name, precision)
    bounds = [several(network), one(network, 2)]
    with opened("onnxruntime-cuda", network, path, bounds) as engine:
        found = verify(engine, module, network, model.dims, precision, 5, cases(network, model.dims, bounds))
    assert [parity.output for parity in found] == [spec.name for spec in network.outputs]


@pytest.mark.parametrize("rows", [1, 2, 8, 32])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_cuda_graph_of_each_batch(
    rows: int, precision: Any, model: Any, graphs: Any, caplog: pytest.LogCaptureFixture
) -> None:
    network, (path, module) = contract("unet", model.dims), graphs("unet", precision)
    with (
        caplog.at_level(logging.WARNING, "smooth_rt"),
        opened("onnxruntime-cuda", network, path, [one(network, rows)]) as engine,
    ):
        options = engine._sessions.any().get_provider_options()["CUDAExecutionProvider"]
        assert (options["enable_cuda_graph"], options["use_tf32"]) == ("1", "0")
        case = Case({"batch": rows, "height": 16, "width": 16}, 1.0)
        # A replay reads what is in the buffers now: three inputs, three right answers.
        for seed in range(3):
            inputs = random_inputs(network, model.dims, case, torch.Generator().manual_seed(seed))
            got = engine.infer(**inputs)["noise_pred"]
            with torch.no_grad():
                wanted = module(*inputs.values())[0]
            assert (got - wanted).norm() / wanted.norm() < (1e-4 if precision == "fp32" else 2e-2)
        assert engine._graphs
        assert not caplog.messages


@pytest.mark.parametrize("backend", ON_GPU)
def test_outputs_are_the_callers_own_and_shapes_take_turns(backend: str, model: Any, graphs: Any) -> None:
    network, (path, _) = contract("vae_decoder", model.dims), graphs("vae_decoder", "fp16")
    with opened(backend, network, path, [several(network), one(network, 1)]) as engine:
        generator = torch.Generator().manual_seed(0)
        inputs = [
            random_inputs(network, model.dims, Case({"batch": b, "height": 8, "width": w}, 5.5), generator)
            for w in (8, 12, 16)
            for b in (1, 2, 3, 4)
        ]
        assert len(inputs) > SHAPES
        first = [engine.infer(**each)["sample"].clone() for each in inputs]
        kept = engine.infer(**inputs[0])["sample"]
        second = [engine.infer(**each)["sample"] for each in inputs]
        assert all((a - b).norm() <= 1e-3 * a.norm() for a, b in zip(first, second, strict=True))
        assert torch.equal(kept, engine.infer(**inputs[0])["sample"])


def test_weights_a_then_b_then_a_again(model: Any, graphs: Any, tmp_path: Path) -> None:
    network, (path, _) = contract("unet", model.dims), graphs("unet", "fp32")
    graph = onnx.load(path, load_external_data=False).graph
    names = [tensor.name for tensor in graph.initializer if tensor.name.endswith("attn1.to_q.weight.T")]
    case = Case({"batch": 2, "height": 16, "width": 16}, 1.0)
    inputs = random_inputs(network, model.dims, case, torch.Generator().manual_seed(1))
    with opened("onnxruntime-cuda", network, path, [one(network, 2)], cache=tmp_path / "compiled") as engine:
        engine.places = {name.removesuffix(".T"): Place(name=name, transposed=True) for name in names}
        own = {name: model.unet.get_parameter(name.removeprefix("unet.")).detach() for name in engine.places}
        other = {name: weight * 1.5 for name, weight in own.items()}
        found = []
        for weights in (own, other, own):
            engine.refit(weights)
            found.append(engine.infer(**inputs)["noise_pred"])
        assert (found[0] - found[2]).norm() / found[0].norm() < 1e-5
        assert (found[0] - found[1]).norm() / found[0].norm() > 1e-3


@pytest.mark.parametrize("backend", ["onnxruntime-tensorrt", "onnxruntime-tensorrt-rtx"])
def test_what_was_compiled_is_kept(backend: str, model: Any, graphs: Any, tmp_path: Path) -> None:
    network, (path, _) = contract("vae_decoder", model.dims), graphs("vae_decoder", "fp16")
    case = Case({"batch": 1, "height": 16, "width": 16}, 5.5)
    inputs = random_inputs(network, model.dims, case, torch.Generator().manual_seed(1))
    found = []
    for _ in range(2):
        with opened(backend, network, path, [one(network, 1)], cache=tmp_path / "compiled") as engine:
            found.append(engine.infer(**inputs)["sample"])
    assert any((tmp_path / "compiled").iterdir())
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_pipeline_draws_what_eager_draws(
    precision: str, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault = availability("onnxruntime-cuda")
    if fault is not None:
        pytest.skip(fault)
    monkeypatch.setenv("SMOOTH_RT_CACHE", str(tmp_path))
    drawn = []
    for engine, provider, exact in (("eager", None, "fp32"), ("onnxruntime", "cuda", precision)):
        with SmoothPipeline.from_pretrained(
            load_model("default"), engine=engine, provider=provider, precision=exact
        ) as pipe:
            noise = torch.Generator().manual_seed(0)
            prompt = "red apple on blue background"
            drawn.append(torch.as_tensor(pipe(prompt, generator=noise, output_type="np").images))
    error = (drawn[0] - drawn[1]).square().mean()
    assert -10 * torch.log10(error) > (60 if precision == "fp32" else 30)
