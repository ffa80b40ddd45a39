import numpy as np
import pytest
import torch

from nemo_minitron.data.batch import Batch, BlendedSamples, TokenSamples
from nemo_minitron.data.documents import DocumentSamples
from nemo_minitron.data.indexed import build, open_tokens
from nemo_minitron.errors import DataError

DOCUMENTS = [np.arange(10, 14), np.array([50]), np.arange(20, 23), np.arange(30, 41), np.arange(60, 62)]


@pytest.fixture
def prefix(tmp_path):
    build(tmp_path / "x", DOCUMENTS, np.uint16)
    return tmp_path / "x"


def all_of(samples):
    return samples.batch(range(samples.num_evaluation_samples))


def test_documents_side_by_side(prefix):
    """Predictions: 3, 0, 2, 10 (8 and 2), 1 in samples of 8."""
    batch = all_of(DocumentSamples(open_tokens(prefix), 8))
    assert batch.tokens.tolist() == [[10, 11, 12, 20, 21, 38, 39, 60], [*range(30, 38)]]
    assert batch.labels.tolist() == [[11, 12, 13, 21, 22, 39, 40, 61], [*range(31, 39)]]
    assert batch.document_ids.tolist() == [[1, 1, 1, 2, 2, 3, 3, 4], [1] * 8]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 0, 1, 0], [*range(8)]]
    assert batch.loss_mask.tolist() == [[1.0] * 8] * 2
    assert batch.tokens.is_contiguous() and batch.sample_ids.tolist() == [0, 1]


def test_what_is_left_over_is_padding(prefix):
    batch = DocumentSamples(open_tokens(prefix), 12).batch([1, 0])
    assert batch.tokens.tolist() == [[20, 21, *range(30, 40)], [10, 11, 12, 60] + [0] * 8]
    assert batch.document_ids[1].tolist() == [1, 1, 1, 2] + [0] * 8
    assert batch.position_ids[1].tolist() == [0, 1, 2, 0, *range(8)]
    assert batch.loss_mask[1].tolist() == [1.0] * 4 + [0.0] * 8


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("seq_length", [1, 2, 5, 12, 40])
def test_no_label_comes_from_another_document(prefix, seq_length, packed):
    samples = DocumentSamples(open_tokens(prefix), seq_length, packed=packed)
    batch = all_of(samples)
    counted = batch.loss_mask.bool()
    assert sorted(batch.labels[counted].tolist()) == sorted(
        int(token) for document in DOCUMENTS for token in document[1:])
    torch.testing.assert_close(batch.labels[counted], batch.tokens[counted] + 1)
    assert torch.equal(batch.document_ids > 0, counted)
    starts = batch.position_ids == 0
    starts[:, 0] = False
    changes = torch.zeros_like(starts)
    changes[:, 1:] = batch.document_ids[:, 1:] != batch.document_ids[:, :-1]
    assert torch.equal(starts, changes)
    if not packed:
        assert batch.document_ids.max() == 1 and samples.num_evaluation_samples == len(batch.tokens)


def test_a_split_is_a_range_of_documents(prefix):
    batch = all_of(DocumentSamples(open_tokens(prefix, start=5, num_tokens=14), 16))
    assert batch.tokens[0, :12].tolist() == [20, 21, *range(30, 40)] and len(batch.tokens) == 1


@pytest.fixture
def answers(tmp_path):
    """Of the fourth document, tokens 33 to 35 and the last; of the others but the third, the last token."""
    masks = [[0, 0, 0, 1], [1], [0, 0, 0], [0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 1], [0, 1]]
    build(tmp_path / "x_answers", [np.array(mask) for mask in masks], np.uint8)
    return tmp_path / "x_answers"


def test_only_answers_are_predicted(prefix, answers):
    samples = DocumentSamples(open_tokens(prefix), 16, answers=open_tokens(answers))
    batch = all_of(samples)
    assert sorted(batch.labels[batch.loss_mask.bool()].tolist()) == [13, 33, 34, 35, 40, 61]
    assert (samples.num_truncated, samples.num_dropped) == (0, 2)  # one token alone; no answer
    assert batch.document_ids.tolist() == [[1, 1, 1] + [2] * 10 + [3, 0, 0]]


def test_long_conversations_are_cut_off_or_left_out(prefix, answers):
    samples = DocumentSamples(open_tokens(prefix), 4, answers=open_tokens(answers), packed=False)
    batch = all_of(samples)
    assert batch.labels[batch.loss_mask.bool()].tolist() == [13, 33, 34, 61]
    assert (samples.num_truncated, samples.num_dropped) == (1, 2)
    samples = DocumentSamples(open_tokens(prefix), 2, answers=open_tokens(answers), packed=False)
    assert all_of(samples).labels[:, 0].tolist() == [61]
    assert (samples.num_truncated, samples.num_dropped) == (2, 4)


def test_nothing_to_train_on_is_refused(tmp_path):
    build(tmp_path / "x", [np.array([1]), np.array([2])], np.uint16)
    samples = DocumentSamples(open_tokens(tmp_path / "x"), 4)
    assert samples.num_evaluation_samples == 0
    with pytest.raises(DataError, match="document of two tokens"):
        samples.check_training()


def test_tokens_of_another_tokenizer_are_refused(prefix):
    with pytest.raises(DataError, match="below 61; found 61"):
        DocumentSamples(open_tokens(prefix), 8, vocab_size=61).batch([0])


def test_the_order_and_the_calibration_samples(prefix):
    samples = DocumentSamples(open_tokens(prefix), 1)
    count = samples.num_evaluation_samples
    assert sorted(samples.training_id(position, 3) for position in range(count)) == list(range(count))
    assert samples.calibration_ids(count, 3).tolist() == list(range(count))
    with pytest.raises(DataError, match="importance"):
        samples.calibration_ids(count + 1, 3)


def test_blends_keep_documents_apart_too(prefix):
    sources = [DocumentSamples(open_tokens(prefix), 8) for _ in range(2)]
    batch = BlendedSamples(sources, [0.5, 0.5]).batch([0, 3])
    expected = Batch.join([sources[0].batch([0]), sources[1].batch([1])])
    assert torch.equal(batch.document_ids, expected.document_ids) and batch.sample_ids.tolist() == [0, 3]
    stream = TokenSamples(open_tokens(prefix), 8)
    assert BlendedSamples([stream, stream], [0.5, 0.5]).batch([0]).document_ids is None
