"""Run a model without some of its layers many times, computing what comes before them once (one pipeline stage)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

from nemo_minitron.data.batch import Batch
from nemo_minitron.model.build import HiddenStateGPT

Dropped = tuple[int, ...]


def sweep_prefixes(model: HiddenStateGPT, batches: Iterable[Batch], candidates: list[Dropped],
                   measure: Callable[[torch.Tensor, Batch, torch.Tensor | None], torch.Tensor], *, base: Dropped,
                   reference: bool, num_batches: int,
                   say: Callable[[str], None]) -> tuple[list[list[torch.Tensor]], int]:
    """What `measure` gives for each candidate and micro-batch, and the number of layers run.

    Args:
        model: a whole model, or its tensor-parallel shard.
        batches: this replica's micro-batches.
        candidates: the layers that each leaves out, ascending; each contains `base`.
        measure: takes the final hidden state `[S, B, H]` (after the final norm), its batch, and the whole model's.
        base: layers that are left out of the shared part as well.
        reference: whether `measure` needs the whole model's final hidden state.
        num_batches: how many micro-batches there are.
        say: prints a line of progress.
    """
    rows: list[list[torch.Tensor]] = [[] for _ in candidates]
    forwards, started = 0, time.monotonic()
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for number, batch in enumerate(batches, 1):
            stack = _Stack(model, batch)
            whole = stack.finish(stack.entering[-1]) if reference else None
            if base:
                stack.enter_again(base)
            for row, dropped in zip(rows, candidates, strict=True):
                row.append(measure(stack.finish(stack.without(dropped)), batch, whole))
            forwards += stack.forwards
            if number % 10 == 0 or number == num_batches:
                seconds = time.monotonic() - started
                say(f"[score] {len(candidates)} models without layers: micro-batch {number}/{num_batches}, "
                    f"ETA {seconds / number * (num_batches - number):.0f} s")
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
            model(batch.tokens, batch.position_ids, None)
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
