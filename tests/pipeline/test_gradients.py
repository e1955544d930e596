"""The UNet's vector-Jacobian product, through the pipeline: against autograd in float64, and what it refuses."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from engines.contract import contract
from engines.eager import EagerEngine, Unet, UnetFeatures, VaeDecoder
from smooth_rt.errors import EngineError, InputError
from smooth_rt.pipeline import SmoothPipeline

BOTH = ("sample", "encoder_hidden_states")


@pytest.fixture(scope="module")
def drawn(pipe: SmoothPipeline) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    shapes: dict[str, tuple[int, ...]] = {
        "latents": (3, 4, 8, 16),
        "prompt_embeds": (3, pipe.dims.tokens, pipe.dims.text_width),
        "cotangent": (3, 4, 8, 16),
        "cotangent_scale": (3,),
    }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def engine_of(pipe: SmoothPipeline) -> EagerEngine:
    engine = pipe._engines["unet"]
    assert isinstance(engine, EagerEngine)
    return engine


def test_gradients_are_those_of_the_loss_in_float64(pipe: SmoothPipeline, drawn: dict[str, Tensor]) -> None:
    module: Any = copy.deepcopy(engine_of(pipe)._module).double()
    x, text, c, s = (one.double() for one in drawn.values())
    x.requires_grad_()
    text.requires_grad_()
    (output,) = module(x, torch.tensor([500]), text)
    # Half of s |output|^2 + <output, c>: its cotangent is c + s * output.
    loss = (output * c).sum() + 0.5 * (s[:, None, None, None] * output**2).sum()
    wanted = torch.autograd.grad(loss, [x, text])
    found, grads = pipe.vjp(drawn["latents"], 500, drawn["prompt_embeds"], BOTH, drawn["cotangent"], s.float())
    assert list(grads) == list(BOTH)
    for got, reference in zip((found, *grads.values()), (output, *wanted), strict=True):
        assert float((got - reference).detach().norm() / reference.detach().norm()) < 1e-5


@pytest.mark.parametrize(
    ("of", "index", "shape"),
    [
        ("features", 1, (3, 32, 8, 16)),
        ("up_blocks.0", 0, (3, 32, 4, 8)),
        ("up_blocks.1", 1, (3, 32, 8, 16)),
        ("up_blocks.2", 2, (3, 16, 8, 16)),
    ],
)
def test_features_are_those_of_the_block_and_so_is_their_gradient(
    pipe: SmoothPipeline, drawn: dict[str, Tensor], of: str, index: int, shape: tuple[int, ...]
) -> None:
    module: Any = copy.deepcopy(engine_of(pipe)._module).double()
    x, text, _, s = (one.double() for one in drawn.values())
    seen: list[Tensor] = []
    module.unet.up_blocks[index].register_forward_hook(lambda _, __, output: seen.append(output))
    x.requires_grad_()
    module(x, torch.tensor([500]), text)
    (features,) = seen
    c = torch.randn(features.shape, generator=torch.Generator().manual_seed(3))
    loss = (features * c.double()).sum() + 0.5 * (s[:, None, None, None] * features**2).sum()
    (wanted,) = torch.autograd.grad(loss, x)
    alone = pipe.features(drawn["latents"], 500, drawn["prompt_embeds"], of)
    found, grads = pipe.vjp(
        drawn["latents"], 500, drawn["prompt_embeds"], ["sample"], c, s.float(), of=of
    )  # fmt: skip
    assert list(grads) == ["sample"]
    assert alone.shape == shape
    torch.testing.assert_close(alone, found, rtol=0, atol=0)
    for got, reference in ((found, features), (grads["sample"], wanted)):
        assert float((got - reference).detach().norm() / reference.detach().norm()) < 1e-5


def test_what_comes_after_the_features_is_not_held(pipe: SmoothPipeline) -> None:
    whole: Any = engine_of(pipe)._module
    module: Any = UnetFeatures(whole, "up_blocks.1")
    held = {id(one) for one in module.parameters()}
    left_out = {name for name, one in whole.named_parameters() if id(one) not in held}
    assert {name.split(".")[1] for name in left_out} == {"up_blocks", "conv_norm_out", "conv_out"}
    assert len(held) + len(left_out) == len(list(whole.parameters()))
    assert len(whole.unet.up_blocks) == len(module.network.unet.up_blocks) + 1


def test_one_gradient_is_that_of_both(pipe: SmoothPipeline, drawn: dict[str, Tensor]) -> None:
    _, both = pipe.vjp(drawn["latents"], 7, drawn["prompt_embeds"], BOTH, drawn["cotangent"])
    for name in BOTH:
        _, one = pipe.vjp(drawn["latents"], 7, drawn["prompt_embeds"], [name], drawn["cotangent"], torch.zeros(1))
        torch.testing.assert_close(one, {name: both[name]})


def test_many_at_once_equal_each_alone(
    pipe: SmoothPipeline, drawn: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    def vjp(part: slice) -> tuple[Tensor, dict[str, Tensor]]:
        x, text, c, s = (one[part] for one in drawn.values())
        return pipe.vjp(x, 500, text, BOTH, c, s)

    together, grads = vjp(slice(0, 3))
    for index in range(3):
        alone, grad = vjp(slice(index, index + 1))
        torch.testing.assert_close(alone[0], together[index])
        torch.testing.assert_close({k: v[0] for k, v in grad.items()}, {k: v[index] for k, v in grads.items()})
    monkeypatch.setattr(pipe, "_batch_size", 2)
    torch.testing.assert_close(vjp(slice(0, 3)), (together, grads))


def test_inputs_and_weights_are_left_as_they_are(pipe: SmoothPipeline, drawn: dict[str, Tensor]) -> None:
    before = {name: one.clone() for name, one in drawn.items()}
    module: Any = engine_of(pipe)._module
    asking = [parameter.requires_grad for parameter in module.parameters()]
    pipe.vjp(drawn["latents"], 500, drawn["prompt_embeds"], BOTH, drawn["cotangent"])
    torch.testing.assert_close(drawn, before, rtol=0, atol=0)
    assert [parameter.requires_grad for parameter in module.parameters()] == asking
    assert all(parameter.grad is None for parameter in module.parameters())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"cotangent": torch.zeros(3, 4, 8, 8)}, r"cotangent has shape \[3, 4, 8, 8\].*another input has width=16"),
        ({"cotangent": torch.zeros(2, 4, 8, 16)}, "cotangent: 2 rows for latents of 3; give one for each image"),
        ({"cotangent": torch.zeros(3, 4, 8, 16).half()}, "cotangent is float16, not float32; convert it first"),
        ({"cotangent_scale": torch.zeros(2)}, r"cotangent_scale: shape \[2\], not \[3\] or \[1\]"),
        ({"prompt_embeds": torch.zeros(1, 12, 32)}, "prompt_embeds: 1 rows for latents of 3"),
        ({"latents": None}, "latents: None is no torch tensor with a row for each image"),
        ({"cotangent": torch.zeros(())}, r"cotangent: shape \[\] is no torch tensor with a row"),
        ({"cotangent_scale": 2.0}, r"cotangent_scale: 2\.0 is no torch tensor"),
        ({"timestep": "x"}, "timestep='x': give a whole number from 0 on"),
        ({"timestep": -1}, "timestep=-1: give a whole number"),
        ({"timestep": math.nan}, "timestep=nan: give a whole number"),
        ({"wrt": None}, "wrt=None: name sample or encoder_hidden_states"),
        ({"wrt": [3]}, r"wrt=\[3\]: name sample"),
        ({"wrt": "latents"}, "wrt: latents; name sample or encoder_hidden_states"),
        ({"wrt": []}, "wrt: nothing; name sample or encoder_hidden_states, or both"),
        ({"wrt": ["timestep"]}, "wrt: timestep; name sample or encoder_hidden_states"),
        ({"of": "eps"}, "of: eps; name noise_pred, features, up_blocks.0, up_blocks.1, up_blocks.2$"),
        ({"of": "up_blocks.3"}, "of: up_blocks.3; name noise_pred, features, up_blocks.0"),
        ({"of": "up_blocks.0", "wrt": ["sample"]}, r"cotangent has shape \[3, 4, 8, 16\], not \[batch, 32, height/2, "),
        ({"of": "features"}, "wrt: .*; name sample, the input of the gradient of features"),
        ({"of": "features", "wrt": ["sample"]}, r"cotangent has shape \[3, 4, 8, 16\], not .*; 4 should be 32"),
    ],
)
def test_what_does_not_fit_is_named(
    pipe: SmoothPipeline, drawn: dict[str, Tensor], change: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError, match=said) as caught:
        pipe.vjp(**{"timestep": 500, "wrt": BOTH, **drawn, **change})
    assert "\n" not in str(caught.value)


def test_features_of_a_block_that_is_none(pipe: SmoothPipeline, drawn: dict[str, Tensor]) -> None:
    for block in ("up_blocks.3", "noise_pred"):
        with pytest.raises(InputError) as caught:
            pipe.features(drawn["latents"], 500, drawn["prompt_embeds"], block)
        assert str(caught.value) == f"block: {block}; name features, up_blocks.0, up_blocks.1, up_blocks.2"


def test_only_the_unet_has_gradients_and_only_while_open(pipe: SmoothPipeline, drawn: dict[str, Tensor]) -> None:
    decoder = EagerEngine(contract("vae_decoder", pipe.dims), VaeDecoder(torch.nn.Identity()))
    with pytest.raises(EngineError, match="vae_decoder: gradients are those of the UNet; open that"):
        decoder.vjp(["sample"], drawn["cotangent"])
    unet = EagerEngine(contract("unet", pipe.dims), Unet(torch.nn.Identity()))
    unet.close()
    with pytest.raises(EngineError, match="unet: the eager engine is closed; open it again"):
        unet.vjp(["sample"], drawn["cotangent"])
    with pytest.raises(EngineError, match="unet: the eager engine is closed; open it again"):
        unet.features()


def test_an_engine_without_gradients_says_which_has_them(pipe: SmoothPipeline, drawn: dict[str, Tensor]) -> None:
    class Without(EagerEngine):
        backend = "without"

    unet = Without(contract("unet", pipe.dims), Unet(torch.nn.Identity()))
    unet.gradients = {}
    with pytest.raises(
        EngineError, match=r"unet: the without engine has no gradient with .* sample; use the engine eager"
    ):
        unet.vjp(["sample"], drawn["cotangent"])
    with pytest.raises(EngineError, match=r"has no gradient of features with respect to sample; use the engine eager"):
        unet.vjp(["sample"], drawn["cotangent"], of="features")
    with pytest.raises(EngineError, match=r"unet: the without engine has no graph up to its features; use the engine"):
        unet.features()
