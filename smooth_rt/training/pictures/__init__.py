"""Where training pictures come from: the recipe's emoji, a folder, WebDataset shards or a Hugging Face dataset."""

from smooth_rt.training.pictures.base import Captioned, Pictures
from smooth_rt.training.pictures.listed import Listed, Source
from smooth_rt.training.pictures.opening import Reading, open_pictures

__all__ = ["Captioned", "Listed", "Pictures", "Reading", "Source", "open_pictures"]
