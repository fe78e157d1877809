"""The statistics of `tsdkd.statistics` from hidden states: one pass over the vocabulary, logits never whole."""

from .head import FusedHead
from .projection import Projection

__all__ = ["FusedHead", "Projection"]
