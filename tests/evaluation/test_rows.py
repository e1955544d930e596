"""Rows outlive what stops them, and several processes find what one finds."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from smooth_rt.errors import EngineError, InputError
from smooth_rt.evaluation import IstdTask, Rows, collect
from smooth_rt.evaluation.tables import distances_plot, markdown
from smooth_rt.pipeline import SmoothPipeline


@dataclass(frozen=True)
class Squares:
    """Rows that need no pipeline; fails at one batch if told to."""

    count: int = 10
    fails_at: int = -1

    def batches(self) -> list[list[int]]:
        return [list(range(first, min(first + 3, self.count))) for first in range(0, self.count, 3)]

    def measure(self, pipe: Any, items: Sequence[int]) -> list[dict[str, Any]]:
        if self.fails_at in items:
            raise InputError(f"item {self.fails_at}: is bad")
        return [{"square": item / 3} for item in items]


@contextmanager
def nothing() -> Iterator[Any]:
    yield None


def test_rows_go_on_where_they_were_stopped(tmp_path: Path) -> None:
    path, settings = tmp_path / "a" / "rows.jsonl", {"of": (1, 2)}
    whole = collect(Squares(), nothing, Rows())
    with pytest.raises(InputError):
        collect(Squares(fails_at=7), nothing, Rows(path, settings))
    assert len(path.read_text().splitlines()) == 1 + 6
    with path.open("a") as file:
        file.write('{"item": 6, "squ')  # killed while it wrote
    seen: list[tuple[int, int]] = []
    again = collect(Squares(), nothing, Rows(path, settings), progress=lambda *done: seen.append(done))
    assert again == whole == [{"square": item / 3} for item in range(10)]
    assert seen == [(6, 10), (9, 10), (10, 10)]
    assert [json.loads(line).get("item") for line in path.read_text().splitlines()] == [None, *range(10)]
    # Nothing is measured again.
    assert collect(Squares(fails_at=2), nothing, Rows(path, settings)) == whole


def test_an_interruption_says_what_is_kept(tmp_path: Path) -> None:
    class Interrupted(Squares):
        def measure(self, pipe: Any, items: Sequence[int]) -> list[dict[str, Any]]:
            if 6 in items:
                raise KeyboardInterrupt
            return super().measure(pipe, items)

    with pytest.raises(KeyboardInterrupt, match="interrupted; 6 of 10 are kept; run it again to go on"):
        collect(Interrupted(), nothing, Rows(tmp_path / "rows.jsonl"))
    assert len(Rows(tmp_path / "rows.jsonl").found) == 6


def test_rows_of_something_else_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    Rows(path, {"steps": 2, "engine": "eager"}).add([(0, {"x": 1})])
    with pytest.raises(InputError, match=r"rows\.jsonl: rows of another steps; remove it"):
        Rows(path, {"steps": 3, "engine": "eager"})
    altered = '{"settings": {}}\n{"item": 0, "x": 1}\n{"item": 1, "y": 1}\n'
    for content in ("no rows\n", "[1]\n", '{"settings": {}}\n{"x": 1}\n', altered):
        path.write_text(content)
        with pytest.raises(InputError, match=r"rows\.jsonl: not rows of a measurement"):
            Rows(path, {})


@pytest.mark.parametrize("text", ["", '{"settings": {"a'])
def test_a_first_line_that_was_cut_off_is_no_loss(tmp_path: Path, text: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    assert Rows(path, {"a": 1}).found == {}
    Rows(path, {"a": 1}).add([(0, {"x": 1})])
    assert Rows(path, {"a": 1}).found == {0: {"x": 1}}


def test_several_processes_find_what_one_finds(tiny_model: Path, tmp_path: Path) -> None:
    task = IstdTask(("dog", "red apple", "a", "b", "c"), frames=3, num_inference_steps=2, prompts_per_batch=2)
    opened = partial(SmoothPipeline.from_pretrained, str(tiny_model), engine="eager")
    one = collect(task, opened, Rows(tmp_path / "one.jsonl"))
    two = collect(task, opened, Rows(tmp_path / "two.jsonl"), processes=2)
    assert two == one
    assert len(Rows(tmp_path / "two.jsonl").found) == 5


def test_what_fails_in_a_process_is_said_and_the_rest_kept(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"item 7: is bad; what was measured is kept: run it again"):
        collect(Squares(fails_at=7), nothing, Rows(tmp_path / "rows.jsonl"), processes=2)
    kept = Rows(tmp_path / "rows.jsonl").found
    assert 7 not in kept
    assert collect(Squares(), nothing, Rows(tmp_path / "rows.jsonl"), processes=2) == collect(
        Squares(), nothing, Rows()
    )


def test_a_table_says_what_is_not_measured() -> None:
    columns = {"variant": "model", "x": "X", "lpips": "LPIPS"}
    text = markdown("a", columns, [{"variant": "base", "x": [0.12345, 2.0], "lpips": None}], ["note"])
    assert text.splitlines() == [
        "## a", "", "| model | X | LPIPS |", "|---|---|---|", "| base | 0.1235 to 2 | not measured |", "", "note",
    ]  # fmt: skip


def test_the_plot_stands_alone() -> None:
    plot = distances_plot({"base": [[1.0, 2.0], [3.0, 4.0]], "smooth": [[1.0, 1.0], [1.0, 1.0]]})
    assert plot.startswith('<svg xmlns="http://www.w3.org/2000/svg"')
    assert plot.count("<polyline") == 4
    assert "base, mean over paths, 2: 3.00" in plot
