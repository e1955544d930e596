"""What one benchmark leaves behind, as data: the schema of bench.json. Every number bears its unit in its name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from engines.manifest import Parity
from smooth_rt.writers import write_files

__all__ = [
    "Environment",
    "GenerateResult",
    "MatrixRate",
    "MorphResult",
    "NetworkResult",
    "Report",
    "Settings",
    "Timing",
    "write",
]


def write(content: Any, path: Path | None) -> None:
    """As JSON, where a file is asked for.

    Raises:
        SmoothRTError: the disk refuses.
    """
    if path is not None:
        write_files(path.parent, {path.name: f"{json.dumps(content, indent=2)}\n".encode()})


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Timing(_Record):
    """Seconds over `repeats` timed runs. With few runs p99 lies close to the slowest of them."""

    median_s: float = Field(gt=0)
    p90_s: float = Field(gt=0)
    p99_s: float = Field(gt=0)
    fastest_s: float = Field(gt=0)
    slowest_s: float = Field(gt=0)
    repeats: int = Field(ge=1)


class MatrixRate(_Record):
    """The best rate of an fp32 matrix product of `side` x `side` matrices in one library."""

    library: str
    side: int
    gflop_per_s: float = Field(gt=0)


class NetworkResult(_Record):
    """One network on one engine: `rows` is the batch the network sees, twice the images for a guided UNet step.

    `parity`: every output against the torch module on fresh inputs of several sizes (`export.verify`).
    """

    network: str
    engine: str
    images: int
    rows: int
    parity: tuple[Parity, ...]
    timing: Timing
    flop: int
    floor_s: float
    times_floor: float


class MorphResult(_Record):
    """The whole morph between two seeds: text, all steps of all frames, decoding, pictures."""

    engine: str
    batch_size: int
    frames: int
    steps: int
    timing: Timing
    frames_per_s: float
    flop: int
    floor_s: float
    times_floor: float
    peak_memory_bytes: int = Field(gt=0)


class GenerateResult(_Record):
    """Text to images on one engine beside diffusers' own pipeline in the same run, from the same latents.

    `psnr_db` is the worst image's, peak 1; None where the two pipelines agree in every bit. `speedup` is diffusers'
    median time over this engine's. The peer's own row has engine "diffusers"; OpenVINO GenAI, where it is
    installed, is a second one, "openvino-genai".
    """

    engine: str
    images: int
    steps: int
    timing: Timing
    images_per_s: float
    speedup: float
    psnr_db: float | None


class Environment(_Record):
    """The machine, as far as times depend on it."""

    cpu: str
    instructions: tuple[str, ...]
    logical_cores: int
    usable_cores: int
    memory_bytes: int | None
    system: str
    versions: dict[str, str]
    threads: dict[str, int]
    thread_variables: dict[str, str]
    load_average_1min: float | None


class Settings(_Record):
    """What was asked for. `engines`: as asked; the rows say which backend really ran."""

    model: str
    revision: str | None
    config: str | None = None
    lora: str | None
    lora_strength: float
    engines: tuple[str, ...]
    batch_sizes: tuple[int, ...]
    image_height: int
    image_width: int
    steps: int
    guidance_scale: float
    frames: int
    repeats: int
    warmup: int
    seed: int
    prompt: str
    precision: Literal["fp32"] = "fp32"


class Report(_Record):
    """One run of `python -m bench`."""

    format: Literal[1] = 1
    started: str
    seconds: float
    environment: Environment
    settings: Settings
    choices: dict[str, str]
    warnings: tuple[str, ...]
    matrix_rates: tuple[MatrixRate, ...]
    networks: tuple[NetworkResult, ...]
    morph: tuple[MorphResult, ...]
    generate: tuple[GenerateResult, ...]

    @property
    def ceiling(self) -> MatrixRate:
        """The best measured rate: what the floors are computed with."""
        return max(self.matrix_rates, key=lambda rate: rate.gflop_per_s)
