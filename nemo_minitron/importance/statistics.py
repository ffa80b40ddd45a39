"""Per-sample sequence statistics of one activation, in few passes over it and without a temporary of its size.

Shape letters: S sequence (local to this rank where the tokens are sharded), B micro-batch, U local units of an axis.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

SLICE_BYTES = {"cpu": 2**20, "cuda": 2**26}
"""Size of the work buffer: an activation is taken some samples at a time, on CPU so that they stay in the cache."""


def sequence_statistics(activation_SBU: torch.Tensor, *, token_group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """Mean of absolute values, L2 norm and variance over the sequence: `[3, B, U]`, fp32 (fp64 for fp64).

    Computed in fp32 whatever the type of the activation (fp64 for fp64); the variance is the mean of squared
    differences from the mean, in a second pass. Where the sequence is spread evenly over `token_group`: two
    all-reduces, and variances are merged by Chan's formula, `M2 = sum_i M2_i + sum_i n_i (mean_i - mean)^2` (Chan,
    Golub, LeVeque 1979).
    """
    count = activation_SBU.size(0)
    absolute, mean, m2 = _local_sums(activation_SBU)
    mean /= count
    if token_group is not None:
        shards = dist.get_world_size(token_group)
        packed = torch.stack([absolute, mean])
        dist.all_reduce(packed, group=token_group)
        absolute, merged = packed[0], packed[1] / shards
        m2 += count * (mean - merged).square()
        dist.all_reduce(m2, group=token_group)
        count, mean = count * shards, merged
    norm = (m2 + count * mean.square()).sqrt()
    return torch.stack([absolute / count, norm, m2 / count])


def masked_statistics(activation_SBU: torch.Tensor, counts_SB: torch.Tensor, *,
                      token_group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """`sequence_statistics` over the tokens where `counts_SB` (bool) is true: `[3, B, U]`, zero where there is none.

    Two all-reduces where the sequence is spread over `token_group`.
    """
    dtype = torch.float64 if activation_SBU.dtype == torch.float64 else torch.float32
    kept = counts_SB.unsqueeze(-1)
    work = activation_SBU.to(dtype) * kept
    sums = torch.stack([work.abs().sum(0), work.sum(0), kept.to(dtype).sum(0).expand(work.shape[1:])])
    if token_group is not None:
        dist.all_reduce(sums, group=token_group)
    absolute, total, count = sums
    count = count.clamp(min=1)
    mean = total / count
    m2 = ((work - mean) * kept).square().sum(0)
    if token_group is not None:
        dist.all_reduce(m2, group=token_group)
    return torch.stack([absolute / count, (m2 + count * mean.square()).sqrt(), m2 / count])


def _local_sums(activation_SBU: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sums over S of absolute values, of values, and of squared differences from their mean: `[B, U]` each."""
    S, B, U = activation_SBU.shape
    dtype = torch.float64 if activation_SBU.dtype == torch.float64 else torch.float32
    absolute, total, m2 = torch.empty(3, B, U, dtype=dtype, device=activation_SBU.device)
    samples = max(1, min(B, SLICE_BYTES.get(activation_SBU.device.type, 2**26) // (S * U * dtype.itemsize)))
    buffer = torch.empty(S * samples * U, dtype=dtype, device=activation_SBU.device)
    for first in range(0, B, samples):
        part = activation_SBU[:, first : first + samples]
        work = buffer[: part.numel()].view(part.shape)
        rows = slice(first, first + samples)
        torch.sum(part, 0, dtype=dtype, out=total[rows])
        work.copy_(part).abs_()
        torch.sum(work, 0, out=absolute[rows])
        torch.sub(part, total[rows] / S, out=work)
        work.mul_(work)
        torch.sum(work, 0, out=m2[rows])
    return absolute, total, m2


def head_norms(context_SBC: torch.Tensor, *, heads: int, dim: int) -> torch.Tensor:
    """L2 norm of each token's output of each of `heads` blocks of `dim` channels: `[S, B, C]` -> `[S, B, heads]`."""
    wide = context_SBC if context_SBC.dtype == torch.float64 else context_SBC.float()
    return wide.view(*context_SBC.shape[:2], heads, dim).square().sum(-1).sqrt_()


def token_cosines(before_SBH: torch.Tensor, after_SBH: torch.Tensor) -> torch.Tensor:
    """Cosine between two hidden states of each token, `[S, B]` in fp64; computed in fp32 (fp64 for fp64)."""
    if before_SBH.dtype not in (torch.float32, torch.float64):
        before_SBH, after_SBH = before_SBH.float(), after_SBH.float()
    dot = torch.linalg.vecdot(before_SBH, after_SBH).double()
    norms = torch.linalg.vector_norm(before_SBH, dim=-1).double() * torch.linalg.vector_norm(after_SBH, dim=-1).double()
    return dot / norms.clamp_min(torch.finfo(torch.float32).tiny)
