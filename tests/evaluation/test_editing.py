"""What stays outside a mask, by hand, and the command from end to end."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from smooth_rt import cli
from smooth_rt.errors import InputError
from smooth_rt.evaluation import edit_cases, summarise_editing
from smooth_rt.metrics.reconstruction import outside


def test_what_is_outside_alone_counts() -> None:
    rng = np.random.default_rng(0)
    picture = rng.uniform(0.2, 0.8, (16, 16, 3))
    mask = np.zeros((16, 16), bool)
    mask[:, :8] = True
    inside = picture.copy()
    inside[:, :4] = 0
    psnr, ssim = outside(picture, inside, mask)
    assert psnr == math.inf
    assert ssim == pytest.approx(1)
    around = picture.copy()
    around[:, 8:] += 0.1
    psnr, ssim = outside(picture, around, mask)
    assert psnr == pytest.approx(20)
    assert ssim < 1
    for wrong in (np.zeros((8, 8), bool), np.ones((16, 16), bool)):
        with pytest.raises(InputError, match="mask: "):
            outside(picture, around, wrong)


def test_a_summary_by_hand() -> None:
    rows = [
        {"psnr": 20.0, "ssim": 0.5, "object": True, "colour": None},
        {"psnr": 30.0, "ssim": 0.7, "object": False, "colour": None},
    ]
    assert summarise_editing(rows) == {"psnr": 25.0, "ssim": pytest.approx(0.6), "happened": 0.5, "kept": None}


def test_cases_ship_with_masks_of_their_objects() -> None:
    cases = edit_cases()
    assert len(cases) == 8
    for case in cases:
        with Image.open(case.mask) as mask, Image.open(case.path) as picture:
            assert mask.size == picture.size
            covered = np.asarray(mask) > 0
        assert 0.15 < covered.mean() < 0.9
        assert case.target != case.caption
        assert case.target.partition(" on ")[2] == case.caption.partition(" on ")[2]


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        "[]",
        "",
        '{"file_name": "a.png", "text": "x", "target": "y"}',
        '{"file_name": "a.png", "text": 3, "target": "y", "mask": "m.png"}',
    ],
)
def test_a_folder_without_cases_is_named(tmp_path: Path, text: str) -> None:
    with pytest.raises(InputError, match=r"metadata\.jsonl: No such file"):
        edit_cases(tmp_path)
    (tmp_path / "metadata.jsonl").write_text(text)
    with pytest.raises(InputError, match=r"metadata\.jsonl"):
        edit_cases(tmp_path)


def test_the_command_measures_every_method_and_strength(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    Image.effect_noise((16, 16), 60).convert("RGB").save(data / "a.png")
    Image.fromarray(np.pad(np.full((8, 8), 255, np.uint8), 4)).save(data / "m.png")
    (data / "metadata.jsonl").write_text(
        '{"file_name": "a.png", "text": "dog", "target": "red apple", "mask": "m.png"}'
    )
    command = ["evaluate", "editing", "--model", str(tiny_model), "--engine", "eager", "--num-inference-steps", "4"]
    command += ["--data", str(data), "--output", str(tmp_path / "o"), "--json"]
    assert cli.main([*command, "--edit-strengths", "0.5,0"]) == 0
    rows = json.loads(capsys.readouterr().out)["results"]
    found = {(row["method"], row["strength"]): row for row in rows}
    assert len(found) == len(rows) == 4
    assert found["eq15", 0.0]["psnr"] != found["eq15", 0.5]["psnr"]
    assert all(row["happened"] is None for row in rows)
    assert (tmp_path / "o" / "editing.md").exists()
    for option in ("--edit-methods=erase", "--edit-strengths=2", "--edit-strengths=x", "--edit-methods=,"):
        assert cli.main([*command, option]) == 2
    capsys.readouterr()
    Image.new("L", (16, 16), 255).save(data / "m.png")
    assert cli.main(command) == 2
    assert "m.png: covers the whole picture" in capsys.readouterr().err
