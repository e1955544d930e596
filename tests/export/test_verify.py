"""Verification catches what is wrong and says where; a right graph's errors are reported as they are."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import export.verify
from engines.base import Engine
from engines.contract import NETWORKS, Dims, NetworkName, contract
from engines.errors import InputError, ModelError, ParityError
from export.graphs import Case
from export.verify import TOLERANCES, verify

Networks = dict[NetworkName, nn.Module]


class Altered(Engine):
    """The torch module with its outputs altered."""

    backend = "altered"

    def __init__(self, name: NetworkName, networks: Networks, dims: Dims, alter: Callable[[Any], None]) -> None:
        super().__init__(contract(name, dims))
        self.module = networks[name]
        self.alter = alter

    def infer_impl(self, inputs: dict[str, Tensor], profile: int | None) -> dict[str, Tensor]:
        with torch.no_grad():
            outputs = self.module(*inputs.values())
        named = {spec.name: value.clone() for spec, value in zip(self.network.outputs, outputs, strict=True)}
        self.alter(named)
        return named


def check(name: NetworkName, networks: Networks, dims: Dims, alter: Callable[[Any], None]) -> Any:
    engine = Altered(name, networks, dims, alter)
    return verify(engine, networks[name], engine.network, dims, "fp32", seed=3)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_graph_with_other_weights_is_caught(
    built: Any, networks: Networks, dims: Dims, name: NetworkName, backend: str
) -> None:
    torch.manual_seed(0)
    module = copy.deepcopy(networks[name])
    used = [p for key, p in module.named_parameters() if p.ndim > 1 and _takes_part(name, key)]
    with torch.no_grad():
        used[len(used) // 2].mul_(1.01)
    with built.bundle.engine(name, backend) as engine:
        verify(engine, networks[name], engine.network, dims, "fp32", seed=3)
        with pytest.raises(ParityError, match=f"{name}: {backend}'s .* tolerance 1e-04") as caught:
            verify(engine, module, engine.network, dims, "fp32", seed=3)
    assert "\n" not in str(caught.value)


def _takes_part(name: NetworkName, key: str) -> bool:
    """Whether a parameter is one of the network's own half of the VAE, or of a network that is no half."""
    half = {"vae_encoder": ("encoder.", "quant_conv."), "vae_decoder": ("decoder.", "post_quant_conv.")}
    return name not in half or key.removeprefix("vae.").startswith(half[name])


