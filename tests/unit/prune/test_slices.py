"""`rows_and_columns` on hand-made tensors; the whole of it on checkpoints is in `test_surgery`."""

import numpy as np
import pytest

from nemo_minitron.arch import ArchSpec
from nemo_minitron.artifacts import Plan
from nemo_minitron.checkpoint.families import HFTensor, hf_tensors_with_axes, parameter_source, tensor_axes
from nemo_minitron.prune.slices import rows_and_columns

SOURCE = ArchSpec(family="llama", num_layers=3, hidden_size=6, ffn_hidden_size=8, num_attention_heads=4,
                  num_query_groups=2, head_dim=2, vocab_size=10)
TARGET = ArchSpec(family="llama", num_layers=2, hidden_size=4, ffn_hidden_size=4, num_attention_heads=2,
                  num_query_groups=2, head_dim=2, vocab_size=10)
PLAN = Plan(source=SOURCE, target=TARGET, layers=(0, 2), hidden=(0, 1, 3, 5), ffn=((1, 2, 4, 7), (0, 3, 5, 6)),
            heads=((0, 3), (1, 2)), groups=((0, 1), (0, 1)))


def test_layer_indices_are_those_of_the_kept_layer():
    first = HFTensor("up", (8, 6), 0, ("ffn", "hidden"))
    last = HFTensor("up", (8, 6), 2, ("ffn", "hidden"))
    assert rows_and_columns(PLAN, first) == ((1, 2, 4, 7), (0, 1, 3, 5))
    assert rows_and_columns(PLAN, last) == ((0, 3, 5, 6), (0, 1, 3, 5))
    with pytest.raises(ValueError, match="not in tuple"):
        rows_and_columns(PLAN, HFTensor("up", (8, 6), 1, ("ffn", "hidden")))


def test_one_dimensional_and_uncut_dims():
    assert rows_and_columns(PLAN, HFTensor("norm", (6,), None, ("hidden",))) == ((0, 1, 3, 5), None)
    assert rows_and_columns(PLAN, HFTensor("embedding", (10, 6), None, ("vocab", "hidden"))) == (None, (0, 1, 3, 5))
    assert rows_and_columns(PLAN, HFTensor("key", (4, 6), 0, ("groups", "hidden")))[0] is None
    assert rows_and_columns(PLAN, HFTensor("other", (3,), 0, (None,))) == (None, None)


def test_heads_are_kept_in_blocks_of_head_dim():
    assert rows_and_columns(PLAN, HFTensor("query", (8, 6), 0, ("heads", "hidden")))[0] == (0, 1, 6, 7)
    assert rows_and_columns(PLAN, HFTensor("output", (6, 8), 2, ("hidden", "heads")))[1] == (2, 3, 4, 5)


@pytest.mark.parametrize("name", ["mlp.linear_fc1.weight", "mlp.linear_fc2.weight", "self_attention.linear_qkv.weight",
                                  "self_attention.linear_proj.weight", "input_layernorm.weight"])
def test_slicing_commutes_with_sharding_where_the_cut_dim_is_whole_on_each_rank(name):
    """Cutting hidden, which no TP shard of a linear layer splits beside heads or ffn, before or after sharding."""
    rng = np.random.default_rng(0)
    uncut = {"heads": ((0, 1, 2, 3),) * 2, "ffn": (tuple(range(8)),) * 2}
    plan = Plan(source=SOURCE, target=TARGET, layers=PLAN.layers, hidden=PLAN.hidden, groups=PLAN.groups, **uncut)
    whole = {tensor.name: rng.normal(size=tensor.shape) for tensor in hf_tensors_with_axes(SOURCE)}
    axes = tensor_axes(SOURCE)
    source = parameter_source(SOURCE, f"decoder.layers.0.{name}", 2)
    tensors = [axes[hf] for hf in source.hf]
    hidden_dim = tensors[0].axes.index("hidden")

    def fetch_from(values):
        def fetch(tensor_name, *, rows=None, cols=None):
            value = values[tensor_name]
            return value[rows if rows is not None else slice(None)][(..., cols) if cols is not None else ...]
        return fetch

    def cut(tensor):
        rows, columns = rows_and_columns(plan, tensor)
        value = whole[tensor.name] if rows is None else whole[tensor.name][list(rows)]
        return value if columns is None else value[:, list(columns)]

    cut_tensors = {tensor.name: cut(tensor) for tensor in tensors}
    small = [HFTensor(tensor.name, cut_tensors[tensor.name].shape, tensor.layer, tensor.axes) for tensor in tensors]
    for tp_rank in range(2):
        sliced_then_sharded = source.transform.read(fetch_from(cut_tensors), small, SOURCE, tp_rank=tp_rank, tp_size=2)
        shard = source.transform.read(fetch_from(whole), tensors, SOURCE, tp_rank=tp_rank, tp_size=2)
        np.testing.assert_array_equal(sliced_then_sharded, np.take(shard, plan.hidden, axis=hidden_dim))
