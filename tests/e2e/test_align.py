"""The distilled student tuned on conversations, then on its teacher's answers: trained, measured, killed, refused."""

import itertools
import json
import shutil
import time

import pytest
import transformers

from tests.e2e.command import run, run_well, start, summary
from tests.support.chats import conversation, conversations, write_conversations

TEMPLATE = ("{{ bos_token }}{% for message in messages %}{{ message['role'][0] }}:{{ message['content'] }}"
            "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}a:{% endif %}")
STAGES = "[score,prune,generate,distill,align,evaluate,report]"
STEPS = {"chat": 40, "sdg": 50}
BATCH, SEQ_LENGTH = 4, 48


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    """A folder with conversations, prompts and a template."""
    folder = tmp_path_factory.mktemp("chat")
    write_conversations(folder / "chat.jsonl", conversations(80))
    words = ("the small red", "a cat saw", "it was happy and", "the old dog ran", "then a bird", "was under the tree")
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"{word} {more}"}) + "\n"
                                                  for word in words for more in ("the", "a", "it", "and")))
    (folder / "template.jinja").write_text(TEMPLATE)
    return folder


def arguments(inputs, chat, output_dir, **changes):
    tokens = {name: steps * BATCH * SEQ_LENGTH for name, steps in STEPS.items()}
    phases = f"[{{name: chat, path: chat.jsonl}}, {{name: sdg, source: generate, tokens: {tokens['sdg']}, lr: 0.001}}]"
    recipe = {"stages": STAGES, "align__path": chat, "align__chat_template": chat / "template.jinja",
              "align__seq_length": SEQ_LENGTH, "align__tokens": tokens["chat"], "align__lr": 0.004,
              "align__num_heldout": 3, "align__phases": phases, "train__log_every_steps": 5,
              "generate__prompts": chat / "prompts.jsonl", "generate__max_new_tokens": 36, "generate__stop": "['.']"}
    return inputs.arguments(output_dir, **(recipe | changes))


@pytest.fixture(scope="module")
def aligned(inputs, chat, undisturbed, tmp_path_factory):
    """The folder of a whole run with an alignment, and how its command ended."""
    outputs = tmp_path_factory.mktemp("aligned") / "outputs"
    shutil.copytree(undisturbed[0].parent, outputs)
    finished = run_well(arguments(inputs, chat, outputs), outputs.parent)
    assert "already done: score, prune, distill" in finished.stdout
    return outputs / "tiny", finished


def metrics(run_dir):
    return [json.loads(line) for line in (run_dir / "round1" / "align" / "metrics.jsonl").read_text().splitlines()]


def test_the_loss_on_answers_falls(aligned):
    run_dir, finished = aligned
    steps = [line for line in metrics(run_dir) if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, sum(STEPS.values()) + 1))
    assert [line["phase"] for line in steps] == [name for name, count in STEPS.items() for _ in range(count)]
    assert all(before["tokens"] < after["tokens"] for before, after in itertools.pairwise(steps))
    first = [line["loss"] for line in steps if line["phase"] == "chat"]
    assert first[-1] < first[0] - 1.0
    assert max(line["lr"] for line in steps if line["phase"] == "sdg") == pytest.approx(0.001)
    (entry,) = summary(run_dir)["rounds"]
    before, after = entry["distilled"]["answers"], entry["aligned"]["answers"]
    assert after["chat"]["loss"] < before["chat"]["loss"] - 0.5
    assert after["chat"]["num_tokens"] == before["chat"]["num_tokens"] > 0
    assert after["sdg"]["loss"] < before["sdg"]["loss"]
    assert f"{after['chat']['loss']:.4f} nats/token of answers (chat)" in finished.stdout


def test_what_is_written(aligned):
    """An ordinary model with its template; tokens are those of answers; the page and the card say what it is."""
    run_dir, _ = aligned
    folder = run_dir / "round1" / "align"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "checkpoint")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "checkpoint")
    assert tokenizer.chat_template == TEMPLATE and model.config.hidden_size == 24
    (entry,) = summary(run_dir)["rounds"]
    assert entry["aligned"]["path"].endswith("round1/align/checkpoint")
    assert 0 < entry["aligned"]["tokens"] < sum(STEPS.values()) * BATCH * SEQ_LENGTH
    assert entry["aligned"]["loss"] > entry["teacher"]["loss"] and entry["recovery"] is not None
    page = (run_dir / "report.html").read_text()
    assert "Alignment: cross-entropy of answers" in page and "sdg" in page
    assert "held-out loss on answers, chat" in (folder / "checkpoint" / "README.md").read_text()
    assert not list(folder.rglob("resume")) and not (folder / "sdg" / "checkpoint").exists()


