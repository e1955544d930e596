"""What a request outside of every profile is told, and that the command it is given runs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer.main

from engines.bundle import Bundle
from engines.command import build_command, mend_lacking, outside, widened
from engines.contract import Dims, NetworkName
from engines.errors import InputError
from engines.manifest import LoraSource, Manifest, Source, VariantRecord
from engines.variant import LoraMode, Profile, Span, Variant, every_size

DIMS = Dims(77, 768, 49408, 4, 3, 8, 8, 64)
SOURCE = Source(model="some model", digests={})


def profile(batch: str, height: str, width: str) -> Profile:
    sizes = {"batch": batch, "height": height, "width": width}
    return Profile(**{name: Span.parse(text, name) for name, text in sizes.items()})


def parsed(said: str) -> dict[str, Any]:
    """What `smooth-rt build-engine` understands of the command in a message, and does not refuse."""
    from smooth_rt.commands.app import app
    from smooth_rt.commands.models import read_profiles

    (command,) = re.findall("`(.*)`", said)
    _, name, *words = shlex.split(command)
    group: Any = typer.main.get_command(app)
    options: dict[str, Any] = group.commands[name].make_context(name, words).params
    if options["batches"]:
        (options["profile"],) = read_profiles(options["batches"], options["heights"], options["widths"])
        options["profile"].check(DIMS)
    return options


@pytest.mark.parametrize(
    ("network", "sizes", "asked", "wanted"),
    [
        (
            "unet",
            {"batch": 1, "height": 128, "width": 64},
            "batch 1, height 1024",
            ("1:2:4", "512:512:1024"),
        ),
        ("unet", {"batch": 13, "height": 64, "width": 64}, "batch 7, height 512, width 512", ("1:2:7", "512:512:768")),
        ("vae_decoder", {"batch": 7, "height": 64, "width": 64}, "batch 7, height", ("1:2:7", "512:512:768")),
        ("text_encoder", {"batch": 10}, "batch 5", ("1:2:5", "512:512:768")),
        ("unet", {"batch": 2, "height": 32, "width": 64}, "batch 1, height 256", ("1:2:4", "256:512:768")),
    ],
)
def test_a_request_outside_is_told_in_images_and_pixels(
    network: NetworkName, sizes: dict[str, int], asked: str, wanted: tuple[str, str]
) -> None:
    variant = Variant(backend="openvino", precision="bf16", lora_mode="runtime", architecture="cpu-x86_64")
    built = VariantRecord(
        variant=variant, profiles=[profile("1:2:4", "512:512:768", "512")], backend_version="1", engines=[]
    )
    said = outside(Path("my bundle"), SOURCE, DIMS, built, network, sizes)
    assert said.startswith(f"{network}: {asked}")
    assert "was built for, batch 1:2:4, height 512:512:768, width 512 (images a call, and pixels); build" in said
    options = parsed(said)
    assert options["profile"] == profile(*wanted, "512")
    assert (options["backend"], options["precision"], options["lora_mode"]) == ("openvino", "bf16", "runtime")
    assert options["output"] == Path("my bundle")


def test_convolutions_of_one_size_get_a_bundle_of_their_own() -> None:
    variant = Variant(
        backend="openvino", precision="fp32", lora_mode="fused", architecture="cpu-x86_64", convolution="winograd",
        kernels="native",
    )  # fmt: skip
    built = VariantRecord(variant=variant, profiles=[profile("1", "512", "512")], backend_version="1", engines=[])
    options = parsed(outside(Path("b"), SOURCE, DIMS, built, "unet", {"batch": 1, "height": 32, "width": 64}))
    assert options["profile"] == profile("1", "256", "512")
    assert (options["convolution"], options["output"]) == ("winograd", Path("b-256x512"))
    assert options["kernels"] == "native"


def test_a_bundle_in_the_current_folder_has_a_name_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "b" / "config").mkdir(parents=True)
    variant = Variant(
        backend="openvino", precision="fp32", lora_mode="fused", architecture="cpu-x86_64", convolution="winograd"
    )
    built = VariantRecord(variant=variant, profiles=[profile("1", "512", "512")], backend_version="1", engines=[])
    for path, folder in ((".", "b"), ("..", "b/config")):
        monkeypatch.chdir(tmp_path / folder)
        said = outside(Path(path), SOURCE, DIMS, built, "unet", {"batch": 1, "height": 32, "width": 64})
        assert parsed(said)["output"] == tmp_path / "b-256x512"


def test_of_several_profiles_the_one_that_grows_least_is_widened() -> None:
    small, large = profile("1:1:4", "256", "256"), profile("1", "768", "768")
    assert widened([small, large], {"batch": 1, "height": 768, "width": 1024}) == profile("1", "768", "768:768:1024")
    assert widened([small, large], {"batch": 8, "height": 256, "width": 256}) == profile("1:1:8", "256", "256")
    # A command can name no side without an end.
    half_open = Profile(batch=Span(min=1, opt=1, max=2), height=Span(min=64, opt=512, max=None), width=small.width)
    assert widened([half_open], {"batch": 3}) == profile("1:1:3", "64:512:512", "256")


def held(lora_mode: LoraMode, strength: float | None, sizes: Profile | None = None) -> Manifest:
    """Of a bundle with one variant of OpenVINO in fp32."""
    variant = Variant(backend="openvino", precision="fp32", lora_mode=lora_mode, architecture="cpu-x86_64")
    built = VariantRecord.model_construct(variant=variant, profiles=[sizes or every_size(DIMS)])
    source = SOURCE.model_copy(update={"lora": LoraSource(source="l", digest="d", strength=strength)})
    return Manifest.model_construct(dims=DIMS, source=source, variants=[built], files=[])


@pytest.mark.parametrize(
    ("manifest", "asked", "wanted"),
    [
        # As the bundle holds its LoRA, so that what is there stays.
        (held("runtime", None), {"backend": "onnxruntime"}, ("onnxruntime", "fp32", "runtime", 1.0, "b")),
        (held("refit", None), {"backend": "openvino", "precision": "bf16"}, ("openvino", "bf16", "refit", 1.0, "b")),
        (held("refit", None), {"backend": "inductor"}, ("inductor", "fp32", "runtime", 1.0, "b")),  # refits nothing
        (held("runtime", None), {"backend": "openvino", "lora_mode": "refit"}, ("openvino", "fp32", "refit", 1.0, "b")),
        (held("fused", 0.5), {"backend": "openvino", "precision": "int8"}, ("openvino", "int8", "fused", 0.5, "b")),
        # Where that cannot be, in the cache, whose folders are named by the weights.
        (
            held("runtime", None),
            {"backend": "openvino", "precision": "int8"},
            ("openvino", "int8", "fused", 1.0, None),
        ),
        (
            held("fused", 0.5),
            {"backend": "openvino", "lora_mode": "runtime"},
            ("openvino", "fp32", "runtime", 1.0, None),
        ),
        # The most exact precision that there is of it.
        (held("fused", 0.5), {"backend": "onnxruntime-tensorrt"}, ("onnxruntime-tensorrt", "fp16", "fused", 0.5, "b")),
    ],
)
def test_what_a_bundle_lacks_is_added_to_it_or_built_in_the_cache(
    manifest: Manifest, asked: dict[str, Any], wanted: tuple[Any, ...]
) -> None:
    said = mend_lacking(Path("b"), manifest, **asked)
    options = parsed(said)
    found = (options[name] for name in ("backend", "precision", "lora_mode", "lora_strength", "output"))
    assert tuple(map(str, found)) == tuple(map(str, wanted))
    assert said.startswith("run `" if wanted[-1] == "b" else "its LoRA is ")


def test_what_is_added_to_a_bundle_is_of_its_sizes() -> None:
    sizes = profile("1:2:4", "512:512:768", "512")
    assert parsed(mend_lacking(Path("b"), held("fused", 1.0, sizes), "onnxruntime"))["profile"] == sizes


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"backend": "onnxruntime", "precision": "bf16"}, r"nor can it be: precision 'bf16': onnxruntime is built in"),
        ({"backend": "inductor", "lora_mode": "refit"}, "nor can it be: lora_mode=refit: inductor cannot replace"),
        (
            {"backend": "openvino", "precision": "int8", "lora_mode": "refit"},
            "nor can it be: lora_mode=refit: openvino",
        ),
        (
            {"backend": "openvino", "precision": "bf16", "convolution": "winograd"},
            "nor can it be: convolution=winograd",
        ),
    ],
)
def test_what_no_build_can_add_is_told_without_a_command(asked: dict[str, Any], said: str) -> None:
    told = mend_lacking(Path("b"), held("runtime", None), **asked)
    assert told.startswith(said)
    assert "`" not in told
    assert "eager" not in told


def test_without_a_lora_there_is_no_mode_of_it() -> None:
    manifest = held("fused", 1.0)
    bare = manifest.model_copy(update={"source": SOURCE})
    assert mend_lacking(Path("b"), bare, "openvino", lora_mode="runtime").startswith("it has no LoRA")
    assert parsed(mend_lacking(Path("b"), bare, "onnxruntime"))["lora"] == "none"


@pytest.mark.parametrize("strength", [0.123456789, 1 / 3, 1e-7, -2.0])
def test_a_strength_is_told_in_every_digit(strength: float) -> None:
    """Another one, by the last digit, is another bundle: what stands there would be replaced."""
    options = parsed(mend_lacking(Path("b"), held("fused", strength), "onnxruntime"))
    assert options["lora_strength"] == strength


def test_a_damaged_bundle_is_built_again_with_its_lora_apart() -> None:
    source = held("runtime", None).source
    options = parsed(f"`{build_command(Path('b'), source, ['openvino'])}`")
    assert options["lora_mode"] == "runtime"


def test_a_bundles_engine_says_it(bundle_folder: Path, dims: Dims) -> None:
    bundle = Bundle.open(bundle_folder)
    (built,) = bundle.variants
    with bundle.engine("vae_encoder", "onnxruntime") as engine:
        engine.bounds = ({"batch": (1, 1, 1), "height": (2, 2, 2), "width": (2, 2, 2)},)
        assert engine.outside is not None
        with pytest.raises(InputError, match=f"height {dims.vae_factor * 4}, width {dims.vae_factor * 2} lies outside"):
            engine.most_rows(height=4, width=2)
    assert built.profiles
