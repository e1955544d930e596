"""What the demo found, as numbers, as files and as a page."""

from __future__ import annotations

import math
import os
import platform
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from smooth_rt import __version__, report, writers
from smooth_rt.metrics import Istd, istd, psnr

__all__ = [
    "FEW_STEPS",
    "EditScene",
    "Outcome",
    "Scene",
    "Settings",
    "command",
    "describe",
    "environment",
    "measure",
    "media",
    "table",
]

LIBRARIES = ("torch", "diffusers", "transformers", "onnx", "onnxruntime", "openvino", "numpy", "pillow")
MORPHS = {"images": "Two images", "null-text": "The same two by null-text inversion", "seeds": "Two seeds"}


@dataclass(frozen=True)
class Settings:
    """How much the demo computes. Frames and steps are those of each morph."""

    frames: int = 16
    num_inference_steps: int = 25
    null_text_steps: int = 15  # of the morph by null-text inversion, whose every step takes up to ten gradients
    seeds: tuple[int, int] = (3, 5)
    edit_strength: float = 0.8
    gradients: bool = True  # built for the first engine; else eager autograd takes them


# Said wherever results of fewer steps are shown.
FEW_STEPS = (
    "Made with --small, of too few steps to judge by: edits hardly edit, and the Smooth-LoRA may look worse than "
    "the model alone. It shows that all parts work; for pictures run it without --small."
)


@dataclass(frozen=True)
class EditScene:
    """An image, what it shows, and what it shall show."""

    image: Image.Image
    source_prompt: str
    prompt: str


@dataclass(frozen=True)
class Scene:
    """What the demo shows: two images with their captions, edits, and the guidance that suits the model.

    The first image is also the one that is inverted; `prompt` is that of the morph between two seeds; `note` is what is
    said of the images.
    """

    images: tuple[Image.Image, Image.Image]
    captions: tuple[str, str]
    prompt: str
    edits: tuple[EditScene, ...]
    guidance_scale: float = 7.5
    edit_guidance_scale: float = 7.5
    note: str = ""


@dataclass
class Outcome:
    """What one variant computed on one engine, and the seconds of each job.

    The morph by null-text inversion is that of the first engine alone, which gradients are built for; `gradients` is
    the engine that took them.
    """

    variant: str
    engine: str
    seconds: dict[str, float] = field(default_factory=dict)
    images: dict[str, list[Image.Image]] = field(default_factory=dict)
    gradients: str = "eager"


def measure(outcomes: Sequence[Outcome], scene: Scene) -> list[dict[str, Any]]:
    """One row an outcome, in plain numbers; `same_as_psnr_db` is that of the worst image, None where all are equal."""
    first = _shown(outcomes)
    rows = []
    for outcome in outcomes:
        reference = first[outcome.variant]
        others = [
            psnr(np.asarray(ours), np.asarray(theirs))
            for name, images in outcome.images.items()
            for ours, theirs in zip(images, reference.images[name], strict=True)
        ]
        rows.append(
            {
                "variant": outcome.variant,
                "engine": outcome.engine,
                "seconds": {name: round(value, 3) for name, value in outcome.seconds.items()},
                "istd": {name: _smoothness(outcome.images[name]).istd for name in MORPHS if name in outcome.images},
                "inversion_psnr_db": psnr(np.asarray(scene.images[0]), np.asarray(outcome.images["inversion"][0])),
                "same_as": None if outcome is reference else reference.engine,
                "same_as_psnr_db": None if outcome is reference or math.isinf(min(others)) else min(others),
            }
        )
    return rows


