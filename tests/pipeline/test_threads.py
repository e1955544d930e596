"""One pipeline called from many threads: each answer equals that of a lone run."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.threads import STRENGTHS, jobs, mixed
from engines.bundle import Bundle
from smooth_rt.build import ensure_engines
from smooth_rt.pipeline import SmoothPipeline

BACKENDS = ("onnxruntime", "openvino")


@pytest.fixture(scope="module")
def bundle(small_model: Path, lora: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bundle]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SMOOTH_RT_CACHE", str(tmp_path_factory.mktemp("cache")))
        ensure_engines(small_model, lora, backends=BACKENDS, lora_mode="refit")
        yield ensure_engines(small_model, lora, backends=BACKENDS, lora_mode="runtime").bundle


@pytest.fixture(scope="module")
def fused(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bundle]:
    """With gradients."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SMOOTH_RT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield ensure_engines(small_model, backends=BACKENDS, gradients=["text"]).bundle


def opened(bundle: Bundle, small_model: Path, lora: Path, backend: str, mode: str) -> SmoothPipeline:
    if backend == "eager":
        return SmoothPipeline.from_pretrained(small_model, lora, engine="eager", lora_mode=mode)
    return SmoothPipeline.from_engines(bundle, backend, lora_mode=mode)


@pytest.mark.parametrize(
    ("backend", "mode", "calls"),
    [
        ("onnxruntime", "runtime", 300),
        ("openvino", "runtime", 300),
        ("eager", "runtime", 60),
        ("onnxruntime", "refit", 60),
        ("openvino", "refit", 30),
    ],
)
def test_mixed_calls_of_eight_threads_are_those_of_a_lone_run(
    bundle: Bundle, small_model: Path, lora: Path, backend: str, mode: str, calls: int
) -> None:
    with opened(bundle, small_model, lora, backend, mode) as pipe:
        counts = mixed(pipe, 8, calls, STRENGTHS)
    assert counts.pop("right") + counts.pop("switched") == 8 * calls
    assert not counts


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_eight_threads_are_those_of_a_lone_run(fused: Bundle, backend: str) -> None:
    with SmoothPipeline.from_engines(fused, backend) as pipe:
        assert {"gradient", "other gradient"} <= set(jobs(pipe))
        counts = mixed(pipe, 8, 300)
    assert counts == {"right": 8 * 300}


@pytest.mark.parametrize(("backend", "mode"), [("openvino", "refit"), ("onnxruntime", "runtime"), ("eager", "runtime")])
def test_running_call_keeps_the_strength_it_began_with(
    bundle: Bundle, small_model: Path, lora: Path, backend: str, mode: str
) -> None:
    with opened(bundle, small_model, lora, backend, mode) as pipe:
        alone = {}
        for strength in STRENGTHS:
            pipe.set_lora_strength(strength)
            alone[strength] = image(pipe)
        before, after = reversed(STRENGTHS)
        pipe.set_lora_strength(before)
        threads = []

        def switch(pipe: SmoothPipeline, step: int, *_: Any) -> None:
            if step == 0:
                threads.append(threading.Thread(target=pipe.set_lora_strength, args=(after,)))
                threads[0].start()
                if mode == "runtime":  # which nothing waits for
                    threads[0].join()
                assert pipe.lora_strength == before

        assert torch.equal(image(pipe, switch), alone[before])
        threads[0].join()
        assert pipe.lora_strength == after
        assert torch.equal(image(pipe), alone[after])


@pytest.mark.parametrize("mode", ["refit", "runtime"])
def test_callback_sets_the_strength_of_its_own_call(bundle: Bundle, mode: str) -> None:
    with SmoothPipeline.from_engines(bundle, "onnxruntime", lora_mode=mode, lora_strength=STRENGTHS[0]) as pipe:
        first = image(pipe)

        def switch(pipe: SmoothPipeline, step: int, *_: Any) -> None:
            pipe.set_lora_strength(STRENGTHS[step == 0])

        assert not torch.equal(image(pipe, switch), first)
        assert pipe.lora_strength == STRENGTHS[0]
        assert torch.equal(image(pipe), first)


@pytest.mark.parametrize("mode", ["refit", "runtime"])
def test_context_copied_in_a_callback_begins_a_call_of_its_own(bundle: Bundle, mode: str) -> None:
    copies: list[contextvars.Context] = []
    with SmoothPipeline.from_engines(bundle, "onnxruntime", lora_mode=mode, lora_strength=STRENGTHS[0]) as pipe:
        image(pipe, lambda *_: copies.append(contextvars.copy_context()))
        pipe.set_lora_strength(STRENGTHS[1])
        assert torch.equal(copies[0].run(image, pipe), image(pipe))


def test_callback_that_changes_the_default_device_leaves_its_call_alone(bundle: Bundle) -> None:
    with SmoothPipeline.from_engines(bundle, "onnxruntime", lora_mode="runtime") as pipe:
        alone = image(pipe)
        try:
            assert torch.equal(image(pipe, lambda *_: torch.set_default_device("meta")), alone)
        finally:
            torch.set_default_device(None)


def test_evaluations_of_a_call_are_its_own(bundle: Bundle) -> None:
    with SmoothPipeline.from_engines(bundle, "onnxruntime", lora_mode="runtime") as pipe:
        counted = []

        def run() -> None:
            with pipe.call() as call:
                image(pipe)
                counted.append(dict(call.evaluations))

        threads = [threading.Thread(target=run) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert counted == [{"forward": 2 * 3, "gradient": 0}] * 4
        assert pipe.evaluations == {"forward": 4 * 2 * 3, "gradient": 0}


@pytest.mark.parametrize("backend", BACKENDS)
def test_close_waits_for_the_call_that_runs(bundle: Bundle, backend: str) -> None:
    pipe = SmoothPipeline.from_engines(bundle, backend, lora_mode="runtime")
    engine, inside, answers = pipe._engines["unet"], threading.Event(), []
    works = engine.infer_impl

    def slow(*given: Any) -> Any:
        inside.set()
        closing.start()
        closing.join(0.1)
        assert not engine.closed
        return works(*given)

    engine.infer_impl = slow  # type: ignore[method-assign]
    closing = threading.Thread(target=engine.close)
    embeds = pipe.encode_prompt("dog")
    answers.append(pipe.predict(torch.zeros(1, 4, 8, 8), 500, embeds))
    closing.join()
    assert engine.closed
    assert answers[0].isfinite().all()
    pipe.close()


def test_attention_blend_leaves_other_threads_calls_alone(small_model: Path) -> None:
    with SmoothPipeline.from_pretrained(small_model, engine="eager") as pipe:

        def morph(seed: int) -> torch.Tensor:
            ends = [torch.Generator().manual_seed(seed + i) for i in range(2)]
            made = pipe.interpolate(
                "dog", frames=4, generator=ends, num_inference_steps=5, attention_blend=True, output_type="latent"
            )
            return torch.as_tensor(made.images)

        works = [lambda: morph(0), lambda: morph(7), lambda: image(pipe), lambda: image(pipe)]
        alone = [work() for work in works]
        found: dict[tuple[int, int], torch.Tensor] = {}

        def run(number: int) -> None:
            for turn in range(5):
                found[number, turn] = works[number]()

        threads = [threading.Thread(target=run, args=(number,)) for number in range(len(works))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 5 * len(works)
        assert all(torch.equal(made, alone[number]) for (number, _), made in found.items())


def image(pipe: SmoothPipeline, callback: Any = None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    made = pipe("dog", num_inference_steps=3, generator=generator, output_type="latent", callback_on_step_end=callback)
    return made.latents
