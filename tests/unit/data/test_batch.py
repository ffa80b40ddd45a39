import numpy as np
import pytest
import torch

from nemo_minitron.data.batch import TokenSamples, calibration_ids
from nemo_minitron.data.indexed import build, open_tokens
from nemo_minitron.errors import DataError


@pytest.fixture
def tokens(tmp_path):
    build(tmp_path / "x", [np.arange(100, 105), np.arange(105, 122)], np.uint16)
    return open_tokens(tmp_path / "x")


def test_labels_follow_tokens_in_the_order_asked_for(tokens):
    batch = TokenSamples(tokens, 4).batch([2, 0])
    assert batch.tokens.tolist() == [[108, 109, 110, 111], [100, 101, 102, 103]]
    torch.testing.assert_close(batch.labels, batch.tokens + 1)
    assert batch.position_ids.tolist() == [[0, 1, 2, 3]] * 2
    assert batch.loss_mask.tolist() == [[1.0] * 4] * 2
    assert batch.sample_ids.tolist() == [2, 0]
    assert {t.dtype for t in (batch.tokens, batch.labels, batch.position_ids, batch.sample_ids)} == {torch.int64}
    assert batch.loss_mask.dtype == torch.float32
    assert batch.tokens.is_contiguous() and batch.labels.is_contiguous()


def test_the_partial_sample_is_padded_and_masked(tokens):
    samples = TokenSamples(tokens, 4)
    assert samples.spec.num_evaluation_samples == 6 and samples.spec.num_training_samples == 5
    batch = samples.batch([5])
    assert batch.tokens.tolist() == [[120, 121, 0, 0]]
    assert batch.labels.tolist() == [[121, 0, 0, 0]]
    assert batch.loss_mask.tolist() == [[1, 0, 0, 0]]


@pytest.mark.parametrize("seq_length", [1, 3, 7, 21, 30])
def test_unmasked_labels_are_the_stream_without_its_first_token(tokens, seq_length):
    samples = TokenSamples(tokens, seq_length)
    batch = samples.batch(np.arange(samples.spec.num_evaluation_samples))
    assert batch.labels[batch.loss_mask.bool()].tolist() == list(range(101, 122))
    assert batch.tokens[batch.loss_mask.bool()].tolist() == list(range(100, 121))


def test_tokens_of_another_tokenizer_are_refused(tokens):
    assert TokenSamples(tokens, 4, vocab_size=122).batch([5]).sample_ids.tolist() == [5]
    with pytest.raises(DataError, match="below 121; found 121"):
        TokenSamples(tokens, 4, vocab_size=121).batch([5])


def test_calibration_ids_are_distinct_ascending_and_seeded():
    ids = calibration_ids(1000, 100, seed=5)
    assert ids.dtype == np.int64 and len(set(ids.tolist())) == 100
    assert (np.diff(ids) > 0).all() and ids[0] >= 0 and ids[-1] < 1000
    assert ids.tolist() == calibration_ids(1000, 100, seed=5).tolist()
    assert ids.tolist() != calibration_ids(1000, 100, seed=6).tolist()
    assert calibration_ids(10, 10, seed=0).tolist() == list(range(10))


def test_too_few_calibration_samples_are_refused():
    with pytest.raises(DataError, match=r"10 samples; found 9 .*importance\.num_samples"):
        calibration_ids(9, 10, seed=0)
