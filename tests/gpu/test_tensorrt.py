"""TensorRT on a GPU: torch's numbers at every corner, buffers that stay, graphs by shape, and weights put in place.

`python -m pytest -m gpu tests/gpu/test_tensorrt.py` with tensorrt or tensorrt-rtx installed; each is tested if it is.
"""

from __future__ import annotations

from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from engines.contract import LORA_STRENGTH, NETWORKS, Network, contract
from engines.device import SHAPES
from engines.eager import gradient_networks, torch_networks
from engines.errors import EngineError, SmoothRTError
from engines.lora import LoraWeights
from engines.rtx import leaves_out
from engines.runtime_lora import RuntimeUnet
from engines.select import PORTABLE, TENSORRT, buildable, gpu, target
from engines.trt import TrtEngine
from engines.variant import Bounds, Place
from export.graphs import Case, cases, random_inputs
from export.half import in_half
from export.to_onnx import to_onnx
from export.to_tensorrt import to_tensorrt
from export.verify import verify
from smooth_rt.build import ensure_engines
from smooth_rt.lora import lora_weights, read_lora
from smooth_rt.model import load_model
from smooth_rt.pipeline import SmoothPipeline

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU; torch finds none here"),
]


@pytest.fixture(scope="module", params=TENSORRT)
def backend(request: pytest.FixtureRequest) -> str:
    fault = buildable(request.param)
    if fault is not None:
        pytest.skip(fault)
    return str(request.param)


@pytest.fixture(scope="module")
def model() -> Any:
    return load_model("default")


def bounded(network: Network) -> Bounds:
    return {symbol: (1, 2, 4) if symbol == "batch" else (8, 16, 16) for symbol in network.symbols}


def torchs(model: Any, name: Any) -> Any:
    """The torch form of a network, of one of gradients too."""
    networks = torch_networks(model.text_encoder, model.unet, model.vae)
    return networks[name] if name in networks else gradient_networks(networks["unet"], [name])[name]


def built(
    backend: str,
    model: Any,
    name: Any,
    folder: Path,
    lora: LoraWeights | None = None,
    precision: Any = "fp32",
    cache: Path | None = None,
    **options: Any,
) -> tuple[TrtEngine, Any]:
    network = contract(name, model.dims, lora_strength=lora is not None)
    module = torchs(model, name)
    if lora is not None:
        module = RuntimeUnet(module, lora).eval()
    exact = module if precision == "fp32" else in_half(module, network, model.dims, precision)[0]
    to_onnx(exact, network, model.dims, folder / "model.onnx")
    path, bounds = folder / "model.engine", [bounded(network)]
    try:
        to_tensorrt(
            folder / "model.onnx", path, network, bounds, backend=backend, architecture=target(backend), **options
        )
        return TrtEngine(network, path, bounds, backend, cache), module
    except SmoothRTError as error:
        # A GPU that TensorRT for RTX does not name, such as Hopper: its refusal is the expected answer, and the probe
        # below records it. No other GPU gets away.
        if backend == "tensorrt-rtx" and leaves_out(gpu() or "") is not None:
            pytest.skip(f"{torch.cuda.get_device_name()}: {error}")
        raise


