"""Model FLOPs of a step, and what part of the devices' peak that is. Pure but for the name of the device."""

from __future__ import annotations

import resource

import torch

from nemo_minitron.arch import ArchSpec
from nemo_minitron.parallel.cpu import cuda_is_available

PEAK_TFLOPS = {
    "H100": {"bf16-mixed": 989.4, "32": 66.9},
    "H200": {"bf16-mixed": 989.4, "32": 66.9},
    "A100": {"bf16-mixed": 312.0, "32": 19.5},
}
"""Dense peak of one SXM device by precision, TFLOP/s: NVIDIA's datasheets (H100: 2022; H200: 2023; A100: 2020)."""


def forward_flops_per_token(arch: ArchSpec, seq_length: int) -> float:
    """FLOPs of a forward pass with its LM head, per token: 2 a weight, and the attention's two products over all
    positions.

    2 (N + V H) + 4 S n D L with N the parameters without embeddings, as PaLM counts (arXiv:2204.02311, appendix B); the
    causal half of the attention is not taken off. A backward pass is twice that.
    """
    weights = arch.num_non_embedding_parameters() + arch.vocab_size * arch.hidden_size
    attention = 4 * seq_length * arch.num_attention_heads * arch.head_dim * arch.num_layers
    return 2.0 * weights + attention


def flops_per_token(student: ArchSpec, teacher: ArchSpec | None, seq_length: int) -> float:
    """FLOPs of a training step per token: student forward and backward, and the teacher's forward if it runs."""
    own = 3 * forward_flops_per_token(student, seq_length)
    return own if teacher is None else own + forward_flops_per_token(teacher, seq_length)


def peak_tflops(precision: str, given: float | None) -> float | None:
    """Peak of one device, TFLOP/s: as `given`, else of a known GPU; None where unknown (any CPU)."""
    if given is not None or not cuda_is_available():
        return given
    name = torch.cuda.get_device_name()
    return next((peaks.get(precision) for known, peaks in PEAK_TFLOPS.items() if known in name), None)


def peak_memory_mib() -> float:
    """Largest memory so far of this process: allocated on its GPU, or resident on a CPU; MiB."""
    if cuda_is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
