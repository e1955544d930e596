"""A run that stops and resumes ends bit for bit where one that never stopped ends."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from smooth_rt.errors import InputError, ModelError, SmoothRTError
from smooth_rt.training.checkpoints import Checkpoints
from smooth_rt.training.draws import keyed_generator
from smooth_rt.training.run import Part, Run, StepFn


def start(folder: Path, **options: Any) -> tuple[Run, nn.Linear]:
    torch.manual_seed(0)
    model = nn.Linear(5, 3)
    chosen = {"steps": 12, "lr": 1e-2, "warmup": 2, "save_every": 4, **options}
    chosen["settings"] = {"seed": 0, **options.get("settings", {})}
    return Run(folder, {"model": model}, **chosen), model


def loss_of(model: nn.Linear, stop_at: int | None = None) -> StepFn:
    def step_fn(step: int) -> Iterator[Part]:
        if step == stop_at:
            raise KeyboardInterrupt
        x = torch.randn(7, 5, generator=keyed_generator(0, "test", step))
        loss = (model(x) - x[:, :3]).square().mean()
        yield loss, {"error": loss.item()}

    return step_fn


def loss_at(model: nn.Linear) -> float:
    return next(iter(loss_of(model)(0)))[0].item()


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
    for name, value in whole.state.ema.items():
        assert torch.equal(value, second.state.ema[name]), name


def test_training_lowers_the_loss_and_averages_the_weights(tmp_path: Path) -> None:
    run, model = start(tmp_path, steps=200)
    before = loss_at(model)
    run.fit(loss_of(model), quiet=True)
    assert loss_at(model) < 0.5 * before
    raw = model.weight.detach().clone()
    with run.averaged():
        assert not torch.equal(model.weight, raw)
    assert torch.equal(model.weight, raw)


def test_a_folder_in_use_needs_resume(tmp_path: Path) -> None:
    run, model = start(tmp_path)
    run.fit(loss_of(model), quiet=True)
    with pytest.raises(InputError, match="--resume"):
        start(tmp_path)


def test_another_run_is_named_and_what_it_is_not_may_change(tmp_path: Path) -> None:
    run, model = start(tmp_path, settings={"channels": (16, 32), "vae_lr": 1e-3})
    run.fit(loss_of(model), quiet=True)
    # A checkpoint may hold more than this run asks for, such as a rate; it may not lack what this run is known by.
    again, _ = start(tmp_path, steps=20, resume=True, settings={"channels": (16, 32)})
    assert again.step == 12
    for settings, named in (
        ({"seed": 1, "channels": (16, 32)}, "seed"),
        ({"model": "a", "channels": [1]}, "channels, model"),
    ):
        with pytest.raises(InputError, match=f"made with another {named};"):
            start(tmp_path, resume=True, settings=settings)


def rewritten(path: Path, change: Callable[[dict[str, str], dict[str, Tensor]], object]) -> None:
    with safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
    tensors = load_file(path)
    change(metadata, tensors)
    save_file(tensors, path, metadata or None)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda metadata, _: metadata.clear(), "no settings"),
        (lambda metadata, _: metadata.pop("step"), "no step"),
        (lambda metadata, _: metadata.update(step="abc"), "abc"),
        (lambda metadata, _: metadata.update(step="3"), "metadata"),
        (lambda metadata, _: metadata.update(settings="{"), "settings|property name"),
        (lambda metadata, _: metadata.update(settings="[]"), "metadata"),
        (lambda _, tensors: tensors.pop("weight/model.bias"), "weight/model.bias is missing"),
        (lambda _, tensors: tensors.pop("exp_avg_sq/model.bias"), "exp_avg_sq/model.bias is missing"),
        (lambda _, tensors: tensors.update({"ema/model.bias": torch.zeros(1)}), r"is \[1\] and should be \[3\]"),
        (lambda _, tensors: tensors["ema/model.bias"][0].add_(1e-6), "not those that were written"),
        (lambda _, tensors: tensors["weight/model.bias"].fill_(float("nan")), "weight/model.bias is not finite"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(
    tmp_path: Path, change: Any, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    run, model = start(tmp_path)
    run.fit(loss_of(model), quiet=True)
    before, newest = run.checkpoints()
    rewritten(newest, change)
    content = newest.read_bytes()
    again, _ = start(tmp_path, resume=True)
    assert again.step == 8
    warned = [record.getMessage() for record in caplog.records]
    assert len(warned) == 2
    assert re.search(rf"{newest.name}: not a whole checkpoint \(.*({why}).*set aside", warned[0])
    assert warned[1] == f"going on from {before}"
    assert newest.with_suffix(".damaged").read_bytes() == content
    assert run.checkpoints() == [before]
    before.write_bytes(before.read_bytes()[:-9])
    with pytest.raises(ModelError, match=rf"{before.name}: .*begin anew"):
        start(tmp_path, resume=True)
    assert run.checkpoints() == [before]


@pytest.mark.parametrize(("keep", "kept"), [(1, [12]), (2, [8, 12]), (9, [4, 8, 12])])
def test_the_newest_checkpoints_stay(tmp_path: Path, keep: int, kept: list[int]) -> None:
    run, model = start(tmp_path, keep=keep)
    run.fit(loss_of(model), quiet=True)
    assert [Checkpoints.step(path) for path in run.checkpoints()] == kept


@pytest.mark.parametrize(
    "options", [{"keep": 0}, {"steps": 0}, {"lr": float("nan")}, {"lr": float("inf")}, {"lr": 0.0}]
)
def test_steps_and_rate_out_of_range_are_named(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"^{next(iter(options))}="):
        Run(tmp_path / "run", {"model": nn.Linear(5, 3)}, **{"steps": 12, "lr": 1e-2, "settings": {}, **options})
    assert not (tmp_path / "run").exists()


def failing(model: nn.Linear, step: int, what: str) -> StepFn:
    """`loss_of`, but at `step` its loss is NaN, or finite with a gradient that is not."""
    good = loss_of(model)

    def step_fn(at: int) -> Iterator[Part]:
        for loss, numbers in good(at):
            bad = loss
            if at == step:
                # The root's slope is infinite at 0.
                bad = loss * float("nan") if what == "loss" else loss + (model.weight * 0).abs().sum().sqrt()
            yield bad, numbers

    return step_fn


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_not_finite_leaves_the_checkpoint_before(tmp_path: Path, what: str) -> None:
    run, model = start(tmp_path)
    with pytest.raises(SmoothRTError) as said:
        run.fit(failing(model, 6, what), quiet=True)
    assert str(said.value) == (
        f"step 6: the {what} is nan; what led there is kept as failed-00000006.safetensors; lower --lr; "
        "state saved at step 4; add --resume to go on"
    )
    # Saved at step 6, it would end there again whatever the rate.
    assert [path.name for path in run.checkpoints()] == ["checkpoint-00000004.safetensors"]
    again, resumed = start(tmp_path, resume=True, lr=1e-3)
    assert (again.step, again.learning_rate(5)) == (4, 1e-3)
    with pytest.raises(
        SmoothRTError, match=r"; delete checkpoint-00000004\.safetensors and lower --lr; no state is saved"
    ):
        again.fit(failing(resumed, 4, what), quiet=True)
    again.fit(loss_of(resumed), quiet=True)
    assert all(torch.isfinite(value).all() for value in resumed.state_dict().values())


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    run, model = start(tmp_path)

    def damage(step: int) -> None:
        if step == 7:
            model.weight.data[0, 0] = float("inf")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as said:
        run.fit(loss_of(model), [(1, damage)], quiet=True)
    assert str(said.value) == (
        "interrupted; the state at step 7 is lost (step 7: weight/model.weight is not finite); "
        "state saved at step 4; add --resume to go on"
    )
    assert [path.name for path in run.checkpoints()] == ["checkpoint-00000004.safetensors"]


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (InputError("1.png: damaged; replace it"), "1.png: damaged; replace it; "),
        (OSError(28, "No space left on device", "grid.png"), "grid.png: No space left on device; "),
    ],
)
def test_any_failure_saves_first(tmp_path: Path, error: Exception, line: str) -> None:
    run, model = start(tmp_path)

    def fail(step: int) -> None:
        if step == 3:
            raise error

    with pytest.raises(SmoothRTError) as said:
        run.fit(loss_of(model), [(1, fail)], quiet=True)
    assert str(said.value) == line + "state saved at step 3; add --resume to go on"
    assert isinstance(said.value, InputError) == isinstance(error, InputError)
    assert start(tmp_path, resume=True)[0].step == 3


def test_a_fault_of_the_program_stays_one_and_is_saved(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run, model = start(tmp_path)

    with pytest.raises(ZeroDivisionError):
        run.fit(loss_of(model), [(3, lambda step: 1 // (step - 3))], quiet=True)
    assert "state saved at step 3; add --resume to go on" in caplog.messages


def test_a_log_on_a_full_disk_is_named(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    run, model = start(tmp_path, steps=60)
    with pytest.raises(SmoothRTError, match=r"log\.jsonl: .*No space.*state saved at step 50; add --resume"):
        run.fit(loss_of(model), quiet=True)
    assert run.checkpoints()[-1].name == "checkpoint-00000050.safetensors"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_checkpoint_that_cannot_be_written_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def refuse(*_: object) -> None:
        raise error

    run, model = start(tmp_path / "a" / "run", save_every=1)
    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises((SmoothRTError, KeyboardInterrupt), match="no state is saved: begin anew"):
        run.fit(loss_of(model), quiet=True)
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_saved_nothing_leaves_nothing(tmp_path: Path) -> None:
    run, model = start(tmp_path / "a" / "run", steps=60, save_every=500)
    with pytest.raises(SmoothRTError, match="lower --lr; no state is saved: begin anew"):
        run.fit(failing(model, 55, "loss"), quiet=True)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "log.jsonl").write_text("mine\n")
    run, model = start(tmp_path)
    with pytest.raises(KeyboardInterrupt, match="interrupted; no state is saved"):
        run.fit(loss_of(model, stop_at=0), quiet=True)
    assert (tmp_path / "log.jsonl").read_text() == "mine\n"


def test_what_a_killed_run_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-00000001.partial").write_bytes(b"half")
    (tmp_path / ".tmpWwUmuK").write_bytes(b"half")  # a file of safetensors' that is not done
    (tmp_path / "checkpoint-copy.safetensors").write_bytes(b"not ours")
    run, model = start(tmp_path)
    run.fit(loss_of(model), quiet=True)
    names = [f"checkpoint-{what}.safetensors" for what in ("00000008", "00000012", "copy")]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_does_not_part_what_belongs_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    whole, model = start(tmp_path / "whole")
    whole.fit(loss_of(model), quiet=True)
    run, halted = start(tmp_path / "halved")
    update = run.state.optimizer.step

    def interrupted() -> None:
        update()
        if run.step == 5:
            signal.raise_signal(number)

    monkeypatch.setattr(run.state.optimizer, "step", interrupted)
    former = signal.signal(number, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt, match="state saved at step 6"):
            run.fit(loss_of(halted), quiet=True)
        with pytest.raises(KeyboardInterrupt), run.averaged():
            signal.raise_signal(number)
    finally:
        signal.signal(number, former)
    assert not torch.equal(halted.weight, run.state.ema["model.weight"])
    again, resumed = start(tmp_path / "halved", resume=True)
    again.fit(loss_of(resumed), quiet=True)
    assert torch.equal(model.weight, resumed.weight)


def test_a_step_that_was_not_finished_leaves_no_trace(tmp_path: Path) -> None:
    met = torch.zeros(())

    def step_of(model: nn.Linear, stop_at: int | None) -> StepFn:
        def step_fn(step: int) -> Iterator[Part]:
            met.add_(step)
            yield from loss_of(model, stop_at)(step)

        return step_fn

    run, model = start(tmp_path, extra={"met": met})
    with pytest.raises(KeyboardInterrupt):
        run.fit(step_of(model, 5), quiet=True)
    assert met.item() == sum(range(5))
    met.zero_()
    run, model = start(tmp_path, resume=True, extra={"met": met})
    run.fit(step_of(model, None), quiet=True)
    assert met.item() == sum(range(12))
