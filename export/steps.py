"""The steps of a build as its progress tells them: what is done now, and how much of the whole time is behind."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from torch import nn

from engines.contract import DERIVED, NETWORKS, NetworkName

__all__ = ["DETAIL_S", "Progress", "Steps"]

# Called with what is being done, and how much of the build is done and how much there is, in parts of the whole time.
Progress = Callable[[str, int, int], None]

DETAIL_S = 0.1
_UNITS = 10  # a second
_SD15 = {"text_encoder": 123e6, "unet": 860e6, "vae_encoder": 34e6, "vae_decoder": 50e6}  # parameters
# Seconds of each step on two cores, for the networks in the contract's order: those that the default model takes, and
# those that Stable Diffusion 1.5 takes on top, which go with the size. Only ratios count. The first three kinds,
# TensorRT's and the gradients of the default model are measured (docs/measurements, the logs of builds); the others are
# rough. Verifying OpenVINO's engines takes longer than that where they are small, and ONNX Runtime's shorter.
_SECONDS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "export": ((2.5, 18, 5, 5.5), (4.5, 22, 1, 0.5)),
    "verify": ((0.5, 2, 0, 0), (1.2, 38, 30, 57)),
    "openvino": ((1.3, 3, 3, 3), (1.2, 5, 0, 0)),
    "tensorrt": ((1, 10, 2, 3), (5, 75, 7, 7)),
    "export gradient": ((0, 30, 0, 0), (0, 210, 0, 0)),
    "export in half": ((8, 40, 7, 7), (1, 60, 20, 30)),
    "inductor": ((40, 120, 40, 40), (10, 100, 20, 20)),
    "int8": ((0, 120, 0, 0), (0, 1500, 0, 0)),
    "configuration": ((0.1,), (0,)),
    "manifest": ((0.1,), (6,)),
}
_OF_GRADIENTS = 2  # times the UNet's own seconds: converting and verifying a graph of its gradients


class Steps:
    """Counts a build's steps for the progress callback, each with its share of the time.

    Args:
        progress: called at each step, and now and then within long ones.
        networks: the model's; their sizes decide which steps are long.
        planned: the kind of every step, by network; the configuration and the manifest come before and after.
    """

    def __init__(
        self,
        progress: Progress | None,
        networks: Mapping[NetworkName, nn.Module],
        planned: Mapping[NetworkName, Sequence[str]],
    ) -> None:
        self._progress = progress
        self._sizes = {name: sum(p.numel() for p in networks[name].parameters()) / _SD15[name] for name in NETWORKS}
        self._before = self._now = 0  # units before the step that is under way, and its own
        self._said = 0.0
        every = [(kind, name) for name, kinds in planned.items() for kind in kinds]
        self._total = sum(self._units(kind, name) for kind, name in every)
        self._total += self._units("configuration") + self._units("manifest")

    def begin(self, what: str, kind: str, network: NetworkName | None = None) -> None:
        """Say that a step begins; the one before is done."""
        self._before += self._now
        self._now = self._units(kind, network)
        self._say(what)

    def detail(self, what: str, share: float = 0.0) -> None:
        """Say what goes on within a step and how much of it is done, but not more often than anybody can read."""
        if time.monotonic() - self._said > DETAIL_S:
            self._say(what, share)

    def end(self) -> None:
        """Say that all is done."""
        self._before, self._now = self._total, 0
        self._say("done")

    def _say(self, what: str, share: float = 0.0) -> None:
        self._said = time.monotonic()
        if self._progress is not None:
            self._progress(what, self._before + int(share * self._now), self._total)

    def _units(self, kind: str, network: NetworkName | None = None) -> int:
        always, sized = _SECONDS[kind]
        of = "unet" if network in DERIVED else network
        index = 0 if of is None else NETWORKS.index(of)
        size = self._sizes["unet" if of is None else of]
        times = _OF_GRADIENTS if network in DERIVED and kind != "export gradient" else 1
        return max(1, round(_UNITS * times * (always[index] + size * sized[index])))
