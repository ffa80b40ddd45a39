"""FLOPs of a forward pass and of training steps, from an architecture. Pure arithmetic.

A multiplication and an addition count as two. Counted are the matrix products, the LM head among them, and attention
over all positions of a sample without regard to causality, as arXiv:2407.14679, section 4.1, does; a backward pass is
two forward passes; the embedding lookup and elementwise work cost nothing.

Letters: L layers, H hidden, F ffn, N heads, G query groups, D head_dim, V vocab, S sequence, m matrices of the MLP.
"""

from __future__ import annotations

from nemo_minitron.arch import ArchSpec


def layer_matmul_parameters(arch: ArchSpec) -> int:
    """Parameters of a layer that tokens are multiplied with: m*H*F + 2*H*N*D + 2*H*G*D."""
    attention = 2 * arch.hidden_size * arch.head_dim * (arch.num_attention_heads + arch.num_query_groups)
    return arch.num_mlp_matrices * arch.hidden_size * arch.ffn_hidden_size + attention


def matmul_parameters(arch: ArchSpec) -> int:
    """The same of the whole model, with the LM head: L*(m*H*F + 2*H*N*D + 2*H*G*D) + V*H."""
    return arch.num_layers * layer_matmul_parameters(arch) + arch.vocab_size * arch.hidden_size


def forward_flops(arch: ArchSpec, *, samples: int, seq_length: int) -> float:
    """A forward pass of `samples` samples: 2 * tokens * matmul parameters + 4 * S^2 * L * N * D a sample."""
    attention = 4 * seq_length**2 * arch.num_layers * arch.num_attention_heads * arch.head_dim
    return float(samples * (2 * seq_length * matmul_parameters(arch) + attention))


def flops_per_token(arch: ArchSpec, *, seq_length: int) -> float:
    """Forward FLOPs of one token of a sequence of `seq_length`."""
    return forward_flops(arch, samples=1, seq_length=seq_length) / seq_length


def training_flops(student: ArchSpec, *, samples: int, seq_length: int, teacher: ArchSpec | None = None) -> float:
    """Forward and backward of the student, and the forward of a teacher where one takes part."""
    flops = 3 * forward_flops(student, samples=samples, seq_length=seq_length)
    return flops + (forward_flops(teacher, samples=samples, seq_length=seq_length) if teacher else 0.0)
