"""What a training does beside its steps: phases, an exact budget, recomputation, best weights, early ends, traces."""

import json
import signal

import pytest

from tests.support.checkpoints import read_llama
from tests.support.tiny_llama import SEQ_LENGTH, TIED
from tests.support.trainings import (
    GLOBAL_BATCH,
    STEPS,
    TEACHER,
    assert_same_numbers,
    assert_same_weights,
    lines,
    remembered,
    run,
    write_files,
)

PHASES = [{"tokens": 2 * 8 * 16},
          {"tokens": 4 * 4 * 32, "seq_length": 32, "global_batch_size": 4, "micro_batch_size": 2}]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("loop"), tied=TIED)


@pytest.fixture(scope="module")
def trained(files, rank_pool):
    return remembered(files, rank_pool)


@pytest.mark.parametrize(("layout", "recompute"), [("1x1", "full"), ("1x1", "selective"), ("tp2 sp", "full")])
def test_recomputing_activations_changes_no_bit(trained, layout, recompute):
    plain, _ = trained(layout)
    again, _ = trained(layout, train={"recompute": recompute})
    assert_same_numbers(again, plain, "kd", tolerance=0)
    assert_same_weights(again, plain, "kd", tolerance=0)


@pytest.mark.parametrize("layout", ["dp2", "pp2", "tp2 sp"])
def test_phases_are_the_same_under_every_layout(trained, layout):
    """Two steps of 8 samples of 16 tokens, then four of 4 samples of 32, in one training."""
    out, facts = trained(layout, phases=PHASES)
    expected, _ = trained("1x1", phases=PHASES)
    assert facts[0]["kd"]["tokens"] == 2 * 8 * 16 + 4 * 4 * 32
    assert_same_numbers(out, expected, "kd")
    assert_same_weights(out, expected, "kd")


def test_phases_begin_like_a_training_without(trained):
    """The second phase is another one: its losses differ from step 3 on, those before do not but for the schedule."""
    steps, _ = lines(trained("1x1", phases=PHASES)[0], "kd")
    plain, _ = lines(trained("1x1")[0], "kd")
    for step in (1, 2):
        assert steps[step]["loss"] == plain[step]["loss"]
    assert steps[3]["loss"] != plain[3]["loss"] and steps[3]["lr"] == plain[3]["lr"]


def test_an_interruption_in_the_second_phase_changes_no_bit(files, rank_pool, trained, tmp_path):
    out = tmp_path / "out"
    for interrupt in (True, False):
        run(files, rank_pool, "1x1", "tied", ["kd"], out, save=True, interrupt=interrupt, phases=PHASES)
    whole, _ = trained("1x1", phases=PHASES)
    assert_same_numbers(out, whole, "kd", tolerance=0)
    assert_same_weights(out, whole, "kd", tolerance=0)


@pytest.mark.parametrize("layout", ["1x1", "dp2"])
def test_a_partial_last_batch_spends_the_budget_exactly(trained, layout):
    """43 samples are five steps of 8 and one of 3, whose other rows have no part in loss or denominator."""
    tokens = 43 * SEQ_LENGTH
    _, facts = trained(layout, train={"tokens": tokens, "last_batch": "partial"})
    assert facts[0]["kd"]["tokens"] == tokens and facts[0]["kd"]["steps"] == STEPS
    partial, _ = lines(trained(layout, train={"tokens": tokens, "last_batch": "partial"})[0], "kd")
    whole, _ = lines(trained("1x1", train={"tokens": tokens})[0], "kd")
    assert partial[STEPS - 1]["loss"] == pytest.approx(whole[STEPS - 1]["loss"], abs=1e-6)
    assert abs(partial[STEPS]["loss"] - whole[STEPS]["loss"]) > 1e-4
    if layout == "dp2":
        expected, _ = trained("1x1", train={"tokens": tokens, "last_batch": "partial"})
        assert_same_numbers(trained(layout, train={"tokens": tokens, "last_batch": "partial"})[0], expected, "kd")


