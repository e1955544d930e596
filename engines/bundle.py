"""A bundle: a folder of built graphs with a manifest.json that says what they are and proves that they are whole.

manifest.json                                written last
config/                                      what the pipeline needs to run without the model
onnxruntime-fp32/<network>/model.onnx        a folder a variant; weights in model.onnx.data beside it
openvino-int8/<network>/openvino_model.xml   with openvino_model.bin
tensorrt-rtx-fp16-sm89/<network>/model.engine
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from engines.command import build_command, mend_lacking, outside
from engines.contract import DERIVED, Dims, NetworkName, said_gradients
from engines.errors import BundleError, EngineError, InputError, with_command
from engines.manifest import (
    EngineRecord,
    FileRecord,
    LoraSource,
    Manifest,
    Parity,
    Source,
    VariantRecord,
    digest_file,
    digest_json,
    key_parts,
)
from engines.paths import absolute
from engines.recipes import build_revision, check_gradients
from engines.select import backend_version, check_backend, gpu, open_engine, runs_here
from engines.staging import staging
from engines.variant import (
    CONVOLUTIONS,
    KERNELS,
    PRECISIONS,
    Convolution,
    Kernels,
    LoraMode,
    Precision,
    Profile,
    Variant,
)
from engines.whole import MANIFEST, check_files, check_unchanged, read_manifest, stamps

if TYPE_CHECKING:
    from engines.base import Engine

__all__ = [
    "MANIFEST",
    "Bundle",
    "EngineRecord",
    "FileRecord",
    "LoraSource",
    "Manifest",
    "Parity",
    "Source",
    "VariantRecord",
    "build_command",
    "digest_file",
    "digest_json",
    "key_parts",
    "staging",
]


class Bundle:
    """An opened bundle. `open` has checked it; `engine` opens a network on a backend.

    Attributes: `caches` is the folder for what TensorRT compiles as an engine opens or runs, a folder a key;
    None keeps nothing. Who opens the bundle may set it.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self.caches: Path | None = None
        self._stamps = stamps(path, manifest.files)

    @classmethod
    def open(cls, path: str | os.PathLike[str], verify: bool = True) -> Bundle:
        """Open the bundle in the folder `path`.

        Args:
            path: the folder. `Bundle.path` is absolute, so that engines can be opened from any folder later.
            verify: also compare every file's sha256; its presence and size are always checked.

        Raises:
            BundleError: the folder, its manifest or one of its files is missing, damaged, or of another format.
            InputError: as `absolute`.
        """
        folder = absolute(path)
        manifest = read_manifest(folder)
        mend = f"rebuild it with `{build_command(folder, manifest.source, _backends(manifest))}`"
        bundle = cls(folder, manifest)
        check_files(folder, manifest.files, mend, digests=verify)
        return bundle

    @property
    def dims(self) -> Dims:
        """The sizes of the model."""
        return self.manifest.dims

    @property
    def source(self) -> Source:
        """Where the weights came from."""
        return self.manifest.source

    @property
    def config(self) -> Path:
        """The folder that holds what the pipeline needs to run without the model."""
        return self.path / "config"

    @property
    def backends(self) -> tuple[str, ...]:
        """The backends that there is a variant of, each once."""
        return _backends(self.manifest)

    @property
    def unfit(self) -> dict[str, str]:
        """The backends whose variants are all for GPUs, and for other ones than this machine's; what this one is."""
        faults: dict[str, list[str | None]] = {}
        for built in self.variants:
            of_cpu = built.variant.architecture.startswith("cpu-")
            faults.setdefault(built.backend, []).append(None if of_cpu else runs_here(built.variant.architecture))
        return {backend: str(found[0]) for backend, found in faults.items() if all(found)}

    @property
    def variants(self) -> tuple[VariantRecord, ...]:
        """Everything that was built."""
        return tuple(self.manifest.variants)

    def find(
        self,
        backend: str,
        precision: Precision | None = None,
        lora_mode: LoraMode | None = None,
        convolution: Convolution | None = None,
        kernels: Kernels | None = None,
    ) -> VariantRecord:
        """The variant of `backend`; of several precisions the named one, or else the most exact.

        Of several that differ in their convolutions, the one with the named ones, or else the direct ones, which are
        of more sizes; of several that differ in their kernels, the one with the named ones, or else the backend's,
        which need no compiler. Of several that differ in how they hold the LoRA, the one that holds it as named; of
        those that differ in this or in architecture still, the first that was built.

        Raises:
            BundleError: there is none. EngineError: the backend is unknown.
        """
        check_backend(backend)
        fitting = [
            built
            for built in self.variants
            if built.backend == backend
            and precision in (None, built.variant.precision)
            and lora_mode in (None, built.variant.lora_mode)
            and convolution in (None, built.variant.convolution)
            and kernels in (None, built.variant.kernels)
        ]
        if not fitting:
            wanted = backend if precision is None else f"{backend} in {precision}"
            forms = [f"{convolution} convolutions"] if convolution is not None else []
            forms += [f"{kernels} kernels"] if kernels is not None else []
            wanted += f" with {' and '.join(forms)}" if forms else ""
            wanted += f" and LoRA mode {lora_mode}" if lora_mode is not None else ""
            there = ", ".join(built.variant.name for built in self.variants)
            mend = mend_lacking(self.path, self.manifest, backend, precision, lora_mode, convolution, kernels)
            raise BundleError(f"{self.path}: not built for {wanted} (there is {there}); {mend}")

        def order(built: VariantRecord) -> tuple[int, int, int]:
            variant = built.variant
            return (
                PRECISIONS.index(variant.precision),
                CONVOLUTIONS.index(variant.convolution),
                KERNELS.index(variant.kernels),
            )

        return min(fitting, key=order)

    def stale(self, built: VariantRecord, elsewhere: bool = False) -> str | None:
        """None if a variant is valid here, else one line: what has changed and how to mend it.

        With `elsewhere` one that was built for another machine is valid, too.

        Raises:
            EngineError: its backend is not installed.
        """
        version, mend = backend_version(built.backend), f"rebuild it with `{self.command(built)}`"
        what = f"{built.variant.name} was built"
        if built.backend_version != version:
            return f"{what} by {built.backend} {built.backend_version}, installed is {version}; {mend}"
        revision = build_revision(built.variant)
        if built.build_revision != revision:
            told = f"revision {built.build_revision} of its build, this version's is {revision}"
            other = f"settings of {built.backend}" if built.variant.kernels == "backend" else "kernels of this project"
            return f"{what} with other {other}, which change its numbers ({told}); {mend}"
        fault = None if elsewhere else runs_here(built.variant.architecture)
        return None if fault is None else f"{what} for {built.variant.architecture}, {fault}; {mend}"

    def command(self, built: VariantRecord) -> str:
        """The command that builds a variant of this bundle again."""
        return build_command(self.path, self.source, (), built.variant, built.profiles, built.gradients)

    def misfit(
        self,
        source: Source,
        variant: Variant | None = None,
        profiles: Sequence[Profile] = (),
        gradients: Sequence[NetworkName] = (),
    ) -> str | None:
        """None if the bundle can serve `source`, and by `variant` for `profiles` and with `gradients`, else one line:
        what differs.

        Models and LoRAs are compared by digest, so a renamed folder still fits.
        """
        own = self.source
        for component in sorted({*own.digests, *source.digests}):
            if own.digests.get(component) != source.digests.get(component):
                return f"{self.path}: {component} is another one"
        loras = [None if s.lora is None else (s.lora.digest, s.lora.strength) for s in (own, source)]
        if loras[0] != loras[1]:
            return f"{self.path}: the LoRA or its strength is another one"
        if variant is None:
            return None
        built = next((built for built in self.variants if built.variant == variant), None)
        if built is None:
            return f"{self.path}: {variant.name} is not built"
        for profile in profiles:
            if profile not in built.profiles:
                return f"{self.path}: {variant.name} is not built for {profile}"
        reason = self.stale(built, elsewhere=True)
        if reason is not None:
            return f"{self.path}: {reason}"
        lacking = said_gradients([name for name in gradients if name not in built.gradients])
        return f"{self.path}: {variant.name} is not built with gradients {', '.join(lacking)}" if lacking else None

    def engine(self, network: NetworkName, backend: str, precision: Precision | None = None) -> Engine:
        """Open `network` on `backend`; the caller closes it.

        Raises:
            BundleError: it was not built, or by another version of the backend, or on another architecture.
            EngineError: the backend is unknown, cannot run here or cannot read the graph.
        """
        return self.open_network(network, self.find(backend, precision))

    def open_network(self, network: NetworkName, built: VariantRecord, proved: bool = True) -> Engine:
        """Open `network` of a variant that `find` gave, or one of `variants`; raises as `engine` does.

        `proved` refuses one that nothing was compared with yet.
        """
        reason = self.stale(built)
        if reason is not None:
            raise BundleError(f"{self.path}: {reason}")
        if proved and not built.proved:
            raise BundleError(
                f"{self.path}: {built.variant.name} was built where it could not run, so nothing proves it yet; run "
                f"`smooth-rt engines verify --parity {self.path}` here"
            )
        record = built.engine(network)
        takes = built.variant.network(network, self.dims)
        # The key says weights, sizes and the version; the GPU at hand may be another than that of the variant.
        cache = None if self.caches is None else self.caches / f"{record.key}-{gpu()}"
        try:
            engine = open_engine(built.backend, takes, self.path / record.file, record.hint, record.bounds, cache)
        except EngineError as error:
            said = with_command(error, self.command(built))
            if said is None:
                raise
            where = "" if str(self.path) in str(error) else f"{self.path}: "
            raise EngineError(f"{where}{said}") from error
        unchanged = partial(
            check_unchanged, self.path, self.manifest.files, self._stamps, f"{built.variant.name}/{network}/"
        )
        try:
            unchanged()
        except EngineError:
            engine.close()
            raise
        if cache is not None:
            with suppress(OSError):  # it is used now; nothing was compiled yet, or it can only be read
                os.utime(cache)
        engine.rebuild = self.command(built)
        engine.places = record.places
        engine.unchanged = unchanged
        engine.outside = partial(outside, self.path, self.source, self.dims, built, network)
        if network == "unet":
            engine.gradients = {name: partial(self.open_network, name, built, proved) for name in built.gradients}
            engine.without_gradient = self._without_gradient(built)
        return engine

    def reload(self) -> None:
        """Read the manifest again, which another process may have written anew.

        Raises:
            BundleError: as of `open`; or it is a bundle of other weights by now.
        """
        fresh = Bundle.open(self.path, verify=False)
        fault = fresh.misfit(self.source)
        if fault is not None:
            raise BundleError(f"{fault} by now, for the bundle was replaced; open it again")
        self.manifest, self._stamps = fresh.manifest, fresh._stamps

    def rewrite(self, manifest: Manifest) -> None:
        """Put another manifest in the place of this one, whole or not at all.

        Raises:
            BundleError: it cannot be written.
        """
        path = self.path / MANIFEST
        partial = path.with_name(f".{MANIFEST}.partial-{os.getpid()}")
        try:
            partial.write_text(manifest.model_dump_json(indent=1) + "\n", encoding="utf-8")
            partial.replace(path)
        except OSError as error:
            raise BundleError(f"{path}: cannot be written ({error.strerror}); copy the bundle elsewhere") from error
        finally:
            partial.unlink(missing_ok=True)
        self.manifest = manifest

    def _without_gradient(self, built: VariantRecord) -> dict[NetworkName, str]:
        """What mends the lack of each gradient that the variant can be built with."""
        variant = built.variant
        mends: dict[NetworkName, str] = {}
        for name in DERIVED:
            with suppress(InputError):
                check_gradients(variant.backend, variant.precision, variant.lora_mode, [name])
                gradients = (*built.gradients, name)
                command = build_command(self.path, self.source, (), variant, built.profiles, gradients)
                mends[name] = f"build it with `{command}`"
        return mends


def _backends(manifest: Manifest) -> tuple[str, ...]:
    return tuple(dict.fromkeys(built.backend for built in manifest.variants))
