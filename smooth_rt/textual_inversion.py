"""Concepts that a tokenizer learned by textual inversion (arXiv 2208.01618)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

__all__ = ["with_all_vectors"]


def with_all_vectors(prompts: Sequence[str], tokenizer: CLIPTokenizer) -> list[str]:
    """Return prompts in which a concept of several vectors is spelled as all its tokens, as diffusers' pipelines do.

    Such a concept has the token `<name>`, which prompts give, and `<name>_1`, `<name>_2`, ... for its other vectors.
    """
    added = tokenizer.added_tokens_encoder
    if not any(f"{token}_1" in added for token in added):
        return list(prompts)
    from diffusers.loaders import TextualInversionLoaderMixin

    converted: list[str] = TextualInversionLoaderMixin().maybe_convert_prompt(list(prompts), tokenizer)
    return converted
