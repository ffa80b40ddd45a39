"""Which rows and columns of each Hugging Face tensor a plan keeps. Pure: index arithmetic only.

Tensors are global, as they lie in the checkpoint: dim 0 = rows (output features of a linear layer), dim 1 =
columns (input features).
"""

from __future__ import annotations

from nemo_minitron.artifacts import Plan
from nemo_minitron.checkpoint.families import HFTensor

Indices = tuple[int, ...]


def rows_and_columns(plan: Plan, tensor: HFTensor) -> tuple[Indices | None, Indices | None]:
    """Ascending indices to keep along dim 0 and dim 1 of `tensor`; None means all of them.

    `tensor` is one of the source model: its `layer` is the source's number of a layer that `plan` keeps. The heads
    (groups) dims are `num * head_dim` long, head by head, and whole blocks of head_dim are kept. A one-dimensional
    tensor has no columns: None.
    """
    kept = [_kept(plan, tensor.layer, axis) for axis in tensor.axes]
    rows, columns = (*kept, None) if len(kept) == 1 else kept
    return rows, columns


def _kept(plan: Plan, layer: int | None, axis: str | None) -> Indices | None:
    """Kept indices along one dim, or None for all."""
    source = plan.source
    if axis in (None, "vocab", "head_dim"):
        return None
    if axis == "hidden":
        return None if len(plan.hidden) == source.hidden_size else plan.hidden
    assert layer is not None, f"axis {axis} outside a layer"
    position = plan.layers.index(layer)
    if axis == "ffn":
        return None if len(plan.ffn[position]) == source.ffn_hidden_size else plan.ffn[position]
    heads, size = {"heads": (plan.heads, source.num_attention_heads),
                   "groups": (plan.groups, source.num_query_groups)}[axis]
    return None if len(heads[position]) == size else _blocks(heads[position], source.head_dim)


def _blocks(heads: Indices, head_dim: int) -> Indices:
    """The `head_dim` consecutive indices of each of `heads`."""
    return tuple(head * head_dim + offset for head in heads for offset in range(head_dim))
