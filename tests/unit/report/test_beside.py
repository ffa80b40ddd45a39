"""Another run shown beside this one."""

import json

import pytest

from nemo_minitron.errors import ConfigError
from nemo_minitron.report.beside import beside_section, check_beside, compared, difference


def write_run(folder, losses, steps):
    """A finished run: held-out losses by model, training losses of `distill`."""
    entry = {"name": "round1", **{model: {"loss": loss} for model, loss in losses.items()}, "controls": {}}
    folder.mkdir()
    (folder / "summary.json").write_text(json.dumps({"rounds": [entry]}))
    (folder / "round1/distill").mkdir(parents=True)
    lines = [{"step": step, "tokens": 1, "loss": loss} for step, loss in enumerate(steps, 1)]
    lines.insert(1, {"step": 1, "tokens": 1, "heldout_ce": 9.0})
    (folder / "round1/distill/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return [entry]


def test_every_model_and_every_step_of_both(tmp_path):
    rounds = write_run(tmp_path / "here", {"teacher": 2.0, "pruned": 4.0, "distilled": 2.5}, [3.0, 2.9, 2.8])
    write_run(tmp_path / "there", {"teacher": 2.0, "pruned": 4.0, "distilled": 2.500002}, [3.0, 2.900004, 2.8, 2.7])
    found = compared(tmp_path / "here", rounds, tmp_path / "there")
    assert found["models"] == [["round1", "teacher", 2.0, 2.0], ["round1", "pruned", 4.0, 4.0],
                               ["round1", "distilled", 2.5, 2.500002]]
    ((name, stage, steps, largest),) = found["trainings"]
    assert (name, stage, steps) == ("round1", "distill", 3) and largest == pytest.approx(4e-6)
    (shown,) = beside_section([found])
    for words in ("round1, distilled", "2.500002", "\u22122.0e-06", "4.0e-06", str(tmp_path / "there")):
        assert words in shown


def test_runs_of_other_rounds_have_nothing_to_compare(tmp_path):
    rounds = write_run(tmp_path / "here", {"teacher": 2.0}, [1.0])
    write_run(tmp_path / "there", {"teacher": 2.0}, [1.0])
    rounds[0]["name"] = "half"
    with pytest.raises(ConfigError, match=r"models of half.*round1 in .*there.*report\.beside"):
        compared(tmp_path / "here", rounds, tmp_path / "there")
    check_beside([str(tmp_path / "there")], ["half", "round1"])
    with pytest.raises(ConfigError, match=r"one of half.*round1 in .*there.*report\.beside"):
        check_beside([str(tmp_path / "there")], ["half"])


def test_a_run_that_is_not_finished(tmp_path):
    check_beside([], ["round1"])
    with pytest.raises(ConfigError, match=r"summary\.json.*report\.beside"):
        check_beside([str(tmp_path)], ["round1"])


@pytest.mark.parametrize(("value", "shown"), [(0.0, "0"), (1.26e-7, "1.3e-07"), (-0.5, "\u22125.0e-01")])
def test_differences_are_in_powers_of_ten(value, shown):
    assert difference(value) == shown