def table(rows: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """The rows of `measure` as the page and the terminal show them, in columns that fit both."""
    jobs, morphs = (list(dict.fromkeys(name for row in rows for name in row[key])) for key in ("seconds", "istd"))

    def number(values: dict[str, float], name: str, decimals: int) -> str:
        return f"{values[name]:.{decimals}f}" if name in values else ""

    return [
        {
            "model": row["variant"],
            "engine": row["engine"],
            **{f"{name} s": number(row["seconds"], name, 2) for name in jobs},
            **{f"ISTD {name}": number(row["istd"], name, 1) for name in morphs},
            "PSNR dB": f"{row['inversion_psnr_db']:.2f}",
            "vs first engine": "" if row["same_as"] is None else _decibels(row["same_as_psnr_db"]),
        }
        for row in rows
    ]


def _smoothness(frames: Sequence[Image.Image]) -> Istd:
    return istd([np.stack([np.asarray(frame) for frame in frames])])


def _decibels(value: float | None) -> str:
    return "identical" if value is None else f"{value:.1f} dB"


def _shown(outcomes: Sequence[Outcome]) -> dict[str, Outcome]:
    """The outcome of each variant that is shown: that of the first engine."""
    shown: dict[str, Outcome] = {}
    for outcome in outcomes:
        shown.setdefault(outcome.variant, outcome)
    return shown


def media(outcomes: Sequence[Outcome], scene: Scene) -> dict[str, bytes]:
    """Film and contact sheet of each morph, and the single images, by file name."""
    files = {f"original-{i}.png": writers.encode_png(image) for i, image in enumerate(scene.images, 1)}
    files |= {f"edit-{i}-original.png": writers.encode_png(edit.image) for i, edit in enumerate(scene.edits, 1)}
    for variant, outcome in _shown(outcomes).items():
        for name in (name for name in MORPHS if name in outcome.images):
            frames = outcome.images[name]
            files[f"morph-{name}-{variant}.png"] = writers.encode_png(writers.contact_sheet(frames, len(frames)))
            files[f"morph-{name}-{variant}.mp4"] = writers.encode_mp4(frames)
            files[f"morph-{name}-{variant}.webp"] = writers.encode_webp(writers.there_and_back(frames))
        files[f"inversion-{variant}.png"] = writers.encode_png(outcome.images["inversion"][0])
        for i, image in enumerate(outcome.images["edit"], 1):
            files[f"edit-{i}-{variant}.png"] = writers.encode_png(image)
    return files


def command(output: Path, model: str, lora: str | None, small: bool) -> str:
    """The command line that made this demo."""
    words = ["smooth-rt", "demo", "--output", str(output)]
    if model != "default":
        words += ["--model", model]
    if lora != ("default" if model == "default" else None):
        words += ["--lora", lora or "none"]
    return shlex.join([*words, "--small"] if small else words)


def environment() -> dict[str, str]:
    """Machine and versions, as the page shows them."""
    found = {
        "smooth-rt": __version__,
        "Python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": str(os.cpu_count() or "unknown"),
    }
    for library in LIBRARIES:
        try:
            found[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or "unknown")


def _takers(shown: Sequence[Outcome]) -> str:
    """The engines that took the gradients."""
    eager = "PyTorch, for which none have to be built"
    return " and ".join(dict.fromkeys(eager if one.gradients == "eager" else one.gradients for one in shown))


def _evener(morphs: Sequence[report.Morph]) -> str:
    """Of how many paths the last variant, that with the LoRA, has the smaller ISTD."""
    scores = [list(morph.istd.values()) for morph in morphs]
    if not scores or len(scores[0]) < 2:
        return ""
    count = sum(each[-1] < each[0] for each in scores)
    return f"With the Smooth-LoRA {count} of these {len(scores)} paths are evener (a smaller ISTD). "


def describe(
    outcomes: Sequence[Outcome], scene: Scene, rows: Sequence[dict[str, Any]], settings: Settings, typed: str
) -> report.Page:
    """The page of the demo: what the first engine computed, with the numbers of all."""
    shown = _shown(outcomes)
    guidance = f"guidance {scene.guidance_scale:g}"
    captions = {
        "images": f"“{scene.captions[0]}” to “{scene.captions[1]}”, both inverted first, without guidance",
        "null-text": f"{guidance}; both share the embeddings that were fitted",
        "seeds": f"“{scene.prompt}”, seed {' to seed '.join(map(str, settings.seeds))}, {guidance}",
    }
    morphs = []
    for name, title in MORPHS.items():
        frames = {variant: outcome.images[name] for variant, outcome in shown.items() if name in outcome.images}
        if not frames:
            continue
        scores = {variant: _smoothness(images) for variant, images in frames.items()}
        distances = {variant: score.distances[0] for variant, score in scores.items()}
        morphs.append(
            report.Morph(title, captions[name], frames, distances, {v: score.istd for v, score in scores.items()})
        )
    inversion = report.Inversion(
        scene.captions[0],
        scene.images[0],
        {variant: outcome.images["inversion"][0] for variant, outcome in shown.items()},
        {row["variant"]: row["inversion_psnr_db"] for row in reversed(rows)},
    )
    edits = [
        report.Edit(e.source_prompt, e.prompt, e.image, {v: outcome.images["edit"][i] for v, outcome in shown.items()})
        for i, e in enumerate(scene.edits)
    ]
    engines = list(dict.fromkeys(outcome.engine for outcome in outcomes))
    few = settings.num_inference_steps < Settings().num_inference_steps
    lead = (f"{FEW_STEPS} " if few else "") + (
        "Two images turn into each other, a real image is inverted and rebuilt, and images are edited by prompt, "
        f"{'with and without the Smooth-LoRA, ' if len(shown) > 1 else ''}on engines built on the spot "
        f"({', '.join(engines)}). The pictures are those of {engines[0]}; {settings.num_inference_steps} DDIM steps. "
        f"{_evener(morphs)}Each ISTD here is that of one path, and paths differ much; smooth-rt evaluate istd takes a "
        "hundred, between seeds. The first path runs without guidance, as its inversion does; under guidance DDIM "
        "inversion does not come back to its image, and null-text inversion does: an embedding a step is fitted for "
        f"that, in {settings.null_text_steps} steps, by gradients of {_takers(list(shown.values()))}. {scene.note}"
    )
    return report.Page(
        title="Smooth morphs on real engines",
        lead=lead.strip(),
        version=__version__,
        morphs=morphs,
        inversions=[inversion],
        edits=edits,
        rows=table(rows),
        environment=environment(),
        commands=[typed],
    )
