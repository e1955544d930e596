"""What a build is said to take, what a machine is said to have, and the refusal where the one exceeds the other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from engines.bundle import Bundle
from engines.contract import NETWORKS, NetworkName
from engines.errors import EngineError
from engines.manifest import Source
from engines.variant import Order
from export.needs import available_memory, check_memory, disk_needed, memory_needed

GIB = 2**30
KIB = 1024


class Weights(nn.Module):
    """A module of so many GiB in fp32, that takes none."""

    def __init__(self, size: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(int(size * GIB / 4), device="meta"))


@pytest.fixture
def sd15() -> dict[NetworkName, nn.Module]:
    """As large as those of Stable Diffusion 1.5."""
    return dict(zip(NETWORKS, map(Weights, (0.46, 3.20, 0.13, 0.18)), strict=True))


def test_sd15_on_both_backends_of_the_cpu_is_what_was_measured(sd15: Any, order: Callable[..., Order]) -> None:
    both = [order(backend) for backend in ("onnxruntime", "openvino")]
    measured = 14.1 - 4.4  # GiB; at the peak, less what was taken when the model was there
    for one in both:
        needed, network = memory_needed(sd15, one.variant)
        assert network == "unet"
        assert needed / GIB == pytest.approx(measured, rel=0.1)
    assert disk_needed(sd15, both) / GIB == pytest.approx(7.94, rel=0.15)


def test_the_refusal_names_both_amounts_and_what_helps(sd15: Any, order: Callable[..., Order]) -> None:
    orders = [order("onnxruntime"), order("openvino")]
    for enough in (12 * GIB, None):
        check_memory(sd15, orders, enough)
    hungry = [order("onnxruntime", "int8"), order("openvino", "int8")]
    with pytest.raises(EngineError, match=r"build openvino-int8 alone, or onnxruntime in fp32, fp16, or free some"):
        check_memory(sd15, hungry, 12 * GIB)
    with pytest.raises(EngineError) as caught:
        check_memory(sd15, orders, 4 * GIB)
    said = str(caught.value)
    assert said.startswith("unet: building onnxruntime-fp32 takes about 10.1 GiB")
    assert "of memory beside the model and 4.0 GiB are there" in said
    assert said.endswith("(SMOOTH_RT_MEMORY=0 builds all the same)")
    assert "\n" not in said


def test_nothing_is_begun_where_the_memory_is_too_small(
    networks: dict[NetworkName, nn.Module], dims: Any, order: Callable[..., Order], tmp_path: Path
) -> None:
    from export.build import build_bundle

    def write(_: Path) -> None:
        raise AssertionError("begun")

    def build(memory: int | None) -> Bundle:
        source = Source(model="tiny", digests={"unet": "u"})
        return build_bundle(networks, dims, source, [order("openvino")], tmp_path / "bundle", write, memory=memory)

    with pytest.raises(EngineError, match=r"openvino-fp32 takes about .* GiB of memory .* 1\.0 MiB are there"):
        build(2**20)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(AssertionError, match="begun"):
        build(None)


def machine(root: Path, cgroup: str, **files: str) -> Path:
    """A file system that says what Linux says; keywords are files under sys/fs/cgroup, "__" stands for "/"."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(f"MemTotal: {64 * GIB // KIB} kB\nMemAvailable:   {32 * GIB // KIB} kB\n")
    (root / "proc/self/cgroup").write_text(cgroup)
    for name, content in files.items():
        path = root / "sys/fs/cgroup" / name.replace("__", "/").replace("memory_", "memory.")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


@pytest.mark.parametrize(
    ("cgroup", "files", "gib"),
    [
        ("", {}, 32),
        ("0::/\n", {}, 32),
        ("0::/job/step\n", {"job__step__memory_max": "max\n", "job__step__memory_current": "1\n"}, 32),
        ("0::/job/step\n", {"job__memory_max": f"{8 * GIB}\n", "job__memory_current": f"{2 * GIB}\n"}, 6),
        (  # a container that is told its path on the host
            "0::/elsewhere\n",
            {"memory_max": f"{8 * GIB}", "memory_current": f"{5 * GIB}", "memory_stat": f"file 1\ninactive_file {GIB}"},
            4,
        ),
        ("0::/\n", {"memory_max": f"{GIB}", "memory_current": f"{2 * GIB}"}, 0),
        (
            "12:cpu:/x\n4:memory,hugetlb:/job\n",
            {
                "memory__job__memory_limit_in_bytes": f"{4 * GIB}",
                "memory__job__memory_usage_in_bytes": f"{3 * GIB}",
                "memory__memory_limit_in_bytes": f"{2**63 - 4096}",
                "memory__memory_usage_in_bytes": f"{9 * GIB}",
            },
            1,
        ),
    ],
)
def test_what_a_machine_has(tmp_path: Path, cgroup: str, files: dict[str, str], gib: int) -> None:
    assert available_memory(machine(tmp_path, cgroup, **files)) == gib * GIB


def test_a_machine_that_does_not_say(tmp_path: Path) -> None:
    assert available_memory(tmp_path) is None
