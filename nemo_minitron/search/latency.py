"""Measured latency as a constraint: a table of seconds by the shape of a layer, written by `minitron latency`. Pure.

A search reads the table and measures nothing: the same recipe has the same candidates again, on any machine.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_minitron.arch import ArchSpec
from nemo_minitron.artifacts import read_json, write_json
from nemo_minitron.errors import ConfigError

KEY = "search.constraints.latency.table"
Shape = tuple[int, int, int, int]
"""Hidden size, FFN size, query heads and KV groups: all that layers of the same source can differ in."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parts:
    """Seconds, prefill and all new tokens together: of one layer, and of all that is not a layer."""

    layer_s: float
    rest_s: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatencyTable:
    """What was measured for the shapes of layers of one model, and under which `conditions` (device, batch, lengths).

    `fixed` has what all shapes share (`fixed_sizes`). `whole_s` is the source measured as a whole, to compare.
    """

    fixed: Mapping[str, Any]
    conditions: Mapping[str, Any]
    shapes: Mapping[Shape, Parts]
    whole_s: float

    def seconds(self, arch: ArchSpec) -> float:
        """Of a model: its layers, and the rest.

        Raises:
            ConfigError: this shape of layers was not measured, or the table is of another model.
        """
        if fixed_sizes(arch) != dict(self.fixed):
            raise ConfigError("a table of another model", expected=str(fixed_sizes(arch)), found=str(dict(self.fixed)),
                              key=KEY)
        parts = self.shapes.get(shape_of(arch))
        if parts is None:
            hidden, ffn, heads, groups = shape_of(arch)
            raise ConfigError("a layer that was not measured", expected="a table of this search, by `minitron latency`",
                              found=f"none of hidden {hidden}, FFN {ffn}, {heads} heads, {groups} groups", key=KEY)
        return arch.num_layers * parts.layer_s + parts.rest_s

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        names = ("hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups")
        rows = [dict(zip(names, shape, strict=True)) | dataclasses.asdict(parts)
                for shape, parts in self.shapes.items()]
        write_json(path, {"fixed": dict(self.fixed), "conditions": dict(self.conditions), "whole_s": self.whole_s,
                          "shapes": rows})

    @staticmethod
    def load(path: Path) -> LatencyTable:
        """Read what `save` wrote; `UserError` for a file that is missing or is no such table."""
        data = read_json(path)
        try:
            shapes = {(row["hidden_size"], row["ffn_hidden_size"], row["num_attention_heads"], row["num_query_groups"]):
                      Parts(layer_s=float(row["layer_s"]), rest_s=float(row["rest_s"])) for row in data["shapes"]}
            return LatencyTable(fixed=dict(data["fixed"]), conditions=dict(data["conditions"]), shapes=shapes,
                                whole_s=float(data["whole_s"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError("not a table of latencies", expected="a file that `minitron latency` wrote",
                              found=f"{path} ({error!r})", key=KEY) from None


def shape_of(arch: ArchSpec) -> Shape:
    """The shape of every layer."""
    return arch.hidden_size, arch.ffn_hidden_size, arch.num_attention_heads, arch.num_query_groups


def fixed_sizes(arch: ArchSpec) -> dict[str, Any]:
    """What pruning does not change and the time depends on."""
    return {"family": arch.family, "head_dim": arch.head_dim, "vocab_size": arch.vocab_size,
            "tied_embeddings": arch.tied_embeddings}
