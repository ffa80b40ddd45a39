"""Gradients of every family, summed over TP as Megatron does after a step, are those of `transformers`' autograd.

With TP each rank has its own heads, so the gradients of norms on query and key heads are partial on each; with
sequence parallelism those of all norms are.
"""

from pathlib import Path

import pytest
import torch
import transformers

from tests.support.checkpoints import read_llama
from tests.support.tiny_llama import FAMILIES, LAYOUTS, UNTIED, formed, write_model

MODELS = {"llama": UNTIED, **FAMILIES}
TOKENS = torch.arange(60).remainder(UNTIED.vocab_size).view(2, 30)
COUPLING = torch.randn(2, 30, UNTIED.hidden_size, generator=torch.Generator().manual_seed(4))  # [B, S, H]


def save_gradients(rank, world_size, *, paths, layout, out):
    """A job: the gradients of sum(final hidden state * COUPLING), saved as if they were weights, in `out`/family."""
    from types import SimpleNamespace

    import torch.distributed as dist
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )

    from nemo_minitron.checkpoint.digest import read_checkpoint
    from nemo_minitron.model.build import load_model, transformer_config
    from nemo_minitron.parallel import groups
    from nemo_minitron.training.trainer import export

    with formed(layout) as degrees:
        for name, path in paths.items():
            checkpoint = read_checkpoint(Path(path))
            config = transformer_config(checkpoint.arch, degrees)
            model = load_model(checkpoint.arch, checkpoint.path, config)
            wrapped = DistributedDataParallel(config, DistributedDataParallelConfig(), model)
            hidden_SBH = wrapped(TOKENS, torch.arange(TOKENS.size(1)).expand(TOKENS.shape), None)
            coupling_SBH = COUPLING.transpose(0, 1)
            if config.sequence_parallel:
                coupling_SBH = coupling_SBH.chunk(degrees.tp)[groups.tp_rank()]
            (hidden_SBH * coupling_SBH).sum().backward()
            finalize_model_grads([wrapped])
            for parameter_name, parameter in model.named_parameters():
                parameter.data.copy_(parameter.main_grad)
                if not getattr(parameter, "tensor_model_parallel", False):
                    copies = [torch.empty_like(parameter) for _ in range(world_size)]
                    dist.all_gather(copies, parameter.data)
                    assert all(torch.equal(copy, copies[0]) for copy in copies), parameter_name
            export(SimpleNamespace(student=model, arch=checkpoint.arch), Path(out) / name, base=checkpoint,
                   layout=degrees)


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models")
    return {name: str(write_model(arch, directory / name)) for name, arch in MODELS.items()}


@pytest.mark.parametrize("layout", ["1x1", "tp2", "tp2 sp"])
def test_gradients(rank_pool, paths, tmp_path, layout):
    rank_pool(LAYOUTS[layout].world_size).run(f"{__name__}:save_gradients", paths=paths, layout=layout,
                                              out=str(tmp_path))
    for name, path in paths.items():
        model = transformers.AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager",
                                                                  dtype=torch.float32)
        (model.model(TOKENS).last_hidden_state * COUPLING).sum().backward()
        found = read_llama(tmp_path / name)
        expected = dict(model.named_parameters())
        assert found.keys() == expected.keys()
        for key, parameter in expected.items():
            if parameter.grad is None:  # an LM head of its own is not used
                assert key == "lm_head.weight" and not found[key].any()
                continue
            scale = parameter.grad.abs().max()
            assert scale > 1e-3, (name, key)
            assert (found[key] - parameter.grad).abs().max() <= 1e-5 * scale, (name, key)
