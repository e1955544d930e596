"""Half precision: how near it is, which islands of fp32 are left in it, and that weights keep their names."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import nn
from torch.nn import functional

from engines.contract import LORA_STRENGTH, NETWORKS, Dims, Network, NetworkName, contract
from engines.eager import EagerEngine
from engines.errors import EngineError, InputError
from engines.ort import OrtEngine
from export import half
from export.decompositions.attention import attention
from export.graphs import STRENGTHS, cases, random_inputs
from export.half import in_half
from export.to_onnx import to_onnx
from export.verify import TOLERANCES, verify

Networks = dict[NetworkName, nn.Module]


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("name", NETWORKS)
def test_half_precision_is_near(networks: Networks, dims: Dims, name: NetworkName, precision: Any) -> None:
    network = contract(name, dims)
    before = {key: value.clone() for key, value in networks[name].state_dict().items()}
    module, islands = in_half(networks[name], network, dims, precision)
    for parity in verify(EagerEngine(network, module), networks[name], network, dims, precision, 3):
        assert 1e-6 < parity.relative < TOLERANCES[precision]
    weights = [p for p in module.parameters() if p.ndim > 1]
    assert sum(p.dtype is half.DTYPES[precision] for p in weights) > len(weights) / 2
    assert set(islands) <= set(half.ISLANDS) | {name for name, _ in networks[name].named_modules()}
    # What was handed over is as it was.
    assert all(torch.equal(value, before[key]) for key, value in networks[name].state_dict().items())


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_strength_that_is_an_input(runtime: tuple[nn.Module, Network], dims: Dims, precision: Any) -> None:
    module, network = runtime
    tried = cases(network, dims)
    drawn = [random_inputs(network, dims, case, torch.Generator())[LORA_STRENGTH] for case in tried]
    assert torch.equal(torch.cat(drawn).unique(), torch.tensor(sorted(STRENGTHS)))
    engine = EagerEngine(network, in_half(module, network, dims, precision)[0])
    (parity,) = verify(engine, module, network, dims, precision, 3, tried)
    assert 1e-5 < parity.relative < TOLERANCES[precision]


@pytest.mark.slow
def test_a_graph_in_fp16_whose_strength_is_an_input(
    runtime: tuple[nn.Module, Network], dims: Dims, tmp_path: Path
) -> None:
    module, network = runtime
    to_onnx(in_half(module, network, dims, "fp16")[0], network, dims, tmp_path / "model.onnx")
    with OrtEngine(network, tmp_path / "model.onnx") as engine:
        assert verify(engine, module, network, dims, "fp16", 3)


def test_an_island_is_kept_where_it_pays_and_only_there(
    networks: Networks, dims: Dims, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = contract("unet", dims)
    monkeypatch.setattr(half, "WORTH", 0.0)
    assert in_half(networks["unet"], network, dims, "bf16")[1] == ["norms", "timestep embedding"]
    monkeypatch.setattr(half, "WORTH", 1e9)
    assert in_half(networks["unet"], network, dims, "bf16")[1] == []


def test_what_outgrows_fp16_stays_in_fp32(networks: Networks, dims: Dims) -> None:
    network = contract("vae_decoder", dims)
    module = copy.deepcopy(networks["vae_decoder"])
    with torch.no_grad():  # a layer whose output is large, and the next norm makes it small again
        module.get_submodule("vae.decoder.mid_block.resnets.0.conv1").weight.mul_(1e6)
    small, islands = in_half(module, network, dims, "fp16")
    assert "vae.decoder.mid_block.resnets.0" in islands
    parity = verify(EagerEngine(network, small), module, network, dims, "fp16", 3)
    assert parity[0].relative < TOLERANCES["fp16"]


def test_scores_of_attention_that_outgrow_fp16_stay_in_fp32(
    networks: Networks, dims: Dims, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = contract("unet", dims)
    module = copy.deepcopy(networks["unet"])
    path = "unet.mid_block.attentions.0.transformer_blocks.0.attn1"
    with torch.no_grad():  # as SD2.1 has them, if not all of one sign
        for name in ("to_q", "to_k"):
            module.get_submodule(f"{path}.{name}").weight.mul_(1e3)
    small, islands = in_half(module, network, dims, "fp16")
    assert path in islands
    assert not [name for name in islands if "attn" in name and name != path]
    assert path not in in_half(module, network, dims, "bf16")[1]
    monkeypatch.setattr(half, "large_parts", lambda *_: [])
    without, _ = in_half(module, network, dims, "fp16")
    # As it is exported; torch's own kernel for processors, by which nothing is wrong, keeps the scores in fp32.
    monkeypatch.setattr(functional, "scaled_dot_product_attention", attention)
    inputs = random_inputs(network, dims, cases(network, dims)[1], torch.Generator().manual_seed(3))
    with torch.no_grad():
        wanted, got, overflown = (one(*inputs.values())[0] for one in (module, small, without))
    assert float((got - wanted).norm() / wanted.norm()) < TOLERANCES["fp16"]
    assert not overflown.isfinite().all()


def test_numbers_that_no_island_can_save(networks: Networks, dims: Dims) -> None:
    module = copy.deepcopy(networks["vae_decoder"])
    with torch.no_grad():
        module.get_submodule("vae.decoder.conv_out").weight.fill_(float("nan"))
    with pytest.raises(EngineError, match="vae_decoder: not finite in fp16, even with norms in fp32"):
        in_half(module, contract("vae_decoder", dims), dims, "fp16")
    with pytest.raises(InputError, match="precision 'fp32': a module is converted to fp16 or bf16"):
        in_half(module, contract("vae_decoder", dims), dims, "fp32")


@pytest.mark.parametrize("precision", ["fp32", pytest.param("fp16", marks=pytest.mark.slow)])
def test_layers_are_found_in_the_graph_by_name(
    exported_once: Any, networks: Networks, dims: Dims, tmp_path: Path, precision: Any
) -> None:
    network, module = contract("unet", dims), networks["unet"]
    if precision != "fp32":
        module, _ = in_half(module, network, dims, precision)
    exported_once(module, network, dims, tmp_path / "model.onnx")
    model = onnx.load(tmp_path / "model.onnx")
    named = {tensor.name: tensor for tensor in model.graph.initializer}
    for path, parameter in networks["unet"].named_parameters():
        if path.endswith(("to_q.weight", "to_out.0.weight", "conv1.weight")):
            wanted = parameter.T if parameter.ndim == 2 else parameter
            found = [tensor for name, tensor in named.items() if name.removesuffix(".T").endswith(path)]
            assert len(found) == 1
            array = torch.from_numpy(onnx.numpy_helper.to_array(found[0]).astype("float32"))
            torch.testing.assert_close(array, wanted.detach(), rtol=1e-3, atol=1e-4)
