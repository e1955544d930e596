"""Attention blending: frames between two images look at both of them (FreeMorph, Cao et al. 2025, arXiv 2507.01953).

At each step the ends are predicted first, as ever, and what their self-attention layers see is kept. In the frames'
own layers the keys and values of the ends then stand beside the frame's: at place a, with H the layer's input,

    (1 - a) * attention(Q(H), K([H_0, H]), V([H_0, H])) + a * attention(Q(H), K([H_1, H]), V([H_1, H]))

The steps are divided as the authors' code divides them: in the first fifth the ends' keys and values stand alone
(K(H_0) and K(H_1) above), then beside the frame's own, and after 60 % the frames look at themselves, for those steps
draw detail. The ends stay as they are.

FreeMorph does so in cross-attention as well, in the conditional half of guidance alone, and with weights spaced by a
beta distribution. Here it is self-attention alone, in both halves, and the weights are the frame's place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from engines.locks import ReadWriteLock
from smooth_rt.tasks.inversion.base import Noise

if TYPE_CHECKING:
    from smooth_rt.loop import Predict
    from smooth_rt.pipeline import SmoothPipeline

__all__ = ["blended_back", "blending"]

# Of the steps, from the first, those in which the ends alone are looked at, and those in which they are at all.
ALONE, SHARE = 0.2, 0.6


class _Blend:
    """What all layers share: the call that they are in."""

    def __init__(self) -> None:
        self.end: int | None = None  # whose inputs are kept by this call
        self.places: Tensor | None = None  # of the frames of this call [n]
        self.alone = False  # whether these look at the ends alone
        self.kept: dict[tuple[int, int], Tensor] = {}  # by layer and end: [1 or 2 halves of guidance, tokens, width]


_BLENDING: ContextVar[_Blend | None] = ContextVar("attention_blend", default=None)
_INSTALLING = ReadWriteLock()  # one blend at a time: a layer has one processor


class _Processor:
    """In the place of a layer's own processor, which goes on computing: what it is told to look at is widened."""

    def __init__(self, index: int, own: Any, blend: _Blend) -> None:
        self.index = index
        self.own = own
        self.blend = blend

    def __call__(
        self,
        attention: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **rest: Any,
    ) -> Tensor:
        blend = self.blend
        if _BLENDING.get() is not blend:  # another thread's call, or an inner blend
            other: Tensor = self.own(attention, hidden_states, encoder_hidden_states, attention_mask, **rest)
            return other

        def attended(seen: Tensor | None) -> Tensor:
            found: Tensor = self.own(attention, hidden_states, seen, attention_mask, **rest)
            return found

        if blend.end is not None:
            blend.kept[self.index, blend.end] = hidden_states
        if blend.places is None:
            return attended(encoder_hidden_states)
        count = len(blend.places)
        halves = len(hidden_states) // count
        place = blend.places.to(hidden_states).repeat(halves)[:, None, None]

        def beside(end: int) -> Tensor:
            kept = blend.kept[self.index, end]
            kept = kept[-halves:].expand(halves, -1, -1).repeat_interleave(count, 0)
            return attended(kept if blend.alone else torch.cat([kept, hidden_states], 1))

        return (1 - place) * beside(0) + place * beside(1)


@contextmanager
def blending(layers: Sequence[Any]) -> Iterator[_Blend]:
    """Replace the layers' processors in the body. Calls of other threads go on as without.

    Args:
        layers: diffusers' `Attention` modules.
    """
    with _INSTALLING.write():
        blend, own = _Blend(), [layer.processor for layer in layers]
        token = _BLENDING.set(blend)
        try:
            for index, layer in enumerate(layers):
                layer.set_processor(_Processor(index, layer.processor, blend))
            yield blend
        finally:
            _BLENDING.reset(token)
            for layer, processor in zip(layers, own, strict=True):
                layer.set_processor(processor)


@contextmanager
def blended_back(
    pipe: SmoothPipeline, noise: Noise, guidance_scale: float, places: Sequence[float], steps: int
) -> Iterator[Predict]:
    """As `guided_back`, for the frames of a path.

    Args:
        noise: of the frames, the ends first and last.
        places: of the frames, from 0 to 1.
        steps: of the whole way back.

    Raises:
        EngineError: the engine does not expose its attention.
    """
    frames = len(places)
    where = torch.tensor(places, dtype=torch.float32)
    rows = 1 if guidance_scale == 1 else 2

    with blending(pipe.attentions()) as blend:

        def predict(latents: Tensor, index: int, timestep: int) -> Tensor:
            negative = noise.negative_prompt_embeds
            negative = negative[index] if negative.ndim == 4 else negative

            def some(part: slice) -> Tensor:
                text = noise.prompt_embeds[part]
                return pipe.predict(latents[part], timestep, text, negative[part], guidance_scale)

            if index >= SHARE * steps:
                return some(slice(None))
            found = []
            for blend.end, at in ((0, 0), (1, frames - 1)):
                found.append(some(slice(at, at + 1)))
            blend.end, blend.alone = None, index < ALONE * steps
            for part in pipe.calls("unet", frames - 2, latents.shape[2:], rows):
                inner = slice(part.start + 1, min(part.stop + 1, frames - 1))
                blend.places = where[inner]
                found.insert(-1, some(inner))
            blend.places = None
            return torch.cat(found)

        yield predict
