"""Numpy arrays as safetensors stores them <-> torch tensors. BF16 is raw `uint16` on the numpy side."""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray

TORCH_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
SAFETENSORS_DTYPES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def to_torch(array: NDArray[Any], dtype: str) -> torch.Tensor:
    """`array`, read as safetensors type `dtype`, as a CPU tensor that shares its memory."""
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if dtype == "BF16" else tensor


def to_numpy(tensor: torch.Tensor) -> NDArray[Any]:
    """`tensor` as a numpy array on the CPU; BF16 as raw `uint16`."""
    tensor = tensor.detach().cpu().contiguous()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