def test_whether_the_portable_engine_runs_here(
    model: Any, tmp_path: Path, record_property: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """A probe: the line that it prints belongs into docs/measurements, whichever way it goes."""
    fault = buildable("tensorrt-rtx")
    if fault is not None:
        pytest.skip(fault)
    network, at_hand = contract("vae_decoder", model.dims), str(gpu())
    path, bounds = tmp_path / "model.engine", [bounded(network)]
    module = torchs(model, "vae_decoder")
    to_onnx(module, network, model.dims, tmp_path / "model.onnx")
    to_tensorrt(
        tmp_path / "model.onnx", path, network, bounds, backend="tensorrt-rtx", architecture=PORTABLE
    )  # built on any machine
    try:
        with TrtEngine(network, path, bounds, "tensorrt-rtx") as engine:
            tried = cases(network, model.dims, bounds)
            (parity,) = verify(engine, module, network, model.dims, "fp32", 5, tried)
        outcome = f"runs, {parity.relative:.1e} from torch"
    except EngineError as error:
        outcome = f"is refused: {error}"
        assert "\n" not in outcome
        # What it is said to support must run.
        assert leaves_out(at_hand) is not None, outcome
        assert outcome.endswith("; choose another engine")
    trt = import_module("tensorrt_rtx")
    validity, diagnostics = trt.Runtime(trt.Logger(trt.Logger.ERROR)).get_engine_validity(path.read_bytes())
    line = (
        f"{torch.cuda.get_device_name()} ({at_hand}), tensorrt-rtx {metadata.version('tensorrt-rtx')}: the portable "
        f"engine {outcome}; get_engine_validity: {validity}, {diagnostics}"
    )
    record_property("portable engine", line)
    with capsys.disabled():
        print(f"\n{line}")


@pytest.mark.parametrize("name", NETWORKS)
def test_torchs_numbers_at_every_corner(backend: str, model: Any, tmp_path: Path, name: Any) -> None:
    engine, module = built(backend, model, name, tmp_path)
    with engine:
        tried = cases(engine.network, model.dims, engine.bounds)
        assert verify(engine, module, engine.network, model.dims, "fp32", 5, tried)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("name", ["unet_vjp_text", "unet_vjp_sample"])
def test_gradients_are_those_of_autograd(backend: str, model: Any, tmp_path: Path, name: Any, precision: Any) -> None:
    engine, module = built(backend, model, name, tmp_path, precision=precision)
    with engine:
        tried = cases(engine.network, model.dims, engine.bounds)
        found = verify(engine, module, engine.network, model.dims, precision, 5, tried)
    assert [parity.output for parity in found] == [spec.name for spec in engine.network.outputs]


def test_every_shape_is_captured(backend: str, model: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    engine, module = built(backend, model, "unet", tmp_path)
    with engine, caplog.at_level("WARNING", "smooth_rt"):
        # A replay reads what is in the buffers now, and shapes that come between leave it alone.
        for seed, rows in enumerate((1, 4, 1, 2, 4, 1)):
            case = Case({"batch": rows, "height": 16, "width": 16}, 1.0)
            inputs = random_inputs(engine.network, model.dims, case, torch.Generator().manual_seed(seed))
            got = engine.infer(**inputs)["noise_pred"]
            with torch.no_grad():
                wanted = module(*inputs.values())[0]
            assert (got - wanted).norm() / wanted.norm() < 1e-4
        assert engine._graphs
    assert not caplog.messages


def test_kernels_are_kept(model: Any, tmp_path: Path) -> None:
    fault = buildable("tensorrt-rtx")
    if fault is not None:
        pytest.skip(fault)
    cache = tmp_path / "compiled"
    engine, _ = built("tensorrt-rtx", model, "vae_decoder", tmp_path, cache=cache)
    case = Case({"batch": 1, "height": 16, "width": 16}, 1.0)
    inputs = random_inputs(engine.network, model.dims, case, torch.Generator().manual_seed(1))
    first = engine.infer(**inputs)["sample"]
    engine.close()
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    for content in (whole, b"damaged"):
        file.write_bytes(content)
        with TrtEngine(engine.network, tmp_path / "model.engine", engine.bounds, "tensorrt-rtx", cache) as again:
            torch.testing.assert_close(again.infer(**inputs)["sample"], first)
        assert len(file.read_bytes()) >= len(whole) // 2


def test_outputs_are_the_callers_own_and_shapes_take_turns(backend: str, model: Any, tmp_path: Path) -> None:
    engine, _ = built(backend, model, "vae_decoder", tmp_path)
    with engine:
        generator = torch.Generator().manual_seed(0)
        inputs = [
            random_inputs(engine.network, model.dims, Case({"batch": b, "height": 8, "width": w}, 5.5), generator)
            for w in (8, 12, 16)
            for b in (1, 2, 3, 4)
        ]
        assert len(inputs) > SHAPES
        first = [engine.infer(**one)["sample"].clone() for one in inputs]
        kept = engine.infer(**inputs[0])["sample"]
        second = [engine.infer(**one)["sample"] for one in inputs]
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        assert torch.equal(kept, first[0])


def test_an_engine_that_was_cut_or_is_none(backend: str, model: Any, tmp_path: Path) -> None:
    engine, _ = built(backend, model, "text_encoder", tmp_path)
    network, path = engine.network, tmp_path / "model.engine"
    engine.close()
    whole = path.read_bytes()
    for content in (b"", b"garbage" * 100, whole[: len(whole) // 2], whole[:-1]):
        path.write_bytes(content)
        with pytest.raises(EngineError, match=r"model\.engine: .* cannot open it on") as caught:
            TrtEngine(network, path, [bounded(network)], backend)
        assert "\n" not in str(caught.value)


def test_weights_a_then_b_then_a_again(backend: str, model: Any, tmp_path: Path) -> None:
    network = contract("unet", model.dims)
    to_onnx(torchs(model, "unet"), network, model.dims, tmp_path / "model.onnx")
    graph = onnx.load(tmp_path / "model.onnx", load_external_data=False).graph
    names = [tensor.name for tensor in graph.initializer if tensor.name.endswith("attn1.to_q.weight.T")]
    engine, _ = built(backend, model, "unet", tmp_path, refittable=names)
    engine.places = {name.removesuffix(".T"): Place(name=name, transposed=True) for name in names}
    own = {name: model.unet.get_parameter(name.removeprefix("unet.")).detach() for name in engine.places}
    other = {name: weight * 1.5 for name, weight in own.items()}
    case = Case({"batch": 2, "height": 16, "width": 16}, 1.0)
    inputs = random_inputs(network, model.dims, case, torch.Generator().manual_seed(1))
    with engine:
        found = []
        for weights in (own, other, own):
            engine.refit(weights)
            found.append(engine.infer(**inputs)["noise_pred"])
        assert torch.equal(found[0], found[2])
        assert (found[0] - found[1]).norm() / found[0].norm() > 1e-3


def test_strengths_a_then_b_then_a_again(backend: str, model: Any, tmp_path: Path) -> None:
    engine, module = built(backend, model, "unet", tmp_path, lora_weights(model.unet, read_lora()))
    case = Case({"batch": 2, "height": 16, "width": 16}, 1.0)
    inputs = random_inputs(engine.network, model.dims, case, torch.Generator().manual_seed(1))
    with engine:
        tried = cases(engine.network, model.dims, engine.bounds)
        assert verify(engine, module, engine.network, model.dims, "fp32", 5, tried)
        found = []
        for strength in (0.6, -1.0, 0.6):  # one captured graph serves them all
            found.append(engine.infer(**{**inputs, LORA_STRENGTH: torch.tensor([strength])})["noise_pred"])
        assert torch.equal(found[0], found[2])
        assert (found[0] - found[1]).norm() / found[0].norm() > 1e-4


def test_a_bundle_takes_strengths_a_then_b_then_a_again(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SMOOTH_RT_CACHE", str(tmp_path))
    bundle = ensure_engines("default", "default", backends=[backend], precision="fp16", lora_mode="refit").bundle
    found = []
    with SmoothPipeline.from_engines(bundle, backend, precision="fp16", lora_mode="refit") as pipe:
        for strength in (0.6, 0.0, 0.6):
            pipe.set_lora_strength(strength)
            generator = torch.Generator().manual_seed(0)
            out = pipe("dog face on red background", generator=generator, num_inference_steps=4, output_type="pt")
            found.append(out.images)
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[1])
