r"""Step-wise Variation Regularization, the loss that makes a latent space smooth.

Smooth Diffusion (Guo et al., CVPR 2024, arXiv 2312.04410), Eq. 9. A noised latent is
:math:`x_t = \sqrt{\bar\alpha_t}\, x_0 + \sigma_t\, \varepsilon` with :math:`\sigma_t = \sqrt{1 - \bar\alpha_t}`; the
network's estimate of the clean latent is :math:`\hat x_0`, and
:math:`J_\varepsilon = \partial\hat x_0/\partial\varepsilon`. With a random direction
:math:`y \sim N(0, I)/\sqrt{CHW}` of unit expected length, one sample's variation is

.. math::
    n = \lVert \sigma_t J_\varepsilon^\top y \rVert_2
      = \lVert \nabla_\varepsilon\, \sigma_t \langle\hat x_0, y\rangle \rVert_2

and the penalty asks it to be the same everywhere: :math:`E[(n - a)^2]`, `a` a running mean of `n`.

Targets (`TARGETS`):

`scalar`
    The paper's: one exponential moving mean with rate 0.01 from 0. It is updated first and carries no gradient, which
    is the reading of Eq. 9; the authors' code lets 1 % of the batch's mean through.
`per-timestep`
    One moving mean a bin of log-SNR, and the penalty relative to it, :math:`E[(n/a_b - 1)^2]`. The factor
    :math:`\sigma_t^2/\sqrt{\bar\alpha_t}` inside `n` runs over four orders of magnitude, so that a single `a` asks all
    timesteps to be what none of them can be, and large t dominates. Within a bin `n` has one scale, and dividing by it
    gives each bin the same say.
`anchored`
    As `per-timestep`, but the means are measured on the model without its LoRA and then kept. A moving mean follows
    the network down: shrinking every `n` is the cheapest way to lower the penalty, and the images lose diversity. A
    mean that stays makes shrinking as dear as growing. `share` asks for that share of the measured means.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from smooth_rt.errors import InputError
from smooth_rt.training.world import World

TARGETS = ("scalar", "per-timestep", "anchored")
BINS = 20
EMA_RATE = 0.01
REACH = 0.3  # of a noise's step in `variation_by_difference`; the noise itself is sqrt(C*H*W) long

Predict = Callable[[Tensor], Tensor]


def clean_estimate(noisy: Tensor, output: Tensor, alpha_bar: Tensor, prediction_type: str) -> Tensor:
    r"""The network's :math:`\hat x_0` from its output at `noisy`; `alpha_bar` broadcasts over the samples.

    Raises:
        InputError: another prediction type than "epsilon", "v_prediction" or "sample".
    """
    if prediction_type == "epsilon":
        return (noisy - (1 - alpha_bar).sqrt() * output) / alpha_bar.sqrt()
    if prediction_type == "v_prediction":
        return alpha_bar.sqrt() * noisy - (1 - alpha_bar).sqrt() * output
    if prediction_type == "sample":
        return output
    raise InputError(f"prediction_type={prediction_type!r}: use epsilon, v_prediction or sample")


def variation(
    predict: Predict,
    latents: Tensor,
    noise: Tensor,
    direction: Tensor,
    alpha_bar: Tensor,
    prediction_type: str = "epsilon",
) -> tuple[Tensor, Tensor]:
    r"""Each sample's :math:`n = \lVert\sigma_t J_\varepsilon^\top y\rVert_2`, differentiable, and the network's output.

    Args:
        predict: noisy latents [B, C, H, W] to the network's output; its samples must not see each other.
        latents: x0, [B, C, H, W].
        noise: epsilon, the same shape; made a leaf here.
        direction: y, the same shape, already divided by sqrt(C*H*W).
        alpha_bar: [B, 1, 1, 1].

    Returns:
        n [B] and the output [B, C, H, W] (which the base loss can use as well).
    """
    leaf = noise.detach().requires_grad_(True)
    # Fused attention has no double backward; the math form has.
    with sdpa_kernel(SDPBackend.MATH):
        along, output = _along(predict, latents, leaf, direction, alpha_bar, prediction_type)
        (gradient,) = torch.autograd.grad(along.sum(), leaf, create_graph=True)
    return gradient.flatten(1).norm(dim=1), output


def variation_by_difference(
    predict: Predict,
    latents: Tensor,
    noise: Tensor,
    direction: Tensor,
    alpha_bar: Tensor,
    prediction_type: str = "epsilon",
) -> tuple[Tensor, Tensor]:
    r"""As `variation`, the same n, but with a gradient that needs no double backward.

    With :math:`g = \sigma_t J_\varepsilon^\top y` and :math:`u = g/\lVert g\rVert` held fixed,
    :math:`\partial n/\partial\theta = u^\top\,\partial g/\partial\theta
    = \partial/\partial\theta\; \frac{d}{dh} \sigma_t\langle\hat x_0(\varepsilon + h u), y\rangle`, and the derivative
    along `h` is a central difference of two forward passes: first-order gradients alone, for which fused attention and
    gradient checkpointing do. The difference errs by :math:`O(h^2)`; REACH says how large h is.
    """
    leaf = noise.detach().requires_grad_(True)
    along, output = _along(predict, latents, leaf, direction, alpha_bar, prediction_type)
    # The graph stays for the output, from which the base loss comes.
    (gradient,) = torch.autograd.grad(along.sum(), leaf, retain_graph=True)
    norms = gradient.flatten(1).norm(dim=1)
    unit = gradient / norms.clamp(min=torch.finfo(norms.dtype).tiny).view(-1, 1, 1, 1)
    ahead, _ = _along(predict, latents, noise + REACH * unit, direction, alpha_bar, prediction_type)
    behind, _ = _along(predict, latents, noise - REACH * unit, direction, alpha_bar, prediction_type)
    slope = (ahead - behind) / (2 * REACH)
    return norms + (slope - slope.detach()), output


def _along(
    predict: Predict, latents: Tensor, noise: Tensor, direction: Tensor, alpha_bar: Tensor, prediction_type: str
) -> tuple[Tensor, Tensor]:
    """sigma <x0-estimate, y> [B], and the network's output."""
    sigma = (1 - alpha_bar).sqrt()
    noisy = alpha_bar.sqrt() * latents + sigma * noise
    output = predict(noisy)
    clean = clean_estimate(noisy, output.to(noisy.dtype), alpha_bar, prediction_type)
    return (sigma * clean * direction).flatten(1).sum(1), output


