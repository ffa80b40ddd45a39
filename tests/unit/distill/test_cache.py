"""The cache of a teacher's likeliest tokens: what is written is what is read, and nothing else is."""

import dataclasses
import json

import pytest
import torch

from nemo_minitron.data.batch import Batch
from nemo_minitron.distill.cache import INDEX_FILE, CachedTeacher, CacheKey, shard_path, write_cache_index, write_shard
from nemo_minitron.distill.top_k import TopK
from nemo_minitron.errors import DataError

S, K, VOCAB = 6, 5, 40
KEY = CacheKey(teacher_digest="t" * 64, data_digest="d" * 64, seq_length=S, vocab_size=VOCAB, k=K, dtype="float32")
OPEN = {"teacher_digest": KEY.teacher_digest, "data_digest": KEY.data_digest, "seq_length": S, "k": K}


def states(sample_ids):
    """Of each sample a distribution of its own, [S * B] token by token."""
    logits = torch.stack([torch.randn(S, VOCAB, generator=torch.Generator().manual_seed(int(sample)))
                          for sample in sample_ids], dim=1).reshape(-1, VOCAB)
    log_probs, ids = logits.log_softmax(-1).sort(dim=-1, descending=True)
    return TopK(ids=ids[:, :K], log_probs=log_probs[:, :K], log_tail=log_probs[:, K:].logsumexp(-1),
                label_log_probs=logits.log_softmax(-1)[:, 3])


def batch_of(sample_ids):
    filler = torch.zeros(len(sample_ids), S)
    return Batch(tokens=filler, labels=filler, position_ids=filler, loss_mask=filler,
                 sample_ids=torch.tensor(sample_ids))


@pytest.fixture
def folder(tmp_path):
    """Samples 3, 4, 8 (with one of filling) and 11 in two shards."""
    write_shard(shard_path(tmp_path, 0), [3, 4, 8], [states([3, 4]), states([8, 0])], KEY)
    write_shard(shard_path(tmp_path, 1), [11], [states([11, 0])], KEY)
    write_cache_index(tmp_path, 2, KEY)
    return tmp_path


@pytest.mark.parametrize("samples", [[3], [11, 4], [8, 3, 11, 4], [4, 4]])
def test_any_batch_in_any_order_is_read_as_it_was_written(folder, samples):
    found, expected = CachedTeacher(folder, **OPEN).states(batch_of(samples)), states(samples)
    for field in dataclasses.fields(TopK):
        assert torch.equal(getattr(found, field.name), getattr(expected, field.name)), field.name


def test_fewer_tokens_than_were_stored_put_the_rest_into_the_tail(folder):
    found = CachedTeacher(folder, **(OPEN | {"k": 2})).states(batch_of([4]))
    expected = states([4])
    assert torch.equal(found.ids, expected.ids[:, :2])
    total = found.log_probs.exp().sum(1) + found.log_tail.exp()
    torch.testing.assert_close(total, torch.ones(S))


def test_bytes_per_token_are_those_of_the_files(folder):
    record = json.loads((folder / INDEX_FILE).read_text())
    assert record["num_tokens"] == 4 * S
    assert record["bytes_per_token"] == pytest.approx(
        sum(path.stat().st_size for path in folder.glob("*.safetensors")) / (4 * S), abs=0.01)


def test_half_precision_is_close(tmp_path):
    key = dataclasses.replace(KEY, dtype="float16")
    write_shard(shard_path(tmp_path, 0), [3], [states([3])], key)
    write_cache_index(tmp_path, 1, key)
    found = CachedTeacher(tmp_path, **OPEN).states(batch_of([3]))
    torch.testing.assert_close(found.log_probs, states([3]).log_probs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("change", "message"), [
    ({"teacher_digest": "x" * 64}, "another teacher"), ({"data_digest": "x" * 64}, "another data"),
    ({"seq_length": 7}, "another seq_length"), ({"k": 6}, "at least 6; found 5"),
])
def test_another_cache_is_refused(folder, change, message):
    with pytest.raises(DataError, match=message):
        CachedTeacher(folder, **(OPEN | change))


def test_a_sample_that_is_not_there(folder):
    with pytest.raises(DataError, match="sample 5"):
        CachedTeacher(folder, **OPEN).states(batch_of([5]))


@pytest.mark.parametrize("size", [0, 5, 300, -1])
def test_a_truncated_shard_is_named(folder, size):
    path = shard_path(folder, 1)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(DataError, match=f"(broken|truncated) cache.*{path.name}"):
        CachedTeacher(folder, **OPEN)


def test_a_missing_shard_or_index_is_named(folder):
    shard_path(folder, 0).unlink()
    with pytest.raises(DataError, match="shard-000000"):
        CachedTeacher(folder, **OPEN)
    (folder / INDEX_FILE).unlink()
    with pytest.raises(DataError, match="no cache of a teacher"):
        CachedTeacher(folder, **OPEN)
