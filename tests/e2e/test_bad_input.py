"""Every mistake ends with exit code 2 and one line that names the file or key; nothing is left half-written."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch

from nemo_minitron.data.tokenizer import train_bpe
from tests.e2e.command import Inputs, manifests, run


def check_refused(finished, *names):
    """Exit code 2 and one line that has all of `names`."""
    assert finished.code == 2, finished
    (line,) = finished.stderr.splitlines()
    assert line.startswith("minitron: ") and all(str(name) in line for name in names), line


def check_nothing_half_written(output_dir, *done):
    """Only the stages `done` have a manifest, and no checkpoint is left in parts."""
    run_dir = output_dir / "tiny"
    assert sorted(manifests(run_dir)) == sorted(done)
    assert not list(output_dir.rglob("*.partial")) and not list(output_dir.rglob("*.safetensors.*"))


@pytest.fixture
def teacher(inputs: Inputs, tmp_path: Path) -> Path:
    """A copy of the teacher to be spoilt."""
    shutil.copytree(inputs.teacher, tmp_path / "teacher")
    return tmp_path / "teacher"


def change_config(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def split_in_two(directory: Path) -> None:
    """Store the teacher as two shards and an index."""
    tensors = safetensors.torch.load_file(directory / "model.safetensors")
    weight_map = {}
    for i, name in enumerate(tensors):
        weight_map[name] = f"model-{i % 2 + 1:05d}-of-00002.safetensors"
    for file in set(weight_map.values()):
        part = {name: tensor for name, tensor in tensors.items() if weight_map[name] == file}
        safetensors.torch.save_file(part, directory / file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (directory / "model.safetensors").unlink()


def remove_shard(directory: Path) -> str:
    split_in_two(directory)
    (directory / "model-00002-of-00002.safetensors").unlink()
    return "model-00002-of-00002.safetensors"


def truncate(directory: Path) -> str:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    return "model.safetensors"


def truncate_header(directory: Path) -> str:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    return "model.safetensors"


def remove_weights(directory: Path) -> str:
    (directory / "model.safetensors").unlink()
    return "model.safetensors"


def remove_all(directory: Path) -> str:
    shutil.rmtree(directory)
    return str(directory)


def make_gpt2(directory: Path) -> str:
    change_config(directory, model_type="gpt2")
    return "config.json; expected model_type llama or mistral or nemotron or qwen2 or qwen3; found 'gpt2'"


def make_contradictory(directory: Path) -> str:
    change_config(directory, num_key_value_heads=3)
    return "config.json: bad architecture; expected num_attention_heads to be a multiple of num_query_groups"


def break_config(directory: Path) -> str:
    path = directory / "config.json"
    path.write_text(path.read_text()[:50])
    return "config.json"


SPOILT_TEACHERS = [remove_all, remove_shard, truncate, truncate_header, remove_weights, make_gpt2, make_contradictory,
                   break_config]


@pytest.mark.parametrize("spoil", SPOILT_TEACHERS)
def test_a_teacher_that_cannot_be_used(spoil, teacher, inputs, tmp_path):
    name = spoil(teacher)
    finished = run(inputs.arguments(tmp_path / "outputs", teacher__path=teacher), tmp_path)
    check_refused(finished, name)
    check_nothing_half_written(tmp_path / "outputs")


def test_a_task_file_in_the_wrong_form(inputs, tmp_path):
    task = tmp_path / "task.json"
    good = {"context": "Two and two is", "continuation": [" three", " four"], "answer": 1}
    task.write_text(json.dumps([good, {**good, "answer": 2}]))
    tasks = f"[{{name: mine, path: {task}}}]"
    finished = run(inputs.arguments(tmp_path / "outputs", evaluate__tasks=tasks), tmp_path)
    check_refused(finished, f"row 2 of {task}", "an index from 0 to 1", "evaluate.tasks")
    check_nothing_half_written(tmp_path / "outputs")


MISTAKES = {
    "target too large": ({"prune.target.ffn_hidden_size": 65}, "prune.target.ffn_hidden_size"),
    "no target": ({"prune.target.ffn_hidden_size": None, "prune.target.hidden_size": None}, "prune.target"),
    "too many tensor ranks for the groups": ({"parallel.tp": 4}, "parallel.tp"),
    "tensor ranks that do not divide the heads": ({"parallel.tp": 3}, "parallel.tp"),
    "tensor ranks that do not divide the target":
        ({"parallel.tp": 2, "prune.target.ffn_hidden_size": 41}, "parallel.tp"),
    "more pipeline stages than layers": ({"parallel.pp": 5}, "parallel.pp"),
    "more pipeline stages than layers of the target":
        ({"parallel.pp": 2, "prune.target.num_layers": 1}, "parallel.pp"),
    "heads that do not spread over the groups":
        ({"prune.target.num_attention_heads": 3}, "prune.target.num_attention_heads"),
    "a size and a ratio": ({"prune.ratio.hidden_size": 0.5}, "prune.ratio.hidden_size"),
    "a ratio above one": ({"prune.ratio.num_layers": 1.5}, "prune.ratio.num_layers"),
    "a budget that cannot be met": ({"prune.budget.num_parameters": 100}, "prune.budget"),
    "two budgets": ({"prune.budget.num_parameters": 0.5, "prune.budget.num_non_embedding_parameters": 0.5},
                    "prune.budget"),
    "a layer twice": ({"prune.layers.drop": "[1,1]"}, "prune.layers.drop"),
    "a layer out of range": ({"prune.layers.drop": "[4]"}, "prune.layers.drop"),
    "a metric that is not collected":
        ({"prune.target.num_layers": 3, "prune.layers.by": "loss"}, "importance.depth.metrics=[loss]"),
    "an order that is not collected":
        ({"prune.target.num_layers": 3, "prune.layers.by": "removal_order"}, "importance.depth.iterative"),
    "a block as long as the model":
        ({"importance.depth.metrics": "[loss]", "importance.depth.block_lengths": "[4]"},
         "importance.depth.block_lengths"),
    "accuracy without questions": ({"importance.depth.metrics": "[accuracy]"}, "importance.depth.task"),
    "a task file that is none": ({"importance.depth.metrics": "[accuracy]", "importance.depth.task": "nowhere.json"},
                                 "importance.depth.task"),
    "a task to score that is none": ({"evaluate.tasks": "[{name: mine, path: nowhere.json}]"}, "evaluate.tasks"),
    "an unknown method": ({"importance.method": "luck"}, "importance.method"),
    "an unknown norm": ({"importance.norms": "[last]"}, "importance.norms"),
    "batch that does not divide": ({"train.global_batch_size": 5}, "train.global_batch_size"),
    "samples longer than the context": ({"data.seq_length": 65}, "data.seq_length"),
    "unknown key": ({"prune.target.ffn_size": 40}, "ffn_size"),
    "unknown choice": ({"data": "nope"}, "'nope'"),
    "unknown key with a plus": ({"+prune.target.ffn_size": 40}, "prune.target.ffn_size"),
    "text for a number": ({"train.global_batch_size": "many"}, "train.global_batch_size"),
    "a list for a number": ({"distill.tokens": "[1,2]"}, "distill.tokens"),
    "a number for a node": ({"prune": 3}, "prune"),
    "zero tokens": ({"distill.tokens": 0}, "distill.tokens"),
    "zero tensor ranks": ({"parallel.tp": 0}, "parallel.tp"),
    "unknown stage": ({"stages": "[score,prunes]"}, "prunes"),
    "unknown control": ({"controls": "[random]"}, "random"),
    "unknown precision": ({"train.precision": "fp8"}, "train.precision"),
    "no teacher": ({"teacher.path": "null"}, "teacher.path"),
    "unknown experiment": ({"experiment": "nope"}, "nope"),
    "name that is a path": ({"name": "a/b"}, "(change name)"),
    "syntax of a list": ({"stages": "[score"}, "'stages=[score'"),
    "input not there": ({"stages": "[prune]"}, "score"),
    "negative warm-up": ({"optim.warmup_steps": -1}, "optim.warmup_steps"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_recipe_that_cannot_be(mistake, inputs, tmp_path):
    changes, name = MISTAKES[mistake]
    finished = run(inputs.arguments(tmp_path / "outputs", **changes), tmp_path)
    check_refused(finished, name)
    assert "== " not in finished.stdout, "found before anything starts"
    check_nothing_half_written(tmp_path / "outputs")


@pytest.mark.parametrize(("words", "name"), [(["trian"], "trian"), (["run", "experimental"], "experimental"),
                                             (["data.path"], "data.path"), (["run", "=3"], "=3")])
def test_words_that_mean_nothing(words, name, tmp_path):
    check_refused(run(words, tmp_path), name)
    assert not list(tmp_path.iterdir())


BAD_TEXTS = {"empty.txt": b"", "blank.txt": b" \n\t", "binary.txt": b"text\0text", "latin1.txt": b"caf\xe9",
             "folder/data.json": b"{}", "folder/.hidden.txt": b"text"}


@pytest.mark.parametrize("name", [*BAD_TEXTS, "nowhere"])
def test_text_that_cannot_be_used(name, inputs, tmp_path):
    path = tmp_path / name
    if name in BAD_TEXTS:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(BAD_TEXTS[name])
    path = path.parent if "/" in name else path
    finished = run(inputs.arguments(tmp_path / "outputs", data__path=path, stages="[initialize]"), tmp_path)
    check_refused(finished, path, "data.path")
    check_nothing_half_written(tmp_path / "outputs")


def test_text_that_one_of_two_ranks_finds_bad(inputs, tmp_path):
    path = tmp_path / "binary.txt"
    path.write_bytes(BAD_TEXTS[path.name])
    finished = run(inputs.arguments(tmp_path / "outputs", data__path=path, parallel__tp=2), tmp_path)
    check_refused(finished, path, "data.path")
    check_nothing_half_written(tmp_path / "outputs")


def test_a_tokenizer_larger_than_the_vocabulary(teacher, inputs, tmp_path):
    texts = [path.read_text() for path in inputs.text.glob("*.txt")]
    assert train_bpe(texts, teacher, vocab_size=310) == 310
    finished = run(inputs.arguments(tmp_path / "outputs", teacher__path=teacher), tmp_path)
    check_refused(finished, "tokenizer", 310, 300, "teacher.path")
    check_nothing_half_written(tmp_path / "outputs")


def test_too_few_calibration_samples(inputs, tmp_path):
    finished = run(inputs.arguments(tmp_path / "outputs", importance__num_samples=100_000), tmp_path)
    check_refused(finished, "importance.num_samples")
    check_nothing_half_written(tmp_path / "outputs")


def test_a_warm_up_longer_than_the_training(halfway, inputs):
    finished = run(inputs.arguments(halfway / "outputs", optim__warmup_steps=40), halfway)
    check_refused(finished, "optim.warmup_steps")
    check_nothing_half_written(halfway / "outputs", "score", "prune")


@pytest.mark.parametrize(("name", "text"), [
    ("commands.json", '[{"comm'), ("commands.json", "3"), ("round1/distill/manifest.json", ""),
    ("round1/distill/manifest.json", '{"stage": "distill"}'), ("round1/prune/manifest.json", "[]"),
])
def test_a_file_of_ours_that_is_broken(name, text, a_run, inputs, tmp_path):
    (a_run / name).write_text(text)
    before = manifests(a_run)
    finished = run(inputs.arguments(tmp_path / "outputs"), tmp_path)
    check_refused(finished, a_run / name)
    assert (a_run / name).read_text() == text and manifests(a_run) == before


def test_fewer_calibration_samples_than_asked_for(inputs, tmp_path):
    finished = run(inputs.arguments(tmp_path / "outputs", importance__num_samples=100000), tmp_path)
    check_refused(finished, "100000 samples", "in the calibration text", "importance.num_samples")
    check_nothing_half_written(tmp_path / "outputs")


def test_scores_of_another_model(a_run, teacher, inputs, tmp_path):
    tensors = safetensors.torch.load_file(teacher / "model.safetensors")
    tensors["model.norm.weight"] += 1
    safetensors.torch.save_file(tensors, teacher / "model.safetensors", metadata={"format": "pt"})
    finished = run(inputs.arguments(tmp_path / "other", teacher__path=teacher, stages="[prune]",
                                    prune__scores=a_run / "round1" / "score"), tmp_path)
    check_refused(finished, "scores are of another model", "prune.scores")
    check_nothing_half_written(tmp_path / "other")


def test_scores_with_nan(a_run, inputs, tmp_path):
    path = a_run / "round1" / "score" / "scores.safetensors"
    tensors = safetensors.torch.load_file(path)
    tensors["ffn.mean.sum"][0, 0] = float("nan")
    safetensors.torch.save_file(tensors, path)
    header = path.with_name("scores.json")
    change = json.loads(header.read_text()) | {"tensors_digest": hashlib.sha256(path.read_bytes()).hexdigest()}
    header.write_text(json.dumps(change))
    finished = run(inputs.arguments(tmp_path / "other", stages="[prune]", prune__scores=path.parent), tmp_path)
    check_refused(finished, "ffn.mean.sum", "NaN")
    check_nothing_half_written(tmp_path / "other")


def test_an_output_directory_that_is_a_file(inputs, tmp_path):
    (tmp_path / "outputs").write_text("")
    check_refused(run(inputs.arguments(tmp_path / "outputs"), tmp_path), tmp_path / "outputs", "output_dir")
