"""Which parameters a rank holds: the tensors of one tensor-parallel rank of one pipeline stage. Pure arithmetic.

The same cuts as `model/build.py` makes of a Megatron `GPTModel`; a multirank test compares the bytes.
"""

from __future__ import annotations

import math

from nemo_minitron.arch import ArchSpec
from nemo_minitron.parallel.layout import Layout


def layer_tensors(arch: ArchSpec, tp: int) -> list[int]:
    """Elements of each parameter of a layer on one rank: matrices are cut over `tp`, norms are whole."""
    hidden, dim = arch.hidden_size, arch.head_dim
    heads, groups, ffn = arch.num_attention_heads // tp, arch.num_query_groups // tp, arch.ffn_hidden_size // tp
    norm = [hidden] * (2 if arch.norm == "layernorm_1p" else 1)
    qkv = (heads + 2 * groups) * dim
    attention = [heads * dim * hidden, qkv * hidden]
    if arch.qkv_bias:
        attention.append(qkv)
    if arch.qk_norm:
        attention += [dim, dim]
    return [*norm, *attention, *norm, (arch.num_mlp_matrices - 1) * ffn * hidden, ffn * hidden]


def head_rows(arch: ArchSpec, tp: int) -> int:
    """Rows of the embedding and the LM head on one rank: the vocabulary is padded to a multiple of `tp`."""
    return math.ceil(arch.vocab_size / tp)


def stage_tensors(arch: ArchSpec, layout: Layout, stage: int) -> list[int]:
    """Elements of each parameter on a rank of the pipeline stage `stage`, in the model's order.

    The first stage has the embedding, the last one the final norm and the LM head; a tied head is the embedding where
    both are on one stage, and a copy of it where not.
    """
    last = layout.pp - 1
    matrix = head_rows(arch, layout.tp) * arch.hidden_size
    tensors = [matrix] if stage == 0 else []
    tensors += layer_tensors(arch, layout.tp) * layout.stage_layers(arch.num_layers)[stage]
    if stage == last:
        tensors += [arch.hidden_size] * (2 if arch.norm == "layernorm_1p" else 1)
        if not arch.tied_embeddings or last > 0:
            tensors.append(matrix)
    return tensors


def buffer_elements(tensors: list[int], *, dp: int, distributed_optimizer: bool) -> int:
    """Elements of Megatron's gradient buffer for these parameters.

    With the distributed optimizer every parameter begins at a multiple of 64, and the buffer ends at a multiple of
    128 and dp (megatron-core 0.15.3, `param_and_grad_buffer.py`; a bucket of its own for tied embeddings with several
    stages, at most 128 * dp elements more, is left out).
    """
    if not distributed_optimizer:
        return sum(tensors)
    end = 0
    for elements in reversed(tensors):
        end = math.ceil(end / 64) * 64 + elements
    divisor = math.lcm(dp, 128)
    return math.ceil(end / divisor) * divisor
