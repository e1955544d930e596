"""A run that stops and resumes ends bit for bit where one that never stopped ends."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from smooth_rt.errors import InputError, ModelError, SmoothRTError
from smooth_rt.training.run import Run, StepFn, keyed_generator


def start(folder: Path, steps: int = 12, **options: object) -> tuple[Run, nn.Linear]:
    torch.manual_seed(0)
    model = nn.Linear(5, 3)
    settings = {"seed": 0, **options.pop("settings", {})}  # type: ignore[dict-item]
    return Run(folder, {"model": model}, steps, 1e-2, settings, warmup=2, save_every=4, **options), model  # type: ignore[arg-type]


def loss_of(model: nn.Linear, stop_at: int | None = None) -> StepFn:
    def step_fn(step: int) -> tuple[Tensor, dict[str, float]]:
        if step == stop_at:
            raise KeyboardInterrupt
        x = torch.randn(7, 5, generator=keyed_generator(0, "test", step))
        loss = (model(x) - x[:, :3]).square().mean()
        return loss, {"loss": loss.item()}

    return step_fn


def test_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    whole, model = start(tmp_path / "whole")
    whole.fit(loss_of(model), quiet=True)
    first, halted = start(tmp_path / "halved")
    with pytest.raises(KeyboardInterrupt):
        first.fit(loss_of(halted, stop_at=7), quiet=True)
    second, resumed = start(tmp_path / "halved", resume=True)
    assert second.step == 7
    second.fit(loss_of(resumed), quiet=True)
    for name, value in model.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    for name, value in whole.ema.items():
        assert torch.equal(value, second.ema[name]), name


def test_training_lowers_the_loss_and_averages_the_weights(tmp_path: Path) -> None:
    run, model = start(tmp_path, steps=200)
    before = loss_of(model)(0)[0].item()
    run.fit(loss_of(model), quiet=True)
    assert loss_of(model)(0)[0].item() < 0.5 * before
    raw = model.weight.detach().clone()
    with run.averaged():
        assert not torch.equal(model.weight, raw)
    assert torch.equal(model.weight, raw)


def test_a_folder_in_use_needs_resume(tmp_path: Path) -> None:
    run, model = start(tmp_path)
    run.fit(loss_of(model), quiet=True)
    with pytest.raises(InputError, match="--resume"):
        start(tmp_path)


def test_other_settings_are_named(tmp_path: Path) -> None:
    run, model = start(tmp_path, settings={"channels": (16, 32)})
    run.fit(loss_of(model), quiet=True)
    with pytest.raises(InputError, match=r"other settings \(seed\)"):
        start(tmp_path, resume=True, settings={"seed": 1, "channels": (16, 32)})


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    run, model = start(tmp_path)
    run.fit(loss_of(model), quiet=True)
    newest = run.checkpoints()[-1]
    newest.write_bytes(newest.read_bytes()[:-9])
    with pytest.raises(ModelError, match=newest.name):
        start(tmp_path, resume=True)


def test_a_loss_that_is_not_finite_stops_and_saves(tmp_path: Path) -> None:
    run, model = start(tmp_path)

    def step_fn(step: int) -> tuple[Tensor, dict[str, float]]:
        return model.weight.sum() * (float("nan") if step == 3 else 1.0), {}

    with pytest.raises(SmoothRTError, match="step 3: the loss is nan"):
        run.fit(step_fn, quiet=True)
    assert [path.name for path in run.checkpoints()] == ["checkpoint-00000003.safetensors"]
