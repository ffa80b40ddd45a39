"""Nats of options under every layout are those of `transformers`' model, one unpadded option at a time."""

from pathlib import Path

import pytest
import torch
import transformers

from tests.support.tiny_llama import LAYOUTS, TIED, formed, write_model

OPTIONS = [((1, 5, 7, 30, 60), 2), ((1, 44, 3), 1), ((1, 99, 100, 0, 2, 8, 90), 6), ((8, 13), 1), ((1, 2, 3, 4), 2)]
SIZE = 3  # the second batch is not full


def nats_of(rank, world_size, *, path, layout):
    """A job: nats of all options, row by row; nothing but on the last stage."""
    from nemo_minitron.evaluate.choices import Option, option_batch
    from nemo_minitron.evaluate.likelihood import row_nats
    from nemo_minitron.model.build import load_model, transformer_config
    from nemo_minitron.parallel.schedule import forward_only

    options = [Option(tokens, count) for tokens, count in OPTIONS]
    with formed(layout) as degrees:
        model = load_model(TIED, Path(path), transformer_config(TIED, degrees))
        batches = [option_batch(options[start : start + SIZE], SIZE, 8) for start in range(0, len(options), SIZE)]
        found = forward_only(model, batches, num_microbatches=len(batches), consume=lambda hidden, batch: row_nats(
            model, hidden, batch, chunk_tokens=5))
    return torch.cat(found).tolist() if found else None


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return str(write_model(TIED, tmp_path_factory.mktemp("choices") / "model"))


@pytest.fixture(scope="module")
@torch.no_grad()
def expected(path):
    model = transformers.LlamaForCausalLM.from_pretrained(path, attn_implementation="eager")
    nats = []
    for tokens, count in OPTIONS:
        log_probs = model(torch.tensor([tokens]), use_cache=False).logits[0].double().log_softmax(-1)
        nats.append(-sum(log_probs[place - 1, tokens[place]].item()
                         for place in range(len(tokens) - count, len(tokens))))
    return nats


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nats_are_those_of_the_continuations(rank_pool, path, expected, layout):
    results = rank_pool(LAYOUTS[layout].world_size).run(f"{__name__}:nats_of", path=path, layout=layout)
    found = [result for result in results if result is not None]
    assert len(found) == len(results) // LAYOUTS[layout].pp
    for nats in found:
        assert nats == pytest.approx([*expected, 0.0], rel=1e-5)  # a row that only fills up says nothing
