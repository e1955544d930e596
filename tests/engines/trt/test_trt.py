"""TensorRT's engine without a GPU, on a module that stands for TensorRT's: contexts and their graphs, weights, kernels
that are kept, refusals. That it runs, tests/gpu shows where there is one."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engines import trt as trt_engine
from engines.contract import Dims
from engines.device import SHAPES
from engines.errors import EngineError, InputError
from engines.trt import given_weights
from engines.variant import Place


def image(dims: Dims, height: int, seed: int = 0) -> Tensor:
    shape = (2, dims.image_channels, height * dims.vae_factor, dims.vae_factor)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
def test_each_shape_is_captured_on_a_context_of_its_own(
    backend: str, gpu: Any, opened: Any, dims: Dims, module: Any
) -> None:
    heights = range(1, SHAPES + 3)
    with opened(backend) as engine:
        # In turns, so that every graph is replayed after others were captured; the first ones were dropped by then.
        for turn, height in enumerate([*heights, *heights, 2, 4, 2]):
            sample = image(dims, height, turn)
            torch.testing.assert_close(engine.infer(sample=sample)["latent_mean"], module(sample)[0].detach())
        # The first run of all was on what was asked for, and not on what lay in fresh memory.
        assert torch.equal(gpu.seen[0], image(dims, 1, 0))
        assert len(engine._device._held) == SHAPES
        assert all(context.captured for context in gpu.contexts)
        assert len(gpu.contexts) == 2 * len(heights) + 1  # of the last three, one was dropped before
        assert len({context.memory for context in gpu.contexts}) == 1


@pytest.mark.parametrize("way", ["not capturable", "in a capture", "torch"])
def test_what_cannot_be_captured_runs_without_and_says_so_once(
    way: str,
    gpu: Any,
    opened: Any,
    dims: Dims,
    module: Any,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu.capturable, gpu.fails = way != "not capturable", way
    if way == "torch":

        def refused(*_: object, **__: object) -> None:
            raise RuntimeError("CUDA error: not permitted\nwhen capturing")

        monkeypatch.setattr(torch.cuda, "graph", refused)
    with opened() as engine, caplog.at_level(logging.WARNING, "smooth_rt"):
        for turn, height in enumerate([1, 2, 1, 2]):
            sample = image(dims, height, turn)
            torch.testing.assert_close(engine.infer(sample=sample)["latent_mean"], module(sample)[0].detach())
    (said,) = caplog.messages
    assert said.startswith("vae_encoder: tensorrt-rtx runs without CUDA graphs (")
    assert "\n" not in said


def test_a_run_that_fails_is_an_error_of_the_engine(gpu: Any, opened: Any, dims: Dims) -> None:
    gpu.fails = "always"
    with opened() as engine, pytest.raises(EngineError, match=r"vae_encoder: tensorrt-rtx cannot run it .*rebuild it"):
        engine.infer(sample=image(dims, 1))


def test_weights_a_then_b_then_a_again(opened: Any, dims: Dims, module: Any) -> None:
    own, sample, found = module.weight.detach().clone(), image(dims, 2), []
    with opened() as engine:
        engine.places = {"weight": Place(name="weight", transposed=False)}
        for weight in (own, 2 * own, own):
            engine.refit({"weight": weight})
            found.append(engine.infer(sample=sample)["latent_mean"])
        assert torch.equal(found[0], found[2])
        torch.testing.assert_close(found[1], 2 * found[0])
        engine.places = {"other": Place(name="other", transposed=False)}
        with pytest.raises(InputError, match="no refittable weights 'other'; build with --lora-mode refit"):
            engine.refit({"other": own})


@pytest.mark.parametrize(("kind", "dtype"), [("FLOAT", torch.float32), ("HALF", torch.float16)])
def test_weights_as_tensorrt_itself_reads_them(kind: str, dtype: torch.dtype) -> None:
    trt: Any = pytest.importorskip("tensorrt_rtx", reason="reads them; pip install 'smooth-rt[tensorrt-rtx]'")
    # As a refit asks: by the type of the weights that stand in the engine.
    prototype = trt.Weights(getattr(trt.DataType, kind))
    tensor = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).T
    given, memory = given_weights(trt, prototype.dtype, tensor.requires_grad_())
    assert (given.dtype, given.size) == (prototype.dtype, 12)
    assert torch.equal(torch.from_numpy(given.numpy()).reshape(3, 4), tensor.detach().to(dtype))
    assert memory.data_ptr() == given.numpy().ctypes.data


def test_kernels_are_kept_from_one_start_to_the_next(
    gpu: Any, opened: Any, dims: Dims, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache, sample = tmp_path / "compiled" / "key-sm89", image(dims, 1)

    def start() -> int:
        before = gpu.compilations
        with opened(cache=cache) as engine:
            engine.infer(sample=sample)
        return gpu.compilations - before

    with caplog.at_level(logging.INFO, "smooth_rt"):
        assert [start(), start()] == [1, 0]
        (file,) = cache.iterdir()
        whole = file.read_bytes()
        file.write_bytes(b"damaged")
        assert [start(), start()] == [1, 0]
        assert file.read_bytes() == whole
        assert [path.name for path in cache.iterdir()] == [file.name]
        assert caplog.messages == [f"{file}: damaged, or of another version or GPU; its kernels are compiled anew"]
        file.unlink()
        cache.rmdir()
        cache.write_bytes(b"a file where the folder belongs")
        assert [start(), start()] == [1, 1]
        assert "the compiled kernels are not kept" in caplog.messages[-1]


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
def test_nothing_is_kept_unasked(backend: str, opened: Any, dims: Dims, tmp_path: Path) -> None:
    cache = tmp_path / "compiled" if backend == "tensorrt" else None
    with opened(backend, cache=cache) as engine:
        engine.infer(sample=image(dims, 1))
    assert [path.name for path in tmp_path.iterdir()] == ["model.engine"]


@pytest.mark.parametrize(
    ("at_hand", "mend"),
    [
        ("sm89", "rebuild it here"),
        ("sm90", "made for sm75, sm80, sm86, sm89, sm120 and newer, and this is sm90; choose another engine"),
    ],
)
def test_an_engine_that_tensorrt_refuses(
    at_hand: str, mend: str, opened: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trt_engine, "gpu", lambda: at_hand)
    path = tmp_path / "model.engine"
    opened().close()
    path.write_bytes(b"a foreign one")
    with pytest.raises(EngineError, match=r"cannot open it on a GPU \(of another version\); ") as caught:
        opened()
    assert str(caught.value).endswith(mend)
    assert "\n" not in str(caught.value)
