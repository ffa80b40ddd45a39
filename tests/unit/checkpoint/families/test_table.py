"""Transforms for random shapes: shards merge to what they were read from, and lie as Megatron wants them."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from nemo_minitron.arch import ArchSpec
from nemo_minitron.checkpoint.families import tensor_axes
from nemo_minitron.checkpoint.families.table import QKV, Direct, GatedMLP, Vocab

SIZES = st.fixed_dictionaries({"tp": st.integers(1, 4), "groups": st.integers(1, 3), "heads": st.integers(1, 3),
                               "ffn": st.integers(1, 4), "half_dim": st.integers(1, 3), "vocab": st.integers(1, 12),
                               "hidden": st.integers(1, 6)})


def make(sizes):
    groups = sizes["tp"] * sizes["groups"]
    arch = ArchSpec(family="llama", num_layers=1, hidden_size=sizes["hidden"],
                    ffn_hidden_size=sizes["tp"] * sizes["ffn"], num_attention_heads=groups * sizes["heads"],
                    num_query_groups=groups, head_dim=2 * sizes["half_dim"], vocab_size=sizes["vocab"])
    rng = np.random.default_rng(0)
    return arch, {name: rng.integers(0, 2**16, tensor.shape, dtype=np.uint16)
                  for name, tensor in tensor_axes(arch).items()}


def shards_of(transform, names, arch, arrays, tp):
    def fetch(name, *, rows=None, cols=None):
        array = arrays[name] if rows is None else arrays[name][rows]
        return array if cols is None else array[:, cols]

    tensors = [tensor_axes(arch)[name] for name in names]
    return [transform.read(fetch, tensors, arch, tp_rank=rank, tp_size=tp) for rank in range(tp)]


@given(SIZES)
def test_merge_undoes_read(sizes):
    arch, arrays = make(sizes)
    layer = "model.layers.0."
    for transform, names in (
        (QKV(), [layer + f"self_attn.{part}_proj.weight" for part in "qkv"]),
        (GatedMLP(), [layer + "mlp.gate_proj.weight", layer + "mlp.up_proj.weight"]),
        (Direct(1), [layer + "mlp.down_proj.weight"]),
        (Direct(0), [layer + "mlp.up_proj.weight"]),
        (Direct(), ["model.norm.weight"]),
        (Vocab(), ["lm_head.weight"]),
    ):
        shards = shards_of(transform, names, arch, arrays, sizes["tp"])
        assert len({shard.shape for shard in shards}) == 1
        for name, merged in zip(names, transform.merge(shards, arch), strict=True):
            assert np.array_equal(merged, arrays[name]), name


@given(SIZES)
def test_fused_attention_rows_one_by_one(sizes):
    """Row by row: which head's which row each row of Megatron's fused tensor is."""
    arch, arrays = make(sizes)
    names = [f"model.layers.0.self_attn.{part}_proj.weight" for part in "qkv"]
    fused = np.concatenate(shards_of(QKV(), names, arch, arrays, sizes["tp"]))
    rows = iter(fused)
    for group in range(arch.num_query_groups):
        heads = [(names[0], group * arch.heads_per_group + i) for i in range(arch.heads_per_group)]
        for name, head in [*heads, (names[1], group), (names[2], group)]:
            for offset in range(arch.head_dim):
                assert np.array_equal(next(rows), arrays[name][head * arch.head_dim + offset])
    assert next(rows, None) is None
