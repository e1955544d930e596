"""Sizes that are asked for, what a network is built for by them, and which calls an engine then takes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engines.base import Engine
from engines.contract import Dims, Network, contract
from engines.errors import InputError
from engines.ort import OrtEngine
from engines.ov import OvEngine
from engines.variant import Bounds, Profile, Span, Variant, every_size, fitting, merged

Write = Callable[[Path], Path]


def profile(batch: str, height: str, width: str) -> Profile:
    return Profile(
        batch=Span.parse(batch, "batch"), height=Span.parse(height, "height"), width=Span.parse(width, "width")
    )


@pytest.mark.parametrize(
    ("text", "sizes", "said"),
    [("4", (4, 4, 4), "4"), ("1:4", (1, 4, 4), "1:4:4"), (" 1:4:32 ", (1, 4, 32), "1:4:32"), ("8:8:8", (8, 8, 8), "8")],
)
def test_sizes_as_they_are_written(text: str, sizes: tuple[int, int, int], said: str) -> None:
    span = Span.parse(text, "batch")
    assert (span.min, span.opt, span.max) == sizes
    assert str(span) == said
    assert Span.parse(str(span), "batch") == span


@pytest.mark.parametrize(
    "text", ["", "a", "1:2:3:4", "4:1", "4:8:2", "0", "0:1:2", "-1", "1.5", "1:", ":4", "1e3", "9" * 12, "1 2", "١"]
)
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(InputError, match=r"batch=.*give") as caught:
        Span.parse(text, "batch")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "sizes", [{"min": 4, "opt": 1}, {"min": 4, "opt": 1, "max": 8}, {"min": 0, "opt": 1, "max": 1}, {"min": "a"}, {}]
)
def test_sizes_that_are_none_in_python(sizes: dict[str, Any]) -> None:
    given = ", ".join(f"{name}={size!r}" for name, size in sizes.items())
    with pytest.raises(InputError) as caught:
        Span(**sizes)
    assert str(caught.value).startswith(f"Span({given}): min, opt and max must rise, from 1 on")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("spans", [{"batch": 1, "height": 2, "width": 3}, {"batch": Span(min=1, opt=1, max=1)}, {}])
def test_a_profile_of_anything_but_spans(spans: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="batch, height and width are a Span each") as caught:
        Profile(**spans)
    assert "\n" not in str(caught.value)


def test_a_profile_survives_the_manifest() -> None:
    for one in (profile("1:4:32", "512", "512:512:768"), every_size(Dims(7, 16, 50, 4, 3, 2, 2, 8))):
        assert Profile.model_validate_json(one.model_dump_json(), strict=True) == one


@pytest.mark.parametrize("text", ["1:2", "2:1:3", "1:2:x", "a:b:c", "0:1:2"])
def test_a_profile_that_was_edited(text: str) -> None:
    with pytest.raises(ValueError, match=r"1 validation error"):
        Profile.model_validate_json(f'{{"batch": "{text}", "height": "8:8:8", "width": "8:8:8"}}', strict=True)


def test_sides_are_multiples_of_the_models(dims: Dims) -> None:
    profile("1", "16", "8:24:32").check(dims)
    with pytest.raises(InputError, match=r"width=8:20:32: 20 is no multiple of 8; the nearest is 16"):
        profile("1", "16", "8:20:32").check(dims)


def test_the_unet_takes_both_halves_of_guidance(dims: Dims) -> None:
    asked = profile("1:4:32", "16", "16:24:32")
    assert asked.bounds(contract("unet", dims), dims) == [
        {"batch": (1, 8, 64), "height": (4, 4, 4), "width": (4, 6, 8)}
    ]
    assert asked.bounds(contract("vae_decoder", dims), dims) == [
        {"batch": (1, 4, 32), "height": (4, 4, 4), "width": (4, 6, 8)}
    ]
    assert asked.bounds(contract("text_encoder", dims), dims) == [{"batch": (1, 8, 64)}]


def test_one_size_is_one_size_with_guidance_and_without(dims: Dims) -> None:
    asked = profile("2", "16", "16")
    sides = {"height": (4, 4, 4), "width": (4, 4, 4)}
    assert asked.bounds(contract("unet", dims), dims) == [{"batch": (2, 2, 2), **sides}, {"batch": (4, 4, 4), **sides}]
    assert asked.bounds(contract("vae_encoder", dims), dims) == [{"batch": (2, 2, 2), **sides}]


def test_the_tightest_profile_serves() -> None:
    profiles: list[Bounds] = [
        {"batch": (1, 4, 8), "height": (2, 4, 8)},
        {"batch": (4, 4, 4), "height": (4, 4, 4)},
        {"batch": (1, 1, None), "height": (2, 4, None)},
    ]
    for sizes, index in [((4, 4), 1), ((3, 4), 0), ((5, 8), 0), ((9, 4), 2), ((1, 16), 2), ((1, 1), None)]:
        assert fitting(profiles, {"batch": sizes[0], "height": sizes[1]}) == index
    # A batch may be filled up where nothing takes it as it is.
    assert fitting(profiles[1:2], {"batch": 3, "height": 4}) == 0
    assert fitting(profiles[1:2], {"batch": 5, "height": 4}) is None


def test_profiles_come_together_once() -> None:
    one, two = profile("1", "8", "8"), profile("2", "8", "8")
    assert merged([one], [two, one]) == [one, two]


def test_folders_are_told_apart() -> None:
    cpu = Variant(backend="openvino", precision="int8", lora_mode="fused", architecture="cpu-x86_64")
    gpu = Variant(backend="tensorrt-rtx", precision="fp16", lora_mode="refit", architecture="sm80,sm89")
    assert (cpu.name, gpu.name) == ("openvino-int8", "tensorrt-rtx-fp16-refit-sm80_sm89")
    assert cpu.model_copy(update={"convolution": "winograd"}).name == "openvino-int8-winograd"
    both = {"convolution": "winograd", "kernels": "native", "lora_mode": "runtime"}
    assert cpu.model_copy(update=both).name == "openvino-int8-winograd-native-runtime"


def bounds_of(*batches: tuple[int, int, int | None]) -> list[Bounds]:
    return [{"batch": batch, "height": (2, 2, 4), "width": (2, 2, 4)} for batch in batches]


@pytest.fixture(params=[OrtEngine, OvEngine])
def bounded(request: pytest.FixtureRequest, network: Network, write_graph: Write, tmp_path: Path) -> Any:
    path = write_graph(tmp_path / "graph.onnx")
    return lambda bounds: request.param(network, path, bounds)


def image(dims: Dims, rows: int, height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows)
    sides = height * dims.vae_factor, width * dims.vae_factor
    return torch.randn(rows, dims.image_channels, *sides, generator=generator)


def test_few_rows_are_filled_up_and_cut_again(bounded: Callable[..., Engine], module: Any, dims: Dims) -> None:
    fixed: Bounds = {"batch": (4, 4, 4), "height": (2, 2, 2), "width": (2, 2, 2)}
    with bounded([fixed]) as engine:
        for rows in (1, 3, 4):
            sample = image(dims, rows, 2, 2)
            got = engine.infer(sample=sample)["latent_mean"]
            torch.testing.assert_close(got, module(sample)[0].detach())
        assert engine.most_rows(height=2, width=2) == 4


def test_every_size_inside_runs_and_none_outside(bounded: Callable[..., Engine], module: Any, dims: Dims) -> None:
    fixed: Bounds = {"batch": (1, 1, 1), "height": (2, 2, 2), "width": (2, 2, 2)}
    with bounded([fixed, *bounds_of((2, 2, 3))]) as engine:
        for rows, height, width in [(1, 2, 2), (3, 4, 3), (2, 2, 2), (1, 3, 2)]:
            sample = image(dims, rows, height, width)
            torch.testing.assert_close(engine.infer(sample=sample)["latent_mean"], module(sample)[0].detach())
        for rows, height, width in [(4, 2, 2), (1, 1, 2), (1, 2, 5)]:
            with pytest.raises(InputError, match=r"outside what .* batch 1:1:1, .* or batch 2:2:3, .*ask for one"):
                engine.infer(sample=image(dims, rows, height, width))
        assert engine.most_rows(height=4, width=4) == 3
        with pytest.raises(InputError, match="height 5"):
            engine.most_rows(height=5, width=2)


def test_without_an_end_any_number_of_rows_goes(bounded: Callable[..., Engine]) -> None:
    with bounded(bounds_of((1, 2, 3), (1, 1, None))) as engine:
        assert engine.most_rows(height=2, width=2) is None
    with bounded([]) as engine:
        assert engine.most_rows(height=200, width=1) is None


def test_a_profile_of_more_than_anyone_means() -> None:
    dims = Dims(7, 16, 50, 4, 3, 2, 2, 8)
    with pytest.raises(InputError, match="batch=1:1:999999999: 999999999 is too many; give at most 10000"):
        Profile(
            batch=Span.parse("1:1:999999999", "batch"), height=Span.parse("16", ""), width=Span.parse("16", "")
        ).check(dims)
