import threading
import time

import pytest

from nemo_minitron.launch import standing
from nemo_minitron.launch.standing import ROOT, Call

SITE = "/venv/lib/python3.11/site-packages"
TRAINER = Call(f"{ROOT}/nemo_minitron/training/trainer.py", 9, "fit")
MEGATRON = Call(f"{SITE}/megatron/core/distributed/finalize.py", 5, "finalize_model_grads")
WRAPPER = Call(f"{SITE}/torch/distributed/c10d_logger.py", 83, "wrapper")
REDUCE = Call(f"{SITE}/torch/distributed/distributed_c10d.py", 2806, "all_reduce")


@pytest.fixture(autouse=True)
def _afresh():
    yield
    standing.enter("start")


@pytest.mark.parametrize(("calls", "expected"), [
    ([TRAINER, WRAPPER, REDUCE], ("all_reduce", "nemo_minitron/training/trainer.py:9")),
    ([TRAINER, MEGATRON, WRAPPER, REDUCE], ("all_reduce", "megatron/core/distributed/finalize.py:5")),
    ([WRAPPER, REDUCE, TRAINER], ("fit", "nemo_minitron/training/trainer.py:9")),  # a hook, called by torch
    ([TRAINER, Call("/usr/lib/python3.11/selectors.py", 4, "select")], ("fit", "nemo_minitron/training/trainer.py:9")),
    ([Call("/usr/lib/python3.11/selectors.py", 4, "select")], ("select", "/usr/lib/python3.11/selectors.py:4")),
    ([], ("nothing", "nowhere")),
])
def test_the_innermost_place_that_is_no_library_and_torch_s_part_in_it(calls, expected):
    assert standing.what_it_does(calls) == expected


def test_a_line_has_stage_and_step():
    standing.enter("distill")
    assert standing.line(3, [TRAINER]) == "rank 3: distill, in fit at nemo_minitron/training/trainer.py:9"
    standing.begin_step(120)
    assert standing.line(3, [TRAINER, WRAPPER, REDUCE]) == (
        "rank 3: step 120 of distill, in all_reduce at nemo_minitron/training/trainer.py:9")
    standing.enter("evaluate")
    assert "step" not in standing.line(3, [TRAINER])


def deep(wait):
    wait()


def test_the_main_thread_s_stack_from_another_thread_and_that_of_an_error():
    found = []
    other = threading.Thread(target=lambda: (time.sleep(0.2), found.extend(standing.of_main_thread())))
    other.start()
    deep(other.join)
    assert standing.what_it_does(found)[0] == "deep"
    try:
        deep(lambda: 1 / 0)
    except ZeroDivisionError as error:
        doing, at = standing.what_it_does(standing.of_error(error))
    assert doing == "<lambda>" and at.startswith("tests/unit/launch/test_standing.py:")


def test_time_counts_only_where_progress_is_expected(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(standing.time, "monotonic", lambda: now[0])

    def later(seconds):
        now[0] += seconds
        return standing.idle_s()

    standing.enter("distill")
    assert later(1000) == 0
    standing.begin_step(1)
    assert later(7) == 7
    standing.alive()
    assert later(2) == 2
    with standing.busy():  # a teacher's pass inside the step
        assert later(3) == 3
    assert later(1) == 1, "the step goes on"
    standing.rest()
    assert later(1000) == 0
    with standing.busy():
        assert later(4) == 4
    assert later(1000) == 0, "a pass outside of any step"
