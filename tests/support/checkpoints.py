"""Tiny Hugging Face checkpoints written with the safetensors library, and Megatron's shards of them, written out."""

import json
import math

import safetensors.torch
import torch

from nemo_minitron.arch import ArchSpec

UNTIED = ArchSpec(family="llama", num_layers=4, hidden_size=24, ffn_hidden_size=40, num_attention_heads=8,
                  num_query_groups=4, head_dim=6, vocab_size=101, max_position_embeddings=64)


def llama_config(arch):
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": arch.num_layers,
            "hidden_size": arch.hidden_size, "intermediate_size": arch.ffn_hidden_size,
            "num_attention_heads": arch.num_attention_heads, "num_key_value_heads": arch.num_query_groups,
            "head_dim": arch.head_dim, "vocab_size": arch.vocab_size, "rms_norm_eps": arch.norm_eps,
            "max_position_embeddings": arch.max_position_embeddings, "rope_theta": arch.rope.theta,
            "tie_word_embeddings": arch.tied_embeddings, "torch_dtype": "float32"}


def llama_shapes(arch):
    """Names and shapes of a Llama checkpoint, written out."""
    hidden, ffn = arch.hidden_size, arch.ffn_hidden_size
    queries, keys = arch.num_attention_heads * arch.head_dim, arch.num_query_groups * arch.head_dim
    shapes = {"model.embed_tokens.weight": (arch.vocab_size, hidden), "model.norm.weight": (hidden,)}
    if not arch.tied_embeddings:
        shapes["lm_head.weight"] = (arch.vocab_size, hidden)
    for layer in range(arch.num_layers):
        for name, shape in {
            "self_attn.q_proj": (queries, hidden), "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden), "self_attn.o_proj": (hidden, queries),
            "mlp.gate_proj": (ffn, hidden), "mlp.up_proj": (ffn, hidden), "mlp.down_proj": (hidden, ffn),
            "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
        }.items():
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
    return shapes


def llama_tensors(arch, dtype=torch.float32, seed=0):
    """Random tensors of a Llama checkpoint by name."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in llama_shapes(arch).items()}


def write_llama(arch, directory, *, dtype=torch.float32, num_files=1, seed=0):
    """Write a checkpoint as `transformers` would; returns its tensors."""
    tensors = llama_tensors(arch, dtype, seed)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(llama_config(arch)))
    if num_files == 1:
        safetensors.torch.save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return tensors
    weight_map = {}
    for i in range(num_files):
        file = f"model-{i + 1:05d}-of-{num_files:05d}.safetensors"
        part = dict(list(tensors.items())[i::num_files])
        safetensors.torch.save_file(part, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return tensors


def read_llama(directory):
    """All tensors in the safetensors files of `directory`."""
    return {name: tensor for path in sorted(directory.glob("*.safetensors"))
            for name, tensor in safetensors.torch.load_file(path).items()}


def megatron_parameters(tensors, arch, *, tp_rank, tp_size, layers, first=True, last=True, transformer_engine=False):
    """What Megatron holds on one rank: row by row from the Hugging Face `tensors`, by local parameter name."""
    padded = math.ceil(arch.vocab_size / tp_size)

    def vocab_rows(table):
        rows = range(tp_rank * padded, (tp_rank + 1) * padded)
        return torch.stack([table[row] if row < arch.vocab_size else torch.zeros_like(table[0]) for row in rows])

    def rows_of(table):
        return table.chunk(tp_size)[tp_rank]

    out = {}
    if first:
        out["embedding.word_embeddings.weight"] = vocab_rows(tensors["model.embed_tokens.weight"])
    norms = ("self_attention.linear_qkv.layer_norm_weight", "mlp.linear_fc1.layer_norm_weight") \
        if transformer_engine else ("input_layernorm.weight", "pre_mlp_layernorm.weight")
    for local, layer in enumerate(layers):
        hf = {name.removeprefix(f"model.layers.{layer}."): tensor for name, tensor in tensors.items()
              if name.startswith(f"model.layers.{layer}.")}
        fused = []
        groups = arch.num_query_groups // tp_size
        for group in range(tp_rank * groups, (tp_rank + 1) * groups):
            heads = range(group * arch.heads_per_group, (group + 1) * arch.heads_per_group)
            for name, indices in (("q", heads), ("k", [group]), ("v", [group])):
                fused += [hf[f"self_attn.{name}_proj.weight"][index * arch.head_dim : (index + 1) * arch.head_dim]
                          for index in indices]
        out |= {f"decoder.layers.{local}.{name}": tensor for name, tensor in {
            norms[0]: hf["input_layernorm.weight"],
            "self_attention.linear_qkv.weight": torch.cat(fused),
            "self_attention.linear_proj.weight": rows_of(hf["self_attn.o_proj.weight"].T).T,
            norms[1]: hf["post_attention_layernorm.weight"],
            "mlp.linear_fc1.weight": torch.cat([rows_of(hf["mlp.gate_proj.weight"]),
                                                rows_of(hf["mlp.up_proj.weight"])]),
            "mlp.linear_fc2.weight": rows_of(hf["mlp.down_proj.weight"].T).T,
        }.items()}
    if last:
        out["decoder.final_layernorm.weight"] = tensors["model.norm.weight"]
        if not arch.tied_embeddings:
            out["output_layer.weight"] = vocab_rows(tensors["lm_head.weight"])
        elif not first:
            out["output_layer.weight"] = vocab_rows(tensors["model.embed_tokens.weight"])
    return out