def test_torch_takes_a_large_batch_in_parts(networks: Networks, dims: Dims, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    monkeypatch.setattr(export.verify, "CELLS_PER_CALL", 2 * 8 * 8)
    counted = networks["unet"].register_forward_pre_hook(lambda _, inputs: taken.append(len(inputs[0])))
    engine = Altered("unet", {"unet": copy.deepcopy(networks["unet"])}, dims, lambda _: None)
    engine.module._forward_pre_hooks.clear()
    case = Case({"batch": 5, "height": 8, "width": 8}, 1.0)
    with counted:
        [parity] = verify(engine, networks["unet"], engine.network, dims, "fp32", 3, [case])
    assert taken == [2, 2, 1]
    assert 0 <= parity.relative < 1e-5


def test_a_right_engine_reports_no_error(networks: Networks, dims: Dims) -> None:
    found = check("vae_encoder", networks, dims, lambda _: None)
    assert [parity.output for parity in found] == ["latent_mean", "latent_logvar"]
    assert all(p.relative == 0 and p.max_abs == 0 and p.cases == 3 for p in found)
    assert all(p.tolerance == TOLERANCES["fp32"] for p in found)


def test_the_error_is_the_relative_l2_of_the_worst_image(networks: Networks, dims: Dims) -> None:
    def scale_last_of_three(outputs: dict[str, Tensor]) -> None:
        if len(outputs["sample"]) == 3:
            outputs["sample"][2] *= 1 + 5e-5

    [parity] = check("vae_decoder", networks, dims, scale_last_of_three)
    assert parity.relative == pytest.approx(5e-5, rel=0.02)
    assert parity.worst == {"batch": 3, "height": 8, "width": 4}
    assert parity.max_abs > 0


def test_one_wrong_image_in_a_batch_is_enough(networks: Networks, dims: Dims) -> None:
    def swap(outputs: dict[str, Tensor]) -> None:
        if len(outputs["sample"]) == 3:
            outputs["sample"][2] *= 1 + 2e-4

    with pytest.raises(ParityError, match=r"vae_decoder: altered's sample differs .* \(batch 3, height 8, width 4\)"):
        check("vae_decoder", networks, dims, swap)


def test_the_second_output_counts_too(networks: Networks, dims: Dims) -> None:
    with pytest.raises(ParityError, match=r"latent_logvar differs from torch's by 1\.0e-03"):
        check("vae_encoder", networks, dims, lambda outputs: outputs["latent_logvar"].mul_(1.001))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_fails(networks: Networks, dims: Dims, value: float) -> None:
    def spoil(outputs: dict[str, Tensor]) -> None:
        outputs["latent_mean"][0, 0, 0, 0] = value

    with pytest.raises(ParityError, match="altered's latent_mean is not finite"):
        check("vae_encoder", networks, dims, spoil)


def test_a_damaged_model_is_not_the_engines_fault(networks: Networks, dims: Dims) -> None:
    module = copy.deepcopy(networks["vae_decoder"])
    with torch.no_grad():
        next(p for key, p in module.named_parameters() if "decoder.conv_in.bias" in key).fill_(float("nan"))
    with pytest.raises(ModelError, match="vae_decoder: the torch module's sample is not finite"):
        check("vae_decoder", {**networks, "vae_decoder": module}, dims, lambda _: None)


@pytest.mark.parametrize("precision", TOLERANCES)
def test_a_right_graph_passes_in_each_precision(networks: Networks, dims: Dims, precision: str) -> None:
    engine = Altered("unet", networks, dims, lambda _: None)
    (parity,) = verify(engine, networks["unet"], engine.network, dims, precision, seed=0)
    assert (parity.relative, parity.tolerance) == (0, TOLERANCES[precision])


def test_an_unknown_precision(networks: Networks, dims: Dims) -> None:
    engine = Altered("unet", networks, dims, lambda _: None)
    with pytest.raises(InputError, match="'fp8': unknown; choose from fp32"):
        verify(engine, networks["unet"], engine.network, dims, "fp8", seed=0)


class Cancelling(nn.Module):
    """Gradients that float32 has wrong by more than the tolerance, since they are what is left of large numbers."""

    def forward(
        self, sample: Tensor, timestep: Tensor, text: Tensor, cotangent: Tensor, scale: Tensor
    ) -> tuple[Tensor, Tensor]:
        return sample, (text + 1e5) - 1e5


@pytest.mark.parametrize(("factor", "fine"), [(1.0, True), (1.0005, True), (1.2, False)])
def test_a_gradient_is_held_to_what_torch_itself_keeps(dims: Dims, factor: float, fine: bool) -> None:
    class Exact(Engine):
        backend = "exact"

        def infer_impl(self, inputs: dict[str, Tensor], profile: int | None) -> dict[str, Tensor]:
            grad = factor * inputs["encoder_hidden_states"]
            return {"noise_pred": inputs["sample"].clone(), "grad_encoder_hidden_states": grad}

    network = contract("unet_vjp_text", dims)
    module = Cancelling()
    module.anchor = nn.Parameter(torch.zeros(1))  # for the device that it is on
    if fine:
        _, parity = verify(Exact(network), module, network, dims, "fp32", seed=3)
        assert 1e-4 < parity.relative < parity.tolerance < 0.1
    else:
        with pytest.raises(ParityError, match=r"exact's grad_encoder_hidden_states differs .*leave --gradients out"):
            verify(Exact(network), module, network, dims, "fp32", seed=3)


class Lucky(nn.Module):
    """Gradients that come out exactly in float32, by chance: numbers large and short. A rounding of them would show."""

    def __init__(self) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(1))
        self.layer = nn.Identity()

    def forward(
        self, sample: Tensor, timestep: Tensor, text: Tensor, cotangent: Tensor, scale: Tensor
    ) -> tuple[Tensor, Tensor]:
        return sample, self.layer((256 * text).round() / 256 + 4096) - 4096


@pytest.mark.parametrize(("roundings", "fine"), [(0.0, True), (1.0, True), (100.0, False)])
def test_a_gradient_is_held_to_what_a_rounding_moves_where_torchs_own_is_lucky(
    dims: Dims, roundings: float, fine: bool
) -> None:
    module = Lucky()

    class Other(Engine):
        """Rounds 4096 and some up."""

        backend = "other"

        def infer_impl(self, inputs: dict[str, Tensor], profile: int | None) -> dict[str, Tensor]:
            sample, grad = module(*inputs.values())
            return {"noise_pred": sample, "grad_encoder_hidden_states": grad + roundings * 4096 * 2.0**-24}

    network = contract("unet_vjp_text", dims)
    if fine:
        _, parity = verify(Other(network), module, network, dims, "fp32", seed=3)
        assert parity.relative <= parity.tolerance < 1e-2
        assert (parity.relative > 1e-4) == (roundings > 0)
    else:
        with pytest.raises(ParityError, match="other's grad_encoder_hidden_states differs from torch's"):
            verify(Other(network), module, network, dims, "fp32", seed=3)


