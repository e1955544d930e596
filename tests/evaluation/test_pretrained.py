"""FID against scipy's matrix root, CLIP score against the cosine by hand, on small networks with random weights; and
what is said where the real ones are not at hand."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor, CLIPTokenizer

from smooth_rt.errors import InputError
from smooth_rt.metrics.pretrained import Fid, MissingError, clip_score, inception, lpips_network
from smooth_rt.model import default_model


class Colours(nn.Module):
    """[N, 3, H, W] of uint8 to the mean and the deviation of each channel."""

    num_features = 6

    def forward(self, images: Tensor) -> Tensor:
        pixels = images.double().flatten(2) / 255
        return torch.cat([pixels.mean(2), pixels.std(2)], dim=1)


def pictures(count: int, seed: int, low: int = 0, side: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.randint(60, 256 - low, (count, 1, 1, 1), generator=generator)
    return (low + torch.rand((count, 3, side, side), generator=generator) * spread).byte()


def test_fid_is_the_distance_of_the_gaussians_of_its_features() -> None:
    real, near, far = pictures(64, 0), pictures(48, 1), pictures(48, 2, low=90)
    fid = Fid(real.split(10), Colours())
    network = Colours()

    def expected(some: Tensor) -> float:
        one, other = network(real).numpy(), network(some).numpy()
        covariances = np.cov(one, rowvar=False), np.cov(other, rowvar=False)
        root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
        return float(np.square(one.mean(0) - other.mean(0)).sum() + np.trace(sum(covariances) - 2 * root))

    assert fid.of(far.split(7)) == pytest.approx(expected(far), rel=1e-6)
    # The real pictures' share stays, and the generated ones' does not.
    assert fid.of(near.split(48)) == pytest.approx(expected(near), rel=1e-6)
    assert expected(near) < expected(far)
    with pytest.raises(InputError, match="FID: 1 images; give at least 2"):
        fid.of([near[:1]])


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """A CLIP model of two layers with random weights, in a folder, with the default model's tokenizer."""
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(default_model() / "tokenizer")
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**size, "vocab_size": len(tokenizer), "max_position_embeddings": 77, "eos_token_id": tokenizer.eos_token_id}
    vision = {**size, "image_size": 32, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(tmp_path / "clip")
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(processor, tokenizer).save_pretrained(tmp_path / "clip")
    return tmp_path / "clip"


def test_clip_score_is_a_hundred_times_the_cosine(clip: Path) -> None:
    images = pictures(6, 0, side=40)
    captions = [f"{name} on blue background" for name in ("dog", "cat", "tomato", "heart", "book", "car")]
    model, processor = CLIPModel.from_pretrained(clip).eval(), CLIPProcessor.from_pretrained(clip)
    inputs = processor(text=captions, images=list(images), return_tensors="pt", padding=True)
    with torch.no_grad():
        found = model(**inputs)
    cosines = (found.image_embeds * found.text_embeds).sum(1)
    batches = [(images[:4], captions[:4]), (images[4:], captions[4:])]
    assert clip_score(batches, str(clip)) == pytest.approx(max(100 * float(cosines.mean()), 0), abs=1e-3)
    # Shown and said in another order, it is another number.
    assert clip_score([(images, captions[1:] + captions[:1])], str(clip)) != clip_score([(images, captions)], str(clip))


def test_a_network_that_is_not_at_hand_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    for found in (inception, lpips_network):
        found.cache_clear()
    with pytest.raises(MissingError, match=r"LPIPS: .*alexnet-owt-7be5be79.pth is missing; put torchvision's AlexNet"):
        lpips_network()
    assert list(tmp_path.iterdir()) == []  # nothing was downloaded
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(
        MissingError, match=r"FID: torch-fidelity cannot be imported .*pip install 'smooth-rt\[metrics\]'"
    ):
        inception()
    with pytest.raises(MissingError, match="CLIP score: nobody/nothing is not at hand; hf download nobody/nothing"):
        clip_score([(pictures(1, 0), ["a"])], "nobody/nothing")
    with pytest.raises(MissingError, match="is not a CLIP model"):
        clip_score([(pictures(1, 0), ["a"])], str(tmp_path))
    monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", None)
    with pytest.raises(MissingError, match="FID: torchmetrics is not installed"):
        inception()


def test_inception_as_torch_fidelity_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its network with random weights, from the file that it is looked for in."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except Exception as error:
        pytest.skip(f"torch-fidelity cannot be imported, or a torchvision that fits torch is missing: {error}")
    from torch_fidelity import feature_extractor_inceptionv3 as module

    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    inception.cache_clear()
    torch.manual_seed(0)
    # Built without a file, it asks for one by URL: here it gets what it has.
    own: dict[str, Tensor] = {}
    monkeypatch.setattr(module, "load_state_dict_from_url", lambda *_, **__: own)
    load = FeatureExtractorInceptionV3.load_state_dict
    monkeypatch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_, **__: None)
    network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    monkeypatch.setattr(FeatureExtractorInceptionV3, "load_state_dict", load)
    (tmp_path / "checkpoints").mkdir()
    weights = tmp_path / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    torch.save(network.state_dict(), weights)
    images = pictures(3, 0, side=64)
    with torch.no_grad():
        assert torch.allclose(inception()(images), network(images)[0], rtol=1e-4, atol=1e-6)
    weights.write_bytes(b"x")
    inception.cache_clear()
    with pytest.raises(MissingError, match="is not Inception's weights"):
        inception()
