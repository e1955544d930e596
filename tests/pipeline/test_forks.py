"""A process that is forked from one where a pipeline is in use: it runs, or refuses in one line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from engines import forks
from engines.errors import EngineError
from smooth_rt.build import ensure_engines
from smooth_rt.pipeline import SmoothPipeline

WAIT = 120.0  # seconds, for a machine that is busy
# A process of its own, with more than one thread of torch: a fork of this one would copy what other tests left.
PROGRAM = """
import logging, os, sys, threading
import torch
from smooth_rt import SmoothPipeline

torch.set_num_threads(2)
backend, model, bundle, after = sys.argv[1:]
def opened():
    if backend == "eager":
        return SmoothPipeline.from_pretrained(model, engine="eager")
    return SmoothPipeline.from_engines(bundle, backend)
def image(pipe):
    return pipe("dog", num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="latent").latents
pipe = opened()
first = image(pipe)
torch.randn(512, 512) @ torch.randn(512, 512)
if after == "busy":  # other threads hold locks and use engines as the process is forked
    for _ in range(2):
        threading.Thread(target=lambda: [image(pipe) for _ in range(10**6)], daemon=True).start()
child = os.fork()
if not child:
    if after == "close":
        pipe.close()
    elif after == "reopen":
        pipe.close()
        pipe = opened()
    if after != "close":
        torch.testing.assert_close(image(pipe), first, rtol=1e-3, atol=1e-4)
        assert torch.get_num_threads() == 1
    os._exit(7)
if after == "busy":
    _, status = os.waitpid(child, 0)
    os._exit(os.waitstatus_to_exitcode(status))
_, status = os.waitpid(child, 0)
assert torch.equal(image(pipe), first)
assert torch.get_num_threads() == 2
sys.exit(os.waitstatus_to_exitcode(status))
"""


# torch's threads are started by others, before a pipeline is in use.
EARLY = """
import os, sys
import torch
from smooth_rt import SmoothPipeline

torch.set_num_threads(2)
torch.randn(2000, 2000) @ torch.randn(2000, 2000)
child = os.fork()
if not child:
    backend, model, bundle = sys.argv[1:]
    if backend == "eager":
        pipe = SmoothPipeline.from_pretrained(model, engine="eager")
    else:
        pipe = SmoothPipeline.from_engines(bundle, backend)
    pipe("dog", num_inference_steps=2)
    os._exit(7)
_, status = os.waitpid(child, 0)
sys.exit(os.waitstatus_to_exitcode(status))
"""
# A strength is set by replacing weights, which compiles graphs, as the process is forked.
SETTING = """
import os, sys, threading, time
import torch
from smooth_rt import SmoothPipeline

pipe = SmoothPipeline.from_engines(sys.argv[1], "openvino", lora_mode="refit")
def setting():
    while True:
        for strength in (0.5, 1.0):
            pipe.set_lora_strength(strength)
            pipe("dog", num_inference_steps=1)
threading.Thread(target=setting, daemon=True).start()
for _ in range(3):
    time.sleep(0.3)
    child = os.fork()
    if not child:
        pipe.set_lora_strength(0.5)
        pipe("dog", num_inference_steps=1)
        os._exit(7)
    _, status = os.waitpid(child, 0)
    if os.waitstatus_to_exitcode(status) != 7:
        os._exit(1)
os._exit(7)
"""


@pytest.fixture(scope="module")
def bundle(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SMOOTH_RT_CACHE", str(tmp_path_factory.mktemp("cache")))
        return ensure_engines(tiny_model, backends=["onnxruntime", "openvino"]).bundle.path


def run(arguments: list[str]) -> str:
    """Run a process that exits with 7, and return its stderr."""
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        _, said = process.communicate(timeout=WAIT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail("the forked process hangs")
    assert process.returncode == 7, said
    return said


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime", "eager"])
def test_process_forked_before_first_use_runs(bundle: Path, tiny_model: Path, backend: str) -> None:
    run([sys.executable, "-W", "ignore", "-c", EARLY, backend, str(tiny_model), str(bundle)])


def test_process_forked_as_weights_are_replaced_runs(
    tiny_model: Path, lora: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SMOOTH_RT_CACHE", str(tmp_path_factory.mktemp("cache")))
    built = ensure_engines(tiny_model, lora, backends=["openvino"], lora_mode="refit").bundle.path
    run([sys.executable, "-W", "ignore", "-c", SETTING, str(built)])


@pytest.mark.parametrize(
    ("backend", "after"),
    [
        *((backend, after) for backend in ("openvino", "onnxruntime", "eager") for after in ("run", "reopen")),
        ("openvino", "close"),
        ("onnxruntime", "close"),
        ("onnxruntime", "busy"),
    ],
)
def test_forked_process_runs_a_pipeline_of_its_parent(bundle: Path, tiny_model: Path, backend: str, after: str) -> None:
    arguments = [sys.executable, "-W", "ignore", "-c", PROGRAM, backend, str(tiny_model), str(bundle), after]
    said = run(arguments)
    warned = said.count("this process was forked after torch was loaded, so torch computes on one thread here")
    assert warned == (after != "close" or backend == "eager")


def test_engine_that_needs_its_parents_threads_refuses(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with SmoothPipeline.from_pretrained(tiny_model, engine="eager") as pipe:
        engine = pipe._engines["unet"]
        monkeypatch.setattr(engine, "after_fork_impl", lambda: forks.NO_CUDA)
        engine.after_fork()
        with pytest.raises(EngineError, match=r"unet: opened before this process was forked.*method 'spawn'"):
            pipe.predict(torch.zeros(1, 4, 8, 8), 500, pipe.encode_prompt("dog"))


def test_abandoned_object_is_never_freed() -> None:
    freed = []

    class Pool:
        def __del__(self) -> None:
            freed.append(time.time())

    pool, other = Pool(), Pool()
    forks.abandon(pool)
    del pool, other
    assert len(freed) == 1
