"""A trained model through the whole command on packed conversations: scored, cut, and distilled on their answers."""

import json
import os
from pathlib import Path

import pytest

from tests.e2e.command import ROOT, run_well, summary
from tests.support.chats import conversations, write_conversations

STORIES = Path(os.environ.get("MINITRON_SHARED", ROOT.parent / "shared" / "data")) / "stories260K-hf"
PLAIN = ("{{ bos_token }}{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}{{ eos_token }}\n"
         "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}")
STEPS, BATCH, SEQ_LENGTH = 20, 4, 128


def distilled_steps(run_dir):
    lines = (run_dir / "round1" / "distill" / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if "kl" in record]


@pytest.mark.skipif(not STORIES.is_dir(), reason="needs stories260K-hf in the folder that MINITRON_SHARED names")
def test_distillation_on_packed_conversations(inputs, tmp_path):
    """With relations of attention as a second loss; the same with two replicas and a teacher split over both."""
    chat = write_conversations(tmp_path / "chat.jsonl", conversations(120))
    (tmp_path / "plain.jinja").write_text(PLAIN)
    entries = {}
    for name, layout in (("one", {}), ("two", {"parallel__dp": 2, "distill__teacher__tp": 2})):
        run_well(inputs.arguments(
            tmp_path / name, teacher__path=STORIES, data__path=chat, data__kind="chat", data__packing="documents",
            data__chat_template=tmp_path / "plain.jinja", data__seq_length=SEQ_LENGTH, data__num_heldout=12,
            importance__num_samples=8, prune__target__hidden_size=48, prune__target__ffn_hidden_size=120,
            distill__tokens=STEPS * BATCH * SEQ_LENGTH, distill__intermediate__terms="[{state: attention}]",
            train__log_every_steps=1, train__eval_every_steps=0, optim__lr=0.004, **layout), tmp_path)
        (entries[name],) = summary(tmp_path / name / "tiny")["rounds"]
    one, two = (entries[name] for name in ("one", "two"))
    assert one["distilled"]["loss"] < one["pruned"]["loss"] - 0.5
    assert 0 < one["distilled"]["tokens"] < STEPS * BATCH * SEQ_LENGTH  # those of answers alone
    for model in ("teacher", "pruned", "distilled"):
        assert two[model]["loss"] == pytest.approx(one[model]["loss"], abs=1e-4), model
    steps = distilled_steps(tmp_path / "one" / "tiny")
    assert len(steps) == STEPS and steps[-1]["kl"] < steps[0]["kl"]
    for mine, other in zip(steps, distilled_steps(tmp_path / "two" / "tiny"), strict=True):
        assert mine.keys() >= {"intermediate", "alpha"}
        for key in ("kl", "ce", "teacher_ce", "intermediate", "tokens"):
            assert other[key] == pytest.approx(mine[key], rel=1e-3), (key, mine["step"])
