"""Measure a pipeline: how smooth its latent space is, how well it inverts, and what its images are worth."""

from smooth_rt.evaluation.inputs import Example, captioned, examples, read_prompts
from smooth_rt.evaluation.inversion import InversionTask, measure_inversion
from smooth_rt.evaluation.quality import QualityTask, summarise_quality
from smooth_rt.evaluation.rows import Rows, collect
from smooth_rt.evaluation.smoothness import IstdTask, Smoothness, check_istd, measure_istd, summarise_istd

__all__ = [
    "Example",
    "InversionTask",
    "IstdTask",
    "QualityTask",
    "Rows",
    "Smoothness",
    "captioned",
    "check_istd",
    "collect",
    "examples",
    "measure_inversion",
    "measure_istd",
    "read_prompts",
    "summarise_istd",
    "summarise_quality",
]
