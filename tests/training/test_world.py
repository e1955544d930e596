"""Two processes train what one does, and what cannot be launched is named."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from smooth_rt.errors import InputError
from smooth_rt.training.world import World, launched, training_device

SCRIPT = """
import sys
from pathlib import Path

import torch

from smooth_rt.model import load_model
from smooth_rt.training.data import EmojiScenes
from smooth_rt.training.smooth_lora import train_smooth_lora
from smooth_rt.training.smooth_lora_config import SmoothLoraConfig
from smooth_rt.training.world import launched

model, emoji, output, target, accumulate = sys.argv[1:]
torch.set_num_threads(1)
config = SmoothLoraConfig(
    batch_size=4, accumulate=int(accumulate), lr=1e-3, drop_prompt=0.3, svr_target=target, calibration_steps=2,
    path_weight=0.5, path_steps=2, path_window=1, path_points=3, paths_per_step=2,
)
loaded = load_model(model)
for network in (loaded.unet, loaded.vae, loaded.text_encoder):
    network.double()
world = launched(Path(output), device="cpu")
print(f"size {world.size}\\n", end="", flush=True)  # in one piece: both write to one pipe
train_smooth_lora(loaded, EmojiScenes(Path(emoji), 16), Path(output), 20, config=config, world=world, save_every=7)
"""


def trained(tmp_path: Path, model: Path, emoji: Path, processes: int, target: str, accumulate: int = 1) -> Path:
    script, output = tmp_path / "train.py", tmp_path / f"{processes}-{accumulate}"
    script.write_text(SCRIPT)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [*launch, str(script), str(model), str(emoji), str(output), target, str(accumulate)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"size {processes}" in done.stdout
    return output


def state(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "checkpoint-00000020.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("target", ["scalar", "anchored"])
def test_two_processes_train_what_one_does(tmp_path: Path, tiny_model: Path, emoji: Path, target: str) -> None:
    """In float64 the weights differ by the order of sums alone: 1e-9 leaves five digits for its growth in 20 steps."""
    one = state(trained(tmp_path, tiny_model, emoji, 1, target))
    two = state(trained(tmp_path, tiny_model, emoji, 2, target))
    assert one.keys() == two.keys()
    moved = 0.0
    for key, value in one.items():
        assert value.dtype == torch.float64 or key.startswith("step/")
        assert (two[key] - value).norm() <= 1e-9 * value.norm(), key
        if key.startswith("weight/") and "lora_B" in key:
            moved += value.norm().item()
    assert moved > 0.01  # lora_B starts at zero


def test_the_command_runs_on_two_processes(tmp_path: Path, tiny_model: Path, emoji: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "-m",
        "smooth_rt",
    ]
    command += ["train", "smooth-lora", "--model", str(tiny_model), "--data", str(emoji), "--device", "cpu"]
    command += ["--output", str(tmp_path / "run"), "--steps", "2", "--batch-size", "2", "--report-to", "tensorboard"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("smooth_lora.safetensors") == 1  # one speaks for both
    assert (tmp_path / "run" / "smooth_lora.safetensors").exists()


def test_one_process_is_alone() -> None:
    world = World()
    assert (world.rank, world.size, world.main) == (0, 1, True)
    assert list(world.share(range(4, 8))) == [4, 5, 6, 7]
    assert world.gather(["a"]) == ["a"]


def test_shares_are_the_whole_in_order() -> None:
    worlds = [World() for _ in range(3)]
    for rank, world in enumerate(worlds):
        world.rank, world.size = rank, 3
    assert [place for world in worlds for place in world.share(range(6, 12))] == list(range(6, 12))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"precision": "fp8"}, "mixed_precision='fp8': unknown; choose from no, bf16, fp16"),
        ({"precision": "fp16", "device": "cpu"}, "mixed_precision='fp16': a CPU has no"),
        ({"trackers": ["nothing"], "device": "cpu"}, "nothing"),
        ({"device": "abacus"}, "device='abacus': unknown"),
    ],
)
def test_what_cannot_be_launched_is_named(tmp_path: Path, options: dict[str, object], said: str) -> None:
    with pytest.raises(InputError, match=said):
        launched(tmp_path / "run", **options)  # type: ignore[arg-type]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED"])
def test_launchers_that_cut_the_model_up_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    from accelerate import Accelerator
    from accelerate.utils import DistributedType

    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType[kind])
    with pytest.raises(InputError, match=f"{kind} cuts the weights up"):
        launched(tmp_path, device="cpu")


def test_a_device_that_is_not_there_is_named() -> None:
    assert training_device("cpu") == torch.device("cpu")
    for name, said in (("cuda:99", "GPUs here"), ("abacus", "unknown"), ("meta", "not supported")):
        with pytest.raises(InputError, match=rf"device='{name}': .*{said}"):
            training_device(name)
