"""Options that several commands share, each said once."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from engines.paths import expanded
from smooth_rt.errors import InputError
from smooth_rt.ranges import RANGES, check

__all__ = ["Method", "ModelOptions", "OutputOptions", "Prompts", "RunOptions", "flattened", "listed"]

JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.")]
DebugFlag = Annotated[bool, typer.Option("--debug", help="Show the whole traceback of an error.")]
Prompts = Annotated[list[str] | None, typer.Option("--prompt", help="May be given several times.", show_default=False)]
Method = Annotated[
    str,
    typer.Option(
        help="How images are inverted: ddim, ddim-without-text, negative-prompt, null-text, direct, fixed-point, "
        "spdinv, easyinv, edict or belm. For null-text and spdinv gradients are built, once."
    ),
]


@dataclass(frozen=True)
class OutputOptions:
    """How a command answers. Both are read in `smooth_rt.cli.main` as well, which prints results and errors."""

    json: JsonFlag = False
    debug: DebugFlag = False


@dataclass(frozen=True)
class ModelOptions(OutputOptions):
    """Which weights."""

    model: Annotated[
        str, typer.Option(help="'default' (shipped), a diffusers folder, a hub id or a .safetensors checkpoint.")
    ] = "default"
    model_config: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER_OR_HUB_ID",
            help="For a .safetensors checkpoint: where its configs and tokenizer are. Left out: those that ship.",
            show_default=False,
        ),
    ] = None
    lora: Annotated[
        str | None,
        typer.Option(
            help="A Smooth-LoRA: 'default' (shipped), a file, folder or hub id; 'none' switches it off. Left out: the "
            "shipped one with the default model, else none.",
            show_default=False,
        ),
    ] = None
    lora_strength: Annotated[float, typer.Option(help="1 fuses the LoRA as trained, 0 not at all.")] = 1.0

    @property
    def inputs(self) -> list[str]:
        """Where weights are read from, as far as it is a path: no output may take its place."""
        return [source for source in (self.model, self.lora) if source is not None]

    @property
    def chosen_lora(self) -> str | None:
        """The LoRA's source, or None for no LoRA."""
        if self.lora is None:
            return "default" if self.model == "default" else None
        return None if self.lora.lower() == "none" else self.lora


@dataclass(frozen=True)
class RunOptions(ModelOptions):
    """Which engine, and how it samples."""

    engine: Annotated[
        str, typer.Option(help="auto, eager, onnxruntime, openvino, inductor, tensorrt or tensorrt-rtx.")
    ] = "auto"
    provider: Annotated[
        str | None,
        typer.Option(
            help="Of onnxruntime: cpu, cuda, tensorrt or tensorrt-rtx. `--engine onnxruntime-cuda` says the same.",
            show_default=False,
        ),
    ] = None
    engines: Annotated[
        Path | None,
        typer.Option(
            metavar="BUNDLE",
            help="Run on this bundle, a folder or a name of `engines list`, in the place of --model and --lora.",
            show_default=False,
        ),
    ] = None
    precision: Annotated[
        str | None,
        typer.Option(
            help="fp32, fp16, bf16 or int8, as far as the engine has it. Left out: fp32, or with --engines the most "
            "exact that the bundle has.",
            show_default=False,
        ),
    ] = None
    convolution: Annotated[
        str | None,
        typer.Option(
            help="With --engines: direct or winograd, of a bundle that has both. Left out: direct.", show_default=False
        ),
    ] = None
    kernels: Annotated[
        str | None,
        typer.Option(
            help="backend, or native (openvino, see build-engine). Left out: backend, or with --engines what the "
            "bundle has.",
            show_default=False,
        ),
    ] = None
    num_inference_steps: Annotated[int, typer.Option(help="DDIM steps.")] = 50
    guidance_scale: Annotated[
        float | None,
        typer.Option(
            help="w in uncond + w * (cond - uncond). Left out: 7.5, and 1 where DDIM inverts images.",
            show_default=False,
        ),
    ] = None
    seed: Annotated[int, typer.Option(help="Of the first image; each further image takes the next number.")] = 0
    height: Annotated[int | None, typer.Option(help="Pixels; the model's own size if left out.")] = None
    width: Annotated[int | None, typer.Option(help="Pixels; the model's own size if left out.")] = None
    output: Annotated[
        Path, typer.Option(help="Folder for the results; made if need be. Files of the same names are replaced.")
    ] = Path("smooth-rt-out")

    @property
    def guidance(self) -> float:
        """The guidance of sampling from noise."""
        return 7.5 if self.guidance_scale is None else self.guidance_scale


def listed(text: str, option: str | None = None) -> list[str]:
    """The parts of a comma-separated option, each once.

    Raises:
        InputError: there is none, and `option`, which must have one, is named.
    """
    found = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if option is not None and not found:
        raise InputError(f"{option}={text!r}: names none; name at least one")
    return found


def flattened(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` as a typer callback in which each field of its option dataclass is an option of its own.

    Before anything else is done, `~` is expanded in paths, and the values are held against `smooth_rt.ranges`. A
    function without such a parameter still gets --json and --debug, and checks its values itself.
    """
    hints = get_type_hints(function, include_extras=True)
    name: str | None = next((name for name, hint in hints.items() if is_dataclass(hint)), None)
    group: type[OutputOptions] = OutputOptions if name is None else hints[name]
    grouped = get_type_hints(group, include_extras=True)
    keyword = inspect.Parameter.KEYWORD_ONLY
    own = [
        parameter.replace(annotation=hints[parameter.name], kind=keyword)
        for parameter in inspect.signature(function).parameters.values()
        if parameter.name != name
    ]
    # The fields of a base class come first; on the help page what is special comes first, --json and --debug last.
    ordered = sorted(fields(group), key=lambda field: field.name in ("json", "debug"))
    shared = [inspect.Parameter(f.name, keyword, default=f.default, annotation=grouped[f.name]) for f in ordered]

    def command(**values: Any) -> Any:
        values = {option: _expanded(value) for option, value in values.items()}
        if name is not None:
            check(**{option: value for option, value in values.items() if option in RANGES and value is not None})
        chosen = {field.name: values.pop(field.name) for field in fields(group)}
        return function(**values) if name is None else function(**values, **{name: group(**chosen)})

    command.__name__ = function.__name__
    command.__doc__ = function.__doc__
    command.__signature__ = inspect.Signature([*own, *shared])  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in (*own, *shared)}
    return command


def _expanded(value: Any) -> Any:
    """`value`, with `~` expanded in what are paths; shells leave it in `--output=~/folder`."""
    if isinstance(value, (list, tuple)):
        return type(value)(_expanded(one) for one in value)
    return expanded(value) if isinstance(value, Path) else value
