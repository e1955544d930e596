"""A run that is killed with SIGKILL, wherever it is, and resumed ends with the weights of one that never stopped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

# A process that has imported everything forks one for each life of a run, so that a life costs no start.
SCRIPT = """
import json
import os
import signal
import sys
import time
from pathlib import Path

import torch

import smooth_rt.lora.write
import smooth_rt.training.checkpoints as checkpoints
from smooth_rt.model import load_model
from smooth_rt.training.data import EmojiScenes
from smooth_rt.training.smooth_lora import train_smooth_lora
from smooth_rt.training.smooth_lora_config import SmoothLoraConfig

model, emoji = sys.argv[1:]
torch.set_num_threads(1)
loaded, scenes = load_model(model), EmojiScenes(Path(emoji), 16)


def die_after(operation):
    "The process dies right after file operation number `operation` of its second save and of what follows it."
    done = [0]

    def counted(work):
        def counting(*arguments, **named):
            result = work(*arguments, **named)
            if saves[0] >= 2:
                done[0] += 1
                if done[0] == operation:
                    os.kill(os.getpid(), signal.SIGKILL)
            return result

        return counting

    saves, put = [0], checkpoints.Checkpoints.write

    def write(*arguments):
        saves[0] += 1
        return put(*arguments)

    checkpoints.Checkpoints.write = write
    for owner, name in (
        (Path, "mkdir"), (Path, "replace"), (Path, "unlink"), (Path, "write_bytes"), (os, "fsync"),
        (checkpoints, "save_file"),
    ):
        setattr(owner, name, counted(getattr(owner, name)))


for line in sys.stdin:
    job = json.loads(line)
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if job["operation"]:
            die_after(job["operation"])
        config = SmoothLoraConfig(batch_size=1, lr=1e-2, svr_target="per-timestep", rank=2)
        train_smooth_lora(
            loaded, scenes, Path(job["folder"]), job["steps"], resume=True, config=config, save_every=1, keep=1
        )
        os._exit(0)
    if job["seconds"]:
        time.sleep(job["seconds"])
        os.kill(pid, signal.SIGKILL)
    print(json.dumps(os.waitpid(pid, 0)[1]), flush=True)
"""


class Lives:
    """Runs training in processes that die; `live` returns whether one came to its end."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def live(self, folder: Path, steps: int, seconds: float = 0.0, operation: int = 0) -> bool:
        job = {"folder": str(folder), "steps": steps, "seconds": seconds, "operation": operation}
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        status = json.loads(self.process.stdout.readline())
        assert status in (0, 9), status  # ended, or killed: nothing else
        return bool(status == 0)


@pytest.fixture(scope="module")
def lives(tiny_model: Path, emoji: Path) -> Iterator[Lives]:
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tiny_model), str(emoji)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    ) as process:
        yield Lives(process)
        assert process.stdin is not None
        process.stdin.close()


def ended(folder: Path) -> dict[str, Any]:
    """The last checkpoint and the LoRA; nothing else may lie there."""
    assert sorted(path.suffix for path in folder.iterdir()) == [".safetensors", ".safetensors"]
    (checkpoint,) = folder.glob("checkpoint-*.safetensors")
    lora = load_file(folder / "smooth_lora.safetensors")
    return {**load_file(checkpoint), **{f"lora/{key}": value for key, value in lora.items()}}


def assert_equal(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert torch.equal(value, other[key]), key


def test_killed_at_twenty_random_moments(tmp_path: Path, lives: Lives) -> None:
    steps = 40
    assert lives.live(tmp_path / "whole", steps)
    rng = np.random.default_rng(0)
    killed = 0
    while killed < 20:
        # A life has to get further at times; if it comes to its end, another run begins.
        if lives.live(tmp_path / "killed", steps, seconds=float(rng.uniform(0.05, 0.9))):
            for path in (tmp_path / "killed").iterdir():
                path.unlink()
        else:
            killed += 1
    assert lives.live(tmp_path / "killed", steps)
    assert_equal(ended(tmp_path / "killed"), ended(tmp_path / "whole"))


@pytest.mark.slow
def test_killed_after_every_file_operation_of_a_save(tmp_path: Path, lives: Lives) -> None:
    assert lives.live(tmp_path / "whole", 3)
    whole = ended(tmp_path / "whole")
    operation = 1
    while not lives.live(folder := tmp_path / str(operation), 3, operation=operation):
        assert lives.live(folder, 3)
        assert_equal(ended(folder), whole)
        operation += 1
    assert_equal(ended(folder), whole)
    # Two checkpoints, each made, written, synced and named, the one before removed; and the LoRA beside each.
    assert operation > 15
