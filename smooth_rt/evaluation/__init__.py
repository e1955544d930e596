"""Measure a pipeline: how smooth its latent space is, how well it inverts, and what its images are worth."""

from smooth_rt.evaluation.editing import EditCase, EditingTask, edit_cases, summarise_editing
from smooth_rt.evaluation.inputs import Example, captioned, examples, read_prompts
from smooth_rt.evaluation.interpolation import InterpolationTask, summarise_interpolation
from smooth_rt.evaluation.inversion import InversionTask, measure_inversion
from smooth_rt.evaluation.quality import ByNetworks, QualityTask, summarise_quality
from smooth_rt.evaluation.rows import Rows, collect
from smooth_rt.evaluation.smoothness import IstdTask, Smoothness, check_istd, measure_istd, summarise_istd

__all__ = [
    "ByNetworks",
    "EditCase",
    "EditingTask",
    "Example",
    "InterpolationTask",
    "InversionTask",
    "IstdTask",
    "QualityTask",
    "Rows",
    "Smoothness",
    "captioned",
    "check_istd",
    "collect",
    "edit_cases",
    "examples",
    "measure_inversion",
    "measure_istd",
    "read_prompts",
    "summarise_editing",
    "summarise_interpolation",
    "summarise_istd",
    "summarise_quality",
]
