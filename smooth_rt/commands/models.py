"""fuse, build-engine: what becomes of weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from smooth_rt.commands.options import ModelOptions, listed
from smooth_rt.commands.progress import build_progress
from smooth_rt.commands.running import Stopwatch, opened_model
from smooth_rt.errors import InputError

if TYPE_CHECKING:
    from engines.bundle import Bundle
    from engines.variant import Profile

__all__ = ["build_engine", "fuse", "read_profiles"]

Output = Annotated[Path, typer.Option(help="The folder to write.", show_default=False)]


def fuse(options: ModelOptions, output: Output) -> dict[str, Any]:
    """Fuse a LoRA into a model and write a complete diffusers folder."""
    if options.chosen_lora is None:
        raise InputError("--lora: missing; name the LoRA to fuse")
    from smooth_rt.lora import fuse_to_folder, read_lora

    lora = read_lora(options.chosen_lora)
    written = fuse_to_folder(opened_model(options), lora, options.lora_strength, output)
    named = {"model": options.model, "lora": options.chosen_lora, "lora_strength": options.lora_strength}
    return {"command": "fuse", **named, "layers": len(lora.layers), "output": str(written)}


def build_engine(
    options: ModelOptions,
    backend: Annotated[
        str, typer.Option(help="Comma-separated: onnxruntime (or onnx), openvino, inductor, tensorrt, tensorrt-rtx.")
    ] = "onnxruntime,openvino",
    provider: Annotated[
        str | None,
        typer.Option(
            help="Of onnxruntime: cpu, cuda, tensorrt or tensorrt-rtx. `--backend onnxruntime-cuda` says the same.",
            show_default=False,
        ),
    ] = None,
    precision: Annotated[
        str, typer.Option(help="Of the graphs: fp32, fp16, bf16 or int8; int8 is calibrated on runs of the model.")
    ] = "fp32",
    batches: Annotated[
        list[str] | None,
        typer.Option(
            "--batch",
            metavar="N|MIN:OPT:MAX",
            help="Images a call. Given with --height and --width; several times for several profiles. Left out: every "
            "size, where the backend can.",
            show_default=False,
        ),
    ] = None,
    heights: Annotated[
        list[str] | None, typer.Option("--height", metavar="N|MIN:OPT:MAX", help="Pixels.", show_default=False)
    ] = None,
    widths: Annotated[
        list[str] | None, typer.Option("--width", metavar="N|MIN:OPT:MAX", help="Pixels.", show_default=False)
    ] = None,
    lora_mode: Annotated[
        str,
        typer.Option(
            help="fused (fastest); or one build for every strength, set when it runs: refit (as fast, a switch opens "
            "the engine anew) or runtime (a switch takes no time, each step a little more)."
        ),
    ] = "fused",
    gradients: Annotated[
        str | None,
        typer.Option(
            metavar="text,sample,both,features[:BLOCK]",
            help="Also the UNet's gradients: to the text embeddings (null-text inversion), the latents (SPDInv), both "
            "in one call, or those of its features (drag editing), the output of the last up block but one or of "
            "another: features:up_blocks.1. A bundle that is there is added to.",
            show_default=False,
        ),
    ] = None,
    convolution: Annotated[
        str,
        typer.Option(
            help="direct, or winograd: faster 3x3 convolutions, for openvino in fp32 and one height and width; larger."
        ),
    ] = "direct",
    kernels: Annotated[
        str,
        typer.Option(
            help="backend, or native: the UNet's attention in kernels of this project, for openvino; compiled once by "
            "this machine's C++ compiler."
        ),
    ] = "backend",
    gpu_arch: Annotated[
        str | None,
        typer.Option(
            metavar="sm80,sm89|rtx",
            help="For tensorrt-rtx and onnxruntime's providers: built ahead of time for these; rtx: one engine of "
            "tensorrt-rtx for every GPU that it supports. Left out: the GPU at hand, or else every one.",
            show_default=False,
        ),
    ] = None,
    calibration_prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="For int8: a prompt a line; an engine that is there on other prompts is built anew. Left out: those "
            "of the engine that is there, or prompts that ship.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="The bundle's folder. Left out: a folder of the cache.", show_default=False)
    ] = None,
) -> dict[str, Any]:
    """Export every network, compare it with PyTorch and write a bundle of engines."""
    backends = _backends(backend, provider)
    from smooth_rt.build import ensure_engines
    from smooth_rt.calibration import read_prompts

    profiles = read_profiles(batches or [], heights or [], widths or [])
    prompts = [] if calibration_prompts is None else read_prompts(calibration_prompts)
    watch = Stopwatch()
    with build_progress() as progress:
        model = options.model if options.model_config is None else opened_model(options)
        built = ensure_engines(
            model,
            options.chosen_lora,
            options.lora_strength,
            backends,
            output,
            progress,
            precision=precision,
            profiles=profiles,
            calibration_prompts=prompts,
            gpu_arch=gpu_arch,
            lora_mode=lora_mode,
            gradients=[] if gradients is None else listed(gradients, "gradients"),
            convolution=convolution,
            kernels=kernels,
        )
    parity = [
        {
            "engine": variant.variant.name,
            "network": record.network,
            "output": error.output,
            "relative error": error.relative,
            "tolerance": error.tolerance,
        }
        for variant in built.bundle.variants
        for record in variant.engines
        for error in record.parity
    ]
    return {
        "command": "build-engine",
        "output": str(built.bundle.path),
        "reused": built.reused,
        "reason": built.reason,
        "seconds": watch.seconds,
        "unproved": _unproved(built.bundle),
        "parity": parity,
    }


def _unproved(bundle: Bundle) -> str | None:
    """The engines that were built where they cannot run, and what proves them."""
    names = [built.variant.name for built in bundle.variants if not built.proved]
    if not names:
        return None
    return f"{', '.join(names)}; run `smooth-rt engines verify --parity {bundle.path}` on a machine that they are for"


def _backends(backend: str, provider: str | None) -> list[str]:
    """The backends of --backend, onnxruntime among them on --provider; onnx is another name of onnxruntime.

    Raises:
        InputError: there is no such provider, or onnxruntime is not among them.
    """
    from engines.providers import joined

    names = ["onnxruntime" if name == "onnx" else name for name in listed(backend)]
    if provider is not None and "onnxruntime" not in names:
        raise InputError(f"--provider={provider}: is one of onnxruntime's; name it with --backend")
    return list(dict.fromkeys(joined(name, provider) if name == "onnxruntime" else name for name in names))


def read_profiles(batch: Sequence[str], height: Sequence[str], width: Sequence[str]) -> list[Profile]:
    """The profiles of --batch, --height and --width: the first of each make one, the second of each another.

    Raises:
        InputError: one is missing beside the others, or is no size.
    """
    from engines.variant import Profile, Span

    given = {"batch": batch, "height": height, "width": width}
    if len({len(one) for one in given.values()}) > 1:
        said = ", ".join(f"{len(one)} of --{name}" for name, one in given.items())
        raise InputError(f"profiles: {said}; give all three for each profile")
    return [
        Profile(**{name: Span.parse(text, name) for name, text in zip(given, sizes, strict=True)})
        for sizes in zip(*given.values(), strict=True)
    ]
