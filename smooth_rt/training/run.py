"""A training run that can be stopped at any time and resumed: steps, learning rate, averaged weights, checkpoints.

Random draws are the caller's, keyed by the step (see `draws`), so a checkpoint holds no random state.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engines.paths import absolute
from smooth_rt.errors import InputError, ModelError, SmoothRTError, reason
from smooth_rt.training.checkpoints import Checkpoints, NotFiniteError, StateError
from smooth_rt.training.progress import run_progress
from smooth_rt.training.settings import check_count, check_rate, check_steps
from smooth_rt.training.state import State
from smooth_rt.training.world import World

__all__ = ["Calls", "Part", "Run", "StepFn"]

Part = tuple[Tensor, dict[str, float]]
StepFn = Callable[[int], Iterable[Part]]
Calls = Sequence[tuple[int, Callable[[int], object]]]

LOG_EVERY = 50

log = logging.getLogger("smooth_rt")


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
        world: the processes that share each step. All hold the same state; the main one writes it.
        sources: the names of what a step was made of, in this process's share, for messages.

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
    world: World = field(default_factory=World)
    sources: Callable[[int], list[str]] = lambda _: []

    def __post_init__(self) -> None:
        check_steps("steps", self.steps)
        check_rate("lr", self.lr)
        check_count("keep", self.keep)
        self.folder = absolute(self.folder)
        # As a checkpoint holds them: a tuple comes back from JSON as a list, and must not look like another setting.
        self.settings = json.loads(json.dumps(self.settings))
        self.state = State(self.modules, self.lr, self.weight_decay, self.ema_decay, self.extra, self.world.scaler)
        self._checkpoints = Checkpoints(self.folder, self.keep)
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

    @property
    def step(self) -> int:
        """How many steps are done."""
        return self.state.step

    def checkpoints(self) -> list[Path]:
        """Checkpoints in the folder, oldest first."""
        return self._checkpoints.paths()

    def averaged(self) -> AbstractContextManager[None]:
        """A context in which the modules hold their averaged weights."""
        return self.state.averaged()

    def learning_rate(self, step: int) -> float:
        start = self.steps * (1 - self.decay)
        fall = 1.0 if step < start else 1 - 0.98 * (step - start) / max(1.0, self.steps - start)
        return self.lr * min(1.0, (step + 1) / self.warmup) * fall

    def fit(self, step_fn: StepFn, every: Calls = (), quiet: bool = False) -> None:
        """Run to the last step. `every` holds periods and calls, which the main process makes while others wait.

        `step_fn(step)` gives the step's parts, one after the other: each a loss, back-propagated before the next is
        asked for, and numbers to log. Losses and numbers of all parts and processes are added up.

        Whatever ends it early, the state after the last whole step is saved first, and the cause goes on with one line
        that says so. What `step_fn` has left in `extra` of a step that was not finished is undone.

        Raises:
            SmoothRTError: the loss, a gradient or a weight is not finite, or something cannot be read or written. The
                same step on the same weights would give the same loss again, so what is not finite is saved apart
                (`failed-...`), and the run goes on from the checkpoint before with a lower rate.
            KeyboardInterrupt: Ctrl-C, with the line as its message.
        """
        try:
            self._train(step_fn, every, quiet or not self.world.main)
        except BaseException as error:
            if not self.world.main:
                raise
            said = self._keep(error)
            if isinstance(error, KeyboardInterrupt):
                raise KeyboardInterrupt(f"interrupted; {said}") from error
            if isinstance(error, SmoothRTError):
                raise type(error)(f"{error}; {said}") from error
            if isinstance(error, OSError):
                raise SmoothRTError(f"{error.filename or self.folder}: {reason(error)}; {said}") from error
            log.warning(said)
            raise

    def _train(self, step_fn: StepFn, every: Calls, quiet: bool) -> None:
        if self.world.main:
            self._checkpoints.prune()
        averages: dict[str, float] = {}
        began, first = time.perf_counter(), self.step
        if first and not quiet:
            log.info("%s: going on at step %d of %d", self.folder.name, first, self.steps)
        with run_progress(self.folder.name, first, self.steps, quiet) as show:
            while self.step < self.steps:
                numbers = self._advance(step_fn)
                for key, value in numbers.items():
                    averages[key] = value if key not in averages else 0.98 * averages[key] + 0.02 * value
                rate = (self.step - first) / (time.perf_counter() - began)
                show(self.step, averages, rate)
                self.world.report({**numbers, "lr": self.learning_rate(self.step - 1)}, self.step)
                if self.world.main:
                    self._after(every, {"step": self.step, "steps_per_s": round(rate, 3), **averages})
                if any(self.step % period == 0 for period, _ in every) or self.step == self.steps:
                    self.world.wait()

    def _after(self, every: Calls, line: dict[str, float]) -> None:
        """What the main process does when a step is done."""
        if self.step % LOG_EVERY == 0:
            self._write_log(line)
        # First, so that no call puts weights that are not finite where good ones were.
        if self.step % self.save_every == 0 or self.step == self.steps:
            self.save()
        for period, call in every:
            if self.step % period == 0 or self.step == self.steps:
                call(self.step)

    def _advance(self, step_fn: StepFn) -> dict[str, float]:
        state, step = self.state, self.step
        extra = {key: value.clone() for key, value in self.extra.items()}
        try:
            state.optimizer.zero_grad(set_to_none=True)
            numbers = self._gradients(step_fn)
            norm = nn.utils.clip_grad_norm_(state.parameters.values(), self.clip)
            if state.scaler is None:
                self._check_finite("gradient", norm)
            state.advance(self.learning_rate(step))
        except BaseException:
            if self.step == step:
                for key, value in extra.items():
                    self.extra[key].copy_(value)
            raise
        return numbers

    def _gradients(self, step_fn: StepFn) -> dict[str, float]:
        """Leave the gradients of a step, over all its parts and processes, and return its numbers, "loss" the first."""
        scaler, numbers = self.state.scaler, {"loss": 0.0}
        for loss, found in step_fn(self.step):
            scaled = loss if scaler is None else scaler.scale(loss)
            scaled.backward()  # type: ignore[no-untyped-call]
            for key, value in {"loss": float(loss.detach()), **found}.items():
                numbers[key] = numbers.get(key, 0.0) + value
        self.world.add_up(self.state.gradients)
        sums = torch.tensor(list(numbers.values()), dtype=torch.float64, device=self.world.device)
        self.world.add_up([sums])
        numbers = dict(zip(numbers, sums.tolist(), strict=True))
        self._check_finite("loss", sums[0])
        if scaler is not None:
            scaler.unscale_(self.state.optimizer)
        return numbers

    def _check_finite(self, what: str, value: Tensor) -> None:
        if not torch.isfinite(value):
            of = self.world.gather(self.sources(self.step))
            named = f", made of {', '.join(of[:8])}{' and others' if len(of) > 8 else ''}" if of else ""
            raise NotFiniteError(f"step {self.step}: the {what} is {value.item()}{named}")

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
            said += self._keep_failed() if left else []
            # A checkpoint of this very step would end here again, at any rate.
            dead = left.pop().name if left and Checkpoints.step(left[-1]) == self.step else ""
            said.append(f"delete {dead} and lower {self.rate_option}" if dead else f"lower {self.rate_option}")
        if left:
            said.append(f"state saved at step {Checkpoints.step(left[-1])}; add --resume to go on")
        else:
            said.append("no state is saved: begin anew")
            self._remove_made()
        return "; ".join(said)

    def _keep_failed(self) -> list[str]:
        """Save what led to a loss that is not finite, apart from the checkpoints: for whoever looks for the cause."""
        try:
            path = self._checkpoints.write_failed(self.step, self.settings, self.state.tensors())
        except SmoothRTError:  # the weights themselves are not finite, or there is no room
            return []
        return [f"what led there is kept as {path.name}"]

    def _remove_made(self) -> None:
        """Remove the log and the folders that this run made, as far as they hold nothing else."""
        for part in self._made:
            try:
                part.unlink(missing_ok=True) if part == self._log else part.rmdir()
            except OSError:
                return

    def save(self) -> None:
        """Write a checkpoint of the state as it is.

        Raises:
            SmoothRTError: a weight is not finite, or the file cannot be written.
        """
        self._checkpoints.write(self.step, self.settings, self.state.tensors())
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
                if self.world.main:
                    self._checkpoints.set_aside(other)
                log.warning("%s; set aside as %s", str(fault).rpartition(";")[0], other.with_suffix(".damaged").name)
            if damaged:
                log.warning("going on from %s", path)
            return
        raise damaged[0][1]

    def _load(self, path: Path) -> None:
        needed, together = self.state.shapes()
        tensors = self._checkpoints.read(path, self.settings, needed, together)
        self.state.load(Checkpoints.step(path), tensors)
