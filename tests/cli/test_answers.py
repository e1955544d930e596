"""What the command line answers: interruptions, faults of its own, help, tables, other commands' results."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from smooth_rt.commands.show import show
from smooth_rt.pipeline import SmoothPipeline

FAST = ["--num-inference-steps", "2"]
GENERATE = ["generate", "--prompt", "dog"]


def test_interrupt(opened: list[Any], refused: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(SmoothPipeline, "denoise", interrupt)
    line = refused(*GENERATE, *FAST, "--output", tmp_path / "out", "--json", code=130)
    assert line.startswith("interrupted; ")
    assert list(tmp_path.iterdir()) == []


def test_fault_of_the_program(
    opened: list[Any], run: Any, refused: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("by\nzero")

    monkeypatch.setattr(SmoothPipeline, "denoise", fail)
    line = refused(*GENERATE, *FAST, "--output", tmp_path / "out", code=1)
    assert "ZeroDivisionError: by zero" in line
    assert "--debug" in line
    code, _, err = run(*GENERATE, *FAST, "--output", tmp_path / "out", "--debug")
    assert code == 1
    assert "Traceback" in err
    assert "in fail" in err


def test_debug_shows_where_an_error_was_raised(opened: list[Any], run: Any, tmp_path: Path) -> None:
    code, _, err = run(*GENERATE, "--height", 15, "--output", tmp_path / "out", "--debug")
    assert code == 2
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("error: --height=15")


def test_engines_of_an_empty_cache(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMOOTH_RT_CACHE", str(tmp_path))
    code, out, _ = run("engines", "list", "--json")
    assert (code, json.loads(out)) == (0, {"cache": str(tmp_path), "bundles": []})


def test_prune_removes_what_is_damaged(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMOOTH_RT_CACHE", str(tmp_path))
    broken = tmp_path / "bundles" / "broken"
    broken.mkdir(parents=True)
    (broken / "manifest.json").write_text("{")
    _, out, _ = run("engines", "list", "--json")
    assert "not JSON" in json.loads(out)["bundles"][0]["fault"]
    code, out, _ = run("engines", "prune", "--json")
    assert (code, [row["path"] for row in json.loads(out)["removed"]]) == (0, [str(broken)])
    assert not broken.exists()


def test_bench_passes_its_arguments_on(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import bench.run

    seen: list[str] = []
    monkeypatch.setattr(bench.run, "run", seen.extend)
    assert run("bench", "--quick", "--help", "x")[0] == 0
    assert seen == ["--quick", "--help", "x"]


def test_bench_of_another_distribution(refused: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "__init__.py").write_text("")
    for name in [name for name in sys.modules if name == "bench" or name.startswith("bench.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert f"bench: is {tmp_path / 'bench'}, another project's" in refused("bench")


def test_no_arguments_is_help(run: Any) -> None:
    code, out, _ = run()
    assert code == 0
    for command in ("demo", "generate", "interpolate", "invert", "edit", "fuse", "build-engine", "engines", "bench"):
        assert command in out
    assert "130, 143, 129 after Ctrl-C, SIGTERM, SIGHUP" in " ".join(out.split())


def test_version(run: Any) -> None:
    code, out, _ = run("--version")
    assert code == 0
    assert out.strip()


def test_units_are_said_to_people(capsys: pytest.CaptureFixture[str]) -> None:
    show({"bytes": 3 * 2**20, "seconds": 1936.4, "rows": [{"bytes": 2**30, "seconds": 7300.2}]}, as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["bytes: 3.0 MiB", "seconds: 1936 (32 min 16 s)"]
    assert lines[-1].split() == ["1.0", "GiB", "7300", "(2", "h", "1", "min)"]
    show({"bytes": 3 * 2**20, "seconds": 1936.4}, as_json=True)
    assert json.loads(capsys.readouterr().out) == {"bytes": 3 * 2**20, "seconds": 1936.4}


def test_tables_keep_words_whole(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    rows = [{"engine": "onnxruntime", "seconds": f"{value:.2f}", "name": "ab" * 16} for value in (1.5, 12.25)]
    show({"command": "x", "results": rows, "left": None, "share": math.nan, "kept": True}, as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "results:"
    assert [line.split() for line in lines[-4:-2]] == [
        ["onnxruntime", "1.50", "ab" * 16], ["onnxruntime", "12.25", "ab" * 16],
    ]  # fmt: skip
    assert lines[-4].index("1.50") == lines[-3].index("12.25") + 1
    assert lines[-2:] == ["share: nan", "kept: yes"]
    show({"command": "x", "share": math.nan, "rows": [{"a": math.inf}]}, as_json=True)
    assert json.loads(capsys.readouterr().out) == {"command": "x", "share": None, "rows": [{"a": None}]}


def test_lists_within_a_line_are_told_apart(capsys: pytest.CaptureFixture[str]) -> None:
    show({"profiles": {"a": ["batch 1, height 8", "batch 2"], "b": ["batch 4"]}, "dims": {"x": 1, "y": 2}}, False)
    assert capsys.readouterr().out.splitlines() == [
        "profiles: a batch 1, height 8, batch 2; b batch 4", "dims: x 1, y 2",
    ]  # fmt: skip


def test_a_table_that_is_too_wide_for_a_terminal_is_told_in_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"engine": "openvino-fp32-winograd-native", "key": "a" * 30, "error": 1e-5}] * 2
    monkeypatch.setenv("COLUMNS", "50")
    show({"engines": rows}, as_json=False)
    assert len(capsys.readouterr().out.splitlines()) == 5  # a pipe has no width
    monkeypatch.setenv("FORCE_COLOR", "1")
    show({"engines": rows}, as_json=False)
    block = ["  engine  openvino-fp32-winograd-native", f"  key     {'a' * 30}", "  error   1e-05", ""]
    assert capsys.readouterr().out.splitlines() == ["engines:", *block, *block]
    monkeypatch.setenv("COLUMNS", "80")
    show({"engines": rows}, as_json=False)
    assert len(capsys.readouterr().out.splitlines()) == 5
