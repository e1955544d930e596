"""Prompts with a concept of several vectors, against diffusers' own pipeline."""

from __future__ import annotations

from pathlib import Path

import torch

from smooth_rt.pipeline import SmoothPipeline
from smooth_rt.textual_inversion import with_all_vectors


def test_encode_prompt_of_a_concept_is_that_of_diffusers(tiny_model: Path, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    peer = StableDiffusionPipeline.from_pretrained(tiny_model)
    peer.load_textual_inversion(torch.ones(3, 32), token="<fox>")
    peer.load_textual_inversion(torch.ones(1, 32), token="<cat>")
    peer.save_pretrained(tmp_path)
    prompts = ["a <fox> on white", "<cat>", "dog"]
    with torch.no_grad():
        expected = peer.encode_prompt(prompts, "cpu", 1, do_classifier_free_guidance=False)[0]
    with SmoothPipeline.from_pretrained(tmp_path, engine="eager") as pipe:
        torch.testing.assert_close(pipe.encode_prompt(prompts), expected)
        texts = with_all_vectors(prompts, pipe.tokenizer)
    assert texts == ["a <fox> <fox>_1 <fox>_2 on white", "<cat>", "dog"]


def test_with_all_vectors_without_concepts_changes_nothing(tiny_model: Path) -> None:
    with SmoothPipeline.from_pretrained(tiny_model, engine="eager") as pipe:
        assert with_all_vectors(["a_1 <fox>"], pipe.tokenizer) == ["a_1 <fox>"]
