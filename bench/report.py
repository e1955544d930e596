"""One report in three forms: tables on the terminal, bench.md for people, bench.json for machines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bench.results import GenerateResult, MorphResult, NetworkResult, Report, Timing
from smooth_rt.errors import InputError
from smooth_rt.writers import write_files

__all__ = ["TextTable", "markdown", "print_report", "read_report", "tables", "write_report"]


@dataclass(frozen=True)
class TextTable:
    """A table as text; the first column is words, the rest are figures with their unit in the heading."""

    title: str
    note: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def tables(report: Report) -> list[TextTable]:
    """Everything the report says, as tables."""
    settings, ceiling = report.settings, report.ceiling
    size = f"{settings.image_width}x{settings.image_height} px"
    runs = f"{settings.repeats} timed runs after {settings.warmup} to warm up, engines in turn"
    floor = f"floor: counted FLOP over {ceiling.gflop_per_s:.0f} GFLOP/s ({ceiling.library})"
    return [
        TextTable("Environment", "", ("what", "value"), _environment_rows(report)),
        TextTable(
            "Matrix rate, fp32",
            "best of several products of square matrices; the highest is the ceiling that floors are computed with",
            ("library", "side", "GFLOP/s"),
            tuple((rate.library, str(rate.side), f"{rate.gflop_per_s:.1f}") for rate in report.matrix_rates),
        ),
        TextTable(
            "Floor of one row",
            floor,
            ("network", "GFLOP", "floor ms"),
            tuple(_floor_rows(report)),
        ),
        TextTable(
            "Networks",
            f"{size}, fp32, {runs}; the UNet has two rows an image, one for each half of guidance; parity: the largest "
            "relative L2 error of any output against the torch module on fresh inputs",
            ("network", "engine", "images", "rows", *_timing_headings("ms"), "x floor", "parity"),
            tuple(_network_row(result) for result in report.networks),
        ),
        TextTable(
            "Whole morph between two seeds",
            f"{size}, {settings.frames} frames, {settings.steps} steps, guidance {settings.guidance_scale:g}, text to "
            f"pictures; {runs}; {floor}; peak memory: resident set of a fresh process that does only this",
            ("engine", "batch", *_timing_headings("s"), "frames/s", "TFLOP", "floor s", "x floor", "peak MB"),
            tuple(_morph_row(result) for result in report.morph),
        ),
        TextTable(
            "Generate, beside diffusers",
            f"{size}, {settings.steps} steps, guidance {settings.guidance_scale:g}, same latents; {runs}; speed-up: "
            "diffusers' median over the engine's, same run; PSNR: the worst image against diffusers' image",
            ("pipeline", "images", *_timing_headings("s"), "images/s", "speed-up", "PSNR dB"),
            tuple(_generate_row(result) for result in report.generate),
        ),
    ]


def markdown(report: Report) -> str:
    """The whole report as one Markdown page."""
    lines = ["# smooth-rt benchmark", "", f"Started {report.started}, took {report.seconds:.0f} s."]
    for warning in report.warnings:
        lines += ["", f"> **Warning:** {_cell(warning)}"]
    for table in tables(report):
        figures = [":---", *["---:"] * (len(table.headings) - 1)] if len(table.headings) > 2 else [":---", ":---"]
        lines += ["", f"## {table.title}", ""]
        lines += [table.note[0].upper() + table.note[1:] + ".", ""] if table.note else []
        lines += [_markdown_row(row) for row in (table.headings, tuple(figures), *table.rows)]
    return "\n".join(lines) + "\n"


def print_report(report: Report, console: Console) -> None:
    """Print every table and warning to `console`."""
    for text in tables(report):
        table = Table(title=text.title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
        for i, heading in enumerate(text.headings):
            words = i == 0 or len(text.headings) == 2
            table.add_column(heading, justify="left" if words else "right", overflow="fold")
        for row in text.rows:
            table.add_row(*(escape(cell) for cell in row))
        console.print(table)
        if text.note:
            console.print(f"[dim]{escape(text.note)}[/dim]")
    for warning in report.warnings:
        console.print(f"[yellow]warning:[/yellow] {escape(warning)}", soft_wrap=True)


def write_report(report: Report, folder: Path) -> list[Path]:
    """Write bench.json and bench.md into `folder`, both or neither; returns their paths.

    Raises:
        InputError: `folder` lies under a file or is not writable.
        SmoothRTError: the disk is full or refuses.
    """
    files = {
        "bench.json": (report.model_dump_json(indent=2) + "\n").encode(),
        "bench.md": markdown(report).encode(),
    }
    return write_files(folder, files)


def read_report(path: Path) -> Report:
    """Read a bench.json.

    Raises:
        InputError: the file cannot be read or is not a report of this format.
    """
    try:
        return Report.model_validate_json(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); name a bench.json") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise InputError(f"{path}: not a benchmark report ({where}: {first['msg']}); run python -m bench") from error


def _timing_headings(unit: str) -> tuple[str, str, str]:
    return f"median {unit}", f"p90 {unit}", f"p99 {unit}"


def _timing_cells(timing: Timing, per_second: float, digits: int) -> tuple[str, ...]:
    return tuple(f"{value * per_second:.{digits}f}" for value in (timing.median_s, timing.p90_s, timing.p99_s))


def _floor_rows(report: Report) -> Iterator[tuple[str, ...]]:
    """FLOPs and floor are proportional to the rows, so one line a network says them all."""
    for name in dict.fromkeys(result.network for result in report.networks):
        one = next(result for result in report.networks if result.network == name)
        yield name, f"{one.flop / one.rows / 1e9:.4g}", f"{one.floor_s / one.rows * 1e3:.3g}"


def _network_row(result: NetworkResult) -> tuple[str, ...]:
    worst = max(parity.relative for parity in result.parity)
    return (
        result.network, result.engine, str(result.images), str(result.rows), *_timing_cells(result.timing, 1e3, 2),
        f"{result.times_floor:.2f}", f"{worst:.1e}",
    )  # fmt: skip


def _morph_row(result: MorphResult) -> tuple[str, ...]:
    return (
        result.engine, str(result.batch_size), *_timing_cells(result.timing, 1, 3), f"{result.frames_per_s:.2f}",
        f"{result.flop / 1e12:.4g}", f"{result.floor_s:.3g}", f"{result.times_floor:.2f}",
        f"{result.peak_memory_bytes / 1e6:.0f}",
    )  # fmt: skip


def _generate_row(result: GenerateResult) -> tuple[str, ...]:
    psnr = "identical" if result.psnr_db is None else f"{result.psnr_db:.1f}"
    return (
        result.engine, str(result.images), *_timing_cells(result.timing, 1, 3), f"{result.images_per_s:.2f}",
        f"{result.speedup:.2f}x", "(reference)" if result.engine == "diffusers" else psnr,
    )  # fmt: skip


def _environment_rows(report: Report) -> tuple[tuple[str, ...], ...]:
    machine, settings = report.environment, report.settings
    memory = "unknown" if machine.memory_bytes is None else f"{machine.memory_bytes / 1e9:.1f} GB"
    load = "unknown" if machine.load_average_1min is None else f"{machine.load_average_1min:.2f}"
    lora = "none" if settings.lora is None else f"{settings.lora}, strength {settings.lora_strength:g}, fused"
    threads = {**machine.threads, **machine.thread_variables}
    revision = "" if settings.revision is None else f" at {settings.revision}"
    return (
        ("processor", machine.cpu),
        ("instruction sets", ", ".join(machine.instructions) or "unknown"),
        ("cores", f"{machine.usable_cores} usable of {machine.logical_cores}"),
        ("memory", memory),
        ("system", machine.system),
        ("versions", ", ".join(f"{name} {version}" for name, version in machine.versions.items())),
        ("threads", ", ".join(f"{name} {count}" for name, count in threads.items())),
        ("load average at start", f"{load} (1 minute)"),
        ("model", f"{settings.model}{revision}"),
        ("LoRA", lora),
        ("prompt and seed", f"{settings.prompt!r}, {settings.seed}"),
        *((f"engine {asked}", ran) for asked, ran in report.choices.items()),
    )


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(_cell(cell) for cell in cells) + " |"
