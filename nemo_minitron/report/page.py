"""`write_report`: everything under `outputs/NAME` as one self-contained HTML page.

The page needs no network, no JavaScript and no other file; a content security policy in its head says so. It shows
what the stages wrote and computes nothing that they did not, except perplexity, bits per byte and differences.
"""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from nemo_minitron.report import figures, formats, tables
from nemo_minitron.report.beside import beside_section
from nemo_minitron.report.collect import Experiment, ModelFigures, Round, collect
from nemo_minitron.report.markup import Html, join, tag
from nemo_minitron.report.search import family_table, search_section
from nemo_minitron.report.style import CSS
from nemo_minitron.report.task_table import task_table

DEFINITIONS = (
    ("Loss", "Mean cross-entropy in nats per token: the sum over all held-out tokens that are predicted, divided by "
             "their number. Every model sees the same tokens in the same order."),
    ("Perplexity", "exp(loss), per token."),
    ("Bits per byte", "Loss in bits, times held-out tokens, divided by the bytes of text they encode. It does not "
                      "depend on the tokenizer. Shown where the number of bytes is known."),
    ("Excess", "Loss of a model minus loss of the teacher, in nats/token."),
    ("Recovery", "(pruned \u2212 distilled) / (pruned \u2212 teacher), of losses. It flatters: a freshly pruned model "
                 "can be arbitrarily bad, so recovery near 100% alone says little."),
    ("Excess against scratch", "Excess of the distilled model over excess of the same architecture trained from "
                               "scratch on as many tokens."),
    ("KL", "KL(teacher \u2016 student) over the whole vocabulary, mean over the valid tokens of a step."),
    ("Non-embedding parameters", "All parameters without the input and output embedding matrices."),
    ("Tokens/s", "Training tokens over wall-clock seconds, all processes together."),
    ("Importance", "Mean activations on calibration data, aggregated along the sequence, then over samples "
                   "(arXiv:2407.14679, section 2.2)."),
)


def write_report(output_dir: Path) -> Path:
    """Read `output_dir` (outputs/NAME) and write `report.html` into it, replacing it atomically.

    Stages that have not run are left out or named as missing.

    Raises:
        UserError: `output_dir` is not a directory.
    """
    page = render(collect(output_dir))
    path = output_dir / "report.html"
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(page)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    return path


def render(experiment: Experiment) -> Html:
    """The whole page."""
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content="default-src 'none'; style-src 'unsafe-inline'"),
        tag("title", f"{experiment.name} \u2013 pruning report"),
        tag("style", Html(CSS)),
    )
    body = tag("body", _header(experiment), tag("main", _family(experiment), *[_round(experiment, index) for index in
                                                                               range(len(experiment.rounds))],
                                               *beside_section(experiment.beside), _appendix(experiment)))
    return Html("<!doctype html>\n" + tag("html", head, body, lang="en") + "\n")


def headline(round_: Round) -> str:
    """One sentence with the round's real numbers, as far as they are known."""
    teacher, pruned, distilled = (round_.models.get(key) for key in ("teacher", "pruned", "distilled"))
    small = distilled or pruned
    parts = []
    if teacher and small and teacher.num_parameters is not None and small.num_parameters is not None:
        parts.append(f"Pruned from {formats.count(teacher.num_parameters)} to {formats.count(small.num_parameters)} "
                     f"parameters{_kept(teacher, small)}")
    if distilled and distilled.tokens is not None:
        parts.append(f"{'distilled' if parts else 'Distilled'} on {formats.count(distilled.tokens)} tokens")
    done = ", ".join(parts) or "Not finished yet"
    if distilled is None or distilled.loss is None:
        return done + "."
    others = (("teacher", teacher), ("just pruned", pruned))
    compared = [f"{words} {formats.loss(model.loss)}" for words, model in others if model and model.loss is not None]
    behind = f" ({', '.join(compared)})" if compared else ""
    return f"{done}: held-out loss {formats.loss(distilled.loss)} nats/token{behind}."


def _kept(teacher: ModelFigures, small: ModelFigures) -> str:
    before, after = teacher.num_non_embedding_parameters, small.num_non_embedding_parameters
    return f" ({formats.percent(after / before, 0)} of non-embedding)" if before and after is not None else ""


def _header(experiment: Experiment) -> Html:
    rounds = experiment.rounds
    lead = headline(rounds[-1]) if rounds else "No stage has finished yet."
    if len(rounds) > 1:
        lead = f"{len(rounds)} rounds; the last: {lead[:1].lower()}{lead[1:]}"
    facts = (f"Last stage finished {formats.moment(tables.last_finished(experiment))}; "
             f"all stages took {formats.duration(tables.total_seconds(experiment))}.")
    links = [tag("a", round_.name, href=f"#round-{index}") for index, round_ in enumerate(rounds)]
    return tag(
        "header", tag("h1", experiment.name), tag("p", lead, class_="lead"),
        tag("p", facts, class_="note") if tables.total_seconds(experiment) else "",
        tag("nav", *links) if len(links) > 1 else "",
        *[tag("p", "Not shown: ", problem, class_="missing warning") for problem in experiment.problems],
    )


