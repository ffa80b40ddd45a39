"""Measured latency as a constraint: arithmetic on a table, and what is said when the table does not fit."""

import dataclasses
import json

import pytest

from nemo_minitron.arch import ArchSpec
from nemo_minitron.config_rounds import ConstraintsConfig, LatencyConfig, SearchConfig
from nemo_minitron.errors import ConfigError
from nemo_minitron.search.latency import LatencyTable, Parts, fixed_sizes, shape_of
from nemo_minitron.search.recipe import candidates_of
from nemo_minitron.search.space import UNFIT

SOURCE = ArchSpec(family="llama", num_layers=4, hidden_size=256, ffn_hidden_size=512, num_attention_heads=8,
                  num_query_groups=4, head_dim=32, vocab_size=1000)


def table(**shapes):
    """10 ms a layer of the source, 6 ms one with half of its FFN, and 2 ms the rest."""
    half = dataclasses.replace(SOURCE, ffn_hidden_size=256)
    return LatencyTable(fixed=fixed_sizes(SOURCE), conditions={"device": "CPU"}, whole_s=0.043,
                        shapes={shape_of(SOURCE): Parts(layer_s=0.010, rest_s=0.002),
                                shape_of(half): Parts(layer_s=0.006, rest_s=0.002)} | shapes)


def search(path, max_ms, **axes):
    return SearchConfig(**{"num_layers": [4, 3, 2], "ffn_hidden_size": [512, 256]} | axes,
                        constraints=ConstraintsConfig(latency=LatencyConfig(max_ms=max_ms, table=path)))


def test_a_model_takes_its_layers_and_the_rest(tmp_path):
    table().save(tmp_path / "t.json")
    again = LatencyTable.load(tmp_path / "t.json")
    assert again == table()
    assert again.seconds(SOURCE) == pytest.approx(0.042)
    assert again.seconds(dataclasses.replace(SOURCE, ffn_hidden_size=256, num_layers=3)) == pytest.approx(0.020)


@pytest.mark.parametrize(("max_ms", "expected"), [
    (26.5, {(4, 256), (3, 256), (2, 512), (2, 256)}),  # 26, 20, 22 and 14 ms
    (0.5, {(3, 256), (2, 256)}),  # half of the source's 42 ms
])
def test_candidates_within_the_limit(max_ms, expected, tmp_path):
    table().save(tmp_path / "t.json")
    found = candidates_of(SOURCE, search(str(tmp_path / "t.json"), max_ms))
    assert {(arch.num_layers, arch.ffn_hidden_size) for arch in found.candidates} == expected
    assert found.ruled_out["latency"] == 6 - len(expected)


def test_only_what_the_other_constraints_allow_must_have_been_measured(tmp_path):
    table().save(tmp_path / "t.json")
    node = search(str(tmp_path / "t.json"), 30.0, hidden_size=[256, 64])
    smallest = dataclasses.replace(SOURCE, num_layers=2, ffn_hidden_size=256)
    node.constraints.num_parameters.min = smallest.num_parameters()
    found = candidates_of(SOURCE, node)
    assert {arch.hidden_size for arch in found.candidates} == {256}
    assert found.ruled_out == {UNFIT: 0, "num_parameters": 6, "latency": 2}


@pytest.mark.parametrize(("change", "axes", "max_ms", "said"), [
    (lambda data: data["shapes"].pop(), {}, 30.0, r"not measured.*FFN 256.*latency\.table"),
    (lambda data: data["fixed"].update(vocab_size=7), {}, 30.0, r"another model.*latency\.table"),
    (lambda data: data.pop("whole_s"), {}, 30.0, r"minitron latency.*latency\.table"),
    (lambda data: None, {"hidden_size": [256, 128]}, 30.0, r"not measured.*hidden 128"),
    (lambda data: None, {}, 50.0, r"above the source.*at most 42.*constraints\.latency"),
    (lambda data: None, {}, 13.0, r"latency rules out 6"),
])
def test_a_table_that_does_not_fit(change, axes, max_ms, said, tmp_path):
    path = tmp_path / "t.json"
    table().save(path)
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(ConfigError, match=said):
        candidates_of(SOURCE, search(str(path), max_ms, **axes))


@pytest.mark.parametrize(("max_ms", "path"), [(20.0, None), (None, "t.json")])
def test_a_limit_needs_a_table_and_a_table_a_limit(max_ms, path):
    with pytest.raises(ConfigError, match=r"go together.*search\.constraints\.latency"):
        candidates_of(SOURCE, search(path, max_ms))
