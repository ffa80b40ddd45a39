"""Baselines to compare activation importance with: the size of the weights, and chance. Numpy only, streaming.

Shape letters: L layers, H hidden, F ffn, N query heads, G query groups, D head_dim.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import numpy.typing as npt

from nemo_minitron.arch import ArchSpec
from nemo_minitron.checkpoint.container import to_float32
from nemo_minitron.checkpoint.families import hf_tensors_with_axes
from nemo_minitron.checkpoint.tensors import TensorReader
from nemo_minitron.importance.scores import AXES, WIDTH_AXES, width_shape

BLOCK_VALUES = 2**22

Tensors = dict[str, npt.NDArray[np.float64]]


def _shape(arch: ArchSpec, axis: str) -> tuple[int, ...]:
    if axis == "layers":
        return (arch.num_layers,)
    return (1 if axis == "hidden" else arch.num_layers, width_shape(arch, axis)[1])


def magnitude(directory: Path, arch: ArchSpec) -> Tensors:
    """`{axis}.magnitude`: L2 norm of all weights that a unit owns, in the checkpoint in `directory`.

    hidden [1, H]: column or row of every matrix at the residual stream, embeddings included (a tied one once).
    ffn [L, F]: rows of gate and up, column of down. heads [L, N]: rows of q, columns of o. groups [L, G]: rows of k
    and v, and all of the group's heads. layers [L]: all matrices of the layer. Norms' scales and biases do not
    count. Reads each matrix once, in blocks of rows.
    """
    squares = {axis: np.zeros(_shape(arch, axis)) for axis in AXES}
    with TensorReader(directory) as reader:
        for tensor in hf_tensors_with_axes(arch):
            if len(tensor.shape) == 2:
                rows, columns = _squares(reader, tensor.name, tensor.shape)
                if tensor.layer is not None:
                    squares["layers"][tensor.layer] += rows.sum()
                for axis, values in zip(tensor.axes, (rows, columns), strict=True):
                    if axis in WIDTH_AXES:
                        row = 0 if axis == "hidden" else tensor.layer
                        squares[axis][row] += values.reshape(squares[axis].shape[1], -1).sum(1)
    squares["groups"] += squares["heads"].reshape(arch.num_layers, arch.num_query_groups, -1).sum(2)
    return {f"{axis}.magnitude": np.sqrt(values) for axis, values in squares.items()}


def random_importance(arch: ArchSpec, seed: int) -> Tensors:
    """`{axis}.random`: uniform numbers in [0, 1), of shapes as `magnitude`; a function of `seed` and the axis."""
    def draw(axis: str) -> npt.NDArray[np.float64]:
        words = np.frombuffer(hashlib.sha256(axis.encode()).digest(), "<u4").tolist()
        return np.random.default_rng([seed, *words]).random(_shape(arch, axis))

    return {f"{axis}.random": draw(axis) for axis in AXES}


def _squares(reader: TensorReader, name: str,
             shape: tuple[int, ...]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Sum of squares of each row and of each column."""
    by_row, by_column = np.zeros(shape[0]), np.zeros(shape[1])
    step = max(1, BLOCK_VALUES // shape[1])
    for start in range(0, shape[0], step):
        block = to_float32(reader.read(name, rows=slice(start, start + step)), reader.dtype(name)) ** 2
        by_row[start : start + step] = block.sum(1, dtype=np.float64)
        by_column += block.sum(0, dtype=np.float64)
    return by_row, by_column
