"""Where a LoRA is read from and written to, and what is refused on the way."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from smooth_rt.errors import InputError, ModelError
from smooth_rt.lora import Lora, LoraLayer, read_lora, write_lora

ATTENTION = "mid_block.attentions.0.transformer_blocks.0.attn1"
TENSORS = {
    f"{ATTENTION}.processor.to_q_lora.down.weight": torch.ones(2, 4),
    f"{ATTENTION}.processor.to_q_lora.up.weight": torch.ones(4, 2),
}


def refusal(read: Callable[[], object], *said: str) -> None:
    with pytest.raises(ModelError) as error:
        read()
    assert "\n" not in str(error.value)
    assert all(part in str(error.value) for part in said), str(error.value)


def test_sources(tmp_path: Path) -> None:
    for name in ("pytorch_lora_weights.safetensors", "smooth_lora.safetensors"):
        folder = tmp_path / name.split("_")[0]
        folder.mkdir()
        refusal(lambda folder=folder: read_lora(folder), "holds none of")
        (folder / "weights.bin").write_bytes(b"\x80\x02.")
        refusal(lambda folder=folder: read_lora(folder), "weights.bin", "pickles")
        save_file(TENSORS, folder / name)
        assert list(read_lora(folder).layers) == [f"{ATTENTION}.to_q"]
    for suffix in ("bin", "pt", "ckpt"):
        refusal(lambda suffix=suffix: read_lora(tmp_path / f"lora.{suffix}"), "pickles are never loaded")
    refusal(lambda: read_lora(tmp_path / "nothing.safetensors"), "no such file")
    refusal(lambda: read_lora("nobody/nothing"), "the hub did not give it")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes((tmp_path / "smooth" / "smooth_lora.safetensors").read_bytes()[:300])
    refusal(lambda: read_lora(cut), "truncated")
    save_file({}, cut)
    refusal(lambda: read_lora(cut), "no tensors")


@pytest.mark.parametrize(("name", "said"), [("", "lora: the name is empty"), ("a" * 5000, "aaa.*cannot be read")])
def test_name_that_no_file_has_is_refused(name: str, said: str) -> None:
    with pytest.raises(ModelError, match=said):
        read_lora(name)


def test_a_pipe_is_no_lora(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ModelError, match="fifo: neither file nor folder; name a"):
        read_lora(tmp_path / "fifo")


def test_writing_fails_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lora = Lora({"mid_block.attentions.0.proj_in": LoraLayer(torch.ones(2, 4), torch.ones(4, 2))}, "", "")
    refusal(lambda: write_lora(lora, tmp_path / "lora.safetensors", "attn-procs"), "proj_in")
    with pytest.raises(InputError, match="unknown"):
        write_lora(lora, tmp_path / "lora.safetensors", "kohya")  # type: ignore[arg-type]
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        write_lora(lora, tmp_path / "file" / "lora.safetensors")

    def full(path: Path, content: bytes) -> int:
        with path.open("wb") as file:
            file.write(content[: len(content) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(InputError, match="No space left"):
        write_lora(lora, tmp_path / "lora.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
