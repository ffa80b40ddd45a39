import torch

from nemo_minitron.importance.statistics import masked_statistics, sequence_statistics


def test_masked_statistics_are_those_of_the_tokens_that_count():
    activation = torch.randn(7, 3, 5) + 0.5
    counts = torch.arange(7).unsqueeze(1) < torch.tensor([7, 4, 0])
    found = masked_statistics(activation, counts)
    torch.testing.assert_close(found[:, 0], sequence_statistics(activation)[:, 0])
    torch.testing.assert_close(found[:, 1], sequence_statistics(activation[:4])[:, 1])
    assert found.shape == (3, 3, 5) and not found[:, 2].any()
    assert masked_statistics(activation.double(), counts).dtype == torch.float64
