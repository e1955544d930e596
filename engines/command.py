"""The commands that messages hand out: each runs as it stands."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from engines.contract import Dims, NetworkName, said_gradients
from engines.manifest import Source, VariantRecord
from engines.variant import GUIDED, Profile, Span, Variant

__all__ = ["build_command", "outside", "widened"]


def build_command(
    path: Path | None = None,
    source: Source | None = None,
    backends: Sequence[str] = (),
    variant: Variant | None = None,
    profiles: Sequence[Profile] = (),
    gradients: Sequence[NetworkName] = (),
) -> str:
    """The command that builds a bundle like this one again.

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
        words += ["--model", source.model]
        # Left out, --lora is the shipped one where the model is the default.
        words += ["--lora", "none" if source.lora is None else source.lora.source]
        if source.lora is not None and source.lora.strength is not None:
            words += ["--lora-strength", f"{source.lora.strength:g}"]
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
        beside = path.with_name(f"{path.name}-{sides['height']}x{sides['width']}")
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
