"""A package that AOTInductor compiled: the torch module's numbers, silence, and nothing left behind."""

from __future__ import annotations

import copy
import os
import resource
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from engines.contract import NETWORKS, Dims, Network, NetworkName, contract
from engines.eager import EagerEngine
from engines.errors import EngineError, InputError
from engines.inductor import InductorEngine
from engines.variant import Precision
from export import to_inductor as stage
from export.graphs import Case, random_inputs
from export.half import channels_last, converted, in_half
from export.to_inductor import _traced, cannot_build, to_inductor
from export.verify import verify

Networks = dict[NetworkName, nn.Module]

needs_compiler = pytest.mark.skipif(cannot_build() is not None, reason=f"{cannot_build()}")


@pytest.fixture(scope="module")
def unet(networks: Networks, dims: Dims, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compiled once for this file; a minute."""
    path = tmp_path_factory.mktemp("inductor") / "unet.pt2"
    to_inductor(networks["unet"], contract("unet", dims), dims, path)
    return path


class Doubled(nn.Module):
    """A text encoder that takes seconds to compile."""

    def __init__(self, dims: Dims) -> None:
        super().__init__()
        self.table = nn.Embedding(dims.vocabulary, dims.text_width)
        self.table.weight.requires_grad_(False)

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor]:
        return (2 * self.table(input_ids),)


@pytest.fixture
def doubled(dims: Dims) -> tuple[nn.Module, Network]:
    return Doubled(dims).eval(), contract("text_encoder", dims)


def errors(engine: InductorEngine, module: nn.Module, network: Network, dims: Dims, case: Case) -> list[float]:
    inputs = random_inputs(network, dims, case, torch.Generator().manual_seed(11))
    got, wanted = engine.infer(**inputs), EagerEngine(network, module).infer(**inputs)
    return [float((got[name] - wanted[name]).norm() / wanted[name].norm()) for name in wanted]


@pytest.mark.slow
@needs_compiler
def test_the_unet_is_the_torch_module_at_every_batch_and_size(unet: Path, networks: Networks, dims: Dims) -> None:
    network = contract("unet", dims)
    with InductorEngine(network, unet) as engine:
        assert all(parity.relative < 1e-5 for parity in verify(engine, networks["unet"], network, dims, "fp32", 3))
        # Over the greatest batch that torch.export proves, and other sides than the traced ones.
        for batch, height, width in ((1, 4, 4), (5, 12, 4), (70, 4, 8)):
            case = Case({"batch": batch, "height": height, "width": width}, 1.0)
            assert max(errors(engine, networks["unet"], network, dims, case)) < 1e-5


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_in_fp32(name: NetworkName, networks: Networks, dims: Dims, tmp_path: Path) -> None:
    network = contract(name, dims)
    to_inductor(networks[name], network, dims, tmp_path / "network.pt2")
    with InductorEngine(network, tmp_path / "network.pt2") as engine:
        assert all(parity.relative < 1e-5 for parity in verify(engine, networks[name], network, dims, "fp32", 3))


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_strength_that_is_an_input(
    runtime: tuple[nn.Module, Network], precision: Precision, dims: Dims, tmp_path: Path
) -> None:
    module, network = runtime
    compiled = module if precision == "fp32" else in_half(module, network, dims, precision)[0]
    to_inductor(compiled, network, dims, tmp_path / "network.pt2", precision=precision)
    with InductorEngine(network, tmp_path / "network.pt2") as engine:
        verify(engine, module, network, dims, precision, 3)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("name", NETWORKS)
def test_half_precision(
    name: NetworkName, precision: Precision, networks: Networks, dims: Dims, tmp_path: Path
) -> None:
    network, module = contract(name, dims), networks[name]
    half, _ = in_half(module, network, dims, precision)
    to_inductor(half, network, dims, tmp_path / "network.pt2", precision=precision)
    assert all(parameter.dtype is torch.float32 for parameter in module.parameters())
    case = Case({"batch": 2, "height": 8, "width": 12}, 1.0)
    with InductorEngine(network, tmp_path / "network.pt2") as engine:
        worst = max(errors(engine, module, network, dims, case))
    # bf16 has 8 bits of mantissa, fp16 has 11.
    low, high = {"bf16": (1e-4, 5e-2), "fp16": (1e-5, 7e-3)}[precision]
    assert low < worst < high


@needs_compiler
def test_in_bf16_and_bounds_silent_alone_and_reported(
    doubled: tuple[nn.Module, Network], dims: Dims, tmp_path: Path, capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder,
) -> None:  # fmt: skip
    module, network = doubled
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setenv("TMPDIR", str(temporary))
    steps: list[tuple[str, int, int]] = []
    path = tmp_path / "made" / "here.pt2"
    to_inductor(
        in_half(module, network, dims, "bf16")[0], network, dims, path,
        precision="bf16", symbol_bounds={"batch": (2, 5)},
        progress=lambda *step: steps.append(step),
    )  # fmt: skip
    assert capfd.readouterr() == ("", "")
    assert list(recwarn) == []
    assert os.listdir(temporary) == []
    assert os.listdir(path.parent) == ["here.pt2"]
    assert steps == [
        ("text_encoder: export", 0, 2),
        ("text_encoder: compile", 1, 2),
        ("text_encoder: compile", 2, 2),
    ]
    with InductorEngine(network, path) as engine:
        for batch in (2, 5):
            assert 1e-4 < errors(engine, module, network, dims, Case({"batch": batch}, 1.0))[0] < 1e-2
        for batch in (1, 6):
            with pytest.raises(InputError, match=rf"batch is {batch}, outside 2\.\.5"):
                errors(engine, module, network, dims, Case({"batch": batch}, 1.0))
        package = engine.package
    assert (package.network, package.precision, package.device) == ("text_encoder", "bf16", "cpu")
    assert package.bounds == {"batch": (2, 5)}
    assert package.torch == torch.__version__
    assert b".cpp" not in b"".join(line for line in path.read_bytes().splitlines() if line.startswith(b"PK"))


@pytest.mark.slow
@needs_compiler
def test_a_static_batch(doubled: tuple[nn.Module, Network], dims: Dims, tmp_path: Path) -> None:
    module, network = doubled
    to_inductor(module, network, dims, tmp_path / "a.pt2", symbol_bounds={"batch": (3, 3)})
    with InductorEngine(network, tmp_path / "a.pt2") as engine:
        assert errors(engine, module, network, dims, Case({"batch": 3}, 1.0)) == [0.0]
        for batch in (1, 2, 4):
            with pytest.raises(InputError, match=rf"batch is {batch}, outside 3\.\.3"):
                errors(engine, module, network, dims, Case({"batch": batch}, 1.0))


@pytest.mark.parametrize(
    ("bounds", "sizes", "dynamic"),
    [
        ({"batch": (1, None), "height": (4, None), "width": (4, None)}, (2, 12, 16), {0, 2, 3}),
        ({"batch": (2, 2), "height": (8, 8), "width": (8, 8)}, (2, 8, 8), set()),
        ({"batch": (1, 1), "height": (4, 8), "width": (16, 32)}, (1, 8, 16), {2, 3}),
    ],
)
def test_what_is_traced(
    bounds: dict[str, tuple[int, int | None]], sizes: tuple[int, int, int], dynamic: set[int], dims: Dims
) -> None:
    inputs, shapes = _traced(contract("unet", dims), dims, bounds)
    assert inputs[0].shape == (sizes[0], dims.latent_channels, *sizes[1:])
    assert set(shapes[0]) == dynamic


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "int8"}, "precision 'int8': unknown; choose from fp32, fp16, bf16"),
        ({"device": "tpu"}, "device 'tpu': unknown; choose from cpu, cuda"),
        ({"symbol_bounds": {"depth": (1, 2)}}, "no symbol 'depth'; it has batch, height, width"),
        ({"symbol_bounds": {"height": (4, 6)}}, "height from 4 to 6: give two multiples of 4"),
        ({"symbol_bounds": {"batch": (0, 6)}}, "batch from 0 to 6"),
        ({"symbol_bounds": {"batch": (4, 3)}}, "batch from 4 to 3"),
    ],
)
def test_arguments_that_cannot_be(
    options: dict[str, Any], message: str, networks: Networks, dims: Dims, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        to_inductor(networks["unet"], contract("unet", dims), dims, tmp_path / "a" / "unet.pt2", **options)
    with pytest.raises(InputError, match=r"ends in \.pt2"):
        to_inductor(networks["unet"], contract("unet", dims), dims, tmp_path / "a" / "unet.so")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [("PATH", "", r"none of g\+\+, clang\+\+, c\+\+ is on PATH"), ("CXX", "no-such", "CXX names 'no-such'")],
)
def test_no_compiler(
    name: str, value: str, message: str, networks: Networks, dims: Dims, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv(name, value)
    with pytest.raises(EngineError, match=message) as caught:
        to_inductor(networks["unet"], contract("unet", dims), dims, tmp_path / "unet.pt2")
    assert "\n" not in str(caught.value)
    assert "apt install" in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_a_compiler_that_fails(
    doubled: tuple[nn.Module, Network], dims: Dims, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """It answers to --version, as torch asks, and compiles nothing."""
    script = tmp_path / "g++"
    script.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "a.cpp:1:2: error: no space left" >&2\nexit 1\n')
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    with pytest.raises(EngineError, match=r"text_encoder: AOTInductor failed: .*; use another backend") as caught:
        to_inductor(doubled[0], doubled[1], dims, tmp_path / "made" / "a.pt2")
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")
    assert os.listdir(tmp_path / "made") == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_no_gpu(networks: Networks, dims: Dims, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="compiling for CUDA needs a GPU"):
        to_inductor(networks["unet"], contract("unet", dims), dims, tmp_path / "unet.pt2", device="cuda")
    assert os.listdir(tmp_path) == []


def test_a_module_that_torch_cannot_export(dims: Dims, tmp_path: Path) -> None:
    class Branches(Doubled):
        def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor]:
            return super().forward(input_ids if input_ids.sum() > 3 else -input_ids)

    with pytest.raises(EngineError, match=r"text_encoder: torch\.export failed") as caught:
        to_inductor(Branches(dims).eval(), contract("text_encoder", dims), dims, tmp_path / "made" / "a.pt2")
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path / "made") == []


def test_a_disk_that_fills_as_the_program_is_written(
    doubled: tuple[nn.Module, Network], dims: Dims, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A limit of this process on the size of a file stands for it. Torch's own writer ends the process there."""
    monkeypatch.setattr(stage, "cannot_build", lambda *_: None)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            to_inductor(doubled[0], doubled[1], dims, tmp_path / "made" / "a.pt2")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path / "made") == []


