"""The engine on a package of one convolution: its numbers, and what is refused before any of its code is loaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engines import inductor, pt2, select
from engines.contract import Dims, Network, contract
from engines.errors import EngineError, InputError
from engines.inductor import InductorEngine
from engines.pt2 import METADATA, read_package
from engines.select import availability, backend_version, choose, open_engine
from export.to_inductor import cannot_build, to_inductor

DIMS = Dims(
    tokens=5,
    text_width=6,
    vocabulary=11,
    latent_channels=3,
    image_channels=2,
    vae_factor=4,
    latent_multiple=2,
    sample_size=4,
)
NETWORK = contract("vae_encoder", DIMS)

needs_a_package = pytest.mark.skipif(cannot_build() is not None, reason=f"{cannot_build()}")


class Convolution(nn.Module):
    """The contract of a VAE encoder."""

    def __init__(self) -> None:
        super().__init__()
        shape = (DIMS.latent_channels, DIMS.image_channels, DIMS.vae_factor, DIMS.vae_factor)
        self.weight = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)))

    def forward(self, sample: Tensor) -> tuple[Tensor, Tensor]:
        mean = nn.functional.conv2d(sample, self.weight, stride=DIMS.vae_factor)
        return mean, -mean


def image(batch: int = 2, height: int = 3, width: int = 2) -> Tensor:
    shape = (batch, DIMS.image_channels, height * DIMS.vae_factor, width * DIMS.vae_factor)
    return torch.randn(shape, generator=torch.Generator().manual_seed(batch))


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Half a minute, once."""
    path = tmp_path_factory.mktemp("package") / "vae_encoder.pt2"
    to_inductor(Convolution().eval(), NETWORK, DIMS, path, symbol_bounds={"batch": (1, 40)})
    return path


@pytest.fixture
def never_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **__: Any) -> None:
        pytest.fail("native code was loaded")

    monkeypatch.setattr(torch._inductor, "aoti_load_package", load)


def repacked(package: Path, target: Path, **changes: Any) -> Path:
    """The package with another record of itself."""
    record = json.loads(json.dumps({**vars(read_package(package)), **changes}))
    with zipfile.ZipFile(package) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name.endswith("_metadata.json"):
                content = json.dumps({**json.loads(content), METADATA: json.dumps(record)}).encode()
            new.writestr(name, content)
    return target


@needs_a_package
def test_matches_torch_and_leaves_outputs_to_the_caller(package: Path) -> None:
    module = Convolution()
    with open_engine("inductor", NETWORK, package) as engine:
        for sizes in ((1, 1, 1), (2, 3, 2), (40, 2, 5)):
            outputs = engine.infer(sample=image(*sizes))
            for name, wanted in zip(("latent_mean", "latent_logvar"), module(image(*sizes)), strict=True):
                torch.testing.assert_close(outputs[name], wanted.detach(), rtol=1e-5, atol=1e-5)
        first = engine.infer(sample=image())["latent_mean"]
        kept = first.clone()
        engine.infer(sample=image() + 1)
        assert torch.equal(first, kept)
        first += 1
        with pytest.raises(InputError, match=r"batch is 41, outside 1\.\.40 .*; rebuild with wider bounds"):
            engine.infer(sample=image(41))
    with pytest.raises(EngineError, match="closed; open it again"):
        engine.infer(sample=image())
    torch.testing.assert_close(kept, first - 1)  # an output outlives its engine


@needs_a_package
def test_several_threads(package: Path) -> None:
    with InductorEngine(NETWORK, package) as engine, ThreadPoolExecutor(4) as pool:
        wanted = engine.infer(sample=image())["latent_mean"]
        for got in pool.map(lambda _: engine.infer(sample=image())["latent_mean"], range(40)):
            assert torch.equal(got, wanted)


@needs_a_package
def test_runs_without_a_compiler_and_leaves_nothing(package: Path, tmp_path: Path, pytestconfig: Any) -> None:
    code = f"""
import torch
from pathlib import Path
from engines.contract import Dims, contract
from engines.inductor import InductorEngine
with InductorEngine(contract("vae_encoder", {DIMS!r}), Path({str(package)!r})) as engine:
    print(engine.infer(sample=torch.zeros(1, 2, 8, 8))["latent_mean"].shape[1:])
"""
    environment = {**os.environ, "PATH": "", "CXX": "/nowhere", "TMPDIR": str(tmp_path), "PYTHONPATH": "."}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=pytestconfig.rootpath, env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "torch.Size([3, 2, 2])\n", "")
    assert os.listdir(tmp_path) == []


