"""Loading and saving on gloo ranks, TP x PP x DP: the file comes back bit for bit, whatever the layout."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from nemo_minitron.checkpoint.load import load_shard
from nemo_minitron.checkpoint.save import save_checkpoint
from tests.support.checkpoints import UNTIED, llama_tensors, megatron_parameters, read_llama, write_llama

WORLD_SIZE = 4


def load_and_save(rank, world_size, *, base, directory, tp_size, pp_size, dtype):
    """A job: ranks count TP first, then DP, then PP, as Megatron's do; replicas other than the first hold NaN."""
    dp_size = world_size // (tp_size * pp_size)
    groups = [dist.new_group(range(first, first + tp_size)) for first in range(0, world_size, tp_size)]
    tp_rank, dp_rank, pp_rank = rank % tp_size, rank // tp_size % dp_size, rank // (tp_size * dp_size)
    num_layers = UNTIED.num_layers // pp_size
    layers = range(pp_rank * num_layers, (pp_rank + 1) * num_layers)
    shapes = megatron_parameters(llama_tensors(UNTIED), UNTIED, tp_rank=tp_rank, tp_size=tp_size, layers=layers,
                                 first=pp_rank == 0, last=pp_rank == pp_size - 1)
    parameters = {name: torch.nn.Parameter(torch.full_like(tensor, torch.nan, dtype=getattr(torch, dtype)))
                  for name, tensor in shapes.items()}
    if dp_rank == 0:
        load_shard(parameters.items(), Path(base), UNTIED, tp_rank=tp_rank, tp_size=tp_size, layer_offset=layers.start)
    save_checkpoint(parameters.items(), UNTIED, Path(directory), base_directory=Path(base),
                    tp_group=groups[rank // tp_size], tp_rank=tp_rank, tp_size=tp_size, pp_rank=pp_rank,
                    pp_size=pp_size, dp_rank=dp_rank, layer_offset=layers.start, dtype=None, barrier=dist.barrier)
    for group in groups:
        if dist.get_rank(group) >= 0:
            dist.destroy_process_group(group)


@pytest.mark.parametrize(("tp_size", "pp_size"), [(2, 2), (4, 1), (2, 1), (1, 4)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_round_trip_is_bit_equal(tmp_path, rank_pool, tp_size, pp_size, dtype):
    tensors = write_llama(UNTIED, tmp_path / "base", dtype=getattr(torch, dtype), num_files=2)
    rank_pool(WORLD_SIZE).run("tests.multirank.checkpoint.test_save:load_and_save", base=str(tmp_path / "base"),
                              directory=str(tmp_path / "out"), tp_size=tp_size, pp_size=pp_size, dtype=dtype)
    saved = read_llama(tmp_path / "out")
    assert saved.keys() == tensors.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in tensors.items())
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == pp_size
