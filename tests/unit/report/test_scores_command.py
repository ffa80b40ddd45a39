"""`minitron scores`: what is printed of scores, and of two of them."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest

from nemo_minitron.cli import main
from nemo_minitron.importance.baselines import random_importance
from nemo_minitron.importance.scores import Scores, tensor_shapes
from nemo_minitron.report.rank import ranks, spearman, top_half_overlap
from tests.unit.importance.test_scores import SOURCE, make_scores


@pytest.fixture
def folder(tmp_path):
    make_scores().save(tmp_path / "run" / "round1" / "score")
    return tmp_path / "run"


def test_show_prints_every_axis_and_every_depth_metric(folder, capsys):
    assert main(["scores", "show", str(folder), "batch=mean", "norms=[final]"]) == 0
    text = capsys.readouterr().out
    assert "batch mean, sequence mean, norms final" in text
    for axis in ("hidden:", "ffn:", "heads:", "groups:", "block influence", "loss without it",
                 "loss without 2 layers", "accuracy without it", "logit_mse without it", "order in which they go"):
        assert axis in text
    scores = make_scores()
    rows = scores.tensors["ffn.mean.sum"] / scores.num_samples
    assert f"{rows[1].min():.4g}" in text and f"{np.median(rows[1]):.4g}" in text and f"{rows[1].max():.4g}" in text
    whole = scores.tensors["layers.loss.0"][0]
    assert f"{scores.tensors['layers.loss.1'][2] - whole:.4f}" in text


def test_diff_of_a_file_with_itself_is_one_and_with_another_aggregation_is_not(folder, capsys):
    assert main(["scores", "diff", str(folder), str(folder)]) == 0
    text = capsys.readouterr().out
    assert "weights: the same" in text and "1.000    100.0%" in text and "0.9" not in text
    assert main(["scores", "diff", str(folder), str(folder), "b.sequence=var"]) == 0
    scores = make_scores()
    rows = [np.sqrt(scores.tensors[f"ffn.{name}.sum_of_squares"])[0] for name in ("mean", "var")]
    assert f"{spearman(*rows):.3f}" in capsys.readouterr().out


def test_ranks_of_equal_values_are_shared():
    assert ranks(np.array([3.0, 1.0, 3.0, 2.0])).tolist() == [3.5, 1.0, 3.5, 2.0]
    assert spearman(np.arange(5.0), np.arange(5.0)[::-1]) == pytest.approx(-1)
    assert spearman(np.ones(4), np.arange(4.0)) is None
    assert top_half_overlap(np.array([4.0, 3, 2, 1]), np.array([4.0, 1, 2, 3])) == 0.5


@pytest.mark.parametrize(("arguments", "found"), [
    (["show"], "found 0"), (["show", "nowhere"], "no scores"), (["show", "RUN", "batch=max"], "importance.batch"),
    (["show", "RUN", "colour=red"], "'colour'"), (["diff", "RUN"], "found 1"),
    (["diff", "RUN", "OTHER"], "hidden_size"), (["diff", "RUN", "RANDOM"], "nothing to compare"),
])
def test_mistakes_are_told_in_one_line(folder, tmp_path, capsys, arguments, found):
    other = dataclasses.replace(SOURCE, hidden_size=10)
    tensors = {name: np.ones(shape) for name, shape in tensor_shapes(other).items()}
    make_scores(source=other, tensors=tensors).save(tmp_path / "other")
    random = {name: value for name, value in random_importance(SOURCE, 1).items() if name != "layers.random"}
    Scores(source=SOURCE, num_samples=1, samples_digest="", source_digest="", measures={},
           tensors=random).save(tmp_path / "random")
    places = {"RUN": str(folder), "OTHER": str(tmp_path / "other"), "RANDOM": str(tmp_path / "random")}
    assert main(["scores", *(places.get(argument, argument) for argument in arguments)]) == 2
    error = capsys.readouterr().err
    assert found in error and error.count("\n") == 1


def test_neither_torch_nor_megatron_is_imported(folder):
    script = (f"import sys; from nemo_minitron.cli import main; main(['scores', 'show', {str(folder)!r}]); "
              "assert not {'torch', 'megatron', 'transformers'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
