"""What is run: each network alone, the whole morph, and text to image beside diffusers. Engines take turns."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

import numpy as np
import torch

from bench.floor import count_flop, floor_seconds
from bench.memory import Morph, peaks_of_morph
from bench.peers import diffusers_images, diffusers_pipeline, genai_images, genai_pipeline, worst_psnr
from bench.results import GenerateResult, MatrixRate, MorphResult, NetworkResult, Settings
from bench.subject import Subject
from bench.timing import interleave, summarise
from engines.contract import NetworkName, contract
from engines.manifest import Parity
from export.graphs import Case, random_inputs
from export.verify import verify
from smooth_rt.pipeline import SmoothPipeline

__all__ = ["MEASURED", "PEER", "Say", "flop_of_morph", "flop_per_row", "measure_networks", "measure_pipelines"]

# The networks that a morph between two seeds runs.
MEASURED: tuple[NetworkName, ...] = ("text_encoder", "unet", "vae_decoder")
PEER = "diffusers"

Say = Callable[[str], None]
PeerImages = Callable[[str, torch.Tensor, int, float], np.ndarray]


def passes(settings: Settings) -> int:
    """Rows of the UNet an image: guidance runs it with and without the prompt; a scale of 1 needs one of them."""
    return 1 if settings.guidance_scale == 1 else 2


def _inputs(subject: Subject, network: NetworkName, rows: int, settings: Settings) -> dict[str, torch.Tensor]:
    factor = subject.model.dims.vae_factor
    sizes = {"batch": rows, "height": settings.image_height // factor, "width": settings.image_width // factor}
    case = Case(sizes, 1 / float(subject.model.vae.config.scaling_factor))
    generator = torch.Generator().manual_seed(settings.seed)
    return random_inputs(contract(network, subject.model.dims), subject.model.dims, case, generator)


def flop_per_row(subject: Subject, settings: Settings) -> dict[NetworkName, int]:
    """FLOPs of one row of each measured network at the size of the benchmark; n rows cost n times as much."""
    return {
        name: count_flop(subject.modules[name], list(_inputs(subject, name, 1, settings).values())) for name in MEASURED
    }


def flop_of_morph(flop: dict[NetworkName, int], settings: Settings) -> int:
    """FLOPs of the whole morph: the prompt (and the empty one that guidance needs), all steps, all decoding."""
    frame = settings.steps * passes(settings) * flop["unet"] + flop["vae_decoder"]
    return passes(settings) * flop["text_encoder"] + settings.frames * frame


def measure_networks(
    subject: Subject, settings: Settings, flop: dict[NetworkName, int], ceiling: MatrixRate, say: Say
) -> list[NetworkResult]:
    """Each network on each engine at each batch size; every engine proves its parity before any is timed.

    Raises:
        ParityError: an engine's output is over its tolerance.
    """
    results = []
    for name in MEASURED:
        with ExitStack() as stack:
            engines = {backend: stack.enter_context(subject.engine(name, backend)) for backend in subject.backends}
            parity: dict[str, tuple[Parity, ...]] = {}
            for backend, engine in engines.items():
                say(f"{name}: parity of {backend}")
                # Another seed than the one the bundle was verified with: the inputs are fresh.
                seed = settings.seed + 1
                found = verify(
                    engine, subject.modules[name], engine.network, subject.model.dims, settings.precision, seed
                )
                parity[backend] = tuple(found)
            for images in settings.batch_sizes:
                say(f"{name}: times at {images}")
                rows = images * (passes(settings) if name == "unet" else 1)
                inputs = _inputs(subject, name, rows, settings)
                runs = {backend: partial(engine.infer, **inputs) for backend, engine in engines.items()}
                for backend, seconds in interleave(runs, settings.repeats, settings.warmup).items():
                    timing = summarise(seconds)
                    floor = floor_seconds(rows * flop[name], ceiling)
                    results.append(
                        NetworkResult(
                            network=name,
                            engine=engines[backend].backend,
                            images=images,
                            rows=rows,
                            parity=parity[backend],
                            timing=timing,
                            flop=rows * flop[name],
                            floor_s=floor,
                            times_floor=timing.median_s / floor,
                        )
                    )
    return results


def measure_pipelines(
    subject: Subject, settings: Settings, flop: dict[NetworkName, int], ceiling: MatrixRate, say: Say
) -> tuple[list[MorphResult], list[GenerateResult]]:
    """The whole morph and text to image on every engine, the latter beside diffusers.

    Raises:
        EngineError: an engine failed.
    """
    peaks = {}
    for backend in subject.backends:
        say(f"morph: peak memory of {backend}")
        peaks[backend] = peaks_of_morph(_morph(subject, settings, backend))
    morphs: list[MorphResult] = []
    generated: list[GenerateResult] = []
    peers = _peers(subject)
    with ExitStack() as stack:
        pipes = {choice.backend: stack.enter_context(subject.pipeline(choice)) for choice in subject.choices}
        for size in settings.batch_sizes:
            for pipe in pipes.values():
                pipe.batch_size = size
            say(f"morph: times at {size}")
            morphs += _morph_results(pipes, settings, size, flop_of_morph(flop, settings), ceiling, peaks)
            say(f"generate: times at {size}")
            generated += _generate_results(pipes, peers, settings, size)
    return morphs, generated


def _morph(subject: Subject, settings: Settings, backend: str) -> Morph:
    return Morph(
        engine=backend,
        bundle=None if backend == "eager" or subject.bundle is None else subject.bundle.path,
        model=settings.model,
        config=settings.config,
        lora=settings.lora,
        lora_strength=settings.lora_strength,
        batch_sizes=settings.batch_sizes,
        prompt=settings.prompt,
        frames=settings.frames,
        height=settings.image_height,
        width=settings.image_width,
        guidance_scale=settings.guidance_scale,
        seed=settings.seed,
    )


def _morph_results(
    pipes: dict[str, SmoothPipeline],
    settings: Settings,
    size: int,
    flop: int,
    ceiling: MatrixRate,
    peaks: dict[str, dict[int, int]],
) -> list[MorphResult]:
    def run(pipe: SmoothPipeline) -> object:
        return pipe.interpolate(
            settings.prompt,
            frames=settings.frames,
            generator=[torch.Generator().manual_seed(settings.seed + i) for i in range(2)],
            height=settings.image_height,
            width=settings.image_width,
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance_scale,
        )

    runs = {backend: partial(run, pipe) for backend, pipe in pipes.items()}
    floor = floor_seconds(flop, ceiling)
    results = []
    for backend, seconds in interleave(runs, settings.repeats, settings.warmup).items():
        timing = summarise(seconds)
        results.append(
            MorphResult(
                engine=pipes[backend].engine,
                batch_size=size,
                frames=settings.frames,
                steps=settings.steps,
                timing=timing,
                frames_per_s=settings.frames / timing.median_s,
                flop=flop,
                floor_s=floor,
                times_floor=timing.median_s / floor,
                peak_memory_bytes=peaks[backend][size],
            )
        )
    return results


def _peers(subject: Subject) -> dict[str, PeerImages]:
    """By name, what makes images of (prompt, latents, steps, guidance_scale) beside the engines."""
    peers: dict[str, PeerImages] = {PEER: partial(diffusers_images, diffusers_pipeline(subject.model))}
    if subject.bundle is not None and "openvino" in subject.backends:
        genai = genai_pipeline(subject.bundle.path / subject.bundle.find("openvino").variant.name)
        if genai is not None:
            peers["openvino-genai"] = partial(genai_images, genai, subject.model.dims.vae_factor)
    return peers


def _generate_results(
    pipes: dict[str, SmoothPipeline], peers: dict[str, PeerImages], settings: Settings, images: int
) -> list[GenerateResult]:
    seeds = range(settings.seed, settings.seed + images)
    latents = next(iter(pipes.values())).draw_noise(
        images, settings.image_height, settings.image_width, [torch.Generator().manual_seed(seed) for seed in seeds]
    )
    last: dict[str, np.ndarray] = {}

    def run(pipe: SmoothPipeline) -> None:
        made = pipe(
            settings.prompt,
            num_images_per_prompt=images,
            latents=latents,
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance_scale,
            output_type="np",
        )
        last[pipe.engine] = np.asarray(made.images)

    def run_peer(name: str) -> None:
        last[name] = peers[name](settings.prompt, latents, settings.steps, settings.guidance_scale)

    runs: dict[str, Callable[[], object]] = {name: partial(run_peer, name) for name in peers}
    runs.update({pipe.engine: partial(run, pipe) for pipe in pipes.values()})
    times = {name: summarise(s) for name, s in interleave(runs, settings.repeats, settings.warmup).items()}
    return [
        GenerateResult(
            engine=name,
            images=images,
            steps=settings.steps,
            timing=timing,
            images_per_s=images / timing.median_s,
            speedup=times[PEER].median_s / timing.median_s,
            psnr_db=worst_psnr(last[name], last[PEER]),
        )
        for name, timing in times.items()
    ]
