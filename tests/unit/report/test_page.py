"""The page against a synthetic outputs directory whose numbers are known."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from nemo_minitron.arch import ArchSpec
from nemo_minitron.artifacts import Manifest, Plan, write_json
from nemo_minitron.errors import UserError
from nemo_minitron.importance.scores import Scores, tensor_shapes
from nemo_minitron.report.page import write_report

NB = "\u00a0"
HELDOUT_TOKENS = 262_144
SOURCE = ArchSpec(family="llama", num_layers=6, hidden_size=192, ffn_hidden_size=512, num_attention_heads=6,
                  num_query_groups=2, head_dim=32, vocab_size=2048, tied_embeddings=True)
TARGET = ArchSpec(family="llama", num_layers=5, hidden_size=144, ffn_hidden_size=320, num_attention_heads=6,
                  num_query_groups=2, head_dim=32, vocab_size=2048, tied_embeddings=True)


def model(arch: ArchSpec, loss: float | None, tokens: float | None = None) -> dict:
    seconds = None if tokens is None else tokens / 40_000
    return {"path": "somewhere", "loss": loss, "num_parameters": arch.num_parameters(),
            "num_non_embedding_parameters": arch.num_non_embedding_parameters(), "tokens": tokens,
            "seconds": seconds, "tokens_per_s": None if tokens is None else 40_000.0}


def summary(name: str, *, controls: bool) -> dict:
    ran = {"scratch": model(TARGET, 2.155, 8e6), "ce": model(TARGET, 1.875, 8e6)} if controls else {}
    return {"name": name, "heldout_tokens": HELDOUT_TOKENS, "heldout_bytes": None, "rounds": [{
        "name": "r1", "teacher": model(SOURCE, 1.555), "pruned": model(TARGET, 4.055),
        "distilled": model(TARGET, 1.8049, 8e6), "controls": ran, "recovery": 0.90004, "excess": 0.2499,
        "excess_vs_scratch": 0.4165 if controls else None}]}


def build_outputs(root: Path, *, name: str = "demo", controls: bool = True) -> Path:
    """outputs/NAME as the stages leave it."""
    directory = root / "demo"
    directory.mkdir(parents=True)
    (directory / "config.yaml").write_text("name: demo\nprune:\n  target: '<b>half</b>'\n")
    write_json(directory / "commands.json", [
        {"command": ["minitron", "experiment=demo", "note=two words"], "started": "2026-01-02T03:04:05+00:00"}])
    write_json(directory / "summary.json", summary(name, controls=controls))
    round_dir = directory / "r1"
    build_scores_and_plan(round_dir)
    seconds = {"score": 12.25, "prune": 1.5, "distill": 200.0} | ({"ce": 150.0, "scratch": 150.0} if controls else {})
    for index, (stage, taken) in enumerate(seconds.items()):
        Manifest(stage=stage, fingerprint="f", inputs={}, config={}, versions={"torch": "2.13.0", "numpy": "2.4"},
                 world={"tp": 2, "pp": 1, "dp": 1, "world_size": 1 if stage == "prune" else 2, "threads": 1},
                 times={"started": 1_767_000_000 + 600 * index, "seconds": taken},
                 result={"tokens_per_s": 12_345.6} if stage == "score" else {}).write(round_dir / stage)
        if stage in ("distill", "ce", "scratch"):
            build_metrics(round_dir / stage, stage)
    return directory


def build_scores_and_plan(round_dir: Path) -> None:
    rng = np.random.default_rng(0)
    shapes = tensor_shapes(SOURCE)
    tensors = {}
    for axis in ("hidden", "ffn"):
        per_sample = rng.lognormal(0, 0.8, shapes[f"{axis}.mean.sum"])
        tensors[f"{axis}.mean.sum"], tensors[f"{axis}.mean.sum_of_squares"] = 64 * per_sample, 64 * per_sample**2
    tensors["layers.block_influence"] = np.array([0.61, 0.22, 0.14, 0.05, 0.09, 0.33])
    Scores(source=SOURCE, num_samples=64, samples_digest="s", source_digest="w", measures={},
           tensors=tensors).save(round_dir / "score")
    layers = (0, 1, 2, 4, 5)
    ffn = np.argsort(-tensors["ffn.mean.sum"], axis=1)[:, :320]
    hidden = np.argsort(-tensors["hidden.mean.sum_of_squares"].sum(0))[:144]
    plan = Plan(source=SOURCE, target=TARGET, layers=layers, hidden=tuple(sorted(hidden.tolist())),
                ffn=tuple(tuple(sorted(ffn[layer].tolist())) for layer in layers),
                heads=tuple(tuple(range(6)) for _ in layers), groups=tuple(tuple(range(2)) for _ in layers))
    write_json(round_dir / "prune" / "plan.json", plan.to_dict())


def build_metrics(directory: Path, stage: str) -> None:
    rng = np.random.default_rng(len(stage))
    end, start = {"distill": (1.80, 4.0), "ce": (1.875, 4.0), "scratch": (2.15, 7.6)}[stage]
    lines = []
    for step in range(1, 501):
        ce = end + (start - end) * math.exp(-step / 60) + 0.04 * rng.standard_normal()
        line = {"step": step, "tokens": step * 16_000, "loss": ce, "ce": ce, "lr": 1e-3, "grad_norm": 1.0,
                "tokens_per_s": 4e4, "seconds": 0.4}
        if stage == "distill":
            kl = 0.2 + 2 * math.exp(-step / 60)
            line |= {"loss": kl, "kl": kl, "teacher_ce": 1.5, "agreement": 0.8125}
        lines.append(line)
        if step % 50 == 0:
            extra = {"heldout_kl": 0.22 + 2 * math.exp(-step / 60)} if stage == "distill" else {}
            lines.append({"step": step, "tokens": step * 16_000,
                          "heldout_ce": end + 0.005 + (start - end) * math.exp(-step / 60), **extra})
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


class Checker(HTMLParser):
    """Collects visible text and insists that every element is closed in order."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(key, value or "") for key, value in attrs]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.words.append(data)


