"""Smooth-LoRA: read any common format, fuse at a strength, write."""

from smooth_rt.lora.fuse import fuse, fuse_to_folder, fused_with, lora_weights
from smooth_rt.lora.read import Lora, LoraLayer, digest_weights, read_lora
from smooth_rt.lora.write import LoraFormat, write_lora

__all__ = [
    "Lora",
    "LoraFormat",
    "LoraLayer",
    "digest_weights",
    "fuse",
    "fuse_to_folder",
    "fused_with",
    "lora_weights",
    "read_lora",
    "write_lora",
]
