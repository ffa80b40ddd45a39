"""Bytes that serving a model takes. Pure arithmetic."""

from __future__ import annotations

from nemo_minitron.arch import ArchSpec


def kv_cache_bytes(arch: ArchSpec, *, batch_size: int, seq_length: int, bytes_per_element: float = 2.0) -> float:
    """Keys and values of every layer and group: 2 * L * G * D elements a token."""
    elements = 2 * arch.num_layers * arch.num_query_groups * arch.head_dim
    return elements * batch_size * seq_length * bytes_per_element


def serving_bytes(arch: ArchSpec, *, batch_size: int, seq_length: int, bytes_per_element: float = 2.0) -> float:
    """Weights and the keys and values of `batch_size` sequences of `seq_length` tokens, in the same precision."""
    return arch.num_parameters() * bytes_per_element + kv_cache_bytes(
        arch, batch_size=batch_size, seq_length=seq_length, bytes_per_element=bytes_per_element)
