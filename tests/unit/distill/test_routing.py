"""Every micro-batch is run once, and every state reaches each rank that needs it, from a rank that has it."""

from itertools import product

from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_minitron.distill.routing import FINAL, rank_of, share, transfers
from nemo_minitron.parallel.layout import Layout


@st.composite
def layout_pairs(draw):
    world = draw(st.sampled_from([1, 2, 4, 6, 8, 12]))
    divisors = [n for n in range(1, world + 1) if world % n == 0]
    found = []
    for _ in range(2):
        tp = draw(st.sampled_from(divisors))
        pp = draw(st.sampled_from([n for n in divisors if (world // tp) % n == 0]))
        found.append(Layout(tp=tp, pp=pp, dp=world // (tp * pp)))
    return found


@given(layout_pairs(), st.integers(1, 5), st.data())
@settings(max_examples=200, deadline=None)
def test_all_states_arrive(layouts, num_microbatches, data):
    teacher, student = layouts
    stages = {FINAL: (teacher.pp - 1, student.pp - 1),
              (0, 0): (data.draw(st.integers(0, teacher.pp - 1)), data.draw(st.integers(0, student.pp - 1)))}
    plan = transfers(teacher, student, num_microbatches=num_microbatches, stages=stages)
    arrived = {(transfer.item, transfer.number, transfer.destination) for transfer in plan}
    wanted = {(item, dp * num_microbatches + m, rank_of(student, tp=tp, dp=dp, pp=stages[item][1]))
              for item, dp, m, tp in product(stages, range(student.dp), range(num_microbatches), range(student.tp))}
    assert arrived == wanted and len(plan) == len(wanted)
    runs = {number: dp for dp in range(teacher.dp)
            for number in share(student.dp * num_microbatches, teacher, dp) if number >= 0}
    for transfer in plan:
        holders = {rank_of(teacher, tp=tp, dp=runs[transfer.number], pp=stages[transfer.item][0])
                   for tp in range(teacher.tp)}
        assert transfer.source in holders
        assert transfer.source == transfer.destination or transfer.destination not in holders


@given(layout_pairs(), st.integers(1, 7))
def test_every_microbatch_is_run_once_in_equal_shares(layouts, num_microbatches):
    teacher, student = layouts
    total = student.dp * num_microbatches
    shares = [share(total, teacher, dp) for dp in range(teacher.dp)]
    assert len({len(part) for part in shares}) == 1  # a pipeline's ranks wait for each other
    assert sorted(number for part in shares for number in part if number >= 0) == list(range(total))


def test_equal_layouts_send_nothing():
    layout = Layout(tp=2, pp=2, dp=2)
    for transfer in transfers(layout, layout, num_microbatches=3, stages={FINAL: (1, 1)}):
        assert transfer.source == transfer.destination


def test_ranks_count_as_megatron_does():
    """Through tp first, then dp, then pp: the default order of `initialize_model_parallel`."""
    layout = Layout(tp=2, pp=3, dp=2)
    places = [(pp, dp, tp) for pp in range(3) for dp in range(2) for tp in range(2)]
    assert [rank_of(layout, tp=tp, dp=dp, pp=pp) for pp, dp, tp in places] == list(range(12))
