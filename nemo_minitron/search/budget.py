"""What a candidate must meet: windows on parameters, memory of serving, FLOPs and latency. Pure arithmetic."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

from nemo_minitron.arch import ArchSpec
from nemo_minitron.cost.flops import flops_per_token
from nemo_minitron.cost.serving import serving_bytes
from nemo_minitron.errors import ConfigError
from nemo_minitron.search.latency import LatencyTable


@dataclasses.dataclass(frozen=True, kw_only=True)
class Constraint:
    """`measure` of an architecture must lie in [minimum, maximum]. `name` is its key under `search.constraints`."""

    name: str
    measure: Callable[[ArchSpec], float]
    minimum: float = -math.inf
    maximum: float = math.inf
    measured: bool = False
    """Known only of what all others allow, and so asked last."""

    def allows(self, arch: ArchSpec) -> bool:
        """Whether the architecture meets it, bounds included."""
        return self.minimum <= self.measure(arch) <= self.maximum

    def check(self, source: ArchSpec) -> Constraint:
        """Return self, or raise `ConfigError` for a window that is empty or reaches above what the source has."""
        has = self.measure(source)
        if not self.minimum <= self.maximum:
            raise ConfigError("an empty window", expected="min to be at most max",
                              found=f"{self.minimum:,.0f} and {self.maximum:,.0f}",
                              key=f"search.constraints.{self.name}")
        above = [bound for bound in (self.minimum, self.maximum) if math.isfinite(bound) and bound > has]
        if above:
            raise ConfigError("a budget above the source", expected=f"at most {has:,.0f}", found=f"{above[0]:,.0f}",
                              key=f"search.constraints.{self.name}")
        return self


def window(source: ArchSpec, name: str, measure: Callable[[ArchSpec], float], minimum: float | None,
           maximum: float | None) -> list[Constraint]:
    """The constraint of two bounds, none where both are None; bounds up to 1 are fractions of the source's measure."""
    if minimum is None and maximum is None:
        return []
    has = measure(source)
    for bound in (minimum, maximum):
        if bound is not None and not bound > 0:
            raise ConfigError("bad budget", expected="a positive number", found=str(bound),
                              key=f"search.constraints.{name}")
    low, high = (bound * has if bound is not None and bound <= 1 else bound for bound in (minimum, maximum))
    return [Constraint(name=name, measure=measure, minimum=-math.inf if low is None else low,
                       maximum=math.inf if high is None else high).check(source)]


def memory_at_most(source: ArchSpec, max_bytes: float, *, batch_size: int, seq_length: int,
                   bytes_per_element: float) -> Constraint:
    """Weights and KV cache of `batch_size` sequences of `seq_length` tokens within `max_bytes`."""
    def measure(arch: ArchSpec) -> float:
        return serving_bytes(arch, batch_size=batch_size, seq_length=seq_length, bytes_per_element=bytes_per_element)

    return window(source, "memory", measure, None, max_bytes)[0]


def flops_at_most(source: ArchSpec, maximum: float, *, seq_length: int) -> Constraint:
    """Forward FLOPs of a token, in a sequence of `seq_length`, within `maximum`."""
    return window(source, "flops_per_token", lambda arch: flops_per_token(arch, seq_length=seq_length), None,
                  maximum)[0]


def latency_at_most(source: ArchSpec, max_ms: float, table: LatencyTable) -> Constraint:
    """Milliseconds of generating, by the measured parts of a model, within `max_ms`."""
    found = window(source, "latency", lambda arch: 1000 * table.seconds(arch), None, max_ms)[0]
    return dataclasses.replace(found, measured=True)
