"""The paper's loss on a denoiser whose Jacobian is known in closed form: a linear one."""

from __future__ import annotations

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor

from smooth_rt.errors import InputError
from smooth_rt.training.svr import VARIATIONS, Target, clean_estimate, snr_bins, variation

SHAPE = (4, 2, 3, 3)
N = 18


@pytest.fixture
def case() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return {
        "weights": normal(N, N) / N**0.5,
        "latents": normal(*SHAPE),
        "noise": normal(*SHAPE),
        "direction": normal(*SHAPE) / N**0.5,
        "alpha_bar": torch.tensor([0.99, 0.7, 0.2, 0.01], dtype=torch.float64).view(-1, 1, 1, 1),
    }


def linear(weights: Tensor, x: Tensor) -> Tensor:
    return (x.flatten(1) @ weights.T).view_as(x)


def jacobian(weights: Tensor, alpha_bar: Tensor, prediction_type: str) -> Tensor:
    """d x0-estimate / d epsilon, [B, N, N], by hand."""
    identity = torch.eye(N, dtype=torch.float64)
    a = alpha_bar.view(-1, 1, 1)
    sigma = (1 - a).sqrt()
    by_noisy = {
        "epsilon": (identity - sigma * weights) / a.sqrt(),
        "v_prediction": a.sqrt() * identity - sigma * weights,
        "sample": weights.expand(len(alpha_bar), N, N),
    }[prediction_type]
    return sigma * by_noisy


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_norm_is_the_closed_form(case: dict[str, Tensor], prediction_type: str) -> None:
    norms, _ = variation(
        lambda x: linear(case["weights"], x),
        case["latents"], case["noise"], case["direction"], case["alpha_bar"], prediction_type,
    )  # fmt: skip
    sigma = (1 - case["alpha_bar"]).sqrt().view(-1, 1)
    j = jacobian(case["weights"], case["alpha_bar"], prediction_type)
    wanted = (sigma * torch.einsum("bij,bi->bj", j, case["direction"].flatten(1))).norm(dim=1)
    torch.testing.assert_close(norms, wanted, rtol=1e-12, atol=0)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("kind", ["scalar", "per-timestep"])
