"""The weights that a new model begins with, as its family was published.

Matrices are drawn from a normal distribution (`initializer_range` of a config); norms begin at one, biases and the
corrections of routers at zero. Where a config says `rescale_prenorm_residual`, as Nemotron's do, what writes to the
residual stream is drawn narrower, by the root of the number of blocks, so that the stream's variance does not grow with
depth (Radford et al., 2019, "Language models are unsupervised multitask learners", section 2.3).
Mamba-2 (Gu and Dao, 2023, arXiv 2312.00752, section 3.6; Dao and Gu, 2024, arXiv 2405.21060; the code published with
the latter): A is uniform in [1, 16], steps are log-uniform, D is one, convolution taps are uniform in +-1 / sqrt(W).

Belongs here: distributions. Not here: shapes and dtypes (decoder.py).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from freehold.errors import BadFile
from freehold.models.decoder import Decoder
from freehold.models.mamba2 import Convolution

RESIDUAL_WRITERS = (
    *("o_proj.weight", "out_proj.weight", "down_proj.weight"),
    *("experts.down_proj", "fc2_latent_proj.weight"),
)
A_RANGE = (1.0, 16.0)


@dataclass(frozen=True, kw_only=True)
class InitSettings:
    """The keys of a config that decide how a new model begins. time_step_*: the sizes of steps that dt_bias gives."""

    initializer_range: float = 0.02
    rescale_prenorm_residual: bool = False
    time_step_min: float = 0.001
    time_step_max: float = 0.1
    time_step_floor: float = 1e-4

    @staticmethod
    def from_config(config: Mapping[str, Any]) -> "InitSettings":
        """Return what a config.json says. Raises: BadFile."""
        given = {f.name: config[f.name] for f in fields(InitSettings) if config.get(f.name) is not None}
        for name, value in given.items():
            is_flag = name == "rescale_prenorm_residual"
            if (type(value) is not bool) if is_flag else (type(value) not in (int, float) or not 0 < value < 10):
                raise BadFile(
                    f"config.json: `{name}` is {value!r:.60}, wanted {'true or false' if is_flag else '0 to 10'}"
                )
        settings = InitSettings(**given)
        if settings.time_step_min > settings.time_step_max:
            raise BadFile("config.json: `time_step_min` is larger than `time_step_max`")
        return settings


@torch.no_grad()
def initialize(decoder: Decoder, settings: InitSettings, *, seed: int) -> None:
    """Fill every parameter; the same seed gives the same values, rounded to the decoder's dtype. Mutates: decoder."""
    random = torch.Generator().manual_seed(seed)
    for path, module in decoder.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not (path == "lm_head" and decoder.spec.tied_embeddings):
                parameter.copy_(_first_values(f"{path}.{name}", parameter, module, decoder, settings, random))


def _first_values(
    name: str,
    parameter: Tensor,
    owner: nn.Module,
    decoder: Decoder,
    settings: InitSettings,
    random: torch.Generator,
) -> Tensor:
    values, leaf = torch.empty(parameter.shape), name.rpartition(".")[2]
    if isinstance(owner, Convolution):
        return values.uniform_(-1.0, 1.0, generator=random) / math.sqrt(owner.weight.shape[-1])
    if leaf == "A_log":
        return values.uniform_(*A_RANGE, generator=random).log()
    if leaf == "dt_bias":
        low, high = math.log(settings.time_step_min), math.log(settings.time_step_max)
        step = values.uniform_(low, high, generator=random).exp().clamp(min=settings.time_step_floor)
        return step + torch.log(-torch.expm1(-step))  # softplus of it is the step
    if "bias" in leaf:
        return values.zero_()
    if parameter.ndim < 2:  # norms, and D
        return values.fill_(1.0)
    std = settings.initializer_range
    if settings.rescale_prenorm_residual and name.endswith(RESIDUAL_WRITERS):
        std /= math.sqrt(len(decoder.blocks))
    return values.normal_(0.0, std, generator=random)
