"""Text that users bring, from every system and editor."""

from __future__ import annotations

import codecs
import json
import shutil
from pathlib import Path

import pytest

from smooth_rt.errors import InputError
from smooth_rt.evaluation import captioned, edit_cases, read_prompts
from smooth_rt.image_folders import files_of, images_of
from smooth_rt.lora import read_lora
from smooth_rt.model import load_model
from smooth_rt.tasks.checks import as_prompts
from smooth_rt.text_files import decode, readable_folder

MARK = "\ufeff"


@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
def test_prompts_of_every_system_read_the_same(tmp_path: Path, ends: str) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes((MARK + ends.join(["dog face", "", "  cat  ", MARK + "caf\u00e9", ""])).encode())
    assert read_prompts(path) == ["dog face", "cat", "caf\u00e9"]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e"])
def test_prompt_with_another_separator_stays_whole(tmp_path: Path, separator: str) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(f"dog{separator}face\ncat{separator}\n".encode())
    assert read_prompts(path) == [f"dog{separator}face", "cat"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("dog".encode("utf-16"), "is UTF-16, not UTF-8"),
        (codecs.BOM_UTF16_BE + "dog".encode("utf-16-be"), "is UTF-16, not UTF-8"),
        ("dog".encode("utf-32"), "is UTF-32, not UTF-8"),
        ("dog".encode("utf-16-le"), "holds NUL characters"),
        ("caf\u00e9".encode("cp1252"), "byte 4 is not UTF-8"),
        ("\u732b".encode("shift-jis"), "byte 1 is not UTF-8"),
        (codecs.BOM_UTF8 + b"dog\xff", "byte 7 is not UTF-8"),
    ],
)
def test_other_encodings_are_named_with_the_file(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    (tmp_path / "a.png").write_bytes(b"")
    for read in (lambda: read_prompts(path), lambda: captioned(tmp_path), lambda: decode(content, str(path))):
        with pytest.raises(InputError, match=rf"^{path}: {said}.*; save it as UTF-8$") as caught:
            read()
        assert "\n" not in str(caught.value)


def test_edit_cases_in_another_encoding_are_named(tmp_path: Path) -> None:
    (tmp_path / "metadata.jsonl").write_text("{}", encoding="utf-16")
    with pytest.raises(InputError, match=r"metadata\.jsonl: is UTF-16, not UTF-8; save it as UTF-8$"):
        edit_cases(tmp_path)


@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
def test_edit_cases_with_a_mark(tmp_path: Path, ends: str) -> None:
    record = {"file_name": "a.png", "mask": "m.png", "text": f"{MARK}dog", "target": f"cat{MARK}"}
    (tmp_path / "metadata.jsonl").write_bytes((MARK + json.dumps(record) + ends + json.dumps(record) + ends).encode())
    assert [(case.caption, case.target) for case in edit_cases(tmp_path)] == [("dog", "cat")] * 2


def test_marks_in_prompts_are_no_tokens() -> None:
    assert as_prompts([f"{MARK}dog face", f"a{MARK}b", ""]) == ["dog face", "ab", ""]


def test_hidden_files_are_no_images(tmp_path: Path) -> None:
    for name in ("b.png", "a.JPG", "below/c.webp", "below/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    for hidden in (
        "._b.png", ".hidden.png", ".ipynb_checkpoints/b-checkpoint.png", "__MACOSX/._b.png", "__MACOSX/b.png",
        "@eaDir/b.png/SYNOPHOTO_THUMB_M.jpg", "below/.thumbnails/c.png", "$RECYCLE.BIN/d.png", "Thumbs.db", ".DS_Store",
    ):  # fmt: skip
        (tmp_path / hidden).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / hidden).write_bytes(b"")
    (tmp_path / "folder.png").mkdir()
    assert images_of(tmp_path) == [tmp_path / name for name in ("a.JPG", "b.png", "below/c.webp")]
    assert len(files_of(tmp_path)) == 4
    # A folder that is hidden itself was named.
    assert images_of(tmp_path / ".ipynb_checkpoints") == [tmp_path / ".ipynb_checkpoints" / "b-checkpoint.png"]


def test_readable_folder_without_marks_is_the_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with readable_folder(tmp_path) as readable:
        assert readable == tmp_path


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_model_with_marks_is_the_same_model(tiny_model: Path, tmp_path: Path, encoding: str) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    rewritten = [path for path in folder.rglob("*") if path.suffix in (".json", ".txt")]
    assert {"model_index.json", "config.json", "scheduler_config.json"} <= {path.name for path in rewritten}
    for path in rewritten:
        path.write_text(path.read_text(encoding="utf-8"), encoding=encoding)
    before = {path: path.read_bytes() for path in rewritten}
    assert load_model(folder).digests == load_model(tiny_model).digests
    assert {path: path.read_bytes() for path in rewritten} == before


def test_adapter_config_with_a_mark(lora: Path, tmp_path: Path) -> None:
    shutil.copyfile(lora, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 6, "r": 2}', encoding="utf-8-sig")
    (layer,) = read_lora(tmp_path).layers.values()
    assert layer.scale == 3
