"""What every test gets: no network, no GPU unless asked for, fixed seeds, a time limit by directory, rank pools.

Where tests run in several processes (pytest-xdist), here is also which of them stay together.
"""

import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Before anything imports torch or a Hugging Face library. A GPU is hidden unless CUDA_VISIBLE_DEVICES is set.
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_DATASETS_OFFLINE="1", WANDB_MODE="disabled")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from tests.support.ranks import RankPool

pytest.register_assert_rewrite("tests.support.trainings")

HERE = Path(__file__).parent
LIMITS_S = {"unit": 60, "multirank": 300, "e2e": 1200, "cluster": 900, "gpu": 600}
SHARING = ("cluster", "e2e", "gpu", "multirank")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give each test the time limit of its directory, and everything below `gpu/` its marker."""
    for item in items:
        directory = item.path.relative_to(HERE).parts[0]
        if directory in LIMITS_S and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(LIMITS_S[directory]))
        if directory == "gpu":
            item.add_marker(pytest.mark.gpu)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keep the tests of one file together, and those of a directory that share pools of ranks and finished runs."""
    from xdist.scheduler import LoadScopeScheduling

    class ByDirectory(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = nodeid.split("::")[0]
            return next((name for name in SHARING if path.startswith(f"tests/{name}/")), path)

    return ByDirectory(config, log)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test starts from the same random state, in whatever order the tests run."""
    random.seed(1234)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(1234)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(1234)


@pytest.fixture(scope="session")
def rank_pool() -> Iterator[Callable[[int], RankPool]]:
    """`rank_pool(world_size)`: worker processes that stay up for the whole session, one pool per size."""
    pools: dict[int, RankPool] = {}

    def pool(world_size: int) -> RankPool:
        return pools.setdefault(world_size, RankPool(world_size))

    yield pool
    for running in pools.values():
        running.close()
