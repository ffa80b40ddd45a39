"""The held-out loss under every layout is `transformers`' own loss on the same samples, every token once."""

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from tests.support.tiny_llama import (
    DOCUMENT_LENGTHS,
    LAYOUTS,
    SEQ_LENGTH,
    TIED,
    formed,
    open_documents,
    open_samples,
    write_documents,
    write_model,
    write_tokens,
)

NUM_SAMPLES = 41  # the last has 5 predicted tokens


def measure(rank, world_size, *, path, tokens, layout, micro_batch_size, max_samples=None, documents=False):
    """A job: (nats, tokens) as this rank gets them, of the stream or of packed `documents`."""
    from nemo_minitron.evaluate.loss import heldout_loss
    from nemo_minitron.model.build import load_model, transformer_config

    with formed(layout) as degrees:
        model = load_model(TIED, Path(path), transformer_config(TIED, degrees))
        samples = open_documents(tokens, seq_length=64) if documents else open_samples(tokens)
        result = heldout_loss(model, samples, layout=degrees, micro_batch_size=micro_batch_size,
                              max_samples=max_samples, chunk_tokens=24)
    return [result.nats, result.num_tokens, result.loss]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("loss")
    return {"path": str(write_model(TIED, directory / "model")), "tokens": str(write_tokens(directory / "tokens"))}


@pytest.fixture(scope="module")
def expected(files):
    """Nats and tokens of each sample, one at a time."""
    model = transformers.LlamaForCausalLM.from_pretrained(files["path"], attn_implementation="eager")
    samples = open_samples(files["tokens"])
    losses = []
    for sample in range(NUM_SAMPLES):
        batch = samples.batch([sample])
        count = int(batch.loss_mask.sum())
        window = torch.cat([batch.tokens[:, :1], batch.labels], dim=1)[:, : count + 1]
        with torch.no_grad():
            losses.append((float(model(window, labels=window).loss) * count, count))
    assert losses[-1][1] == 5 and losses[0][1] == SEQ_LENGTH
    return losses


@pytest.mark.parametrize(("layout", "micro_batch_size", "max_samples"), [
    ("1x1", 8, None), ("tp2", 8, None), ("pp2", 8, None), ("tp2 sp", 8, None), ("dp2", 8, None), ("tp2 pp2", 8, None),
    ("1x1", 64, 7), ("dp2", 4, 9), ("dp2", 4, 1),
])
def test_loss_is_exact(rank_pool, files, expected, layout, micro_batch_size, max_samples):
    """41, 9 and 1 samples, spread evenly: none is a multiple of replicas x micro-batch."""
    results = rank_pool(LAYOUTS[layout].world_size).run(f"{__name__}:measure", **files, layout=layout,
                                                        micro_batch_size=micro_batch_size, max_samples=max_samples)
    chosen = [expected[int(index)] for index in np.linspace(0, len(expected) - 1, max_samples or len(expected))]
    nats = sum(loss for loss, _ in chosen)
    num_tokens = sum(count for _, count in chosen)
    for found_nats, found_tokens, loss in results:
        assert found_tokens == num_tokens
        assert loss == pytest.approx(nats / num_tokens, abs=1e-5)
        assert found_nats == pytest.approx(loss * num_tokens)


@pytest.mark.parametrize("layout", ["1x1", "tp2 sp", "pp2", "dp2"])
def test_loss_of_packed_documents_is_that_of_each_alone(rank_pool, files, tmp_path, layout):
    prefix = write_documents(tmp_path / "documents")
    model = transformers.LlamaForCausalLM.from_pretrained(files["path"], attn_implementation="eager")
    nats = 0.0
    for sample in range((alone := open_documents(prefix, seq_length=64, packed=False)).num_evaluation_samples):
        batch = alone.batch([sample])
        count = int(batch.loss_mask.sum())
        window = torch.cat([batch.tokens[:, :1], batch.labels], dim=1)[:, : count + 1]
        with torch.no_grad():
            nats += float(model(window, labels=window).loss) * count
    results = rank_pool(LAYOUTS[layout].world_size).run(
        f"{__name__}:measure", path=files["path"], tokens=str(prefix), layout=layout, micro_batch_size=2,
        documents=True)
    for _, found_tokens, loss in results:
        assert found_tokens == sum(DOCUMENT_LENGTHS) - len(DOCUMENT_LENGTHS)
        assert loss == pytest.approx(nats / found_tokens, abs=1e-5)
