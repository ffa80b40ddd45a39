"""Resume points that are written while training goes on."""

import json
import re

import pytest

from tests.support.tiny_llama import TIED
from tests.support.trainings import RESUME_AT, STEPS, assert_same_numbers, lines, run, write_files


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("points"), tied=TIED)


def sealed(out):
    """Names, sizes and checksums of the resume point after step 3."""
    (point,) = (out / "kd" / "resume").glob("step_*")
    record = json.loads((point / "complete.json").read_text())
    assert record["step"] == RESUME_AT
    return record["files"]


@pytest.mark.parametrize("layout", ["1x1", "tp2"])
def test_a_point_that_is_late_holds_the_weights_of_its_step(files, rank_pool, tmp_path, layout):
    """Its ranks wait so long that training has ended before they write: the same bytes as written at once."""
    out, _ = run(files, rank_pool, layout, "tied", ["kd"], tmp_path / "beside", save=True, slow_writing=5.0)
    expected, _ = run(files, rank_pool, layout, "tied", ["kd"], tmp_path / "at_once", save=True,
                      train={"checkpoint_async": False})
    assert lines(out, "kd")[0][STEPS]["seconds"] < 5.0, "the steps did not wait for the point"
    tensors = {name: entry for name, entry in sealed(out).items() if name.endswith(".distcp")}
    assert len(tensors) == 2 * (2 if layout == "tp2" else 1)
    assert tensors == {name: sealed(expected)[name] for name in tensors}
    assert_same_numbers(out, expected, "kd", tolerance=0)


def test_one_point_is_on_its_way_at_a_time(files, rank_pool, tmp_path):
    """With a point a step and writing slower than that, each waits for the one before; the newest two are kept."""
    out, _ = run(files, rank_pool, "dp2", "tied", ["kd"], tmp_path, slow_writing=0.3,
                 train={"checkpoint_every_steps": 1})
    points = {int(re.sub(r"\D", "", path.parent.name)) for path in (out / "kd" / "resume").glob("step_*/complete.json")}
    assert points == {STEPS - 2, STEPS - 1}
    assert lines(out, "kd")[0][STEPS]["seconds"] > 0.3 * (STEPS - 2)
