"""From the recipe's node `search` to its candidates: `candidates_of(source, config.search)`. No torch."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from nemo_minitron.arch import ArchSpec
from nemo_minitron.config_rounds import ConstraintsConfig, SearchConfig
from nemo_minitron.errors import ConfigError
from nemo_minitron.search.budget import Constraint, flops_at_most, latency_at_most, memory_at_most, window
from nemo_minitron.search.latency import LatencyTable
from nemo_minitron.search.space import Enumeration, Space, axis_sizes, enumerate_candidates


def candidates_of(source: ArchSpec, search: SearchConfig) -> Enumeration:
    """The architectures that the recipe's search chooses from.

    Raises:
        ConfigError: sizes that contradict each other, a budget above the source, or nothing left.
    """
    return enumerate_candidates(source, space_of(source, search), constraints_of(source, search.constraints)).check()


def space_of(source: ArchSpec, search: SearchConfig) -> Space:
    """The recipe's lists and smallest sizes as the sizes of every axis."""
    if search.ffn_expansion and (search.ffn_hidden_size or search.smallest.ffn_hidden_size is not None):
        raise ConfigError("an axis is asked for twice", expected="ffn_expansion or ffn_hidden_size", found="both",
                          key="search.ffn_expansion")
    bad = [factor for factor in search.ffn_expansion if not factor > 0]
    if bad:
        raise ConfigError("bad expansion", expected="positive factors", found=str(bad), key="search.ffn_expansion")
    axes = {axis: axis_sizes(source, axis, listed=getattr(search, axis), smallest=getattr(search.smallest, axis),
                             divisor=getattr(search.divisors, axis))
            for axis in ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups")}
    if search.ffn_expansion:
        axes["ffn_hidden_size"] = ()
    return Space(**axes, ffn_expansion=tuple(search.ffn_expansion), ffn_divisor=search.divisors.ffn_hidden_size)


def constraints_of(source: ArchSpec, constraints: ConstraintsConfig) -> list[Constraint]:
    """The recipe's bounds, those that are set."""
    total, non_embedding = constraints.num_parameters, constraints.num_non_embedding_parameters
    found = window(source, "num_parameters", ArchSpec.num_parameters, total.min, total.max)
    found += window(source, "num_non_embedding_parameters", ArchSpec.num_non_embedding_parameters, non_embedding.min,
                    non_embedding.max)
    memory, flops = constraints.memory, constraints.flops_per_token
    if memory.max_bytes is not None:
        found.append(memory_at_most(source, memory.max_bytes, batch_size=memory.batch_size,
                                    seq_length=memory.seq_length, bytes_per_element=memory.bytes_per_element))
    if flops.max is not None:
        found.append(flops_at_most(source, flops.max, seq_length=flops.seq_length))
    latency = constraints.latency
    if (latency.max_ms is None) != (latency.table is None):
        raise ConfigError("a limit and what it is measured by go together", expected="both max_ms and table, or none",
                          found="one of them", key="search.constraints.latency")
    if latency.max_ms is not None and latency.table is not None:
        found.append(latency_at_most(source, latency.max_ms, LatencyTable.load(Path(latency.table))))
    return found


def expected_candidate(enumeration: Enumeration, search: SearchConfig) -> ArchSpec:
    """The candidate that planning goes on with: the one `search.expected` describes, else the largest.

    Raises:
        ConfigError: `search.expected` describes none of them.
    """
    sizes = {name: size for name, size in dataclasses.asdict(search.expected).items() if size is not None}
    fitting = [arch for arch in enumeration.candidates
               if all(getattr(arch, name) == size for name, size in sizes.items())]
    if not fitting:
        raise ConfigError("the expected architecture is no candidate", expected=f"one of {len(enumeration.candidates)}",
                          found=", ".join(f"{name} {size}" for name, size in sizes.items()), key="search.expected")
    return max(fitting, key=ArchSpec.num_parameters)
