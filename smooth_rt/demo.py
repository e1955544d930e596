"""The demo: engines built on the spot, three jobs with and without the Smooth-LoRA, one page to look at."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from engines.paths import absolute
from smooth_rt import report, writers
from smooth_rt.build import Built, ensure_engines
from smooth_rt.demo_report import EditScene, Outcome, Scene, Settings, command, describe, measure, media
from smooth_rt.errors import EngineError, InputError, ParityError
from smooth_rt.evaluation import examples
from smooth_rt.model import load_model
from smooth_rt.pipeline import SmoothPipeline
from smooth_rt.tasks.inversion import METHODS

__all__ = ["Demo", "Settings", "run_demo"]

LOG = logging.getLogger("smooth_rt")
Progress = Callable[[str, int, int], None]

SMALL = Settings(frames=5, num_inference_steps=6, null_text_steps=3, gradients=False)


@dataclass(frozen=True)
class Demo:
    """The files that were written (the page first), the rows of the table, and which bundles were reused."""

    page: Path
    files: list[Path]
    rows: list[dict[str, Any]]
    reused: dict[str, bool]


def run_demo(
    output: Path,
    model: str = "default",
    lora: str | None = "default",
    lora_strength: float = 1.0,
    engines: Sequence[str] = ("openvino", "onnxruntime"),
    small: bool = False,
    progress: Progress | None = None,
    config: str | None = None,
) -> Demo:
    """Build the bundles, run the jobs on every engine with and without the LoRA, write the page and its files.

    Args:
        output: the folder to write; made if need be. Files of the same names are replaced.
        model: "default" shows the images that ship with it; any other model makes its own.
        lora: None shows the model alone.
        engines: backends; the pictures are those of the first, the others are compared with it.
        small: fewer steps and frames, and no gradients, for a quick check that all parts work.
        progress: called as `progress(stage, done, total)`.
        config: for a single-file checkpoint, as in `load_model`.

    Raises:
        InputError: no engine, or a path that cannot be written; both before anything is computed.
        SmoothRTError: whatever the build, the jobs and the writers raise.
    """
    if not engines:
        raise InputError("engines: none named; name openvino, onnxruntime or both")
    folder = absolute(writers.check_output(output, ["index.html"]))
    settings = SMALL if small else Settings()
    report_progress = progress or (lambda *_: None)
    loras: dict[str, str | None] = {"base": None}
    if lora is not None:
        loras["smooth"] = lora
    built: dict[str, Built] = {}
    for variant, chosen in loras.items():

        def show(stage: str, done: int, total: int, variant: str = variant) -> None:
            report_progress(f"building {variant}: {stage}", done, total)

        def build(backends: Sequence[str], gradients: Sequence[str] = (), lora: str | None = chosen) -> Built:
            # Loaded for each: a LoRA is fused into the model itself.
            source = model if config is None else load_model(model, config=config)
            return ensure_engines(source, lora, lora_strength, backends, None, show, gradients=gradients)

        built[variant] = build(sorted(engines))
        if settings.gradients:
            built[variant] = _with_gradients(built[variant], lambda: build(engines[:1], ["text"]))
    scene = _scene(model, built["base"], engines[0], settings)
    outcomes = []
    for variant, found in built.items():
        for engine in engines:
            with SmoothPipeline.from_engines(found.bundle, engine) as pipe:
                outcomes.append(_jobs(pipe, variant, scene, settings, report_progress, engine == engines[0]))
                outcomes[-1].gradients = engine if _has_gradients(found, engine) else "eager"
    rows = measure(outcomes, scene)
    page = describe(outcomes, scene, rows, settings, command(output, model, lora, small))
    # The page holds the command that made it, and that a path, which need not be UTF-8.
    html = report.render(page).encode(errors="backslashreplace")
    files = {"index.html": html, **media(outcomes, scene)}
    files["results.json"] = writers.encode_json({"rows": rows, "environment": dict(page.environment)})
    written = writers.write_files(folder, files)
    return Demo(written[0], written, rows, {variant: found.reused for variant, found in built.items()})


def _with_gradients(built: Built, build: Callable[[], Built]) -> Built:
    """The bundle with gradients for its first engine; as it was, where they cannot be had, and eager takes them."""
    try:
        more = build()
    except (InputError, EngineError, ParityError) as error:
        LOG.warning("gradients: left to eager autograd, for they could not be built (%s)", error)
        return built
    return replace(more, reused=built.reused and more.reused)


def _has_gradients(built: Built, engine: str) -> bool:
    return any(one.variant.backend == engine and "unet_vjp_text" in one.gradients for one in built.bundle.variants)


def _scene(model: str, built: Built, engine: str, settings: Settings) -> Scene:
    """The shipped images for the default model; for any other, two that it makes itself."""
    if model == "default":
        shipped = {example.path.stem: example for example in examples()}
        dog, panda, heart = (shipped[name] for name in ("dog-face", "panda-face", "red-heart"))
        edits = (
            EditScene(dog.image(), dog.caption, "dog face on pink background"),
            EditScene(heart.image(), heart.caption, "red heart on blue background"),
        )
        images, captions = (dog.image(), panda.image()), (dog.caption, panda.caption)
        # Tried by eye: guided more, the small model's colours saturate; edited with less, a colour comes half-way.
        return Scene(
            images, captions, "sunflower on pink background", edits, guidance_scale=3.0, edit_guidance_scale=5.0,
            note="Training saw the dog, the panda and the heart, and not on the backgrounds that they have here.",
        )  # fmt: skip
    captions = ("a realistic dog", "a realistic cat")
    with SmoothPipeline.from_engines(built.bundle, engine) as pipe:
        made: Any = pipe(
            list(captions),
            num_inference_steps=settings.num_inference_steps,
            generator=[torch.Generator().manual_seed(seed) for seed in settings.seeds],
        ).images
    return Scene((made[0], made[1]), captions, captions[0], (EditScene(made[0], *captions),))


def _jobs(
    pipe: SmoothPipeline, variant: str, scene: Scene, settings: Settings, progress: Progress, first: bool
) -> Outcome:
    outcome = Outcome(variant, pipe.engine)
    steps = settings.num_inference_steps
    fitted = METHODS["null-text"].walks * settings.null_text_steps if first else 0
    done = 0

    def on_step(*_: Any) -> None:
        nonlocal done
        done += 1
        progress(f"{variant} on {pipe.engine}", done, 7 * steps + fitted)

    def timed(name: str, job: Callable[[], Any]) -> None:
        began = time.perf_counter()
        outcome.images[name] = list(job().images)
        outcome.seconds[name] = time.perf_counter() - began

    common: dict[str, Any] = {"num_inference_steps": steps, "callback_on_step_end": on_step}
    # A generator is used up by a draw, so each run makes its own: the same noise on every engine.
    noise = [torch.Generator().manual_seed(seed) for seed in settings.seeds]
    timed(
        "images",
        lambda: pipe.interpolate(list(scene.captions), list(scene.images), frames=settings.frames, **common),
    )
    if first:
        timed(
            "null-text",
            lambda: pipe.interpolate(
                list(scene.captions),
                list(scene.images),
                method="null-text",
                frames=settings.frames,
                num_inference_steps=settings.null_text_steps,
                guidance_scale=scene.guidance_scale,
                keep=False,
                callback_on_step_end=on_step,
            ),
        )
    timed(
        "seeds",
        lambda: pipe.interpolate(
            scene.prompt,
            frames=settings.frames,
            generator=noise,
            guidance_scale=scene.guidance_scale,
            **common,
        ),
    )
    timed("inversion", lambda: pipe.invert([scene.images[0]], scene.captions[0], **common))
    timed(
        "edit",
        lambda: pipe.edit(
            [edit.image for edit in scene.edits],
            [edit.prompt for edit in scene.edits],
            [edit.source_prompt for edit in scene.edits],
            edit_strength=settings.edit_strength,
            guidance_scale=scene.edit_guidance_scale,
            **common,
        ),
    )
    return outcome
