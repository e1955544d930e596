"""Real builds: what is added to a bundle, what serves again, one size alone, and two builds at once."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from engines.bundle import Bundle
from engines.variant import Profile, Span
from smooth_rt import cli
from smooth_rt.build import ensure_engines
from smooth_rt.errors import InputError
from smooth_rt.pipeline import SmoothPipeline

BACKENDS = ["onnxruntime"]


def test_a_bundle_of_more_backends_serves_fewer(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SMOOTH_RT_CACHE", str(tmp_path))
    one = ensure_engines(tiny_model, backends=["openvino"])
    both = ensure_engines(tiny_model, backends=["onnxruntime"])
    assert (one.reused, both.reused) == (False, False)
    assert "onnxruntime-fp32 is not built" in both.reason
    assert both.bundle.path == one.bundle.path
    assert set(both.bundle.backends) == {"onnxruntime", "openvino"}
    for names in (["openvino"], ["onnxruntime"], ["openvino", "onnxruntime"]):
        assert ensure_engines(tiny_model, backends=names).reused


def test_the_command_adds_to_a_bundle_that_is_named(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    build = ["build-engine", "--model", str(tiny_model), "--output", "mine", "--json", "--backend"]
    reused = []
    for backend in ("onnxruntime", "onnxruntime", "openvino", "openvino,onnxruntime"):
        assert cli.main([*build, backend]) == 0
        reused.append(json.loads(capsys.readouterr().out)["reused"])
    assert reused == [False, True, False, True]
    assert set(Bundle.open(tmp_path / "mine").backends) == {"onnxruntime", "openvino"}


def test_a_bundle_grows_and_what_was_in_it_is_not_built_again(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SMOOTH_RT_CACHE", str(tmp_path))
    one = ensure_engines(tiny_model, backends=["onnxruntime"])
    graphs = [file.path for file in one.bundle.manifest.files if "model.onnx" in file.path]
    before = {path: (one.bundle.path / path).stat().st_ino for path in graphs}

    def no_export(*_: object) -> None:
        raise AssertionError("the graphs are there already")

    monkeypatch.setattr("export.stages.to_onnx", no_export)
    more = ensure_engines(tiny_model, backends=["openvino"], precision="bf16")
    assert [built.variant.name for built in more.bundle.variants] == ["onnxruntime-fp32", "openvino-bf16"]
    assert more.bundle.variants[0] == one.bundle.variants[0]
    assert {path: (more.bundle.path / path).stat().st_ino for path in graphs} == before
    exact = ensure_engines(tiny_model, backends=["openvino"]).bundle
    assert exact.find("openvino").variant.precision == "fp32"
    assert exact.find("openvino", "bf16").engine("unet").hint == "bf16"
    # onnx refuses weights that have several links.
    assert (exact.path / "onnxruntime-fp32/unet/model.onnx.data").stat().st_nlink == 1
    # The graphs of both precisions are the same ones: they are on the disk once.
    places = [f"openvino-{name}/unet/openvino_model.bin" for name in ("fp32", "bf16")]
    assert len({(exact.path / place).stat().st_ino for place in places}) == 1
    assert Bundle.open(exact.path).manifest == exact.manifest


def test_engines_of_one_size(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMOOTH_RT_CACHE", str(tmp_path))
    one, side = Span(min=1, opt=1, max=1), Span(min=24, opt=24, max=24)
    profiles = [Profile(batch=one, height=side, width=side)]
    built = ensure_engines(tiny_model, backends=["openvino"], profiles=profiles)
    assert ensure_engines(tiny_model, backends=["openvino"]).reused  # who names no size takes what there is
    with (
        SmoothPipeline.from_engines(built.bundle) as pipe,
        SmoothPipeline.from_pretrained(tiny_model, engine="eager") as eager,
    ):
        assert pipe.size == (24, 24)
        for guidance in (1.0, 7.5):  # of one row a call, and of two
            made, wanted = (
                one(["dog", "red apple"], num_inference_steps=3, height=24, width=24, guidance_scale=guidance,
                    generator=torch.Generator().manual_seed(0), output_type="pt").images
                for one in (pipe, eager)
            )  # fmt: skip
            torch.testing.assert_close(made, wanted, atol=1e-4, rtol=1e-4)
        assert pipe("dog", num_inference_steps=1).images[0].size == (24, 24)
        with pytest.raises(InputError, match=r"height 16, width 16 lies outside .*--height 16:24:24 --width 16:24:24"):
            pipe("dog", height=16, width=16)


@pytest.mark.parametrize(
    ("backend", "scheduler", "unet", "size"),
    [
        ("onnxruntime", "PNDMScheduler", {"sample_size": [8, 16]}, (16, 32)),
        (
            "openvino", "DPMSolverMultistepScheduler", {"sample_size": 32, "_diffusers_version": "0.6.0"}, (128, 128),
        ),
    ],
)  # fmt: skip
def test_bundle_keeps_schedule_and_size_of_its_model(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str, scheduler: str,
    unet: dict[str, Any], size: tuple[int, int],
) -> None:  # fmt: skip
    monkeypatch.setenv("SMOOTH_RT_CACHE", str(tmp_path / "cache"))
    model = shutil.copytree(tiny_model, tmp_path / "model")
    path = model / "unet" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **unet}))
    # As diffusers writes it: without clip_sample, and one of them with an infinite value.
    getattr(diffusers, scheduler)(beta_schedule="scaled_linear").save_pretrained(model / "scheduler")
    with SmoothPipeline.from_pretrained(model, engine="eager") as eager:
        schedule = eager.schedule(7)
        wanted = eager("dog", num_inference_steps=3, generator=torch.Generator().manual_seed(0), output_type="pt")
        assert eager.size == size
    built = ensure_engines(model, backends=[backend])
    assert ensure_engines(model, backends=[backend]).reused
    shutil.rmtree(model)
    with SmoothPipeline.from_engines(built.bundle.path, engine=backend) as pipe:
        assert (pipe.schedule(7), pipe.size) == (schedule, size)
        made = pipe("dog", num_inference_steps=3, generator=torch.Generator().manual_seed(0), output_type="pt")
    assert torch.as_tensor(made.images).shape == (1, 3, *size)
    torch.testing.assert_close(made.images, wanted.images, atol=1e-4, rtol=1e-4)


def test_of_two_that_want_the_same_one_builds_and_the_other_waits(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SMOOTH_RT_CACHE", str(tmp_path / "cache"))
    graphs = ensure_engines(tiny_model, backends=BACKENDS, output=tmp_path / "graphs").bundle.path / "onnxruntime-fp32"
    waits = tmp_path / "one waits"
    ask = (
        "import logging, pathlib, shutil, time; logging.basicConfig(level='INFO', format='%(message)s')\n"
        "from export import stages\n"
        "from smooth_rt.build import ensure_engines\n"
        f"waits = pathlib.Path({str(waits)!r})\n"
        "class Told(logging.Handler):\n"
        "    def emit(self, record):\n"
        "        if 'waiting: ' in record.getMessage(): waits.touch()\n"
        "logging.getLogger().addHandler(Told())\n"
        "def copied(module, network, dims, path):\n"
        "    while not waits.exists(): time.sleep(0.05)\n"  # an export that lasts until the other one is there
        "    path.parent.mkdir(parents=True)\n"
        "    for suffix in ('', '.data'):\n"
        f"        shutil.copy(f'{graphs}/{{network.name}}/model.onnx{{suffix}}', f'{{path}}{{suffix}}')\n"
        "stages.to_onnx = copied\n"
        f"built = ensure_engines({str(tiny_model)!r}, backends=['onnxruntime'])\n"
        "print(built.reused)"
    )
    home = str(Path(cli.__file__).parents[1])
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", ask], cwd=home, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for _ in range(2)
    ]
    said = [process.communicate(timeout=300) for process in processes]
    assert sorted(out.strip() for out, _ in said) == ["False", "True"]
    waited = next(err for out, err in said if out.strip() == "True")
    assert "waiting: another process is at work on" in waited
    assert "reusing engines" in waited
