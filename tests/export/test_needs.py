"""What a build is said to take, what a machine is said to have, and the refusal where the one exceeds the other."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from engines.bundle import Bundle
from engines.contract import DERIVED, Dims, Network, NetworkName, contract
from engines.eager import gradient_networks, torch_networks
from engines.errors import EngineError
from engines.machine import available_memory
from engines.manifest import Source
from engines.select import architecture
from engines.variant import Order, Profile, Span, Variant, every_size
from export import needs
from export.activations import held_at_most
from export.graphs import cases
from export.needs import check_memory, disk_needed, memory_needed
from export.transformed import added_by_transforms

GIB = 2**30
KIB = 1024


@pytest.fixture(scope="module", autouse=True)
def once() -> Iterator[None]:
    """Each size is looked at once for all tests."""
    found: dict[Any, int] = {}

    def remembered(module: nn.Module, network: Network, sizes: Mapping[str, int], fused: bool) -> int:
        key = (network.name, network.inputs[0].axes, tuple(sizes.items()), fused)
        if key not in found:
            found[key] = held_at_most(module, network, sizes, fused)
        return found[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(needs, "held_at_most", remembered)
        yield


@pytest.fixture(scope="module")
def sd15() -> tuple[dict[NetworkName, nn.Module], Dims]:
    """Stable Diffusion 1.5 without its numbers, which takes no memory."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from bench.training import SD15

    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    text = {"vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
    with torch.device("meta"):
        networks = torch_networks(
            CLIPTextModel(CLIPTextConfig(**text, num_attention_heads=12)),
            UNet2DConditionModel(**SD15, sample_size=64),
            AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, **blocks),
        )
    dims = Dims(
        tokens=77, text_width=768, vocabulary=49408, latent_channels=4, image_channels=3, vae_factor=8,
        latent_multiple=8, sample_size=64, up_channels=(1280, 1280, 640, 320),
    )  # fmt: skip
    return networks, dims


def profile(batch: str, side: str) -> Profile:
    sides = Span.parse(side, "side")
    return Profile(batch=Span.parse(batch, "batch"), height=sides, width=sides)


def ordered(backend: str, dims: Dims, *profiles: Profile, precision: Any = "fp32", gradients: Any = ()) -> Order:
    variant = Variant(backend=backend, precision=precision, lora_mode="fused", architecture=architecture())
    return Order(variant=variant, profiles=profiles or (every_size(dims),), gradients=gradients)


def held(sd15: Any, name: NetworkName, fused: bool = False, **sizes: int) -> float:
    networks, dims = sd15
    module = gradient_networks(networks["unet"], [name])[name] if name in DERIVED else networks[name]
    return needs.held_at_most(module, contract(name, dims), sizes, fused) / GIB


def test_what_a_call_holds_beside_its_weights(sd15: Any) -> None:
    # The products of attention and its softmax in the largest of layers: 8 heads of 4096 cells squared, twice.
    products = 2 * 8 * 4096**2 * 4 / GIB
    assert held(sd15, "unet", batch=1, height=64, width=64) == pytest.approx(products, rel=0.1)
    assert held(sd15, "unet", fused=True, batch=1, height=64, width=64) < products / 5
    # 256 channels of the image's sides, three at once.
    image = 256 * 512**2 * 4 / GIB
    assert 2 * image < held(sd15, "vae_decoder", batch=1, height=64, width=64) < 4 * image
    assert held(sd15, "vae_decoder", batch=2, height=64, width=64) == pytest.approx(
        2 * held(sd15, "vae_decoder", batch=1, height=64, width=64), rel=0.01
    )


