"""What a training run changes as it goes: weights, their average, AdamW's moments, and what the caller adds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from smooth_rt.training.interrupts import undivided

__all__ = ["State"]

MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # what AdamW keeps of a parameter
SCALE = ("scale", "growth_tracker")  # what a loss scaler keeps


class State:
    """The state of a run over `modules` (name -> module); only parameters that require gradients belong to it.

    Args:
        extra: further tensors that a step changes, kept in place.
        scaler: the loss scaler of fp16.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        lr: float,
        weight_decay: float,
        ema_decay: float,
        extra: Mapping[str, Tensor],
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        self.parameters = {
            f"{name}.{key}": p for name, m in modules.items() for key, p in m.named_parameters() if p.requires_grad
        }
        self.ema = {key: p.detach().clone() for key, p in self.parameters.items()}
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=lr, weight_decay=weight_decay, fused=True)
        self.ema_decay, self.extra, self.scaler = ema_decay, extra, scaler
        self.step = 0
        self._averaged = False

    @property
    def gradients(self) -> list[Tensor]:
        return [p.grad for p in self.parameters.values() if p.grad is not None]

    def advance(self, learning_rate: float) -> None:
        """One step of AdamW along the gradients, undivided; where the scaler finds them overflown it is skipped."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        with undivided():
            if self.scaler is None:
                self.optimizer.step()
            else:
                self.scaler.step(self.optimizer)
                self.scaler.update()
            self.step += 1
            weight = 1 - min(self.ema_decay, (1 + self.step) / (10 + self.step))
            with torch.no_grad():
                torch._foreach_lerp_(list(self.ema.values()), list(self.parameters.values()), weight)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """A context in which the modules hold their averaged weights."""
        try:
            self._swap(True)
            yield
        finally:
            self._swap(False)

    def _swap(self, averaged: bool) -> None:
        with undivided(), torch.no_grad():
            if self._averaged != averaged:
                for key, parameter in self.parameters.items():
                    held = parameter.detach().clone()
                    parameter.copy_(self.ema[key])
                    self.ema[key].copy_(held)
                self._averaged = averaged

    def tensors(self) -> dict[str, Tensor]:
        """All of it, for a checkpoint."""
        found: dict[str, Tensor] = {f"extra/{key}": value for key, value in self.extra.items()}
        for key, parameter in self.parameters.items():
            found[f"weight/{key}"] = parameter.detach()
            found[f"ema/{key}"] = self.ema[key]
            for name, value in self.optimizer.state.get(parameter, {}).items():
                found[f"{name}/{key}"] = value
        if self.scaler is not None:
            held = {"growth_tracker": self.scaler._get_growth_tracker(), "scale": self.scaler.get_scale()}
            found |= {f"scaler/{name}": torch.tensor(float(held[name]), dtype=torch.float64) for name in SCALE}
        return found

    def shapes(self) -> tuple[dict[str, torch.Size], list[dict[str, torch.Size]]]:
        """What `tensors` always holds, and groups of what it holds together or not at all: a parameter that no gradient
        has reached has no moments."""
        needed = {f"extra/{key}": value.shape for key, value in self.extra.items()}
        moments = []
        for key, parameter in self.parameters.items():
            needed |= {f"{kind}/{key}": parameter.shape for kind in ("weight", "ema")}
            of_moments = (torch.Size(), parameter.shape, parameter.shape)
            moments.append({f"{name}/{key}": shape for name, shape in zip(MOMENTS, of_moments, strict=True)})
        if self.scaler is not None:
            needed |= {f"scaler/{name}": torch.Size() for name in SCALE}
        return needed, moments

    def load(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `tensors` gave after so many steps."""
        self.step = step
        with torch.no_grad():
            for key, value in self.extra.items():
                value.copy_(tensors[f"extra/{key}"])
            for key, parameter in self.parameters.items():
                parameter.copy_(tensors[f"weight/{key}"])
                self.ema[key].copy_(tensors[f"ema/{key}"])
                if f"exp_avg/{key}" in tensors:
                    state = {name: tensors[f"{name}/{key}"] for name in MOMENTS}
                    # The fused kernel wants all of it where the parameter is, and the moments in its memory layout.
                    state["step"] = state["step"].to(parameter.device)
                    for name in MOMENTS[1:]:
                        state[name] = torch.empty_like(parameter).copy_(state[name])
                    self.optimizer.state[parameter] = state
        if self.scaler is not None:
            whole = self.scaler.state_dict()
            scale, grown = (tensors[f"scaler/{name}"].item() for name in SCALE)
            self.scaler.load_state_dict({**whole, "scale": scale, "_growth_tracker": int(grown)})
