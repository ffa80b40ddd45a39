"""`ArchSpec` -> this rank's shard of a Megatron `GPTModel` that ends at its final hidden state."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.activations import squared_relu
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from nemo_minitron.arch import ArchSpec, Rope
from nemo_minitron.checkpoint.load import load_shard
from nemo_minitron.model.attention import CausalAttention, transformer_engine_attention
from nemo_minitron.model.norm import LayerNorm1P, RMSNorm
from nemo_minitron.parallel import groups
from nemo_minitron.parallel.cpu import cuda_is_available, device
from nemo_minitron.parallel.layout import Layout


class HiddenStateGPT(GPTModel):
    """A `GPTModel` whose last stage returns the final hidden state `[S, B, H]`, after the final norm.

    No logits are formed here: the losses multiply by the LM head themselves, chunk by chunk.
    """

    arch: ArchSpec

    def _postprocess(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return hidden_states

    def head(self) -> torch.Tensor:
        """The LM head's rows of this TP rank, `[v, H]` with v the padded vocabulary / tp (last stage only)."""
        assert self.post_process
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight

    def exported_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """`named_parameters()` of the model proper, without what distillation adds and trains beside it."""
        return ((name, parameter) for name, parameter in self.named_parameters()
                if not name.startswith("distillation_"))

    @property
    def layer_offset(self) -> int:
        """Number of layers on the pipeline stages before this one."""
        return get_transformer_layer_offset(self.config)


def padded_vocab_size(vocab_size: int, tp: int) -> int:
    """Rows of the embedding when it is cut over `tp` ranks: rounded up to a multiple of tp."""
    return math.ceil(vocab_size / tp) * tp


def transformer_engine_is_available() -> bool:
    """Whether Transformer Engine can be used: it is installed and there is a GPU."""
    if not cuda_is_available():
        return False
    try:
        import transformer_engine.pytorch  # noqa: F401
    except ImportError:
        return False
    return True


def transformer_config(arch: ArchSpec, layout: Layout, *, bf16: bool = False, fp8: bool = False,
                       recompute: str = "none") -> TransformerConfig:
    """Megatron's configuration for `arch`; fusions that need CUDA kernels only where there is CUDA.

    `fp8` has Transformer Engine multiply in fp8. `recompute` says which activations are computed again in the backward
    pass instead of being kept: none; selective, those of the core attention; full, those of every layer.
    """
    fused = transformer_engine_is_available()
    dtype = torch.bfloat16 if bf16 else torch.float32
    zero_centred = arch.norm == "layernorm_1p"
    stages = layout.stage_layers(arch.num_layers)
    return TransformerConfig(
        num_layers=arch.num_layers, hidden_size=arch.hidden_size, ffn_hidden_size=arch.ffn_hidden_size,
        num_attention_heads=arch.num_attention_heads, num_query_groups=arch.num_query_groups,
        kv_channels=arch.head_dim, gated_linear_unit=arch.activation == "swiglu",
        activation_func=torch.nn.functional.silu if arch.activation == "swiglu" else squared_relu,
        normalization="LayerNorm" if zero_centred else "RMSNorm", layernorm_zero_centered_gamma=zero_centred,
        layernorm_epsilon=arch.norm_eps, add_qkv_bias=arch.qkv_bias, qk_layernorm=arch.qk_norm,
        add_bias_linear=False, hidden_dropout=0.0, attention_dropout=0.0,
        pipeline_model_parallel_layout=None if len(set(stages)) == 1 else _pipeline_layout(stages),
        tensor_model_parallel_size=layout.tp, pipeline_model_parallel_size=layout.pp,
        sequence_parallel=layout.sequence_parallel and layout.tp > 1,
        params_dtype=dtype, pipeline_dtype=dtype, bf16=bf16,
        calculate_per_token_loss=True, perform_initialization=False, use_cpu_initialization=not cuda_is_available(),
        fp8="hybrid" if fp8 else None,
        recompute_granularity=None if recompute == "none" else recompute,
        recompute_method="uniform" if recompute == "full" else None,
        recompute_num_layers=1 if recompute == "full" else None,
        bias_activation_fusion=fused and arch.activation == "swiglu",  # the only one of ours that Megatron fuses
        bias_dropout_fusion=fused, apply_rope_fusion=fused, masked_softmax_fusion=False,
        gradient_accumulation_fusion=False, persist_layer_norm=fused,
    )


def _pipeline_layout(stage_layers: tuple[int, ...]) -> list[list[str]]:
    """What Megatron builds on each stage, where stages differ in length."""
    stages = [["decoder"] * count for count in stage_layers]
    stages[0].insert(0, "embedding")
    stages[-1].append("loss")
    return stages