def check(path: Path) -> Checker:
    checker = Checker()
    checker.feed(path.read_text(encoding="utf-8"))
    checker.close()
    assert checker.open == []
    return checker


def table_rows(path: Path) -> list[list[str]]:
    """All table rows of the page as lists of cell texts."""

    class Rows(HTMLParser):
        rows: list[list[str]]
        cell: bool = False

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            if tag == "tr":
                self.rows.append([])
            elif tag in ("td", "th"):
                self.rows[-1].append("")
                self.cell = True

        def handle_endtag(self, tag: str) -> None:
            self.cell = self.cell and tag not in ("td", "th")

        def handle_data(self, data: str) -> None:
            if self.cell:
                self.rows[-1][-1] += data

    parser = Rows()
    parser.rows = []
    parser.feed(path.read_text(encoding="utf-8"))
    return parser.rows


def test_headline_figures_and_losses(tmp_path: Path) -> None:
    path = write_report(build_outputs(tmp_path))
    said = "".join(check(path).words)
    assert path.name == "report.html"
    assert (f"Pruned from 2.76{NB}M to 1.36{NB}M parameters (45% of non-embedding), distilled on 8.00{NB}M tokens: "
            "held-out loss 1.805 nats/token (teacher 1.555, just pruned 4.055).") in said
    assert "90.0%" in said
    assert "+0.250 nats/token" in said
    assert "0.416" in said
    assert "the same 262,144 held-out tokens" in said
    rows = {row[0]: row[1:] for row in table_rows(path)}
    assert rows["teacher"][:3] == ["1.555", "\u2013", "4.74"]
    assert rows["distilled"] == ["1.805", "+0.250", "6.08", f"1.36{NB}M", f"1.06{NB}M", f"8.00{NB}M",
                                 f"3{NB}min{NB}20{NB}s", "40,000"]
    assert rows["from scratch"][:2] == ["2.155", "+0.600"]
    assert rows["CE control"][:2] == ["1.875", "+0.320"]


def test_architecture_and_times(tmp_path: Path) -> None:
    rows = {row[0]: row[1:] for row in table_rows(write_report(build_outputs(tmp_path)))}
    assert rows["layers"] == ["6", "5", "\u221216.7%"]
    assert rows["hidden size"] == ["192", "144", "\u221225.0%"]
    assert rows["head dim"] == ["32", "32", "same"]
    assert rows["parameters"][0] == f"{SOURCE.num_parameters():,}"
    assert rows["non-embedding"][1] == f"{TARGET.num_non_embedding_parameters():,}"
    assert rows["score"] == [f"12.2{NB}s", "2%", "2", "2 \u00d7 1 \u00d7 1", "1", "12,346", "2025-12-29 09:20 UTC"]
    assert rows["prune"][2:4] == ["1", "\u2013"]
    assert rows["distill"][-2] == "40,000"
    assert rows["total"][0] == f"8{NB}min{NB}34{NB}s"
    assert rows["torch"] == ["2.13.0"]