@needs_a_package
@pytest.mark.usefixtures("never_loaded")
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"torch": "1.0"}, rf"compiled by torch 1\.0, and this is {torch.__version__.replace('+', '.')}; rebuild"),
        ({"machine": "linux riscv64"}, "compiled for linux riscv64, and this is"),
        ({"instructions": ["avx2048"]}, "a processor with avx2048, which this one lacks"),
        ({"network": "unet"}, "holds unet, not vae_encoder"),
        ({"tensors": ["sample: float32 [batch, 9]"]}, "a model of other sizes"),
    ],
)
def test_another_machine_is_refused_before_anything_is_loaded(
    package: Path, changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(EngineError, match=said) as caught:
        InductorEngine(NETWORK, repacked(package, tmp_path / "other.pt2", **changes))
    assert "\n" not in str(caught.value)
    assert "other.pt2" in str(caught.value)


@needs_a_package
@pytest.mark.usefixtures("never_loaded")
@pytest.mark.parametrize(("gpu", "said"), [(None, "torch finds none here"), ("8.6", r"capability 9\.0, .* is 8\.6")])
def test_another_gpu(
    package: Path, gpu: str | None, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu is not None)
    monkeypatch.setattr(pt2, "gpu_capability", lambda: gpu)
    with pytest.raises(EngineError, match=said):
        InductorEngine(NETWORK, repacked(package, tmp_path / "other.pt2", device="cuda", capability="9.0"))


def _tf32() -> tuple[Any, ...]:
    return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32


@needs_a_package
@pytest.mark.parametrize(("precision", "exact"), [("fp32", True), ("bf16", False)])
def test_fp32_is_not_tf32_on_a_gpu(
    package: Path, precision: str, exact: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def run(inputs: list[Tensor]) -> list[Tensor]:
        seen.append(_tf32())
        return [torch.zeros(2, 3, 3, 2)] * 2

    loaded = SimpleNamespace(loader=SimpleNamespace(run=run))
    monkeypatch.setattr(torch._inductor, "aoti_load_package", lambda *_, **__: loaded)
    monkeypatch.setattr(inductor, "_Graphs", lambda run: SimpleNamespace(run=run))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(pt2, "gpu_capability", lambda: "9.0")
    before = _tf32()
    assert before[0]  # torch's own default
    path = repacked(package, tmp_path / "gpu.pt2", device="cuda", capability="9.0", precision=precision)
    with InductorEngine(NETWORK, path) as engine:
        for _ in range(2):
            engine.infer(sample=image())
            assert _tf32() == before
    assert seen == [(False, False) if exact else before] * 2


@pytest.mark.parametrize("told", ["torch.set_float32_matmul_precision('medium')", "matmul.fp32_precision = 'tf32'"])
def test_tf32_is_off_and_then_as_it_was_told(told: str, pytestconfig: Any) -> None:
    """In a process of its own: what was told the newer way cannot be read the older way any more."""
    code = f"""
import torch
from engines.tf32 import no_tf32
cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
def read(name):
    try:
        return eval(name)
    except RuntimeError:
        return "unreadable"
def state():
    older = "cudnn.allow_tf32", "matmul.allow_tf32", "torch.get_float32_matmul_precision()"
    return [read(name) for name in (*older, "cudnn.conv.fp32_precision", "matmul.fp32_precision")]
{told}
before = state()
with no_tf32():
    assert True not in state()[:2], state()
    assert "tf32" not in state()[3:], state()
assert state() == before, (before, state())
"""
    environment = {**os.environ, "PYTHONPATH": "."}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=pytestconfig.rootpath, env=environment)


@needs_a_package
@pytest.mark.usefixtures("never_loaded")
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.999])
def test_a_truncated_package(package: Path, share: float, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    whole = package.read_bytes()
    path = tmp_path / "short.pt2"
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(EngineError, match=r"short\.pt2: no whole AOTInductor package .*; rebuild") as caught:
        InductorEngine(NETWORK, path)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("never_loaded")
def test_what_is_no_package_of_ours(tmp_path: Path) -> None:
    path = tmp_path / "foreign.pt2"
    with pytest.raises(EngineError, match="No such file"):
        InductorEngine(NETWORK, path)
    path.write_bytes(b"garbage")
    with pytest.raises(EngineError, match="no whole AOTInductor package"):
        InductorEngine(NETWORK, path)
    for content in (None, "{}", "[]", "not json", json.dumps({METADATA: "{}"}), json.dumps({METADATA: "[1]"})):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a/version", "1")
            if content is not None:
                archive.writestr("a/data/aotinductor/model/x.wrapper_metadata.json", content)
        with pytest.raises(EngineError, match="of another program; rebuild"):
            InductorEngine(NETWORK, path)


@needs_a_package
def test_a_package_whose_library_is_missing(package: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "hollow.pt2"
    with zipfile.ZipFile(package) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            if not name.endswith(".so"):
                new.writestr(name, old.read(name))
    with pytest.raises(EngineError, match=r"hollow\.pt2: inductor cannot open it .*; rebuild") as caught:
        InductorEngine(NETWORK, path)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


@needs_a_package
def test_the_record_comes_back_as_it_was_written(package: Path) -> None:
    record = read_package(package)
    assert record.bounds == {"batch": (1, 40), "height": (1, None), "width": (1, None)}
    assert record == replace(pt2.Package.of_this_machine(NETWORK, "fp32", "cpu", record.bounds))
    assert record.misfit(NETWORK) is None
    other: Network = contract("vae_encoder", replace(DIMS, image_channels=5))
    assert record.misfit(other) == "its tensors are those of a model of other sizes"


def test_a_known_backend_that_auto_does_not_take() -> None:
    assert availability("inductor") is None
    assert backend_version("inductor") == backend_version("eager")
    assert "inductor" not in select.AUTO_ORDER
    assert choose("inductor", ["inductor"]).reason == "asked for"
    with pytest.raises(EngineError, match="not in the bundle, which holds onnxruntime"):
        choose("inductor", ["onnxruntime"])