VARIATIONS = {"exact": variation, "difference": variation_by_difference}


def check_target(kind: str, share: float) -> None:
    """What `Target` would refuse of these two, asked before anything is read.

    Raises:
        InputError: an unknown kind, or a share that is not a finite number above 0 or not for `anchored`.
    """
    if kind not in TARGETS:
        raise InputError(f"svr_target={kind!r}: unknown; choose from {', '.join(TARGETS)}")
    if not 0 < share < math.inf or (share != 1 and kind != "anchored"):
        raise InputError(f"svr_share={share}: a number above 0, for the target anchored; leave it out otherwise")


def snr_bins(alphas_cumprod: Tensor, bins: int = BINS) -> Tensor:
    """The bin [T] of each timestep of the training schedule: so many, even in log-SNR."""
    log_snr = torch.log(alphas_cumprod / (1 - alphas_cumprod))
    place = (log_snr[0] - log_snr) / (log_snr[0] - log_snr[-1])
    return (place * bins).long().clamp(max=bins - 1)


class Target:
    """What `n` is compared with; `state` is what a checkpoint must hold ([bins] means and [bins] counts).

    Args:
        kind: one of `TARGETS`.
        bin_of: the bin of each timestep (see `snr_bins`); `scalar` puts all into one.
        share: of the measured means that `anchored` asks for: above 0.

    Raises:
        InputError: see `check_target`.
    """

    def __init__(self, kind: str, bin_of: Tensor, share: float = 1.0) -> None:
        check_target(kind, share)
        self.kind, self.share = kind, share
        self.bin_of = torch.zeros_like(bin_of) if kind == "scalar" else bin_of
        bins = int(self.bin_of.max()) + 1
        self.means = torch.zeros(bins, dtype=torch.float64)
        self.counts = torch.zeros(bins, dtype=torch.float64)

    @property
    def state(self) -> dict[str, Tensor]:
        return {"means": self.means, "counts": self.counts}

    def update(self, norms: Tensor, timesteps: Tensor, world: World | None = None) -> None:
        """Move the means towards the batch, all processes' parts of it together; `scalar` as in the paper, the others
        without a bias from the start at 0."""
        world = world or World()
        bins = self.bin_of[timesteps.cpu()]
        sums = torch.zeros((2, len(self.means)), dtype=torch.float64)
        sums[0].index_add_(0, bins, norms.detach().double().cpu())
        sums[1].index_add_(0, bins, torch.ones(len(bins), dtype=torch.float64))
        sums = sums.to(world.device)
        world.add_up([sums])
        total, met = sums.cpu()
        for index in torch.nonzero(met).flatten():
            self.counts[index] += 1
            rate = EMA_RATE if self.kind == "scalar" else max(EMA_RATE, 1 / float(self.counts[index]))
            self.means[index] += rate * (total[index] / met[index] - self.means[index])

    def fill(self) -> None:
        """Give each bin that met nothing the mean of the nearest one that did; for a short calibration."""
        seen = torch.nonzero(self.counts).flatten()
        for index in torch.nonzero(self.counts == 0).flatten():
            self.means[index] = self.means[seen[(seen - index).abs().argmin()]]

    def penalties(self, norms: Tensor, timesteps: Tensor) -> Tensor:
        """The penalty of each sample, [B]; `update` comes first, in training."""
        target = (self.share * self.means)[self.bin_of[timesteps.cpu()]].to(norms)
        if self.kind == "scalar":
            return (norms - target).square()
        return (norms / target - 1).square()