def test_figures_are_drawn_from_the_files(tmp_path: Path) -> None:
    path = write_report(build_outputs(tmp_path))
    page, said = path.read_text(encoding="utf-8"), "".join(check(path).words)
    assert "layer 3, cut: 0.05" in said
    assert "layer 0, kept: 0.61" in said
    assert "Layers cut: 1 of 6." in said
    assert "62.5% of the channels kept" in said
    assert "144 of 192 channels are kept" in said
    assert "Training curves are means over 5 consecutive steps." in said
    assert "the table and the teacher's line cover all of them." in said
    assert "agree on the most likely token for 81.2% of the training tokens" in said
    assert f"distilled, held-out: nats/token 1.806 at 8.00{NB}M training tokens" in said
    # Six charts, each wide and narrow: ladder, cross-entropy, KL, layers, FFN, hidden.
    assert page.count('class="chart wide"') == page.count('class="chart narrow"') == 6
    assert not [value for key, value in check(path).attributes if key in ("x", "y", "points", "width", "height")
                and ("nan" in value or "inf" in value or (key in ("width", "height") and value.startswith("-")))]


def test_missing_controls_name_the_command(tmp_path: Path) -> None:
    path = write_report(build_outputs(tmp_path, controls=False))
    rows = {row[0]: row[1:] for row in table_rows(path)}
    assert rows["CE control"] == rows["from scratch"] == ["not run; make controls adds it"]
    assert "needs the scratch control: make controls." in "".join(check(path).words)


def test_everything_is_escaped(tmp_path: Path) -> None:
    evil = "<script>alert('x')</script>\"&"
    path = write_report(build_outputs(tmp_path, name=evil))
    checker = check(path)
    assert "script" not in checker.tags
    assert "b" not in checker.tags
    assert evil in checker.words
    assert "minitron experiment=demo 'note=two words'  # 2026-01-02T03:04:05+00:00" in checker.words


def test_page_stands_alone(tmp_path: Path) -> None:
    path = write_report(build_outputs(tmp_path))
    checker, page = check(path), path.read_text(encoding="utf-8")
    assert "://" not in page
    assert "@import" not in page
    assert "url(" not in page
    assert not {"script", "link", "img", "iframe"} & set(checker.tags)
    links = [value for key, value in checker.attributes if key in ("href", "src")]
    assert all(value.startswith("#") for value in links)
    assert ("http-equiv", "Content-Security-Policy") in checker.attributes
    assert [entry.name for entry in path.parent.iterdir() if entry.name.startswith(".")] == []


def test_bits_per_byte_where_bytes_are_known(tmp_path: Path) -> None:
    directory = build_outputs(tmp_path)
    data = summary("demo", controls=True) | {"heldout_bytes": 3 * HELDOUT_TOKENS}
    write_json(directory / "summary.json", data)
    rows = {row[0]: row[1:] for row in table_rows(write_report(directory))}
    assert rows["teacher"][3] == f"{1.555 / 3 / math.log(2):.3f}"


def test_several_rounds(tmp_path: Path) -> None:
    directory = build_outputs(tmp_path)
    data = summary("demo", controls=False)
    data["rounds"].append({**data["rounds"][0], "name": "r2"})
    write_json(directory / "summary.json", data)
    checker = check(write_report(directory))
    assert ("href", "#round-1") in checker.attributes
    assert ("id", "round-1") in checker.attributes
    assert "Round r2" in checker.words


@pytest.mark.parametrize("kept", ["nothing", "metrics"])
def test_unfinished_run_still_gives_a_page(tmp_path: Path, kept: str) -> None:
    directory = tmp_path / "demo"
    directory.mkdir()
    if kept == "metrics":
        (directory / "r1" / "distill").mkdir(parents=True)
        (directory / "r1" / "distill" / "metrics.jsonl").write_text(
            '{"step": 1, "tokens": 10, "ce": 3.0, "kl": NaN}\n{"step": 2, "tokens": 20, "ce": 2.5, "kl": 0.5}\n{"st')
    said = "".join(check(write_report(directory)).words)
    assert "config.yaml is missing." in said
    if kept == "metrics":
        assert "r1/distill/metrics.jsonl: 1 lines are not metrics and were left out" in said
        assert "Not pruned yet" in said
        assert "not measured yet" not in said
    else:
        assert "No stage has finished yet." in said


