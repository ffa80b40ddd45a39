"""Tasks by the recipe: what is refused before anything runs, what a score depends on, and scores of local tasks."""

import json

import pytest

from nemo_minitron.config import EvaluateConfig, TaskConfig
from nemo_minitron.errors import ConfigError, DataError
from nemo_minitron.evaluate.tasks import check_tasks, run_task, task_key
from tests.unit.evaluate.test_local import ARC, QUESTION, WINOGRANDE, write_json, write_mmlu

pytest.importorskip("lm_eval", reason="needs the extra eval")
pytestmark = pytest.mark.timeout(300)  # the first test imports lm_eval and datasets


class Live:
    """Stands for a sharded model: the likeliest option is the one with the smallest sum of token ids."""

    max_length = 2048
    rank = 0

    class tokenizer:  # noqa: N801
        eos_token_id, bos_token_id, name_or_path, chat_template = 0, None, "bytes", None

        def __call__(self, text, **_):
            return {"input_ids": list(text.encode())}

        def encode(self, text, **_):
            return list(text.encode())

        def decode(self, tokens, **_):
            return bytes([tokens] if isinstance(tokens, int) else tokens).decode()

    def __init__(self):
        self.tokenizer = type(self).tokenizer()
        self.asked = []

    def ask_scores(self, options):
        self.asked += options
        return [(-float(sum(option.tokens)), False) for option in options]


@pytest.fixture
def question_file(tmp_path):
    rows = [QUESTION, {"context": "C", "continuation": [" aa", " b"], "answer": 1},
            {"context": "C", "continuation": [" aa", " b"], "answer": 0}]
    return write_json(tmp_path / "questions.json", rows)


def test_questions_are_scored_with_their_standard_error(question_file):
    scores = run_task(Live(), TaskConfig(name="mine", path=str(question_file)), EvaluateConfig(), seed=1)["mine"]
    # the smallest sum of bytes: "three" is heavier than "four", "aa" than "b": right, right, wrong
    assert scores["num_samples"] == 3
    assert scores["num_fewshot"] == 0
    assert scores["metrics"]["acc"]["value"] == pytest.approx(2 / 3)
    assert scores["metrics"]["acc"]["stderr"] == pytest.approx((2 / 3 * 1 / 3 / 2) ** 0.5)  # n - 1 = 2


@pytest.mark.parametrize("own", [True, False])
def test_limits_the_tasks_own_first(question_file, own):
    task = TaskConfig(name="mine", path=str(question_file), limit=2 if own else None)
    evaluate = EvaluateConfig(limit=3 if own else 2)
    assert run_task(Live(), task, evaluate, seed=1)["mine"]["num_samples"] == 2


def test_local_winogrande_has_lm_evals_prompts_and_shots(tmp_path):
    other = {**WINOGRANDE, "instruction": WINOGRANDE["instruction"].replace("cake", "pie")}
    path = write_json(tmp_path / "w.json", [WINOGRANDE, other])
    live = Live()
    scores = run_task(live, TaskConfig(name="wino", num_fewshot=1, path=str(path)), EvaluateConfig(), seed=1)["wino"]
    texts = [bytes(option.tokens).decode() for option in live.asked]
    cake, pie = (f"Ann gave Bo a {word}, so Bo was glad." for word in ("cake", "pie"))
    assert f"{pie}\n\nAnn gave Bo a cake, so Ann was glad." in texts[0] + texts[1]
    assert f"{cake}\n\nAnn gave Bo a pie, so Bo was glad." in texts[2] + texts[3]
    assert scores["num_fewshot"] == 1 and set(scores["metrics"]) == {"acc"}


def test_local_arc_and_mmlu(tmp_path):
    arc = run_task(Live(), TaskConfig(name="arc", path=str(write_json(tmp_path / "a.json", [ARC, ARC]))),
                   EvaluateConfig(), seed=1)["arc"]
    assert set(arc["metrics"]) == {"acc", "acc_norm"} and arc["num_samples"] == 2
    live = Live()
    mmlu = run_task(live, TaskConfig(name="mmlu", num_fewshot=1, path=str(write_mmlu(tmp_path / "mmlu"))),
                    EvaluateConfig(), seed=1)["mmlu"]
    text = bytes(live.asked[3].tokens).decode()
    assert text.startswith("The following are multiple choice questions (with answers) about anatomy.")
    assert text.count("Which, if any?") == 2 and text.endswith("Answer: D")
    assert (mmlu["num_samples"], mmlu["num_fewshot"], mmlu["metrics"]["acc"]["value"]) == (1, 1, 0.0)


@pytest.mark.parametrize(("tasks", "more", "error", "found"), [
    ([TaskConfig(name="winogrand")], {}, ConfigError, "unknown task.*winogrand.*evaluate.tasks"),
    ([TaskConfig(name="a", path="x"), TaskConfig(name="a")], {}, ConfigError, "a task twice.*found a"),
    ([TaskConfig(name="a", path="/not/there")], {}, DataError, "/not/there.*evaluate.tasks"),
    ([TaskConfig(name="winogrande")], {"harness_dir": "/not/there"}, ConfigError, "/not/there.*evaluate.harness_dir"),
])
def test_bad_tasks_are_refused(tasks, more, error, found):
    with pytest.raises(error, match=found):
        check_tasks(EvaluateConfig(tasks=tasks, **more))


def test_no_shots_before_contexts(question_file):
    with pytest.raises(ConfigError, match="5 for mine"):
        check_tasks(EvaluateConfig(tasks=[TaskConfig(name="mine", path=str(question_file), num_fewshot=5)]))


def test_code_is_not_run_unasked():
    with pytest.raises((ConfigError, DataError), match=r"evaluate\.(allow_code|tasks)"):
        run_task(Live(), TaskConfig(name="humaneval"), EvaluateConfig(), seed=1)


def test_a_score_depends_on_questions_shots_limit_and_seed(question_file):
    task, evaluate = TaskConfig(name="mine", path=str(question_file)), EvaluateConfig()
    before = task_key(task, evaluate, 1)
    assert before == task_key(TaskConfig(name="mine", path=str(question_file), metric="acc"), evaluate, 1)
    changed = [task_key(TaskConfig(name="mine", path=str(question_file), num_fewshot=1), evaluate, 1),
               task_key(TaskConfig(name="mine", path=str(question_file), limit=1), evaluate, 1),
               task_key(task, EvaluateConfig(add_bos=True), 1), task_key(task, evaluate, 2),
               task_key(task, EvaluateConfig(limit=2), 1)]
    question_file.write_text(json.dumps([QUESTION]))
    assert len({before, *changed, task_key(task, evaluate, 1)}) == 7
