"""The report round-trips through JSON, and its two readable forms say what it holds."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from pydantic import ValidationError
from rich.console import Console

from bench.environment import environment
from bench.report import markdown, print_report, read_report, tables, write_report
from bench.results import (
    GenerateResult,
    MatrixRate,
    MorphResult,
    NetworkResult,
    Report,
    Settings,
)
from bench.timing import summarise
from engines.manifest import Parity
from smooth_rt.errors import InputError

PARITY = Parity(output="noise_pred", relative=1e-6, max_abs=2e-6, tolerance=1e-4, cases=3, worst={"batch": 1})


@pytest.fixture
def report() -> Report:
    timing = summarise([0.5, 0.5, 1.0])
    return Report(
        started="2030-01-02T03:04:05+00:00",
        seconds=12.0,
        environment=environment(),
        settings=Settings(
            model="a|model",
            revision=None,
            lora="[bold]lora",
            lora_strength=0.5,
            engines=("eager", "auto"),
            batch_sizes=(2,),
            image_height=16,
            image_width=24,
            steps=3,
            guidance_scale=7.5,
            frames=4,
            repeats=3,
            warmup=1,
            seed=0,
            prompt="a dog",
        ),
        choices={"eager": "eager: asked for", "auto": "openvino: fastest"},
        warnings=("the machine is busy",),
        matrix_rates=(
            MatrixRate(library="torch", side=64, gflop_per_s=100.0),
            MatrixRate(library="openvino", side=64, gflop_per_s=400.0),
        ),
        networks=(
            NetworkResult(
                network="unet",
                engine="openvino",
                images=2,
                rows=4,
                parity=(PARITY,),
                timing=timing,
                flop=40_000_000_000,
                floor_s=0.1,
                times_floor=5.0,
            ),
        ),
        morph=(
            MorphResult(
                engine="openvino",
                batch_size=2,
                frames=4,
                steps=3,
                timing=timing,
                frames_per_s=8.0,
                flop=80_000_000_000,
                floor_s=0.2,
                times_floor=2.5,
                peak_memory_bytes=500_000_000,
            ),
        ),
        generate=(
            GenerateResult(
                engine="eager", images=2, steps=3, timing=timing, images_per_s=4.0, speedup=1.0, psnr_db=None
            ),
            GenerateResult(
                engine="openvino", images=2, steps=3, timing=timing, images_per_s=4.0, speedup=1.5, psnr_db=61.25
            ),
        ),
    )


def test_json_round_trip(report: Report, tmp_path: Path) -> None:
    paths = write_report(report, tmp_path / "results")
    assert [path.name for path in paths] == ["bench.json", "bench.md"]
    assert read_report(paths[0]) == report
    assert json.loads(paths[0].read_text())["generate"][0]["psnr_db"] is None


def test_the_ceiling_is_the_best_rate(report: Report) -> None:
    assert report.ceiling.library == "openvino"


def test_markdown_says_the_figures(report: Report) -> None:
    page = markdown(report)
    assert "| unet | openvino | 2 | 4 | 500.00 | 900.00 | 990.00 | 5.00 | 1.0e-06 |" in page
    assert "| unet | 10 | 25 |" in page
    assert "| openvino | 2 | 0.500 | 0.900 | 0.990 | 8.00 | 0.08 | 0.2 | 2.50 | 500 |" in page
    assert "| openvino | 2 | 0.500 | 0.900 | 0.990 | 4.00 | 1.50x | 61.2 |" in page
    assert "identical" in page
    assert "a\\|model" in page
    assert "**Warning:** the machine is busy" in page


def test_every_row_has_a_cell_under_every_heading(report: Report) -> None:
    for table in tables(report):
        assert table.rows
        assert {len(row) for row in table.rows} == {len(table.headings)}


def test_the_terminal_shows_names_as_they_are(report: Report) -> None:
    said = io.StringIO()
    print_report(report, Console(file=said, width=200))
    for words in ("[bold]lora", "auto", "openvino: fastest", "warning: the machine is busy", "61.2"):
        assert words in said.getvalue()


def test_an_unknown_key_is_refused(report: Report) -> None:
    data = {**report.model_dump(mode="json"), "extra": 1}
    with pytest.raises(ValidationError):
        Report.model_validate(data)


@pytest.mark.parametrize("content", ["", "{}", '{"format": 2}'])
def test_something_else_is_not_a_report(content: str, tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    path.write_text(content)
    with pytest.raises(InputError, match="not a benchmark report") as caught:
        read_report(path)
    assert "\n" not in str(caught.value)


def test_an_output_under_a_file_is_refused(report: Report, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError):
        write_report(report, tmp_path / "file" / "results")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