def test_broken_files_are_named(tmp_path: Path) -> None:
    directory = build_outputs(tmp_path)
    (directory / "r1" / "score" / "scores.json").write_text("{}")
    (directory / "r1" / "prune" / "plan.json").write_text("{not json")
    (directory / "r1" / "prune" / "manifest.json").write_text('{"stage": "prune"}')
    said = "".join(check(write_report(directory)).words)
    assert "Not shown: r1/score: cannot read" in said
    assert "Not shown: r1/prune/plan.json: not valid JSON" in said
    assert "Not shown: r1/prune/manifest.json:" in said
    assert "there are no readable scores" in said


def test_no_directory_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no results to report"):
        write_report(tmp_path / "absent")


def test_an_alignment_has_a_row_a_table_and_a_curve(tmp_path: Path) -> None:
    """Losses on answers are a table of their own: those of text are on other tokens."""
    directory = build_outputs(tmp_path, controls=False)
    data = json.loads((directory / "summary.json").read_text())
    entry = data["rounds"][0]
    answers = {"distilled": (3.25, 4.5), "aligned": (1.125, 2.0)}
    entry["aligned"] = model(TARGET, 2.5049, 4e5)
    for name, losses in answers.items():
        entry[name]["answers"] = {phase: {"loss": loss, "num_tokens": 77}
                                  for phase, loss in zip(("code", "chat"), losses, strict=True)}
    write_json(directory / "summary.json", data)
    lines = [{"step": step, "tokens": 100 * step, "loss": 4 - step / 10, "ce": 4 - step / 10} for step in range(1, 21)]
    (directory / "r1" / "align").mkdir()
    (directory / "r1" / "align" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    path = write_report(directory)
    rows = [row for row in table_rows(path) if row[0] in ("distilled", "aligned")]
    assert [row[1:3] for row in rows] == [["1.805", "+0.250"], ["2.505", "+0.950"], ["3.250", "4.500"],
                                          ["1.125", "2.000"]]
    said = "".join(check(path).words)
    assert "Alignment: cross-entropy of answers" in said
    assert "its loss on this text is not what it was tuned for" in said


def test_without_an_alignment_the_page_does_not_speak_of_it(tmp_path: Path) -> None:
    said = "".join(check(write_report(build_outputs(tmp_path))).words)
    assert "lignment" not in said and "aligned" not in said


@pytest.mark.parametrize(("reached", "shown"), [(True, "7.5 times"), (False, "> 7.5 times")])
def test_scratch_on_more_tokens_has_a_figure_a_row_and_a_curve(tmp_path: Path, reached: bool, shown: str) -> None:
    directory = build_outputs(tmp_path)
    data = json.loads((directory / "summary.json").read_text())
    until = model(TARGET, 1.9, 6e7) | {"token_ratio": 7.5, "reached": reached}
    data["rounds"][0]["controls"]["scratch_until"] = until
    write_json(directory / "summary.json", data)
    lines = [{"step": step, "tokens": 1000 * step, "ce": 3 - step / 100} for step in range(1, 101)]
    looks = [{"step": step, "tokens": 1000 * step, "heldout_ce": 3.1 - step / 100} for step in range(10, 101, 10)]
    (directory / "r1" / "scratch_until").mkdir()
    (directory / "r1" / "scratch_until" / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines + looks))
    path = write_report(directory)
    said = "".join(check(path).words)
    assert f"Tokens against scratch{shown}the distillation's tokens" in said
    assert next(row for row in table_rows(path) if row[0] == "scratch, longer")[1:3] == ["1.900", "+0.345"]
    _, _, drawn = said.partition("From scratch, on more tokens")
    assert drawn.startswith("scratch, longer, held-outscratch, longer, trainingdistilled, held-out")
    assert "the table covers all of them" in drawn


def test_the_page_is_written_without_torch() -> None:
    script = ("import sys, nemo_minitron.stages.report\n"
              "assert not {'torch', 'megatron', 'transformers'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", script], check=True)