def test_the_teachers_answers_are_the_conversations(aligned):
    """All that were finished and say something, as they stand; none that was cut off or is empty."""
    run_dir, _ = aligned
    answers = [json.loads(line) for line in (run_dir / "round1/generate/answers.jsonl").read_text().splitlines()]
    taken = (run_dir / "round1/align/sdg/conversations.jsonl").read_text().splitlines()
    finished = [row for row in answers if row["finished"]]
    assert len(answers) == 24 and 4 <= len(taken) < len(finished)
    assert [json.loads(line)["messages"] for line in taken] == [
        [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["answer"]}]
        for row in finished if row["answer"].strip()]


def test_a_killed_alignment_ends_with_the_same_weights(inputs, chat, aligned, undisturbed, tmp_path):
    """Killed in its second training, it neither repeats the first nor starts the second anew."""
    shutil.copytree(undisturbed[0].parent, tmp_path / "outputs")
    command = arguments(inputs, chat, tmp_path / "outputs")
    process = start(command, tmp_path)
    folder, deadline = tmp_path / "outputs/tiny/round1/align", time.monotonic() + 120
    try:
        while not list(folder.glob("sdg/resume/step_*/complete.json")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        process.kill()  # its ranks end with it
    process.communicate()
    assert not (folder / "manifest.json").exists()
    finished = run_well(command, tmp_path)
    assert "[align/sdg] going on from step" in finished.stdout and "[align/chat] step" not in finished.stdout
    whole = aligned[0] / "round1" / "align"
    for name in ("checkpoint/model.safetensors", "chat/checkpoint/model.safetensors"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name
    kept = [[{key: line[key] for key in ("step", "tokens", "loss") if key in line} for line in metrics(run_dir)]
            for run_dir in (tmp_path / "outputs/tiny", aligned[0])]
    assert kept[0] == kept[1]
    again = run_well(command, tmp_path)
    assert "already done: score, prune, generate, distill, align, evaluate, report" in again.stdout


NO_ROLES = json.dumps({"messages": [{"content": "hello"}]})
MISTAKES = {
    "no path": ({"align__path": None, "align__phases": None}, "align.path"),
    "a missing file": ({"align__phases": "[{name: a, path: nowhere.jsonl}]"}, "nowhere.jsonl", "align.phases[0].path"),
    "a chat without roles": ({"align__path": "bad.jsonl", "align__phases": None}, '"role"', "line 1", "align.path"),
    "no template": ({"align__chat_template": None}, "align.chat_template"),
    "a missing template": ({"align__chat_template": "nowhere.jinja"}, "nowhere.jinja", "align.chat_template"),
    "no stage generate": ({"stages": "[score,prune,distill,align]"}, "expected generate among the stages"),
    "a model that is not there": ({"align__model": "nowhere"}, "nowhere"),
    "an unknown source": ({"align__source": "teacher"}, "align.source"),
    "samples longer than the context": ({"align__seq_length": 65}, "align.phases[0].seq_length"),
    "all held out": ({"align__num_heldout": 80}, "align.num_heldout"),
    "a long warm-up": ({"align__warmup_steps": 40}, "align.phases[0].warmup_steps"),
    "a batch that does not divide": ({"align__global_batch_size": 5}, "align.phases[0].global_batch_size"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_recipe_that_cannot_be(mistake, inputs, chat, tmp_path):
    """One line names the key, before anything starts."""
    (tmp_path / "bad.jsonl").write_text(f"{NO_ROLES}\n{json.dumps({'messages': conversation('a', 'b')})}\n")
    changes, *names = MISTAKES[mistake]
    finished = run(arguments(inputs, chat, tmp_path / "outputs", **changes), tmp_path)
    assert finished.code == 2, finished
    (line,) = finished.stderr.splitlines()
    assert all(name in line for name in names), line
    assert "== " not in finished.stdout