def test_what_was_measured_of_gradients_follows(sd15: Any) -> None:
    # Peaks in GiB of a process without the model: docs/measurements, "Gradient graphs".
    for rows, side, ort, openvino in ((1, 32, 7.8, 14.4), (2, 32, 8.6, 16.0), (1, 64, 14.0, None)):
        beside = held(sd15, "unet_vjp", batch=rows, height=side, width=side)
        assert 0.5 + 1.2 * 1.8 * 3.2 + 1.5 * beside == pytest.approx(ort, rel=0.1)
        assert openvino is None or 0.5 + 2.2 * 1.8 * 3.2 + 2.5 * beside == pytest.approx(openvino, rel=0.05)
    networks, dims = sd15
    one_size = ordered("openvino", dims, profile("1", "512"), gradients=("unet_vjp",))
    need = memory_needed(networks, dims, one_size)
    assert (need.network, need.case and need.case.sizes["height"]) == ("unet_vjp", 64)
    assert need.size / GIB == pytest.approx(18.2, rel=0.1)


def test_gradients_of_every_size_of_a_large_model_are_verified_within_what_24_gib_hold(sd15: Any) -> None:
    networks, dims = sd15
    tried = cases(contract("unet_vjp_text", dims), dims)
    assert [case.sizes["batch"] for case in tried] == [1, 2, 3]
    assert all(case.sizes["batch"] * case.sizes["height"] * case.sizes["width"] <= 2 * 32 * 32 for case in tried)
    for backend in ("onnxruntime", "openvino"):
        need = memory_needed(networks, dims, ordered(backend, dims, gradients=("unet_vjp_text",)))
        assert need.network == "unet_vjp_text"
        assert 7 * GIB < need.size < 17 * GIB  # the model takes 4


def test_gradients_that_do_not_fit_are_refused_with_what_does(sd15: Any) -> None:
    networks, dims = sd15
    asked = [ordered("openvino", dims, profile("1:1:2", "512"), gradients=("unet_vjp_text",))]
    with pytest.raises(EngineError) as caught:
        check_memory(networks, dims, asked, 19 * GIB)
    said = str(caught.value)
    assert said.startswith(
        "unet_vjp_text: verifying openvino-fp32 at the profile of batch 1:1:2, height 512, width 512 "
    )
    assert "; leave --gradients out, or give a smaller profile such as --batch 1 --height 512 --width 512, or" in said


def test_the_profile_of_the_issue_is_refused_before_it_begins(sd15: Any) -> None:
    networks, dims = sd15
    large = ordered("onnxruntime", dims, profile("1:4:32", "512:512:768"))
    need = memory_needed(networks, dims, large)
    assert need.case is not None
    assert (need.network, need.case.sizes) == ("vae_decoder", {"batch": 32, "height": 96, "width": 96})
    assert need.size > 4 * 32 * 256 * 768**2  # a single tensor of it
    with pytest.raises(EngineError) as caught:
        check_memory(networks, dims, [large], 18 * GIB)
    assert re.fullmatch(
        r"vae_decoder: verifying onnxruntime-fp32 at the profile of batch 1:4:32, height 512:512:768, width "
        r"512:512:768 takes about [0-9.]+ GiB of memory beside the model and 18\.0 GiB are there; give a smaller "
        r"profile such as --batch 1:4:4 --height 512:512:768 --width 512:512:768, or .*free some "
        r"\(SMOOTH_RT_MEMORY=0 builds all the same\)",
        str(caught.value),
    )


def test_sd15_on_both_backends_of_the_cpu_is_what_was_measured(sd15: Any) -> None:
    networks, dims = sd15
    both = [ordered(backend, dims) for backend in ("onnxruntime", "openvino")]
    # GiB; at the peak, less what was taken when the model was there. It was of plain attention, at the largest case.
    measured = 14.1 - 4.4
    assert 0.5 + 1.2 * 3.2 + 1.5 * held(sd15, "unet", batch=2, height=72, width=80) == pytest.approx(measured, rel=0.1)
    for one, least in zip(both, (5, 9), strict=True):
        need = memory_needed(networks, dims, one)
        assert need.network == "unet"
        assert least < need.size / GIB < 1.1 * measured
    assert disk_needed(networks, dims, both) / GIB == pytest.approx(7.94, rel=0.15)


