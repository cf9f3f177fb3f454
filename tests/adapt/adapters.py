"""Adapters for tests: on tiny decoders, with values that do something."""

import torch

from freehold.adapt.lora import LoraSettings, adapted, wrap
from freehold.models.decoder import Decoder
from models.forms import FORMS

SETTINGS = LoraSettings(rank=4, alpha=6.0)
HERE_AND_OFF = [*FORMS[:1], "off"]  # the kernels of this machine, and the references


@torch.no_grad()
def fill(decoder: Decoder, *, seed: int = 1, size: float = 0.05) -> Decoder:
    """Return the decoder with random values in every B. Mutates: decoder."""
    random = torch.Generator().manual_seed(seed)
    for _, weight in adapted(decoder):
        weight.b.copy_(torch.randn(weight.b.shape, generator=random) * size)
    return decoder


def adapt(decoder: Decoder, settings: LoraSettings = SETTINGS) -> Decoder:
    """Return the decoder with an adapter that does something. Mutates: decoder."""
    wrap(decoder, settings, seed=0)
    return fill(decoder)