class Rounded(nn.Module):
    """Gradients that half precision has wrong by more than its tolerance, more so at later timesteps: what is left of
    numbers of which a layer makes larger ones."""

    def __init__(self, largest: float, least: float = 40.0) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(1), requires_grad=False)
        self.layer = nn.Identity()
        self.least, self.largest = least, largest

    def forward(
        self, sample: Tensor, timestep: Tensor, text: Tensor, cotangent: Tensor, scale: Tensor
    ) -> tuple[Tensor, Tensor]:
        added = torch.where(timestep < 500, self.least, self.largest)[:, None, None].to(text.dtype)
        return sample, self.layer(text + added) - added


class InHalf(Engine):
    """That module in fp16, and its gradients altered."""

    backend = "half"

    def __init__(self, dims: Dims, module: nn.Module, alter: Callable[[Tensor], Tensor]) -> None:
        super().__init__(contract("unet_vjp_text", dims))
        self.module = copy.deepcopy(module).half()
        self.alter = alter

    def infer_impl(self, inputs: dict[str, Tensor], profile: int | None) -> dict[str, Tensor]:
        _, grad = self.module(*(one.half() if one.is_floating_point() else one for one in inputs.values()))
        return {"noise_pred": inputs["sample"].clone(), "grad_encoder_hidden_states": self.alter(grad.float())}


def test_a_gradient_is_held_to_what_half_precision_keeps(dims: Dims) -> None:
    module = Rounded(largest=80.0)
    engine = InHalf(dims, module, lambda grad: grad)
    _, parity = verify(engine, module, engine.network, dims, "fp16", seed=3)
    assert 1e-3 < parity.relative <= parity.tolerance < 0.5
    assert (parity.cases, parity.unjudged) == (3, 0)
    for wrong in (lambda grad: 1.6 * grad, lambda grad: 0 * grad, lambda grad: -grad, lambda grad: grad.flip(1)):
        engine = InHalf(dims, module, wrong)
        with pytest.raises(ParityError, match="half's grad_encoder_hidden_states differs from torch's"):
            verify(engine, module, engine.network, dims, "fp16", seed=3)


def test_what_half_precision_does_not_keep_judges_no_engine(dims: Dims) -> None:
    module = Rounded(largest=4000.0)
    engine = InHalf(dims, module, lambda grad: grad)
    _, parity = verify(engine, module, engine.network, dims, "fp16", seed=3)
    assert parity.unjudged > 0
    assert parity.tolerance < 0.5
    # The other items do judge one.
    engine = InHalf(dims, module, lambda grad: 1.6 * grad)
    with pytest.raises(ParityError, match="differs from torch's"):
        verify(engine, module, engine.network, dims, "fp16", seed=3)
    module = Rounded(largest=4000.0, least=4000.0)
    with pytest.raises(ParityError, match="leaves next to nothing of the model's own grad_encoder_hidden_states"):
        verify(engine, module, engine.network, dims, "fp16", seed=3)


@pytest.mark.parametrize(("factor", "asked"), [(1.01, []), (1.04, [6]), (1.1, [6, 30]), (1.4, [6, 30])])
def test_what_few_draws_refuse_is_held_against_more(
    dims: Dims, monkeypatch: pytest.MonkeyPatch, factor: float, asked: list[int]
) -> None:
    drawn: list[int] = []

    def allowance(self: object, inputs: Any, wanted: dict[str, Tensor], each: int, draws: int) -> dict[str, Tensor]:
        drawn.append(draws)
        return {name: torch.full([len(one)], 0.01 * draws) for name, one in wanted.items()}

    monkeypatch.setattr(export.verify.Conditioning, "allowance", allowance)
    module, case = Rounded(largest=0.0, least=0.0), Case({"batch": 2, "height": 8, "width": 8}, 1.0)
    engine = InHalf(dims, module, lambda grad: factor * grad)
    if factor - 1 <= 0.3:
        _, parity = verify(engine, module, engine.network, dims, "fp16", 3, [case])
        assert parity.relative == pytest.approx(factor - 1, rel=0.1)
    else:
        with pytest.raises(ParityError, match=r"differs from torch.s by 4.* tolerance 3e-01"):
            verify(engine, module, engine.network, dims, "fp16", 3, [case])
    assert drawn == asked