def test_gradient_of_the_penalty_agrees_with_finite_differences(
    case: dict[str, Tensor], prediction_type: str, kind: str
) -> None:
    timesteps = torch.tensor([5, 300, 700, 980])
    alphas = torch.linspace(0.999, 0.005, 1000, dtype=torch.float64)

    def penalty(weights: Tensor) -> Tensor:
        target = Target(kind, snr_bins(alphas))
        target.means += 0.8
        target.counts += 1
        norms, _ = variation(
            lambda x: linear(weights, x),
            case["latents"], case["noise"], case["direction"], case["alpha_bar"], prediction_type,
        )  # fmt: skip
        return target.penalties(norms, timesteps).mean()

    weights = case["weights"].clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(penalty(weights), weights)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        along = torch.randn(N, N, generator=generator, dtype=torch.float64)
        step = 1e-6
        difference = (penalty(case["weights"] + step * along) - penalty(case["weights"] - step * along)) / (2 * step)
        torch.testing.assert_close((gradient * along).sum(), difference.detach(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_clean_estimate_inverts_the_noising(case: dict[str, Tensor], prediction_type: str) -> None:
    a, x0, noise = case["alpha_bar"], case["latents"], case["noise"]
    noisy = a.sqrt() * x0 + (1 - a).sqrt() * noise
    output = {"epsilon": noise, "v_prediction": a.sqrt() * noise - (1 - a).sqrt() * x0, "sample": x0}[prediction_type]
    torch.testing.assert_close(clean_estimate(noisy, output, a, prediction_type), x0, rtol=1e-12, atol=1e-12)


def test_scalar_target_moves_by_one_percent_from_zero() -> None:
    target = Target("scalar", snr_bins(torch.linspace(0.99, 0.01, 1000)))
    timesteps = torch.tensor([1, 999])
    target.update(torch.tensor([2.0, 4.0]), timesteps)
    assert target.means.tolist() == pytest.approx([0.03])
    target.update(torch.tensor([1.0, 1.0]), timesteps)
    assert target.means.tolist() == pytest.approx([0.03 + 0.01 * (1 - 0.03)])
    assert target.penalties(torch.tensor([1.0]), torch.tensor([5])).item() == pytest.approx((1 - target.means[0]) ** 2)


def test_per_timestep_target_keeps_a_mean_a_bin_and_is_relative() -> None:
    target = Target("per-timestep", snr_bins(torch.linspace(0.999, 0.005, 1000)))
    early, late = torch.tensor([0, 0]), torch.tensor([999, 999])
    target.update(torch.tensor([1.0, 3.0]), early)
    target.update(torch.tensor([100.0, 300.0]), late)
    assert target.means[0].item() == pytest.approx(2.0)
    assert target.means[-1].item() == pytest.approx(200.0)
    small = target.penalties(torch.tensor([1.0]), early[:1])
    large = target.penalties(torch.tensor([100.0]), late[:1])
    assert small.item() == pytest.approx(large.item()) == pytest.approx(0.25)


def test_a_bin_that_was_never_met_takes_its_neighbours_mean() -> None:
    target = Target("anchored", snr_bins(torch.linspace(0.999, 0.005, 1000)))
    target.update(torch.tensor([2.0, 50.0]), torch.tensor([0, 999]))
    target.fill()
    assert target.means[1].item() == 2.0
    assert target.means[-2].item() == 50.0
    assert torch.isfinite(target.penalties(torch.ones(1000), torch.arange(1000))).all()


def test_a_share_of_the_anchor_moves_the_least_penalty() -> None:
    target = Target("anchored", snr_bins(torch.linspace(0.999, 0.005, 1000)), share=0.5)
    timesteps = torch.zeros(1, dtype=torch.long)
    target.update(torch.tensor([4.0]), timesteps)
    assert target.penalties(torch.tensor([2.0]), timesteps).item() == 0.0
    assert target.penalties(torch.tensor([4.0]), timesteps).item() == 1.0
    with pytest.raises(InputError, match=r"svr_share=0\.5: .*the target anchored"):
        Target("scalar", snr_bins(torch.linspace(0.9, 0.1, 10)), share=0.5)
    for share in (float("nan"), float("inf"), 0.0):
        with pytest.raises(InputError, match="svr_share="):
            Target("anchored", snr_bins(torch.linspace(0.9, 0.1, 10)), share=share)


def test_an_unknown_target_names_the_choices() -> None:
    with pytest.raises(InputError, match=r"svr_target='none'.*scalar, per-timestep"):
        Target("none", snr_bins(torch.linspace(0.9, 0.1, 10)))


def network(seed: int = 0) -> torch.nn.Module:
    """Two layers that bend, in float64."""
    torch.manual_seed(seed)
    return torch.nn.Sequential(
        torch.nn.Conv2d(2, 8, 3, padding=1), torch.nn.SiLU(), torch.nn.Conv2d(8, 2, 3, padding=1)
    ).double()


def penalty_gradient(case: dict[str, Tensor], kind: str, module: torch.nn.Module) -> tuple[Tensor, Tensor]:
    target = Target("scalar", snr_bins(torch.linspace(0.999, 0.005, 1000)))
    target.means += 0.8
    norms, output = VARIATIONS[kind](
        module, case["latents"], case["noise"], case["direction"], case["alpha_bar"], "epsilon"
    )
    loss = target.penalties(norms, torch.tensor([5, 300, 700, 980])).mean() + output.square().mean()
    found = torch.autograd.grad(loss, list(module.parameters()))
    return norms.detach(), torch.cat([gradient.flatten() for gradient in found])


def test_the_difference_has_the_same_norms_and_nearly_the_same_gradient(
    case: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    norms, exact = penalty_gradient(case, "exact", network())
    for reach, tolerance in ((0.3, 5e-3), (0.01, 1e-5)):  # the error falls with the square of the reach
        monkeypatch.setattr("smooth_rt.training.svr.REACH", reach)
        same, near = penalty_gradient(case, "difference", network())
        torch.testing.assert_close(same, norms, rtol=1e-12, atol=0)
        assert (near - exact).norm() < tolerance * exact.norm()


@pytest.mark.parametrize("kind", ["exact", "difference"])
def test_the_gradient_through_checkpointed_activations_is_the_same(case: dict[str, Tensor], kind: str) -> None:
    module = network()

    class Checkpointed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = module

        def forward(self, x: Tensor) -> Tensor:
            return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=False)  # type: ignore[no-any-return]

    plain = penalty_gradient(case, kind, module)
    kept = penalty_gradient(case, kind, Checkpointed())
    for one, other in zip(plain, kept, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)
