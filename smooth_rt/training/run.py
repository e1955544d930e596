"""A training run that can be stopped at any time and resumed: steps, learning rate, averaged weights, checkpoints.

Random draws are the caller's, keyed by the step (see `keyed_generator`), so a checkpoint holds no random state. A
checkpoint is one safetensors file, written beside its place and renamed into it: it is whole or absent.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from smooth_rt.errors import InputError, ModelError, SmoothRTError

StepFn = Callable[[int], tuple[Tensor, dict[str, float]]]


def keyed_generator(seed: int, stream: str, step: int) -> torch.Generator:
    """A CPU generator that depends on nothing but its key."""
    key = np.random.SeedSequence([seed, *stream.encode(), step]).generate_state(2, np.uint32)
    return torch.Generator().manual_seed((int(key[0]) << 32 | int(key[1])) & (2**63 - 1))


@dataclass
class Run:
    """Trains `modules` (name -> module) for `steps` steps and keeps its state under `folder`.

    The learning rate warms up over `warmup` steps, stays, and falls linearly to 2 % over the last `decay` share of
    the run, so a run can be resumed with more steps as long as it has not begun to fall.

    Raises:
        InputError: the folder holds a checkpoint and `resume` is false, or settings that change the weights differ.
        SmoothRTError: the loss is not finite; the state before the step is saved first.
    """

    folder: Path
    modules: dict[str, nn.Module]
    steps: int
    lr: float
    settings: dict[str, Any]
    warmup: int = 200
    decay: float = 0.25
    ema_decay: float = 0.999
    clip: float = 1.0
    weight_decay: float = 0.01
    save_every: int = 500
    resume: bool = False
    extra: dict[str, Tensor] = field(default_factory=dict)  # further state, saved and restored in place
    step: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise InputError(f"steps={self.steps}: a run needs at least 1 step")
        # As a checkpoint holds them: a tuple comes back from JSON as a list, and must not look like another setting.
        self.settings = json.loads(json.dumps(self.settings))
        self.parameters = {
            f"{name}.{key}": p for name, m in self.modules.items() for key, p in m.named_parameters() if p.requires_grad
        }
        self.ema = {key: p.detach().clone() for key, p in self.parameters.items()}
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=self.lr, weight_decay=self.weight_decay, fused=True
        )
        self.folder.mkdir(parents=True, exist_ok=True)
        newest = self.checkpoints()
        if newest and not self.resume:
            raise InputError(
                f"{self.folder}: holds a run already; add --resume to go on with it or name another folder"
            )
        if newest:
            self._load(newest[-1])

    def checkpoints(self) -> list[Path]:
        """Checkpoints in the folder, oldest first."""
        return sorted(self.folder.glob("checkpoint-*.safetensors"))

    def learning_rate(self, step: int) -> float:
        start = self.steps * (1 - self.decay)
        fall = 1.0 if step < start else 1 - 0.98 * (step - start) / max(1.0, self.steps - start)
        return self.lr * min(1.0, (step + 1) / self.warmup) * fall

    def fit(self, step_fn: StepFn, every: dict[int, Callable[[int], None]] | None = None, quiet: bool = False) -> None:
        """Run to the last step. `step_fn(step)` returns the loss and numbers to log; `every` maps periods to calls."""
        log = (self.folder / "log.jsonl").open("a", encoding="utf-8")
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        averages: dict[str, float] = {}
        began, first = time.perf_counter(), self.step
        try:
            with Progress(*columns, TimeRemainingColumn(), disable=quiet) as progress:
                task = progress.add_task(self.folder.name, total=self.steps, completed=self.step)
                while self.step < self.steps:
                    numbers = self._advance(step_fn)
                    for key, value in numbers.items():
                        averages[key] = value if key not in averages else 0.98 * averages[key] + 0.02 * value
                    shown = " ".join(f"{key} {value:.4f}" for key, value in averages.items())
                    progress.update(task, completed=self.step, description=f"{self.folder.name} {shown}")
                    if self.step % 50 == 0:
                        rate = (self.step - first) / (time.perf_counter() - began)
                        log.write(json.dumps({"step": self.step, "steps_per_s": round(rate, 3), **averages}) + "\n")
                        log.flush()
                    for period, call in (every or {}).items():
                        if self.step % period == 0 or self.step == self.steps:
                            call(self.step)
                    if self.step % self.save_every == 0:
                        self.save()
        except KeyboardInterrupt:
            self.save()
            raise
        finally:
            log.close()
        self.save()

    def _advance(self, step_fn: StepFn) -> dict[str, float]:
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(self.step)
        loss, numbers = step_fn(self.step)
        if not torch.isfinite(loss):
            self.save()
            raise SmoothRTError(f"step {self.step}: the loss is {loss.item()}; state saved, lower --lr and --resume")
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.parameters.values(), self.clip)
        self.optimizer.step()
        self.step += 1
        weight = 1 - min(self.ema_decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.ema.values()), list(self.parameters.values()), weight)
        return numbers

    def averaged(self) -> _Averaged:
        """A context in which the modules hold their averaged weights."""
        return _Averaged(self)

    def save(self) -> None:
        tensors: dict[str, Tensor] = {f"extra/{key}": value for key, value in self.extra.items()}
        for key, parameter in self.parameters.items():
            tensors[f"weight/{key}"] = parameter.detach()
            tensors[f"ema/{key}"] = self.ema[key]
            for name, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"{name}/{key}"] = value
        target = self.folder / f"checkpoint-{self.step:08d}.safetensors"
        partial = target.with_suffix(".partial")
        contiguous = {key: value.contiguous() for key, value in tensors.items()}
        try:
            save_file(contiguous, partial, {"step": str(self.step), "settings": json.dumps(self.settings)})
            partial.replace(target)
        except (OSError, SafetensorError) as error:
            partial.unlink(missing_ok=True)
            raise SmoothRTError(f"{target}: cannot be written ({error}); make room, then --resume") from error
        for old in self.checkpoints()[:-2]:
            old.unlink()

    def _load(self, path: Path) -> None:
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata()
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{path}: unreadable ({error}); delete it to resume from the one before") from error
        settings = json.loads(metadata["settings"])
        if settings != self.settings:
            changed = [k for k in {*settings, *self.settings} if settings.get(k) != self.settings.get(k)]
            raise InputError(f"{path}: made with other settings ({', '.join(sorted(changed))}); name another folder")
        self.step = int(metadata["step"])
        with torch.no_grad():
            for key, value in self.extra.items():
                value.copy_(tensors[f"extra/{key}"])
            for key, parameter in self.parameters.items():
                parameter.copy_(tensors[f"weight/{key}"])
                self.ema[key].copy_(tensors[f"ema/{key}"])
                if f"exp_avg/{key}" in tensors:
                    names = ("step", "exp_avg", "exp_avg_sq")
                    state = {name: tensors[f"{name}/{key}"] for name in names}
                    # The fused kernel wants all of it where the parameter is, and the moments in its memory layout.
                    state["step"] = state["step"].to(parameter.device)
                    for name in names[1:]:
                        state[name] = torch.empty_like(parameter).copy_(state[name])
                    self.optimizer.state[parameter] = state


class _Averaged:
    def __init__(self, run: Run) -> None:
        self.run = run

    def __enter__(self) -> None:
        self._swap()

    def __exit__(self, *exc: object) -> None:
        self._swap()

    def _swap(self) -> None:
        with torch.no_grad():
            for key, parameter in self.run.parameters.items():
                held = parameter.detach().clone()
                parameter.copy_(self.run.ema[key])
                self.run.ema[key].copy_(held)