@pytest.mark.parametrize("leaves", ["", "open('result.json', 'w').close()\n"])  # on a full disk an empty answer
def test_a_crash_of_the_compiling_process(
    doubled: tuple[nn.Module, Network], dims: Dims, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, leaves: str
) -> None:
    crashing = tmp_path / "crashing.py"
    ends = "import os, sys\nprint('terminate called', file=sys.stderr, flush=True)\nos.abort()\n"
    crashing.write_text(leaves + ends)
    monkeypatch.setattr(stage.aoti_compile, "__file__", str(crashing))
    monkeypatch.setattr(stage, "cannot_build", lambda *_: None)
    with pytest.raises(EngineError, match="ended with code -6: terminate called"):
        to_inductor(doubled[0], doubled[1], dims, tmp_path / "made" / "a.pt2")
    assert os.listdir(tmp_path / "made") == []


@needs_compiler
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_interrupted_while_the_compiler_runs(how: signal.Signals, tmp_path: Path) -> None:
    """A compiler that never ends stands for a long compilation."""
    started = tmp_path / "started"
    script = tmp_path / "g++"
    script.write_text(f'#!/bin/sh\n[ "$1" = --version ] && exit 0\necho $$ >> {started}\nsleep 600\n')
    script.chmod(0o755)
    program = tmp_path / "program.py"
    program.write_text(
        textwrap.dedent(f"""
        import signal
        from pathlib import Path
        import torch
        from torch import nn
        # What runs in the background of a shell ignores it.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        from engines.contract import Dims, contract
        from export.to_inductor import to_inductor

        class Table(nn.Module):
            def __init__(self):
                super().__init__()
                self.table = nn.Embedding(9, 5)
            def forward(self, input_ids):
                return (2 * self.table(input_ids),)

        dims = Dims(tokens=3, text_width=5, vocabulary=9, latent_channels=4, image_channels=3, vae_factor=2,
                    latent_multiple=4, sample_size=8)
        to_inductor(Table().eval(), contract("text_encoder", dims), dims, Path({str(tmp_path / "made" / "a.pt2")!r}))
        """)
    )
    environment = {**os.environ, "CXX": str(script), "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([sys.executable, str(program)], env=environment, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: started.exists() and started.read_text().strip() != "")
        process.send_signal(how)
        assert process.wait(timeout=120) != 0
        compilers = [int(pid) for pid in started.read_text().split()]
        wait_for(lambda: not any(alive(pid) for pid in compilers))
        wait_for(lambda: os.listdir(tmp_path / "made") == [])
    finally:
        process.kill()
        process.wait()


def wait_for(condition: Any, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def test_a_copy_in_half_precision_shares_nothing_and_leaves_the_module(networks: Networks) -> None:
    module = networks["unet"]
    before = copy.deepcopy(module.state_dict())
    half = converted(module, torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    # Islands of fp32 stay.
    half.unet.conv_out.float()  # type: ignore[union-attr, operator]
    again = channels_last(converted(half, torch.bfloat16, [half.unet.conv_out]))  # type: ignore[list-item]
    assert again.unet.conv_out.weight.dtype is torch.float32  # type: ignore[union-attr]
    assert again.unet.conv_out.weight.is_contiguous(memory_format=torch.channels_last)  # type: ignore[union-attr, operator]
    # What needs no conversion is not copied.
    same = converted(module, torch.float32)
    assert same is not module
    assert {p.data_ptr() for p in same.parameters()} == {p.data_ptr() for p in module.parameters()}
