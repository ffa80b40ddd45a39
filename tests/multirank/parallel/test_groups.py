"""Layouts one after another in the same processes."""

from tests.support.tiny_llama import LAYOUTS


def form_in_turn(rank, world_size, *, layouts):
    """A job: form each layout over the one before; [TP rank, PP rank, DP rank, last stage, a sum over the replicas]."""
    import torch

    from nemo_minitron.parallel import groups

    found = []
    for name in layouts:
        groups.form(LAYOUTS[name], timeout_s=60)
        total = groups.sum_over_replicas_from_last_stage(torch.tensor([10.0 ** rank]))
        found.append([groups.tp_rank(), groups.pp_rank(), groups.dp_rank(), groups.is_last_stage(), total.item()])
    groups.dissolve()
    return found


def test_another_layout_can_be_formed_in_the_same_worker(rank_pool):
    zero, one = rank_pool(2).run(f"{__name__}:form_in_turn", layouts=["tp2", "pp2", "dp2", "tp2"])
    assert zero == [[0, 0, 0, True, 1], [0, 0, 0, False, 10], [0, 0, 0, True, 11], [0, 0, 0, True, 1]]
    assert one == [[1, 0, 0, True, 10], [0, 1, 0, True, 10], [0, 0, 1, True, 11], [1, 0, 0, True, 10]]


def test_replicas_of_the_last_stage_are_summed_for_all(rank_pool):
    """TP 2 x PP 2: ranks count TP first, so the last stage is ranks 2 and 3, and each TP rank has its own sum."""
    results = rank_pool(4).run(f"{__name__}:form_in_turn", layouts=["tp2 pp2"])
    assert [total for ((*_, total),) in results] == [100, 1000, 100, 1000]