def _family(experiment: Experiment) -> Html:
    """All rounds in one table, where there are several."""
    if len(experiment.rounds) < 2:
        return Html("")
    return tag("section", tag("h2", "Family"), family_table(experiment))


def _round(experiment: Experiment, index: int) -> Html:
    round_ = experiment.rounds[index]
    several = len(experiment.rounds) > 1
    curves = figures.loss_curves(round_)
    return tag(
        "section", tag("h2", f"Round {round_.name}" if several else "Result"),
        tag("p", headline(round_), class_="summary") if several else "",
        _tiles(round_),
        tag("h3", "Losses"),
        figures.loss_ladder(round_) or "",
        tables.loss_table(round_, experiment) if round_.models else _missing("summary.json lists no loss yet."),
        *([tag("h3", "Tasks"), task_table(round_, experiment.published)] if round_.tasks else []),
        *_alignment(round_),
        *search_section(round_),
        tag("h3", "Architecture"),
        tables.architecture_table(round_.plan.source, round_.plan.target) if round_.plan
        else _missing("Not pruned yet: there is no plan."),
        tag("h3", "Loss curves"),
        figures.correction_curve(round_) or "",
        *curves or [_missing("No training stage has written metrics yet.")],
        tag("h3", "Importance"),
        *_importance(round_),
        tag("h3", "Time"),
        tables.time_table(round_) if round_.manifests else _missing("No stage has finished yet."),
        id=f"round-{index}",
    )


def _alignment(round_: Round) -> list[Html]:
    """The alignment, where it was run."""
    curve = figures.alignment_curve(round_)
    shown = [tables.answers_table(round_) if round_.answers else None, curve]
    return [tag("h3", "Alignment"), *[one for one in shown if one is not None]] if any(shown) else []


def _tiles(round_: Round) -> Html:
    """The key figures, each with what it means."""
    teacher, small = round_.models.get("teacher"), round_.models.get("distilled") or round_.models.get("pruned")
    tiles = []
    if teacher and small and teacher.num_non_embedding_parameters and small.num_non_embedding_parameters:
        kept = small.num_non_embedding_parameters / teacher.num_non_embedding_parameters
        tiles.append(_tile("Size", formats.percent(kept, 0), "", "of the teacher's non-embedding parameters."))
    scratch = "against the same architecture trained from scratch on as many tokens. Below 1, pruning paid off." \
        if round_.excess_vs_scratch is not None else join(["needs the scratch control: ", tag("code", "make controls"),
                                                           "."])
    tiles += [
        _tile("Excess", formats.signed(round_.excess), "nats/token",
              "held-out loss of the distilled model above the teacher's. Smaller is better."),
        _tile("Excess against scratch", formats.loss(round_.excess_vs_scratch), "", scratch),
        _tile("Recovery", formats.percent(round_.recovery), "",
              "of the loss that pruning added was won back. Flattering: a pruned model can be arbitrarily bad."),
    ]
    if round_.scratch_token_ratio is not None:
        more = "" if round_.scratch_reached else "> "
        tiles.append(_tile("Tokens against scratch", f"{more}{round_.scratch_token_ratio:.1f}", "times",
                           "the distillation's tokens, for random weights to reach the same loss. The papers: up to 40 "
                           "(arXiv:2407.14679, abstract), against models trained on trillions of tokens."))
    return tag("div", *tiles, class_="tiles")


def _tile(name: str, figure: str, unit: str, meaning: str) -> Html:
    return tag("div", tag("div", name, class_="name"),
               tag("div", figure, tag("span", f" {unit}", class_="unit") if unit and figure != formats.MISSING else "",
                   class_="figure"),
               tag("p", meaning), class_="tile")


def _importance(round_: Round) -> list[Html]:
    importance, plan = round_.importance, round_.plan
    if importance is None:
        return [_missing("Not shown: there are no readable scores for this round.")]
    note = (f"From {formats.integer(importance.num_samples)} calibration samples; width axes aggregated with "
            f"{importance.sequence} along the sequence and {importance.batch} over samples.")
    drawn = [figures.layer_importance(importance, plan), figures.ffn_importance(importance, plan),
             figures.hidden_importance(importance, plan)]
    return [tag("p", note, class_="note"), *[figure for figure in drawn if figure is not None]]


def _appendix(experiment: Experiment) -> Html:
    definitions = [part for term, meaning in DEFINITIONS for part in (tag("dt", term), tag("dd", meaning))]
    commands = "\n".join(shlex.join(words) + (f"  # {started}" if started else "")
                         for words, started in experiment.commands)
    versions = tables.version_table(experiment)
    return join([
        tag("section", tag("h2", "How the numbers are defined"), tag("dl", *definitions)),
        tag("section", tag("h2", "Reproduce"), tag("h3", "Commands"),
            tag("pre", commands) if commands else _missing("No command was recorded."),
            tag("h3", "Configuration"),
            tag("details", tag("summary", "Resolved configuration"), tag("pre", experiment.config))
            if experiment.config is not None else _missing("config.yaml is missing."),
            tag("h3", "Versions"), versions if versions is not None else _missing("No stage recorded versions.")),
    ])


def _missing(words: str) -> Html:
    return tag("p", words, class_="missing")
