"""What the engines of a real model compute: torch's numbers, at every size, for each image alone and for many."""

from __future__ import annotations

from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

from engines.base import Engine
from engines.contract import NETWORKS, Axis, Dims, NetworkName, contract
from engines.variant import Bounds
from export.graphs import Case, cases, example_inputs, random_inputs

BACKENDS = ("onnxruntime", "openvino")
# N at once against N alone: the same graph, other blocking in the matrix products.
BATCH_TOLERANCE = 1e-5


@pytest.fixture(scope="module", params=[(name, backend) for name in NETWORKS for backend in BACKENDS], ids="-".join)
def engine(request: pytest.FixtureRequest, built: Any) -> Any:
    name, backend = request.param
    with built.bundle.engine(name, backend) as opened:
        yield opened


def relative(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


# Latent sides; the UNet takes multiples of 4 and the VAE any. 8 is the model's own size.
@pytest.mark.parametrize(("batch", "height", "width"), [(1, 8, 8), (2, 12, 20), (65, 8, 4)])
def test_torchs_numbers_at_every_size(
    engine: Engine,
    networks: dict[NetworkName, nn.Module],
    dims: Dims,
    generator: torch.Generator,
    batch: int,
    height: int,
    width: int,
) -> None:
    case = Case({"batch": batch, "height": height, "width": width}, 2.0)
    inputs = random_inputs(engine.network, dims, case, generator)
    with torch.no_grad():
        wanted = networks[engine.network.name](*inputs.values())
    got = engine.infer(**inputs)
    assert list(got) == [spec.name for spec in engine.network.outputs]
    for output, reference in zip(got.values(), wanted, strict=True):
        assert relative(output, reference) < 1e-4


def test_the_vae_takes_odd_sides(
    built: Any, networks: dict[NetworkName, nn.Module], dims: Dims, generator: torch.Generator
) -> None:
    case = Case({"batch": 2, "height": 5, "width": 7}, 2.0)
    for name in ("vae_encoder", "vae_decoder"):
        for backend in BACKENDS:
            with built.bundle.engine(name, backend) as engine:
                inputs = random_inputs(engine.network, dims, case, generator)
                with torch.no_grad():
                    wanted = networks[engine.network.name](*inputs.values())[0]
                got = engine.infer(**inputs)[engine.network.outputs[0].name]
                assert relative(got, wanted) < 1e-4


def test_many_at_once_equal_each_alone(engine: Engine, dims: Dims, generator: torch.Generator) -> None:
    case = Case({"batch": 5, "height": 8, "width": 12}, 2.0)
    inputs = random_inputs(engine.network, dims, case, generator)
    together = engine.infer(**inputs)
    for index in range(5):
        alone = engine.infer(**{name: tensor[index : index + 1] for name, tensor in inputs.items()})
        for name, output in alone.items():
            assert relative(together[name][index : index + 1], output) < BATCH_TOLERANCE


def test_one_timestep_for_all(built: Any, dims: Dims, generator: torch.Generator) -> None:
    inputs = random_inputs(contract("unet", dims), dims, Case({"batch": 3, "height": 8, "width": 8}, 1.0), generator)
    for backend in BACKENDS:
        with built.bundle.engine("unet", backend) as engine:
            inputs["timestep"] = torch.tensor([400])
            once = engine.infer(**inputs)["noise_pred"]
            inputs["timestep"] = torch.tensor([400, 400, 400])
            assert torch.equal(once, engine.infer(**inputs)["noise_pred"])
            inputs["timestep"] = torch.tensor([400, 400, 30])
            assert relative(engine.infer(**inputs)["noise_pred"][2], once[2]) > 1e-3


@pytest.mark.parametrize("name", NETWORKS)
def test_the_onnx_graph_bears_the_contracts_names_and_free_axes(built: Any, dims: Dims, name: NetworkName) -> None:
    network = contract(name, dims)
    model = onnx.load(built.bundle.path / "onnxruntime-fp32" / name / "model.onnx", load_external_data=False)
    assert model.opset_import[0].version == 20
    for values, specs in ((model.graph.input, network.inputs), (model.graph.output, network.outputs)):
        assert [value.name for value in values] == [spec.name for spec in specs]
        for value, spec in zip(values, specs, strict=True):
            for size, axis in zip(value.type.tensor_type.shape.dim, spec.axes, strict=True):
                assert size.HasField("dim_param") == isinstance(axis, Axis)
                assert isinstance(axis, Axis) or size.dim_value == axis
    external = [tensor for tensor in model.graph.initializer if tensor.external_data]
    assert {entry.value for t in external for entry in t.external_data if entry.key == "location"} == {
        "model.onnx.data"
    }


@pytest.mark.parametrize("name", NETWORKS)
def test_the_graph_does_not_say_where_it_was_made(built: Any, name: NetworkName) -> None:
    content = (built.bundle.path / "onnxruntime-fp32" / name / "model.onnx").read_bytes()
    assert b"stack_trace" not in content
    assert b".py" not in content


@pytest.mark.parametrize("name", NETWORKS)
def test_inputs_of_verification_obey_the_contract_and_are_fresh(dims: Dims, name: NetworkName) -> None:
    network = contract(name, dims)
    example = dict(zip([s.name for s in network.inputs], example_inputs(network, dims), strict=True))
    shared = {spec.name for spec in network.inputs if spec.shared}
    assert all(len(tensor) == (1 if name in shared else 2) for name, tensor in example.items())
    traced = network.bind({name: tensor.expand(2, *tensor.shape[1:]) for name, tensor in example.items()})
    tried = cases(network, dims)
    assert [case.sizes["batch"] for case in tried] == ([1, 2, 3, 2] if name == "unet" else [1, 2, 3])
    for case in tried:
        inputs = random_inputs(network, dims, case, torch.Generator().manual_seed(1))
        bound = network.bind(inputs)
        assert bound == {symbol: case.sizes[symbol] for symbol in network.symbols}
        assert traced["batch"] == 2
    if "height" in network.symbols:
        assert any(case.sizes["height"] != case.sizes["width"] for case in tried)
        assert any(case.sizes["height"] > dims.sample_size < case.sizes["width"] for case in tried)


def test_timesteps_of_verification_span_the_schedule(dims: Dims) -> None:
    network = contract("unet", dims)
    sizes = {"batch": 50, "height": 8, "width": 8}
    steps = random_inputs(network, dims, Case(sizes, 1.0), torch.Generator().manual_seed(1))["timestep"]
    assert int(steps.min()) < 20
    assert int(steps.max()) >= 980
    assert int(steps.max()) < 1000


@pytest.mark.parametrize("batch", [(1, 1, 2), (1, 1, 4), (2, 2, 8), (1, None, None)])
def test_the_first_timestep_and_the_last_are_among_those_of_a_unets_verification(
    dims: Dims, batch: tuple[int, int, int]
) -> None:
    network, generator = contract("unet", dims), torch.Generator().manual_seed(1)
    bounds = [] if None in batch else [{"batch": batch, "height": (8, 8, 8), "width": (8, 8, 8)}]
    steps = torch.cat(
        [random_inputs(network, dims, case, generator)["timestep"] for case in cases(network, dims, bounds)]
    )
    assert {0, 999} < set(steps.tolist())


def test_the_axes_bear_the_contracts_names(built: Any, dims: Dims) -> None:
    # ONNX Runtime fixes a size by the name of its axis.
    for name in NETWORKS:
        model = onnx.load(built.bundle.path / "onnxruntime-fp32" / name / "model.onnx", load_external_data=False)
        for value, spec in zip(model.graph.input, contract(name, dims).inputs, strict=True):
            named = [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]
            assert named == list(spec.axis_names)


def test_bounded_engines_are_verified_at_their_corners(dims: Dims) -> None:
    network = contract("unet", dims)

    def tried_at(bounds: Bounds) -> list[tuple[int, ...]]:
        return [tuple(case.sizes.values()) for case in cases(network, dims, [bounds]) if not case.guided]

    tried = tried_at({"batch": (1, 2, 4), "height": (8, 8, 16), "width": (8, 12, 12)})
    corners = {(b, h, w) for b in (1, 4) for h in (8, 16) for w in (8, 12)}
    assert set(tried) == {*corners, (2, 8, 12), (2, 12, 12)}
    assert len(tried) == 10
    tried = tried_at({"batch": (1, 1, 4), "height": (8, 8, 24), "width": (8, 8, 8)})
    assert tried == [(1, 8, 8), (1, 24, 8), (4, 8, 8), (4, 24, 8), (2, 16, 8)]  # none but the last is inside
    narrow = tried_at({"batch": (1, 2, 2), "height": (8, 8, 12), "width": (8, 8, 8)})
    assert len(narrow) == 4  # no multiple of 4 lies between
    assert tried_at({"batch": (2, 2, 2), "height": (8, 8, 8), "width": (8, 8, 8)}) == [(2, 8, 8)]
