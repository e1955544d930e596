"""The commands that messages hand out: each runs as it stands."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from engines.contract import Dims, NetworkName, said_gradients
from engines.errors import InputError
from engines.manifest import Manifest, Source, VariantRecord
from engines.recipes import RECIPES, check_convolution, check_kernels, check_lora_mode, check_precision
from engines.select import ON_GPU, architecture
from engines.variant import GUIDED, Convolution, Kernels, LoraMode, Precision, Profile, Span, Variant, few_images

__all__ = ["build_command", "mend_lacking", "outside", "widened"]


def build_command(
    path: Path | None = None,
    source: Source | None = None,
    backends: Sequence[str] = (),
    variant: Variant | None = None,
    profiles: Sequence[Profile] = (),
    gradients: Sequence[NetworkName] = (),
) -> str:
    """The command that builds a bundle like this one again; with absolute paths, as far as they are known.

    Args:
        path: the bundle's folder.
        source: the model and the LoRA.
        backends: what to build; those that `variant` does not say.
        variant: the backend, the precision and how the LoRA is held.
        profiles: the sizes; one that has no end is what a build without options is for.
        gradients: the networks of gradients.
    """
    words = ["smooth-rt", "build-engine"]
    if source is not None:
        words += ["--model", source.model_location]
        words += [] if source.config_location is None else ["--model-config", source.config_location]
        # Left out, --lora is the shipped one where the model is the default.
        words += ["--lora", "none" if source.lora is None else source.lora.location]
        fused = variant is None or variant.lora_mode == "fused"
        if source.lora is not None and source.lora.strength is not None and fused:
            words += ["--lora-strength", repr(source.lora.strength).removesuffix(".0")]  # every digit: it is compared
        if source.lora is not None and source.lora.strength is None and variant is None:
            words += ["--lora-mode", "runtime"]  # which every backend has; a fused one would be another bundle
    if variant is not None:
        backends = [variant.backend]
    if backends:
        words += ["--backend", ",".join(backends)]
    if variant is not None:
        words += [] if variant.precision == "fp32" else ["--precision", variant.precision]
        words += [] if variant.convolution == "direct" else ["--convolution", variant.convolution]
        words += [] if variant.kernels == "backend" else ["--kernels", variant.kernels]
        words += [] if variant.lora_mode == "fused" else ["--lora-mode", variant.lora_mode]
        if not variant.architecture.startswith("cpu-"):
            words += ["--gpu-arch", variant.architecture]
    if gradients:
        words += ["--gradients", ",".join(said_gradients(gradients))]
    for profile in profiles:
        if profile.height.max is not None:
            words += ["--batch", str(profile.batch), "--height", str(profile.height), "--width", str(profile.width)]
    if path is not None:
        words += ["--output", str(path)]
    return shlex.join(words)


def mend_lacking(
    path: Path,
    manifest: Manifest,
    backend: str,
    precision: Precision | None = None,
    lora_mode: LoraMode | None = None,
    convolution: Convolution | None = None,
    kernels: Kernels | None = None,
) -> str:
    """What to do about a variant that a bundle lacks: "run" and the command that adds it, everything else in the bundle
    staying; or, where that cannot be, the one that builds another bundle in the cache, or why nothing does.

    Args:
        path: of the bundle.
        manifest: of it.
        backend: of the variant; what it shall be like where the rest names nothing.
        precision: None is the backend's most exact one.
        lora_mode: None is the bundle's where the backend has it so.
        convolution: None is direct.
        kernels: None is the backend's.
    """
    like = next((built for built in manifest.variants if built.backend == backend), manifest.variants[0])
    lora, exact = manifest.source.lora, next(iter(RECIPES[backend])) if precision is None else precision
    apart = lora is not None and lora.strength is None
    if lora is None and lora_mode not in (None, "fused"):
        return "it has no LoRA whose strength could be set; leave the LoRA mode out"
    own = like.variant.lora_mode
    modes = [lora_mode] if lora_mode is not None else list(dict.fromkeys([own, "runtime", "fused"] if apart else [own]))
    try:
        check_precision(backend, exact)
        check_kernels(backend, kernels or "backend")
        able = [mode for mode in modes if _holds(backend, exact, mode)]
        if not able:
            check_lora_mode(backend, exact, modes[0])
        variant = Variant(
            backend=backend,
            precision=exact,
            lora_mode=able[0],
            # None is named where the bundle has none of the backend: each machine knows its own.
            architecture=like.variant.architecture if like.backend == backend in ON_GPU else architecture(),
            convolution=convolution or "direct",
            kernels=kernels or "backend",
        )
        profiles = like.profiles
        if variant.convolution == "winograd" and profiles[0].height.max is None:  # which is of one size
            trained = few_images(manifest.dims)
            profiles = [Profile(batch=Span(min=1, opt=1, max=1), height=trained.height, width=trained.width)]
        check_convolution(variant, profiles)
    except InputError as error:
        return f"nor can it be: {error}"
    if (variant.lora_mode != "fused") == apart:
        return f"run `{build_command(path, manifest.source, (), variant, profiles)}`"
    # A LoRA that is fused and one that is held apart are other weights: the bundle would be replaced. In the cache a
    # folder is named by its weights, so that nothing is.
    command = build_command(None, manifest.source, (), variant, profiles)
    return f"its LoRA is {'held apart' if apart else 'fused'}; build another bundle, in the cache, with `{command}`"


def _holds(backend: str, precision: str, lora_mode: str) -> bool:
    try:
        check_lora_mode(backend, precision, lora_mode)
    except InputError:
        return False
    return True


def outside(
    path: Path, source: Source, dims: Dims, built: VariantRecord, network: NetworkName, sizes: Mapping[str, int]
) -> str:
    """One line for a call of a network that no profile covers, in images and pixels, with the command that builds what
    takes it.

    Args:
        path: of the bundle.
        source: of it.
        dims: the model's sizes.
        built: the variant.
        network: which of its networks.
        sizes: of the call, by symbol of the contract.
    """
    asked = {
        symbol: math.ceil(size / (2 if network in GUIDED else 1)) if symbol == "batch" else dims.vae_factor * size
        for symbol, size in sizes.items()
    }
    said = ", ".join(f"{name} {size}" for name, size in asked.items())
    taken = " or ".join(map(str, built.profiles))
    if built.variant.convolution == "direct":
        command = build_command(path, source, (), built.variant, [widened(built.profiles, asked)])
        mend = f"build a wider one with `{command}`"
    else:  # of which each size has a bundle of its own
        first = built.profiles[0]
        sides = {name: asked.get(name, getattr(first, name).opt) for name in ("height", "width")}
        spans = {name: Span(min=side, opt=side, max=side) for name, side in sides.items()}
        named = path.resolve() if path.name in ("", "..") else path
        beside = named.with_name(f"{named.name}-{sides['height']}x{sides['width']}")
        profile = Profile(batch=_ended(first.batch, asked.get("batch", 1)), **spans)
        mend = f"build another with `{build_command(beside, source, (), built.variant, [profile])}`"
    return (
        f"{network}: {said} lies outside what the {built.backend} engine was built for, {taken} (images a call, and "
        f"pixels); {mend}"
    )


def widened(profiles: Sequence[Profile], asked: Mapping[str, int]) -> Profile:
    """The profile that has to grow least to cover a request, grown.

    Args:
        profiles: at least one.
        asked: images (batch) and pixels (height, width); what is left out is covered.
    """

    def grown(profile: Profile) -> Profile:
        spans = {}
        for name in ("batch", "height", "width"):
            span = _ended(getattr(profile, name), asked.get(name, 1))
            # Fewer images than the least are filled up.
            least = span.min if name == "batch" else min(span.min, asked.get(name, span.min))
            spans[name] = Span(min=least, opt=span.opt, max=span.max)
        return Profile(**spans)

    def growth(profile: Profile) -> tuple[int, float]:
        pairs = [(getattr(profile, name), getattr(grown(profile), name)) for name in ("batch", "height", "width")]
        ratio = math.prod((new.max / new.min) / ((old.max or new.max) / old.min) for old, new in pairs)
        return sum(old != new for old, new in pairs), ratio

    return grown(min(profiles, key=growth))


def _ended(span: Span, asked: int) -> Span:
    """`span` up to `asked` at least, and with an end: a command can name no other."""
    return Span(min=span.min, opt=span.opt, max=max(span.max or span.opt, asked))
