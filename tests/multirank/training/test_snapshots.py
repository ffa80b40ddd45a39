"""A teacher that is exchanged for its newest snapshot while the student trains."""

import json

import pytest

from tests.support.tiny_llama import TIED, write_model
from tests.support.trainings import TEACHER, assert_same_numbers, assert_same_weights, lines, run, write_files


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("snapshots")
    return {**write_files(directory, tied=TIED),
            **{name: str(write_model(TEACHER, directory / name, seed=seed))
               for name, seed in (("second", 3), ("third", 4))}}


@pytest.mark.parametrize(("layout", "teacher"), [("1x1", {}), ("pp2", {}), ("dp2", {"layout": "tp2"}),
                                                 ("1x1", {"offload_weights": True})])
def test_an_interrupted_training_takes_at_each_step_what_it_took_before(files, rank_pool, tmp_path, layout, teacher):
    """The third snapshot has come when the run goes on from step 3; there the second is taken, as it was before."""
    options = {"arriving": [files["second"], files["third"]], "save": True, "teacher": teacher}
    expected, out = tmp_path / "expected", tmp_path / "out"
    run(files, rank_pool, layout, "tied", ["kd"], expected, **options)
    for interrupt in (True, False):
        run(files, rank_pool, layout, "tied", ["kd"], out, interrupt=interrupt, **options)
    assert_same_numbers(out, expected, "kd", tolerance=0)
    assert_same_weights(out, expected, "kd", tolerance=0)
    for directory in (expected, out):
        taken = [json.loads(line) for line in (directory / "teachers.jsonl").read_text().splitlines()]
        assert [(line["step"], line["snapshot"]) for line in taken] == [
            (0, None), (1, None), (2, "step_1"), (3, "step_1"), (4, "step_2"), (5, "step_2")]


def test_the_snapshot_teaches_from_its_step_on(files, rank_pool, tmp_path):
    """Steps before an exchange are the first teacher's; the step after has the KL of the newcomer."""
    run(files, rank_pool, "1x1", "tied", ["kd"], tmp_path / "exchanged", arriving=[files["second"]])
    run(files, rank_pool, "1x1", "tied", ["kd"], tmp_path / "plain")
    exchanged, plain = (lines(tmp_path / name, "kd")[0] for name in ("exchanged", "plain"))
    assert all(exchanged[step]["kl"] == plain[step]["kl"] for step in (1, 2))
    assert abs(exchanged[3]["teacher_ce"] - plain[3]["teacher_ce"]) > 1e-3
