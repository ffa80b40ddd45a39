"""How long generating takes with layers of a given shape, on this device: real layers, with random weights."""

from __future__ import annotations

import dataclasses
import random
import statistics
import time

import torch

from nemo_minitron.arch import ArchSpec
from nemo_minitron.generate.decode import generate
from nemo_minitron.generate.sampling import Sampling
from nemo_minitron.model.build import HiddenStateGPT, build_model, transformer_config
from nemo_minitron.parallel.layout import Layout
from nemo_minitron.search.latency import Parts

DEPTHS = (1, 3)
"""Layers of the two models whose difference is a layer's time."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Load:
    """What is generated: `new_tokens` after `prompt_tokens`, for `batch_size` prompts at once."""

    batch_size: int
    prompt_tokens: int
    new_tokens: int


def layer_and_rest(arch: ArchSpec, load: Load, *, bf16: bool, turns: int) -> Parts:
    """Seconds of one layer of `arch` and of the rest of the model (embedding, last norm, LM head, choosing).

    Models of 1 and of 3 layers take turns, so that what slows the machine down slows both; medians over the turns.
    The process must be alone in its groups.
    """
    shallow, deep = (_model(dataclasses.replace(arch, num_layers=depth), bf16=bf16) for depth in DEPTHS)
    times = [(_seconds(shallow, load), _seconds(deep, load)) for _ in range(turns + 1)][1:]  # the first warms up
    one, three = (statistics.median(column) for column in zip(*times, strict=True))
    layer = max(0.0, (three - one) / (DEPTHS[1] - DEPTHS[0]))
    return Parts(layer_s=layer, rest_s=max(0.0, one - DEPTHS[0] * layer))


def whole(arch: ArchSpec, load: Load, *, bf16: bool, turns: int) -> float:
    """Seconds of the whole model: the median over the turns."""
    model = _model(arch, bf16=bf16)
    return statistics.median([_seconds(model, load) for _ in range(turns + 1)][1:])


def _model(arch: ArchSpec, *, bf16: bool) -> HiddenStateGPT:
    model = build_model(arch, transformer_config(arch, Layout(), bf16=bf16)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
    return model


def _seconds(model: HiddenStateGPT, load: Load) -> float:
    draw = random.Random(0)
    prompts = [[draw.randrange(model.arch.vocab_size) for _ in range(load.prompt_tokens)]
               for _ in range(load.batch_size)]
    torch.cuda.synchronize()
    started = time.monotonic()
    with torch.inference_mode():
        generate(model, prompts, Sampling(max_new_tokens=load.new_tokens), lambda _: False, layout=Layout(),
                 micro_batch_size=load.batch_size)
    torch.cuda.synchronize()
    return time.monotonic() - started