def test_transformed_convolutions_are_counted_by_layer_and_size(sd15: Any) -> None:
    networks, dims = sd15
    unet, network = networks["unet"], contract("unet", dims)
    own = sum(weight.numel() * 4 for weight in unet.parameters())

    def written(side: str, native: bool) -> float:
        return own + added_by_transforms(unet, network, profile("1", side).bounds(network, dims), native)

    # The files of real builds for 512 px, by OpenVINO's operations and by native kernels.
    assert written("512", native=False) == pytest.approx(7_468_569_164, rel=2e-4)
    assert written("512", native=True) == pytest.approx(7_675_005_608, rel=2e-4)
    assert written("1024", native=False) > 2.8 * own


@pytest.mark.parametrize("kernels", ["backend", "native"])
def test_the_disk_of_transformed_convolutions_is_enough_at_any_size(sd15: Any, kernels: Any) -> None:
    networks, dims = sd15
    winograd = {"convolution": "winograd", "kernels": kernels}
    for side in ("512", "1024"):
        plain = ordered("openvino", dims, profile("1", side))
        asked = plain.model_copy(update={"variant": plain.variant.model_copy(update=winograd)})
        more = sum(
            added_by_transforms(
                networks[name], contract(name, dims), profile("1", side).bounds(contract(name, dims), dims),
                native=kernels == "native" and name == "unet",
            )
            for name in ("unet", "vae_encoder", "vae_decoder")
        )  # fmt: skip
        needed = disk_needed(networks, dims, [asked])
        assert needed == pytest.approx(disk_needed(networks, dims, [plain]) + 1.1 * more, rel=1e-6)
        # Each of two gradients has the transformed layers of the way there and of the way back.
        both = asked.model_copy(update={"gradients": ("unet_vjp", "unet_vjp_text")})
        assert disk_needed(networks, dims, [both]) > needed + 2 * 2 * more / 2


def test_each_size_of_openvino_that_is_compiled_holds_the_weights(sd15: Any) -> None:
    networks, dims = sd15
    one, two = (
        memory_needed(networks, dims, ordered("openvino", dims, *profiles)).size
        for profiles in ((profile("1", "256"),), (profile("1", "256"), profile("1", "320")))
    )
    assert (two - one) / GIB == pytest.approx(2 * 2.2 * 3.2, rel=0.05)  # with guidance and without


def test_inductor_packs_the_weights_once_a_size_and_works_beside(sd15: Any) -> None:
    networks, dims = sd15
    unet = 3.2 * GIB
    every, one = (
        disk_needed(networks, dims, [ordered("inductor", dims, *profiles)]) for profiles in ((), (profile("1", "512"),))
    )
    weights = sum(p.numel() * 4 for name in ("text_encoder", "unet") for p in networks[name].parameters())
    assert every > weights + 3 * unet
    assert one - every == pytest.approx(1.1 * weights, rel=0.01)  # a call with guidance, a call without
    half = disk_needed(networks, dims, [ordered("inductor", dims, precision="bf16")])
    assert half == pytest.approx(every / 2, rel=0.01)


def test_the_refusal_names_both_amounts_and_what_helps(sd15: Any) -> None:
    networks, dims = sd15
    orders = [ordered("onnxruntime", dims), ordered("openvino", dims)]
    for enough in (12 * GIB, None):
        check_memory(networks, dims, orders, enough)
    hungry = [ordered("onnxruntime", dims, precision="int8"), ordered("openvino", dims, precision="int8")]
    with pytest.raises(EngineError, match=r"build openvino-int8 alone, or onnxruntime in fp32, or free some"):
        check_memory(networks, dims, hungry, 12 * GIB)
    with pytest.raises(EngineError) as caught:
        check_memory(networks, dims, orders, 4 * GIB)
    said = str(caught.value)
    assert said.startswith("unet: building openvino-fp32 takes about 10.1 GiB")
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
