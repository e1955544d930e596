"""A training run that can be stopped at any time and resumed: steps, learning rate, averaged weights, checkpoints.

Random draws are the caller's, keyed by the step (see `keyed_generator`), so a checkpoint holds no random state.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

from smooth_rt.errors import InputError, ModelError, SmoothRTError, reason
from smooth_rt.training.checkpoints import Checkpoints, NotFiniteError, StateError
from smooth_rt.training.interrupts import undivided
from smooth_rt.training.settings import check_count, check_rate, check_steps

__all__ = ["Run", "StepFn", "keyed_generator"]

StepFn = Callable[[int], tuple[Tensor, dict[str, float]]]

MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # what AdamW keeps of a parameter
LOG_EVERY = 50

log = logging.getLogger("smooth_rt")


def keyed_generator(seed: int, stream: str, step: int) -> torch.Generator:
    """A CPU generator that depends on nothing but its key."""
    key = np.random.SeedSequence([seed, *stream.encode(), step]).generate_state(2, np.uint32)
    return torch.Generator().manual_seed((int(key[0]) << 32 | int(key[1])) & (2**63 - 1))


@dataclass
class Run:
    """Trains `modules` (name -> module) for `steps` steps and keeps its state under `folder`, made when there is some.

    The learning rate warms up over `warmup` steps, stays, and falls linearly to 2 % over the last `decay` share of
    the run, so a run can be resumed with more steps as long as it has not begun to fall.

    Args:
        settings: what makes the run the one it is: data, noise, the weights' shapes. A checkpoint must agree with
            them. The rate, the number of steps and the rhythm of saving are not among them: a resumed run may change
            them.
        keep: checkpoints that stay.
        extra: further state that a step changes, saved and restored in place.
        rate_option: what the user sets `lr` with, for messages.

    Raises:
        InputError: `steps` or `lr` is out of range, the folder holds a checkpoint and `resume` is false, or its
            settings differ.
        ModelError: all checkpoints are damaged. Where an earlier one is whole, the run goes on from it, with a warning.
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
    keep: int = 2
    resume: bool = False
    extra: dict[str, Tensor] = field(default_factory=dict)
    rate_option: str = "--lr"
    step: int = 0

    def __post_init__(self) -> None:
        check_steps("steps", self.steps)
        check_rate("lr", self.lr)
        check_count("keep", self.keep)
        # As a checkpoint holds them: a tuple comes back from JSON as a list, and must not look like another setting.
        self.settings = json.loads(json.dumps(self.settings))
        self.parameters = {
            f"{name}.{key}": p for name, m in self.modules.items() for key, p in m.named_parameters() if p.requires_grad
        }
        self.ema = {key: p.detach().clone() for key, p in self.parameters.items()}
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=self.lr, weight_decay=self.weight_decay, fused=True
        )
        self._checkpoints = Checkpoints(self.folder, self.keep)
        self._averaged = False
        self._log = self.folder / "log.jsonl"
        self._made = [part for part in (self._log, self.folder, *self.folder.parents) if not part.exists()]
        newest = self.checkpoints()
        if newest and not self.resume:
            raise InputError(
                f"{self.folder}: holds a run already; add --resume to go on with it or name another folder"
            )
        if newest:
            self._load_newest(newest)
        self._saved = self.step

    def checkpoints(self) -> list[Path]:
        """Checkpoints in the folder, oldest first."""
        return self._checkpoints.paths()

    def learning_rate(self, step: int) -> float:
        start = self.steps * (1 - self.decay)
        fall = 1.0 if step < start else 1 - 0.98 * (step - start) / max(1.0, self.steps - start)
        return self.lr * min(1.0, (step + 1) / self.warmup) * fall

    def fit(self, step_fn: StepFn, every: dict[int, Callable[[int], None]] | None = None, quiet: bool = False) -> None:
        """Run to the last step. `step_fn(step)` returns the loss and numbers to log; `every` maps periods to calls.

        Whatever ends it early, the state after the last whole step is saved first, and the cause goes on with one line
        that says so. What `step_fn` has left in `extra` of a step that was not finished is undone.

        Raises:
            SmoothRTError: the loss, a gradient or a weight is not finite, or something cannot be read or written. The
                same step on the same weights would give the same loss again, so what is not finite is not saved, and
                the run goes on from the checkpoint before with a lower rate.
            KeyboardInterrupt: Ctrl-C, with the line as its message.
        """
        try:
            self._train(step_fn, every or {}, quiet)
        except BaseException as error:
            said = self._keep(error)
            if isinstance(error, KeyboardInterrupt):
                raise KeyboardInterrupt(f"interrupted; {said}") from error
            if isinstance(error, SmoothRTError):
                raise type(error)(f"{error}; {said}") from error
            if isinstance(error, OSError):
                raise SmoothRTError(f"{error.filename or self.folder}: {reason(error)}; {said}") from error
            log.warning(said)
            raise

    def _train(self, step_fn: StepFn, every: dict[int, Callable[[int], None]], quiet: bool) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        averages: dict[str, float] = {}
        began, first = time.perf_counter(), self.step
        with Progress(*columns, TimeRemainingColumn(), disable=quiet) as progress:
            task = progress.add_task(self.folder.name, total=self.steps, completed=self.step)
            while self.step < self.steps:
                numbers = self._advance(step_fn)
                for key, value in numbers.items():
                    averages[key] = value if key not in averages else 0.98 * averages[key] + 0.02 * value
                shown = " ".join(f"{key} {value:.4f}" for key, value in averages.items())
                progress.update(task, completed=self.step, description=f"{self.folder.name} {shown}")
                if self.step % LOG_EVERY == 0:
                    rate = (self.step - first) / (time.perf_counter() - began)
                    self._write_log({"step": self.step, "steps_per_s": round(rate, 3), **averages})
                # First, so that no call puts weights that are not finite where good ones were.
                if self.step % self.save_every == 0 or self.step == self.steps:
                    self.save()
                for period, call in every.items():
                    if self.step % period == 0 or self.step == self.steps:
                        call(self.step)

    def _advance(self, step_fn: StepFn) -> dict[str, float]:
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(self.step)
        step, extra = self.step, {key: value.clone() for key, value in self.extra.items()}
        try:
            loss, numbers = step_fn(step)
            self._check_finite("loss", loss)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            self._check_finite("gradient", nn.utils.clip_grad_norm_(self.parameters.values(), self.clip))
            with undivided():
                self.optimizer.step()
                self.step += 1
                weight = 1 - min(self.ema_decay, (1 + self.step) / (10 + self.step))
                with torch.no_grad():
                    torch._foreach_lerp_(list(self.ema.values()), list(self.parameters.values()), weight)
        except BaseException:
            if self.step == step:
                for key, value in extra.items():
                    self.extra[key].copy_(value)
            raise
        return numbers

    def _check_finite(self, what: str, value: Tensor) -> None:
        if not torch.isfinite(value):
            raise NotFiniteError(f"step {self.step}: the {what} is {value.item()}")

    def _write_log(self, line: dict[str, float]) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise SmoothRTError(f"{self._log}: cannot be written ({reason(error)}); make room") from error

    def _keep(self, error: BaseException) -> str:
        """Save the state that `error` leaves behind, unless that has just failed; how to go on, in words."""
        said = []
        if self.step > self._saved and not isinstance(error, StateError):
            try:
                self.save()
            except BaseException as second:
                said.append(f"the state at step {self.step} is lost ({reason(second)})")
        left = self.checkpoints()
        if isinstance(error, NotFiniteError):
            # A checkpoint of this very step would end here again, at any rate.
            dead = left.pop().name if left and Checkpoints.step(left[-1]) == self.step else ""
            said.append(f"delete {dead} and lower {self.rate_option}" if dead else f"lower {self.rate_option}")
        if left:
            said.append(f"state saved at step {Checkpoints.step(left[-1])}; add --resume to go on")
        else:
            said.append("no state is saved: begin anew")
            self._remove_made()
        return "; ".join(said)

    def _remove_made(self) -> None:
        """Remove the log and the folders that this run made, as far as they hold nothing else."""
        for part in self._made:
            try:
                part.unlink(missing_ok=True) if part == self._log else part.rmdir()
            except OSError:
                return

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

    def save(self) -> None:
        """Write a checkpoint of the state as it is.

        Raises:
            SmoothRTError: a weight is not finite, or the file cannot be written.
        """
        tensors: dict[str, Tensor] = {f"extra/{key}": value for key, value in self.extra.items()}
        for key, parameter in self.parameters.items():
            tensors[f"weight/{key}"] = parameter.detach()
            tensors[f"ema/{key}"] = self.ema[key]
            for name, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"{name}/{key}"] = value
        self._checkpoints.write(self.step, self.settings, tensors)
        self._saved = self.step

    def _load_newest(self, paths: list[Path]) -> None:
        """Go on from the newest checkpoint that is whole; those after it are set aside."""
        damaged: list[tuple[Path, ModelError]] = []
        for path in reversed(paths):
            try:
                self._load(path)
            except ModelError as error:
                damaged.append((path, error))
                continue
            for other, fault in damaged:
                self._checkpoints.set_aside(other)
                log.warning("%s; set aside as %s", str(fault).rpartition(";")[0], other.with_suffix(".damaged").name)
            if damaged:
                log.warning("going on from %s", path)
            return
        raise damaged[0][1]

    def _load(self, path: Path) -> None:
        shapes = {f"extra/{key}": value.shape for key, value in self.extra.items()}
        moments = []  # a parameter that no gradient has reached has none
        for key, parameter in self.parameters.items():
            shapes |= {f"{kind}/{key}": parameter.shape for kind in ("weight", "ema")}
            of_moments = (torch.Size(), parameter.shape, parameter.shape)
            moments.append({f"{name}/{key}": shape for name, shape in zip(MOMENTS, of_moments, strict=True)})
        tensors = self._checkpoints.read(path, self.settings, shapes, moments)
        self.step = Checkpoints.step(path)
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
