import pytest

from nemo_minitron.config import Config
from nemo_minitron.launch import signals
from nemo_minitron.stages import execute
from nemo_minitron.stages.context import Context


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_that_came_after_a_training_s_last_step_stops_all_ranks_before_the_next_stage(monkeypatch, rank):
    """A training asks for signals after its steps; one that came later waits for somebody to ask.

    Rank 1 hears of it from rank 0 alone.
    """
    done: list[str] = []

    def stage(context, name, shown):
        done.append(name)
        if name == "distill" and rank == 0:
            monkeypatch.setattr(signals, "_received", "SIGUSR1")

    monkeypatch.setattr(signals, "_received", None)
    monkeypatch.setattr(execute, "_execute", stage)
    context = Context(config=Config(), rank=rank,
                      share=lambda value: value if rank == 0 else "SIGUSR1" if "distill" in done else None)
    with pytest.raises(signals.Stop, match="stopped by SIGUSR1 before evaluate"):
        execute.execute(context, ["prune", "distill", "evaluate", "report"])
    assert done == ["prune", "distill"]
