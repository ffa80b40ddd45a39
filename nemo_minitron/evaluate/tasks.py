"""Tasks of lm-evaluation-harness by the recipe: found and checked early, loaded and run on rank 0.

lm_eval is an extra, imported where it is used; it costs seconds, and its list of 14,000 tasks some more.
"""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nemo_minitron.artifacts import digest_files, digest_json
from nemo_minitron.config import EvaluateConfig, TaskConfig
from nemo_minitron.errors import ConfigError, DataError, UserError
from nemo_minitron.evaluate.local import KEY, LocalTask, Rows, read_local, task_files

if TYPE_CHECKING:
    from nemo_minitron.evaluate.live import LiveModel

FEWSHOT_SEED = 1234
"""Of the choice of solved examples; lm_eval's own default."""
_FOLDERS = {"mmlu": ("mmlu", "default"), "winogrande": ("winogrande",), "arc": ("arc",)}
_NAMES = {"winogrande": "winogrande", "arc": "arc_easy"}


def check_tasks(evaluate: EvaluateConfig) -> None:
    """Find what is wrong with the recipe's tasks before anything runs.

    Raises:
        ConfigError: lm_eval is not installed, or knows no task of a name; a name twice; no such folder.
        DataError: a local file in the wrong form.
    """
    if not evaluate.tasks:
        return
    require_lm_eval()
    names = [task.name for task in evaluate.tasks]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError("a task twice", expected="different names", found=", ".join(twice), key=KEY)
    if evaluate.harness_dir is not None and not Path(evaluate.harness_dir).is_dir():
        raise ConfigError("no folder of tasks", expected="a folder of YAML files", found=evaluate.harness_dir,
                          key="evaluate.harness_dir")
    for task in evaluate.tasks:
        if task.path is not None:
            local = read_local(Path(task.path))
            if local.form == "questions" and task.num_fewshot:
                raise ConfigError("no solved examples are put before the questions of a file of contexts",
                                  expected="num_fewshot 0, and examples inside the contexts",
                                  found=f"{task.num_fewshot} for {task.name}", key=KEY)
    by_name = [task.name for task in evaluate.tasks if task.path is None]
    if by_name:
        known = _manager(evaluate).task_index
        for name in by_name:
            if name not in known:
                near = [other for other in known if name.split("_")[0] in other][:5]
                raise ConfigError("unknown task", expected="a task of lm_eval, or a path"
                                  + (f" (there are {', '.join(near)}, ...)" if near else ""), found=name, key=KEY)


def require_lm_eval() -> None:
    """Raise `ConfigError` where lm-evaluation-harness is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("lm-evaluation-harness is not installed", expected="pip install 'nemo_minitron[eval]'",
                          found="no lm_eval", key=KEY)


def task_key(task: TaskConfig, evaluate: EvaluateConfig, seed: int) -> str:
    """Digest of all that a task's scores depend on besides the model: questions, shots, limit, lm_eval's version."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        installed = version("lm_eval")
    except PackageNotFoundError:
        installed = None
    files = [] if evaluate.harness_dir is None else sorted(Path(evaluate.harness_dir).rglob("*.yaml"))
    return digest_json({
        "name": task.name, "num_fewshot": task.num_fewshot, "limit": task.limit or evaluate.limit, "seed": seed,
        "questions": None if task.path is None else digest_files(task_files(Path(task.path))),
        "harness": digest_files(files) if task.path is None else None, "add_bos": evaluate.add_bos,
        "lm_eval": installed})


def run_task(live: LiveModel, task: TaskConfig, evaluate: EvaluateConfig, *, seed: int) -> dict[str, dict[str, Any]]:
    """On rank 0, inside `live.directing()`: scores of the task, or of each task that a tag stands for, by name.

    Each has `metrics` (name -> value and stderr, null where lm_eval gives none), `num_samples` (questions, those of a
    group together), `num_fewshot` and `version`.

    Raises:
        UserError: data that cannot be had, code that may not be run, questions longer than the model's context.
    """
    from lm_eval.evaluator import evaluate as evaluate_tasks

    from nemo_minitron.evaluate.harness import HarnessModel

    with _seeded():
        loaded = _load(task, evaluate)
        for one in loaded["tasks"].values():
            if getattr(one, "UNSAFE_CODE", False) and not evaluate.allow_code:
                raise ConfigError("a task runs the code that the model writes", found=task.name,
                                  expected="evaluate.allow_code=true, or the task left out", key="evaluate.allow_code")
            shots = one.get_config("num_fewshot") if task.num_fewshot is None else task.num_fewshot
            one.set_config(key="num_fewshot", value=shots or 0)
            one.set_fewshot_seed(seed=FEWSHOT_SEED)
        found = evaluate_tasks(HarnessModel(live, add_bos=evaluate.add_bos, seed=seed), loaded,
                               limit=task.limit or evaluate.limit, log_samples=False,
                               confirm_run_unsafe_code=evaluate.allow_code)
    assert found is not None
    rows = [task.name] if task.name in (loaded.get("groups") or {}) else list(loaded["tasks"])
    return {row: _scores(row, found, list(loaded["tasks"]) if len(rows) == 1 else [row]) for row in rows}


