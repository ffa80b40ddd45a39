"""Where intermediate states are in a Megatron model: hooks that read them, and may put something in their place.

A tap is never on a pipeline stage's own output, which the schedule frees (it must be no view of another tensor): the
output of a layer is read after the norm that follows, which the next stage has where the layer is a stage's last.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from nemo_minitron.model.build import HiddenStateGPT

States = tuple[torch.Tensor, ...]
"""What a tap reads: one `[S, B, H]` (`[S/tp, B, H]` with sequence parallelism), replicated over TP; of `attention`
queries, keys and values `[S, B, c]` with the channels c of this TP rank's heads side by side."""
Take = Callable[[States], States]
"""Gets the states, and returns them or what is to take their place."""


def tap(model: HiddenStateGPT, state: str, layer: int, take: Take) -> Any | None:
    """Call `take` at each forward pass with `state` (a key of `layer_map.STATES`) of `layer`, counted in the whole
    model.

    Returns the hook's handle, or None where the state is on another pipeline stage.
    """
    if state == "embedding":
        return None if not model.pre_process else _on_output(model.embedding, take)
    if state == "hidden" and layer == model.arch.num_layers - 1:
        return None if not model.post_process else _on_output(model.decoder.final_layernorm, take)
    local = layer + (state == "hidden") - model.layer_offset
    if not 0 <= local < len(model.decoder.layers):
        return None
    found = model.decoder.layers[local]
    if state == "hidden":
        return _on_output(found.input_layernorm, take)
    if state == "mlp_input":
        return _on_output(found.pre_mlp_layernorm, take)
    assert state == "attention", state
    return _on_attention(found.self_attention.core_attention, take)


def _on_output(module: torch.nn.Module, take: Take) -> Any:
    def hook(module: torch.nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return take((output,))[0]

    return module.register_forward_hook(hook)


def _on_attention(module: torch.nn.Module, take: Take) -> Any:
    def hook(module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        heads = args[:3]  # query, key, value: [S, B, n, D]
        taken = take(tuple(states.flatten(2) for states in heads))
        return (*(states.view_as(head) for states, head in zip(taken, heads, strict=True)), *args[3:])

    return module.register_forward_pre_hook(hook)
