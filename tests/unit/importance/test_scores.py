"""`Scores`: what is written is read back, and a wrong file is refused with one clear line."""

import dataclasses
import hashlib
import json

import numpy as np
import pytest
import safetensors.numpy

from nemo_minitron.arch import ArchSpec
from nemo_minitron.errors import ScoresError
from nemo_minitron.importance.scores import Scores, tensor_shapes, width_shape

SOURCE = ArchSpec(family="llama", num_layers=3, hidden_size=8, ffn_hidden_size=10, num_attention_heads=4,
                  num_query_groups=2, head_dim=4, vocab_size=16)


def make_scores(**changes):
    rng = np.random.default_rng(0)
    tensors = {name: rng.random(shape) for name, shape in tensor_shapes(SOURCE).items()}
    fields = {"source": SOURCE, "num_samples": 5, "samples_digest": "aa", "source_digest": "bb",
              "measures": {"ffn": "post-activation (input of linear_fc2)"}, "tensors": tensors}
    return Scores(**{**fields, **changes})


def with_tensor(name, value):
    return make_scores(tensors={**make_scores().tensors, name: value})


def test_save_and_load_give_back_every_field_and_bit(tmp_path):
    scores = make_scores()
    scores.save(tmp_path / "scores")
    loaded = Scores.load(tmp_path / "scores")
    for field in dataclasses.fields(Scores):
        if field.name != "tensors":
            assert getattr(loaded, field.name) == getattr(scores, field.name)
    assert loaded.tensors.keys() == scores.tensors.keys()
    for name, tensor in scores.tensors.items():
        assert loaded.tensors[name].dtype == np.float64
        assert loaded.tensors[name].tobytes() == tensor.tobytes()


def test_header_says_what_the_tensors_are(tmp_path):
    make_scores().save(tmp_path)
    header = json.loads((tmp_path / "scores.json").read_text())
    assert header["schema_version"] == 2
    assert header["axes"] == ["hidden", "ffn", "heads", "groups", "layers"]
    assert header["statistics"] == ["mean", "l2", "var"]
    assert header["default_aggregation"] == {"batch": "l2", "sequence": "mean"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scores.json", "scores.safetensors"]


def test_header_lists_only_the_axes_that_were_collected(tmp_path):
    kept = {name: tensor for name, tensor in make_scores().tensors.items() if name.startswith("ffn.mean")}
    make_scores(tensors=kept).save(tmp_path)
    header = json.loads((tmp_path / "scores.json").read_text())
    assert header["axes"] == ["ffn"]
    assert header["statistics"] == ["mean"]


def test_digest_is_that_of_the_tensor_file_and_follows_the_values(tmp_path):
    scores = make_scores()
    scores.save(tmp_path)
    assert scores.digest() == hashlib.sha256((tmp_path / "scores.safetensors").read_bytes()).hexdigest()
    assert Scores.load(tmp_path).digest() == scores.digest()
    assert with_tensor("layers.block_influence", np.zeros(3)).digest() != scores.digest()


def test_digest_does_not_depend_on_the_order_of_the_tensors():
    scores = make_scores()
    assert make_scores(tensors=dict(reversed(scores.tensors.items()))).digest() == scores.digest()


def test_hidden_has_two_rows_per_layer_and_one_for_the_final_norm():
    assert width_shape(SOURCE, "hidden") == (7, 8)
    assert width_shape(SOURCE, "head_channels") == (3, 16)
    assert width_shape(SOURCE, "groups") == (3, 2)


@pytest.mark.parametrize(("scores", "message"), [
    (with_tensor("layers.block_influence", np.array([0.1, np.nan, 0.2])), "1 of 3 NaN"),
    (with_tensor("layers.block_influence", np.array([0.1, np.inf, 0.2])), "infinite"),
    (with_tensor("layers.block_influence", np.zeros(4)), r"shape \(4,\)"),
    (with_tensor("hidden.mean.sum", np.zeros((3, 8))), r"expected shape \(7, 8\)"),
    (with_tensor("layers.block_influence", np.zeros(3, np.float32)), "float32"),
    (with_tensor("ffn.median.sum", np.zeros((3, 10))), "ffn.median.sum"),
    (make_scores(num_samples=0), "at least one calibration sample"),
    (make_scores(tensors={"ffn.mean.sum": np.zeros((3, 10))}), "ffn.mean.sum_of_squares"),
])
def test_bad_scores_are_neither_saved_nor_loaded(tmp_path, scores, message):
    with pytest.raises(ScoresError, match=message):
        scores.save(tmp_path)
    assert not list(tmp_path.iterdir())


def test_nan_in_a_file_is_refused_on_load(tmp_path):
    make_scores().save(tmp_path)
    broken = {name: np.full_like(tensor, np.nan) for name, tensor in make_scores().tensors.items()}
    content = safetensors.numpy.save(broken)
    (tmp_path / "scores.safetensors").write_bytes(content)
    header = json.loads((tmp_path / "scores.json").read_text())
    header["tensors_digest"] = hashlib.sha256(content).hexdigest()
    (tmp_path / "scores.json").write_text(json.dumps(header))
    with pytest.raises(ScoresError, match="NaN"):
        Scores.load(tmp_path)


@pytest.mark.parametrize(("change", "message"), [
    ({"schema_version": 1}, "expected schema_version 2; found 1"),
    ({"tensors_digest": "0"}, "do not belong together"),
    ({"source": {**SOURCE.to_dict(), "num_layers": 4}}, "does not fit the model"),
    ({"source": {"family": "llama"}}, "fields of schema 2"),
])
def test_other_header_is_refused(tmp_path, change, message):
    make_scores().save(tmp_path)
    header = json.loads((tmp_path / "scores.json").read_text())
    (tmp_path / "scores.json").write_text(json.dumps({**header, **change}))
    with pytest.raises(ScoresError, match=message):
        Scores.load(tmp_path)


def test_missing_or_truncated_files_are_refused(tmp_path):
    with pytest.raises(ScoresError, match=r"scores\.json"):
        Scores.load(tmp_path)
    make_scores().save(tmp_path)
    content = (tmp_path / "scores.safetensors").read_bytes()
    (tmp_path / "scores.safetensors").write_bytes(content[:100])
    with pytest.raises(ScoresError, match=r"scores\.safetensors"):
        Scores.load(tmp_path)
    (tmp_path / "scores.safetensors").unlink()
    with pytest.raises(ScoresError, match=r"scores\.safetensors"):
        Scores.load(tmp_path)
