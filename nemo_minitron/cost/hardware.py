"""What a GPU and its network can do: datasheet numbers, and published measurements of how much of them is reached.

Nothing here is fitted to a training run.
"""

from __future__ import annotations

import dataclasses

from nemo_minitron.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU in its node. Rates are a second, bandwidths in bytes a second, those of links in one direction."""

    name: str
    memory_bytes: float
    bf16_flops: float
    """Dense, without sparsity."""
    fp32_flops: float
    """Without tensor cores: torch keeps TF32 off for matrix products."""
    memory_bandwidth: float
    link_bandwidth: float
    """To the other GPUs of the node (NVLink)."""
    network_bandwidth: float
    """To other nodes: one network card a GPU."""
    matmul_efficiency: float
    """Of the peak, in large bf16 matrix products."""
    attention_efficiency: float
    """Of the peak, in fused attention."""
    gpus_per_node: int = 8

    def peak(self, *, bf16: bool) -> float:
        """FLOPs a second of matrix products in this precision."""
        return self.bf16_flops if bf16 else self.fp32_flops


H100_SXM = Gpu(
    # NVIDIA H100 datasheet: 80 GB, 989.4 TFLOP/s bf16 dense, 67 fp32, 3.35 TB/s, NVLink 900 GB/s both ways; the DGX
    # H100 has a ConnectX-7 card of 400 Gb/s for every GPU.
    name="H100 SXM 80 GB", memory_bytes=80e9, bf16_flops=989.4e12, fp32_flops=67e12, memory_bandwidth=3.35e12,
    link_bandwidth=450e9, network_bandwidth=50e9,
    # 792.1 of 989 TFLOP/s: "Maximum Achievable Matmul FLOPS", github.com/stas00/ml-engineering, accelerators.
    matmul_efficiency=0.801,
    # FlashAttention-2 "achieving only 35% utilization on the H100": arXiv:2407.08608, abstract.
    attention_efficiency=0.35,
)
A100_SXM = Gpu(
    # NVIDIA A100 80GB datasheet: 312 TFLOP/s bf16 dense, 19.5 fp32, 2.039 TB/s, NVLink 600 GB/s both ways; the DGX
    # A100 has a ConnectX-6 card of 200 Gb/s for every GPU.
    name="A100 SXM 80 GB", memory_bytes=80e9, bf16_flops=312e12, fp32_flops=19.5e12, memory_bandwidth=2.039e12,
    link_bandwidth=300e9, network_bandwidth=25e9,
    # 267.9 of 312 TFLOP/s, the same table.
    matmul_efficiency=0.859,
    # FlashAttention-2 reaches 50-73% on the A100 (arXiv:2307.08691, abstract): the lower end.
    attention_efficiency=0.50,
)
GPUS = {"h100_sxm": H100_SXM, "a100_sxm": A100_SXM}

# Assumptions, not measurements; docs/scaling.md says what they are worth.
BANDWIDTH_EFFICIENCY = 0.8
"""Part of a memory's or link's bandwidth that large transfers get."""
COLLECTIVE_LATENCY_S = {"link": 10e-6, "network": 30e-6}
"""Time that a collective takes however small it is, inside a node and between nodes."""
OVERHEAD_BYTES = 3e9
"""CUDA context, NCCL's buffers, GEMM workspaces and what the allocator cannot use, on every GPU."""


def gpu_named(name: str) -> Gpu:
    """The GPU of that name; `ConfigError` for one that is not in the table."""
    if name not in GPUS:
        raise ConfigError("unknown GPU", expected=", ".join(GPUS), found=repr(name), key="plan.gpu")
    return GPUS[name]
