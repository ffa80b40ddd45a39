"""The same recipe on other parallel layouts gives the same losses."""

import pytest

from tests.e2e.command import run_well, summary

LAYOUTS = {"tp2": {"tp": 2}, "pp2": {"pp": 2}, "tp2_pp2": {"tp": 2, "pp": 2}}
# Layouts differ in the order of float32 sums alone; 40 steps let that grow to far less than this.
TOLERANCE = 0.005


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_do_not_depend_on_the_layout(layout, undisturbed, inputs, tmp_path):
    degrees = {f"parallel__{name}": degree for name, degree in LAYOUTS[layout].items()}
    finished = run_well(inputs.arguments(tmp_path / "outputs", **degrees), tmp_path)
    assert "== distill" in finished.stdout
    (expected,) = summary(undisturbed[0])["rounds"]
    (found,) = summary(tmp_path / "outputs" / "tiny")["rounds"]
    assert found["pruned"]["num_parameters"] == expected["pruned"]["num_parameters"]
    for name in ("teacher", "pruned", "distilled"):
        assert found[name]["loss"] == pytest.approx(expected[name]["loss"], rel=TOLERANCE), name
