"""Run a model without some of its layers many times, computing what comes before them once (one pipeline stage)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

from nemo_minitron.data.batch import Batch
from nemo_minitron.model.build import HiddenStateGPT
from nemo_minitron.model.forward import forward_batch

Dropped = tuple[int, ...]
"""Layers that are left out, ascending, counted from 0 over the whole model."""
Measure = Callable[[torch.Tensor, Batch, torch.Tensor | None], torch.Tensor]
"""(final hidden state, batch, the whole model's final hidden state) -> numbers, fp64 `[n]`; on the last stage."""
SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """A line of progress every ten seconds at most, and one at the end.

    What is counted is passes: one model without layers on one micro-batch.
    """

    def __init__(self, num_models: int, num_batches: int, say: Callable[[str], None]) -> None:
        self._total, self._say = num_models * num_batches, say
        self._what = f"{num_models} models without layers on {num_batches} micro-batches"
        self._passes, self._started = 0, time.monotonic()
        self._last = self._started

    def add(self, passes: int) -> None:
        """So many more are done."""
        self._passes += passes
        now = time.monotonic()
        if self._passes < self._total and now - self._last < SECONDS_BETWEEN_LINES:
            return
        self._last, rate = now, self._passes / max(now - self._started, 1e-9)
        self._say(f"[score] {self._what}: {self._passes}/{self._total} passes, {rate:.1f} a second, "
                  f"ETA {(self._total - self._passes) / rate:.0f} s")


def sweep_prefixes(model: HiddenStateGPT, batches: Iterable[Batch], candidates: list[Dropped], measure: Measure, *,
                   base: Dropped, reference: bool, progress: Progress) -> tuple[list[list[torch.Tensor]], int]:
    """What `measure` gives for each candidate and micro-batch, and the number of layers run.

    Args:
        model: a whole model, or its tensor-parallel shard.
        batches: this replica's micro-batches.
        candidates: the layers that each leaves out; each contains `base`.
        measure: takes the final hidden state `[S, B, H]` (after the final norm), its batch, and the whole model's.
        base: layers that are left out of the shared part as well.
        reference: whether `measure` needs the whole model's final hidden state.
        progress: told of each pass.
    """
    rows: list[list[torch.Tensor]] = [[] for _ in candidates]
    forwards = 0
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for batch in batches:
                stack = _Stack(model, batch)
                whole = stack.finish(stack.entering[-1]) if reference else None
                if base:
                    stack.enter_again(base)
                for row, dropped in zip(rows, candidates, strict=True):
                    row.append(measure(stack.finish(stack.without(dropped)), batch, whole))
                    progress.add(1)
                forwards += stack.forwards
    finally:
        model.train(was_training)
    return rows, forwards


class _Stack:
    """The hidden states `[S, B, H]` that enter each layer for one micro-batch, and the layers run so far."""

    def __init__(self, model: HiddenStateGPT, batch: Batch) -> None:
        """Run the whole model once; the last of `entering` leaves the last layer."""
        self._model, self._layers = model, list(model.decoder.layers)
        self._base: Dropped = ()
        self.entering: list[torch.Tensor] = []
        self._arguments: list[dict[str, Any]] = []
        handles = [layer.register_forward_pre_hook(self._remember, with_kwargs=True) for layer in self._layers]
        handles.append(self._layers[-1].register_forward_hook(
            lambda layer, args, output: self.entering.append(output[0])))
        try:
            forward_batch(model, batch)
        finally:
            for handle in handles:
                handle.remove()
        self.forwards = len(self._layers)

    def _remember(self, layer: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.entering.append(args[0] if args else kwargs["hidden_states"])
        self._arguments.append({key: value for key, value in kwargs.items() if key != "hidden_states"})

    def enter_again(self, base: Dropped) -> None:
        """Replace the states that enter layers by those of the model without `base`."""
        first = base[0]
        hidden = self.entering[first]
        for layer in range(first, len(self._layers)):
            self.entering[layer] = hidden
            if layer not in base:
                hidden = self._run(layer, hidden)
        self.entering[-1] = hidden
        self._base = base

    def without(self, dropped: Dropped) -> torch.Tensor:
        """The last layer's output of the model without `dropped`, from the first layer that differs on."""
        new = [layer for layer in dropped if layer not in self._base]
        if not new:
            return self.entering[-1]
        hidden = self.entering[new[0]]
        for layer in range(new[0], len(self._layers)):
            if layer not in dropped:
                hidden = self._run(layer, hidden)
        return hidden

    def finish(self, hidden: torch.Tensor) -> torch.Tensor:
        """The final norm."""
        normed: torch.Tensor = self._model.decoder.final_layernorm(hidden)
        return normed

    def _run(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        self.forwards += 1
        output: torch.Tensor = self._layers[layer](hidden_states=hidden, **self._arguments[layer])[0]
        return output
