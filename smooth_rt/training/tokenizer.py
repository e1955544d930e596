"""A CLIPTokenizer of one's own vocabulary, in the files that transformers and diffusers read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
END_OF_WORD = "</w>"


def train_tokenizer(captions: Sequence[str], tokens: int, folder: Path, merges: int = 4096) -> CLIPTokenizer:
    """Learn byte-pair merges over `captions` and write vocab.json, merges.txt and the configuration to `folder`.

    The vocabulary holds every byte symbol with and without the end-of-word mark, so no text is unknown, and
    `model_max_length` is `tokens`.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    learner = Tokenizer(models.BPE(end_of_word_suffix=END_OF_WORD))
    learner.normalizer = normalizers.Lowercase()
    words = Regex(r"[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=merges, initial_alphabet=alphabet, end_of_word_suffix=END_OF_WORD, show_progress=False
    )
    learner.train_from_iterator(captions, trainer)
    learned = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]

    symbols = [*alphabet, *(symbol + END_OF_WORD for symbol in alphabet)]
    symbols += [left + right for left, right in learned]
    vocabulary = {symbol: i for i, symbol in enumerate(dict.fromkeys([*symbols, BOS, EOS]))}
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = CLIPTokenizer(
        vocab=vocabulary, merges=learned, bos_token=BOS, eos_token=EOS, unk_token=EOS, pad_token=EOS,
        model_max_length=tokens,
    )  # fmt: skip
    tokenizer.save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in learned)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return tokenizer
