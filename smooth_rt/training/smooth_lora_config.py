"""The settings of a Smooth-LoRA's training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from smooth_rt.errors import InputError
from smooth_rt.training.settings import Precision, check_count, check_number, check_rate, check_seed
from smooth_rt.training.svr import VARIATIONS, check_target

__all__ = ["SmoothLoraConfig"]

LARGEST = 1e6  # beyond it is a slip of the keyboard, which ends in NaN


@dataclass(frozen=True)
class SmoothLoraConfig:
    """What decides the LoRA.

    `lora_alpha` None is the rank; `reg_weight` is the paper's lambda; `reg_guidance` is that of the regularised
    prediction; `reg_gradient` is "exact", by double backward, or "difference" (see `svr`); at `reg_every` above 1, one
    step in so many bears the penalty, so many times as heavy.

    A step sees `batch_size` images in all, in `accumulate` parts one after the other, each shared by the processes. The
    moving targets of SVR move once a part.

    The `path_...` fields are those of `paths`: the weight of its penalty (0: none) and within it of the ends, the share
    of the model's own steps that is asked for over a whole sampling, its DDIM steps and how many of them are trained at
    a time, the noises of a path (11 lead all the way to an independent one), the guidance; and the paths a training
    step.

    Training uses prompts as they are with probability 1 - `drop_prompt`, else the empty prompt, since guidance at
    sampling runs both.

    Raises:
        InputError: a setting is out of range.
    """

    seed: int = 0
    rank: int = 8
    lora_alpha: float | None = None
    target_modules: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    batch_size: int = 16
    accumulate: int = 1
    gradient_checkpointing: bool = False
    mixed_precision: Precision = "no"
    lr: float = 1e-4
    reg_weight: float = 1.0
    reg_every: int = 1
    reg_gradient: str = "exact"
    reg_guidance: float = 1.0
    svr_target: str = "scalar"
    svr_share: float = 1.0
    drop_prompt: float = 0.0
    calibration_steps: int = 60
    path_weight: float = 0.0
    path_end_weight: float = 4.0
    path_share: float = 1.0
    path_steps: int = 18
    path_window: int = 3
    path_points: int = 6
    path_guidance: float = 7.5
    paths_per_step: int = 2

    def __post_init__(self) -> None:
        check_seed(self.seed)
        check_count("rank", self.rank)
        check_count("batch_size", self.batch_size)
        check_count("calibration_steps", self.calibration_steps)
        check_count("reg_every", self.reg_every)
        check_count("accumulate", self.accumulate)
        if self.batch_size % self.accumulate:
            raise InputError(f"accumulate={self.accumulate}: does not divide batch_size={self.batch_size}")
        if self.reg_gradient not in VARIATIONS:
            raise InputError(f"reg_gradient={self.reg_gradient!r}: choose from {', '.join(VARIATIONS)}")
        if self.mixed_precision not in get_args(Precision):
            raise InputError(f"mixed_precision={self.mixed_precision!r}: choose from {', '.join(get_args(Precision))}")
        check_count("path_steps", self.path_steps, 100)
        check_number("path_points", self.path_points, 2, 11)
        check_count("path_window", self.path_window, self.path_steps)
        check_count("paths_per_step", self.paths_per_step)
        check_rate("lr", self.lr)
        check_number("lora_alpha", self.alpha, 1e-6, LARGEST)
        if not self.target_modules:
            raise InputError("target_modules: none is named; give names of linear layers, as to_q,to_k,to_v,to_out.0")
        check_number("reg_weight", self.reg_weight, 0, LARGEST)
        check_number("reg_guidance", self.reg_guidance, -LARGEST, LARGEST)
        check_number("path_weight", self.path_weight, 0, LARGEST)
        check_number("path_end_weight", self.path_end_weight, 0, LARGEST)
        check_number("path_share", self.path_share, 0.01, 100)
        check_number("path_guidance", self.path_guidance, -LARGEST, LARGEST)
        check_number("drop_prompt", self.drop_prompt, 0, 1)
        check_target(self.svr_target, self.svr_share)

    @property
    def alpha(self) -> float:
        """The LoRA's alpha; the rank unless told otherwise, which is a scale of 1, as in the authors' file."""
        return float(self.rank) if self.lora_alpha is None else self.lora_alpha
