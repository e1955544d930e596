"""Measures by networks that others have trained: FID, CLIP score, LPIPS; all by torchmetrics.

Their weights are used where they are at hand. Nothing is downloaded here: what lacks is said in one line, with where to
put it.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engines.paths import expanded
from smooth_rt.errors import InputError, SmoothRTError, reason

__all__ = ["CLIP", "Fid", "MissingError", "clip_model", "clip_score", "inception", "lpips_network"]

CLIP = "openai/clip-vit-large-patch14"  # SD1.x's own text encoder; the paper does not say which it scores with
# Under torch.hub's folder of checkpoints, as the libraries themselves name them:
INCEPTION = "weights-inception-2015-12-05-6726825d.pth"  # torch-fidelity's copy of the network of FID's authors
ALEXNET = "alexnet-owt-7be5be79.pth"  # torchvision's; LPIPS puts weights of its own on top, which torchmetrics holds
INSTALL = "pip install 'smooth-rt[metrics]'"


class MissingError(SmoothRTError):
    """A package or weights that a measure needs are not at hand; the line says which and where they belong."""


class Fid:
    """The Fréchet Inception Distance (Heusel et al. 2017, arXiv 1706.08500) to a set of real pictures.

    Args:
        real: batches [N, 3, H, W] of uint8; two pictures at least.
        network: [N, 3, H, W] of uint8 to features [N, D]; None: Inception, pooled (2048).

    Raises:
        MissingError: Inception is not at hand.
    """

    def __init__(self, real: Iterable[Tensor], network: nn.Module | None = None) -> None:
        network = network or inception()
        metric = _torchmetrics("FID", "image.fid").FrechetInceptionDistance
        self._metric: Any = metric(network, reset_real_features=False).to(_device())
        self._update(real, real=True)

    def of(self, generated: Iterable[Tensor]) -> float:
        """The distance of pictures in batches [N, 3, H, W] of uint8, two at least."""
        self._metric.reset()
        self._update(generated, real=False)
        return float(self._metric.compute())

    def _update(self, batches: Iterable[Tensor], real: bool) -> None:
        count = 0
        with torch.no_grad():
            for batch in batches:
                self._metric.update(batch.to(_device()), real=real)
                count += len(batch)
        if count < 2:
            raise InputError(f"FID: {count} images; give at least 2, better thousands")


@cache
def inception() -> nn.Module:
    """The network of FID with its pooled features [N, 2048]; pictures are resized as its authors' code did.

    Raises:
        MissingError: torch-fidelity or the weights are not there.
    """
    fid = _torchmetrics("FID", "image.fid")
    try:
        importlib.import_module("torch_fidelity")
    except Exception as error:  # torchvision, which it asks for, may be there and not fit torch
        raise MissingError(f"FID: torch-fidelity cannot be imported ({reason(error)}); {INSTALL}") from error
    weights = str(_hub("FID", INCEPTION, "torch-fidelity's Inception weights"))
    try:
        network: nn.Module = fid.NoTrainInceptionV3("inception-v3-compat", ["2048"], weights, antialias=False)
    except Exception as error:
        raise MissingError(f"FID: {weights} is not Inception's weights ({reason(error)}); download it again") from error
    return network


def clip_score(batches: Iterable[tuple[Tensor, Sequence[str]]], name: str = CLIP) -> float:
    """The CLIP score (Hessel et al. 2021, arXiv 2104.08718) as torchmetrics has it: 100 times the cosine, at least 0,
    mean over pictures.

    Args:
        batches: pictures [N, 3, H, W] of uint8, and N captions.
        name: a CLIP model's name on the Hugging Face Hub, in its cache, or its folder.

    Raises:
        MissingError: the model is not at hand.
    """
    metric: Any = _torchmetrics("CLIP score", "multimodal.clip_score").CLIPScore(lambda: clip_model(name)).to(_device())
    with torch.no_grad():
        for images, captions in batches:
            metric.update(list(images.to(_device())), list(captions))
    return float(metric.compute())


class _Features(nn.Module):
    """What torchmetrics asks of a CLIP model: tensors, where transformers 5 hands out all it has computed."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.config = model.config

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        return self._pooled(self.model.get_image_features(pixel_values))  # type: ignore[operator]

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self._pooled(self.model.get_text_features(input_ids, attention_mask))  # type: ignore[operator]

    @staticmethod
    def _pooled(found: Any) -> Tensor:
        pooled: Tensor = found if isinstance(found, Tensor) else found.pooler_output
        return pooled


@cache
def clip_model(name: str) -> tuple[nn.Module, Any]:
    """A CLIP model and its processor, as torchmetrics takes them.

    Args:
        name: as in `clip_score`.

    Raises:
        MissingError: it is not at hand.
    """
    import transformers

    folder = expanded(name)
    source = str(folder) if folder.is_dir() else name
    try:
        model = transformers.CLIPModel.from_pretrained(source, local_files_only=True).eval()
        processor = transformers.CLIPProcessor.from_pretrained(source, local_files_only=True)
    except Exception as error:  # of many kinds: of the hub, of JSON, of shapes
        if folder.is_dir():
            raise MissingError(f"CLIP score: {name} is not a CLIP model ({reason(error)})") from error
        raise MissingError(f"CLIP score: {name} is not at hand; hf download {name}") from error
    return _Features(model), processor


@cache
def lpips_network() -> Any:
    """LPIPS with AlexNet (Zhang et al. 2018, arXiv 1801.03924): batches [N, 3, H, W] in -1..1 to a distance.

    Raises:
        MissingError: a package or AlexNet's weights are not there.
    """
    package = _torchmetrics("LPIPS", "image.lpip")
    _hub("LPIPS", ALEXNET, "torchvision's AlexNet weights")
    try:
        return package.LearnedPerceptualImagePatchSimilarity(net_type="alex").eval()
    except Exception as error:  # torchvision is missing, or does not fit torch, or the weights are damaged
        raise MissingError(f"LPIPS: {reason(error)}; {INSTALL}") from error


def _torchmetrics(measure: str, module: str) -> Any:
    try:
        return importlib.import_module(f"torchmetrics.{module}")
    except ImportError as error:
        raise MissingError(f"{measure}: torchmetrics is not installed; {INSTALL}") from error


def _hub(measure: str, file: str, what: str) -> Path:
    path = Path(torch.hub.get_dir()) / "checkpoints" / file
    if not path.is_file():
        raise MissingError(f"{measure}: {path} is missing; put {what} there")
    return path


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