def build_model(arch: ArchSpec, config: TransformerConfig, *, unfused_norms: bool = False) -> HiddenStateGPT:
    """Build this rank's shard with unset weights; `load_model` reads them.

    Args:
        arch: the whole model's architecture.
        config: `transformer_config(arch, layout)` for the layout whose groups are formed.
        unfused_norms: keep norms as modules of their own where Transformer Engine would fuse them into the
            linear layers: scoring reads their outputs.
    """
    model = HiddenStateGPT(
        config, _layer_spec(config, unfused_norms=unfused_norms),
        vocab_size=padded_vocab_size(arch.vocab_size, config.tensor_model_parallel_size),
        max_sequence_length=arch.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=True),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=True),
        share_embeddings_and_output_weights=arch.tied_embeddings,
        position_embedding_type="rope", rotary_percent=arch.rotary_fraction, rotary_base=arch.rope.theta,
    )
    model.arch = arch
    _mark_sharded_weights(model)
    rotated_dims = int(arch.head_dim * arch.rotary_fraction)
    model.rotary_pos_emb.inv_freq = inverse_frequencies(arch.rope, rotated_dims).to(device())
    return model.to(device())


def load_model(arch: ArchSpec, path: Path, config: TransformerConfig, *, layout: Layout | None = None,
               unfused_norms: bool = False) -> HiddenStateGPT:
    """Build this rank's shard and fill it from the Hugging Face checkpoint in `path`; every rank must call this.

    With `layout`, that of the groups that are formed, replicas may share what one of them reads (`read_weights`).
    """
    model = build_model(arch, config, unfused_norms=unfused_norms)
    read_weights(model, path, layout or Layout(tp=config.tensor_model_parallel_size, read_once=False))
    return model


def read_weights(model: HiddenStateGPT, path: Path, layout: Layout) -> None:
    """Fill this rank's shard from the Hugging Face checkpoint in `path`; every rank must call this.

    Each rank reads its own slices; of data-parallel replicas the first does, where `layout.read_once`.
    """
    read, share = groups.sharing(layout)
    load_shard(model.named_parameters(), path, model.arch, tp_rank=groups.tp_rank(), tp_size=layout.tp,
               layer_offset=model.layer_offset, read=read, share=share)


def inverse_frequencies(rope: Rope, rotated_dims: int) -> torch.Tensor:
    """Angular frequencies of the rotary pairs, fp32 `[rotated_dims / 2]`, in radians a position.

    Our own because Megatron hard-codes three of Llama-3's four scaling numbers. With scaling, wavelengths
    longer than `original_max / low_freq_factor` are stretched by `factor`, those shorter than
    `original_max / high_freq_factor` are kept, and those between are interpolated (Llama 3.1 model code).
    """
    exponents = torch.arange(0, rotated_dims, 2, dtype=torch.float32) / rotated_dims
    frequencies = 1.0 / rope.theta**exponents
    if rope.scaling is None:
        return frequencies
    scaling = rope.scaling
    wavelengths = 2 * math.pi / frequencies
    periods = scaling.original_max_position_embeddings / wavelengths
    smooth = (periods - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    smooth = smooth.clamp(0.0, 1.0)
    return frequencies * (smooth + (1.0 - smooth) / scaling.factor)


def _mark_sharded_weights(model: HiddenStateGPT) -> None:
    """Say which weights are sharded over TP: Megatron does so only when it also initialises them (biases it marks).

    The gradient norm, and with it clipping, counts a weight without this mark on TP rank 0 alone, as a replica.
    Transformer Engine's layers mark their own.
    """
    for module in model.modules():
        sharded = isinstance(module, (ColumnParallelLinear, VocabParallelEmbedding, RowParallelLinear))
        if sharded and module.weight is not None:  # None: a tied LM head, which is the embedding
            dim = 1 if isinstance(module, RowParallelLinear) else 0
            set_tensor_model_parallel_attributes(module.weight, is_parallel=True, dim=dim, stride=1)


def _layer_spec(config: TransformerConfig, *, unfused_norms: bool) -> Any:
    if transformer_engine_is_available():
        return _transformer_engine_spec(config, unfused_norms=unfused_norms)
    norm = LayerNorm1P if config.layernorm_zero_centered_gamma else RMSNorm
    layer = get_gpt_layer_local_spec(normalization="RMSNorm")
    layer.submodules.input_layernorm = norm
    layer.submodules.pre_mlp_layernorm = norm
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = CausalAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return TransformerBlockSubmodules(layer_specs=[layer] * get_num_layers_to_build(config), layer_norm=norm)


def _transformer_engine_spec(config: TransformerConfig, *, unfused_norms: bool) -> Any:
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TENorm
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

    layer = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
    layer.submodules.self_attention.submodules.core_attention = transformer_engine_attention()
    if unfused_norms:
        submodules = dataclasses.replace(layer.submodules, input_layernorm=TENorm, pre_mlp_layernorm=TENorm)
        submodules.self_attention.submodules.linear_qkv = TEColumnParallelLinear
        submodules.mlp.submodules.linear_fc1 = TEColumnParallelLinear
        layer.submodules = submodules
    return TransformerBlockSubmodules(layer_specs=[layer] * get_num_layers_to_build(config), layer_norm=TENorm)
