"""Data-parallel replicas: one reads the checkpoint and sends it to the others; bytes are counted at `preadv`."""

import dataclasses
import os
from pathlib import Path

import pytest
import torch

from tests.support.tiny_llama import MORE_LAYOUTS, TIED, UNTIED, formed, write_model

ARCHS = {"tied": TIED, "untied": UNTIED}


def load(rank, world_size, *, path, arch, layout, read_once):
    """A job: bytes this rank read, its TP rank, its weights one after another."""
    from nemo_minitron.model.build import load_model, transformer_config
    from nemo_minitron.parallel import groups

    counted = 0
    preadv = os.preadv

    def counting(*arguments):
        nonlocal counted
        found = preadv(*arguments)
        counted += found
        return found

    os.preadv = counting
    try:
        with formed(layout) as degrees:
            degrees = dataclasses.replace(degrees, read_once=read_once)
            model = load_model(ARCHS[arch], Path(path), transformer_config(ARCHS[arch], degrees), layout=degrees)
            weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
            return [counted, groups.tp_rank(), weights.tolist()]
    finally:
        os.preadv = preadv


@pytest.mark.parametrize("arch", ["tied", "untied"])
@pytest.mark.parametrize(("alone", "replicated"), [("1x1", "dp2"), ("tp2", "tp2 dp2")])
def test_two_replicas_read_as_much_as_one(rank_pool, tmp_path, arch, alone, replicated):
    path = str(write_model(ARCHS[arch], tmp_path / "model"))
    job = f"{__name__}:load"
    single = rank_pool(MORE_LAYOUTS[alone].world_size).run(job, path=path, arch=arch, layout=alone, read_once=True)
    one, each = (rank_pool(MORE_LAYOUTS[replicated].world_size).run(job, path=path, arch=arch, layout=replicated,
                                                              read_once=once) for once in (True, False))
    read = sum(count for count, *_ in single)
    assert read > 0
    assert sum(count for count, *_ in one) == read, "the second replica reads nothing"
    assert sum(count for count, *_ in each) == 2 * read
    by_tp_rank = {tp_rank: weights for _, tp_rank, weights in single}
    for _, tp_rank, weights in [*one, *each]:
        assert weights == by_tp_rank[tp_rank], "bit for bit"