@pytest.mark.parametrize("stop", [{"steps": 4}, {"tokens": 4 * GLOBAL_BATCH * SEQ_LENGTH}, {"seconds": 0.0}])
def test_a_budget_ends_a_training_early(trained, stop):
    """With the learning rate of the whole; the last step has its line and its look."""
    out, facts = trained("1x1", train={"stop": stop})
    last = 1 if "seconds" in stop else 4
    assert facts[0]["kd"]["steps"] == last
    steps, looks = lines(out, "kd")
    whole, _ = lines(trained("1x1")[0], "kd")
    assert list(steps) == list(range(1, last + 1)) and list(looks)[-1] == last
    assert all(steps[step]["loss"] == whole[step]["loss"] for step in steps)


@pytest.mark.parametrize("layout", ["1x1", "pp2"])
def test_a_training_ends_with_the_first_look_that_is_good_enough(trained, layout):
    """The look after step 4 is the first at or below the mean of the looks after steps 2 and 4."""
    looks = lines(trained("1x1")[0], "kd")[1]
    assert looks[6] < looks[4] < looks[2]
    stop_at = (looks[2] + looks[4]) / 2
    out, facts = trained(layout, train={"stop": {"heldout_ce": stop_at}})
    steps, found = lines(out, "kd")
    assert list(found) == [2, 4] and found[4] <= stop_at < found[2]
    assert list(steps) == [1, 2, 3, 4] and facts[0]["kd"]["steps"] == 4


def test_the_best_weights_are_kept(trained):
    """Those of the look with the lowest held-out loss, whichever it was."""
    out, facts = trained("1x1", train={"keep_best": True, "eval_every_steps": 1})
    looks = lines(out, "kd")[1]
    best = min(looks, key=looks.get)
    assert facts[0]["kd"]["best"] == best
    kept = read_llama(out / "kd" / "best" / f"step_{best:08d}")
    last = read_llama(out / "kd" / "checkpoint")
    same = all((kept[name] == last[name]).all() for name in last)
    assert same == (best == STEPS)


def test_lines_with_a_speed_say_what_the_step_cost(trained):
    """Model FLOPs by hand, and the teacher's share of the time."""
    out, _ = trained("1x1", train={"log_every_steps": 3, "peak_tflops": 0.001})
    steps, _ = lines(out, "kd")
    assert [step for step, line in steps.items() if "tokens_per_s" in line] == [3, 6]

    def forward(arch):
        weights = arch.num_non_embedding_parameters() + arch.vocab_size * arch.hidden_size
        return 2 * weights + 4 * SEQ_LENGTH * arch.num_attention_heads * arch.head_dim * arch.num_layers

    for line in (steps[3], steps[6]):
        flops = line["tokens_per_s"] * (3 * forward(TIED) + forward(TEACHER)) / 1e12
        assert line["tflops_per_s"] == pytest.approx(flops, rel=0.1, abs=1e-4)
        assert line["mfu"] == pytest.approx(line["tflops_per_s"] / 0.001, rel=0.1, abs=0.1)
        assert 0 < line["teacher_share"] < 1 and line["peak_memory_mib"] > 100


def test_stacks_can_be_asked_for_after_a_training(trained, rank_pool):
    """SIGUSR2 writes them; Lightning's teardown would leave it to kill the rank."""
    trained("1x1")
    assert rank_pool(1).run("tests.support.trainings:catches", number=int(signal.SIGUSR2)) == [True]


def test_a_trace_of_chosen_steps(files, rank_pool, tmp_path):
    run(files, rank_pool, "1x1", "tied", ["ce"], tmp_path, train={"profile": {"first_step": 2, "num_steps": 2}})
    trace = json.loads((tmp_path / "ce" / "profile" / "rank_0.json").read_text())
    assert any("addmm" in event.get("name", "") or "::mm" in event.get("name", "") for event in trace["traceEvents"])