def _load(task: TaskConfig, evaluate: EvaluateConfig) -> dict[str, Any]:
    """What lm_eval makes of the task."""
    try:
        if task.path is not None:
            return dict(_load_local(task, read_local(Path(task.path))))
        return dict(_manager(evaluate).load([task.name]))
    except UserError:
        raise
    except Exception as error:  # of lm_eval, datasets, the hub's client: anything at all
        raise DataError(f"the task {task.name} cannot be loaded", key=KEY,
                        expected="its data from a hub, in a cache, or as a local file (path)",
                        found=f"{type(error).__name__}: {error}"[:300]) from None


def _manager(evaluate: EvaluateConfig) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=evaluate.harness_dir)


def _load_local(task: TaskConfig, local: LocalTask) -> Any:
    """lm_eval's own tasks over local rows, as one group where there are subjects; or a task of contexts."""
    import lm_eval.tasks
    from lm_eval.api.group import Group
    from lm_eval.tasks import TaskManager

    if local.form == "questions":
        from nemo_minitron.evaluate.questions_task import QuestionsTask

        return {"tasks": {task.name: QuestionsTask(task.name, local.questions)}}
    folder = Path(lm_eval.tasks.__file__).parent.joinpath(*_FOLDERS[local.form])
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    if local.form != "mmlu":
        return {"tasks": {task.name: _over_rows(manager, _NAMES[local.form], local.subjects[""], task.name)}}
    aggregate = [{"metric": "acc", "weight_by_size": True}]
    group = Group.from_config({"group": task.name, "aggregate_metric_list": aggregate})
    for subject, splits in local.subjects.items():
        if f"mmlu_{subject}" not in manager.task_index:
            raise DataError("unknown subject of MMLU", expected="one of lm_eval's", found=subject, key=KEY)
        group.add(_over_rows(manager, f"mmlu_{subject}", splits, f"mmlu_{subject}"))
    return manager.load([group])


def _over_rows(manager: Any, base: str, splits: dict[str, Rows], name: str) -> Any:
    """lm_eval's task `base`, its prompts and metrics, over these rows; solved examples from dev, or other questions."""
    import datasets

    held = {split: datasets.Dataset.from_list(rows) for split, rows in splits.items()}
    member = {"task": base, "custom_dataset": lambda **_: held, "training_split": None, "validation_split": None,
              "test_split": "test", "fewshot_split": "dev" if "dev" in splits else "test"}
    # a group is how an existing task is loaded with changes; the task itself comes back out of it
    (made,) = manager.load([{"group": "local", "task": [member]}])["tasks"].values()
    made.set_config(key="task", value=name)
    return made


def _scores(name: str, found: Any, members: Sequence[str]) -> dict[str, Any]:
    """One row of lm_eval's results."""
    result = found["results"][name]
    metrics: dict[str, dict[str, float | None]] = {}
    for key, value in result.items():
        metric, comma, kind = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        label = metric if kind == "none" else key
        metrics[label] = {"value": _number(value), "stderr": _number(result.get(f"{metric}_stderr,{kind}"))}
    shots = {found["n-shot"].get(member) for member in members}
    return {"metrics": metrics, "num_samples": sum(found["n-samples"][member]["effective"] for member in members),
            "num_fewshot": shots.pop() if len(shots) == 1 else None, "version": found["versions"].get(name)}


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None


@contextmanager
def _seeded() -> Iterator[None]:
    """What lm_eval draws is the same each time, and what others draw afterwards does not change by it."""
    states = random.getstate(), np.random.get_state()
    random.seed(0)
    np.random.seed(FEWSHOT_SEED)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
