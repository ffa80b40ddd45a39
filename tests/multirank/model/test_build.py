"""The sharded model computes what `transformers` computes, under every layout, and saves what it loaded."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from nemo_minitron.checkpoint.families import read_arch
from tests.support.checkpoints import read_llama
from tests.support.tiny_llama import (
    FAMILIES,
    LARGE_THETA,
    LAYOUTS,
    SCALED_ROPE,
    TIED,
    UNEVEN,
    UNTIED,
    formed,
    write_model,
)

ROOT = Path(__file__).resolve().parents[3]
STORIES = Path(os.environ.get("MINITRON_SHARED", ROOT.parent / "shared" / "data")) / "stories260K-hf"
MODELS = {"tied": TIED, "untied": UNTIED, "large theta": LARGE_THETA, "scaled rope": SCALED_ROPE,
          "uneven": UNEVEN, **FAMILIES}
NUM_MICROBATCHES, BATCH = 2, 2


def logits_and_round_trip(rank, world_size, *, path, layout, tokens, out):
    """A job: save the logits of `tokens` [N, S] as `out`/logits.npy (padded V) and the weights in `out`/checkpoint."""
    from types import SimpleNamespace

    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    from nemo_minitron.checkpoint.digest import read_checkpoint
    from nemo_minitron.data.batch import Batch
    from nemo_minitron.distill.terms import tokens_first
    from nemo_minitron.model.build import load_model, transformer_config
    from nemo_minitron.parallel import groups
    from nemo_minitron.parallel.schedule import forward_only
    from nemo_minitron.training.trainer import export

    checkpoint = read_checkpoint(Path(path))
    with formed(layout) as degrees:
        model = load_model(checkpoint.arch, checkpoint.path, transformer_config(checkpoint.arch, degrees))

        def logits(hidden, batch):
            hidden_TH = tokens_first(hidden, sequence_parallel=model.config.sequence_parallel)
            whole_TV = gather_from_tensor_model_parallel_region(hidden_TH @ model.head().t())
            return whole_TV.unflatten(0, (batch.tokens.size(1), -1)).transpose(0, 1)  # [B, S, V]

        batches = [Batch(tokens=part, labels=part, loss_mask=torch.ones(part.shape), sample_ids=torch.arange(len(part)),
                         position_ids=torch.arange(part.size(1)).expand(part.shape))
                   for part in torch.tensor(tokens).split(BATCH)]
        results = forward_only(model, batches, num_microbatches=len(batches), consume=logits)
        if groups.is_last_stage() and groups.tp_rank() == 0:
            np.save(Path(out) / "logits.npy", torch.cat(results).numpy())
        export(SimpleNamespace(student=model, arch=checkpoint.arch), Path(out) / "checkpoint", base=checkpoint,
               layout=degrees)


def check(rank_pool, path, layout, out, *, num_tokens):
    model = transformers.AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", dtype=torch.float32)
    assert model.num_parameters() == read_arch(path).num_parameters()
    vocab_size = model.config.vocab_size
    tokens = torch.randint(vocab_size, (NUM_MICROBATCHES * BATCH, num_tokens))
    out.mkdir()
    rank_pool(LAYOUTS[layout].world_size).run(f"{__name__}:logits_and_round_trip", path=str(path), layout=layout,
                                              tokens=tokens.tolist(), out=str(out))
    with torch.no_grad():
        expected = model(tokens).logits
    found = torch.from_numpy(np.load(out / "logits.npy"))[..., :vocab_size]
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    saved, loaded = read_llama(out / "checkpoint"), read_llama(path)
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in loaded.items())
    assert read_arch(out / "checkpoint") == read_arch(path)


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models")
    return {name: write_model(arch, directory / name.replace(" ", "_")) for name, arch in MODELS.items()}


@pytest.mark.parametrize("layout", ["1x1", "tp2", "pp2", "tp2 sp", "tp2 pp2"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_saved_weights(rank_pool, paths, tmp_path, name, layout):
    check(rank_pool, paths[name], layout, tmp_path / "out", num_tokens=48)


@pytest.mark.skipif(not STORIES.is_dir(), reason="needs stories260K-hf in the folder that MINITRON_SHARED names")
@pytest.mark.parametrize("layout", ["1x1", "tp2"])
def test_a_trained_checkpoint(rank_pool, tmp_path, layout):
    check(rank_pool, STORIES, layout, tmp_path / "out", num_tokens=200)
