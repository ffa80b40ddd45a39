"""The page's sections on a search (candidates, curves, how the ranking settled) and on the family of all rounds."""

from __future__ import annotations

from typing import Any

from nemo_minitron.report import charts, formats
from nemo_minitron.report.collect import Experiment, Round
from nemo_minitron.report.markup import Html, tag
from nemo_minitron.report.tables import Row, table


def search_section(round_: Round) -> list[Html]:
    """Every candidate, the loss curves, rank correlation over steps, and the comparison; empty without a search."""
    ranking = round_.search
    if ranking is None:
        return []
    chosen, before = ranking["chosen"]["name"], ranking["best_after_pruning"]["name"]
    return [tag("h3", "Search"), _candidates(ranking, chosen), _curves(ranking, chosen), _stability(ranking),
            *_comparison(round_, chosen, before)]


def family_table(experiment: Experiment) -> Html:
    """One row per round: sizes, tokens, training time and losses of what it made."""
    rows = []
    for round_ in experiment.rounds:
        model, teacher = round_.models.get("distilled"), round_.models.get("teacher")
        if model is None:
            rows.append(Row(round_.name, words=Html("not distilled yet")))
            continue
        excess = None if model.loss is None or teacher is None or teacher.loss is None else model.loss - teacher.loss
        rows.append(Row(round_.name, [
            formats.count(model.num_parameters), formats.count(model.num_non_embedding_parameters),
            formats.loss(model.loss), formats.signed(excess), formats.count(model.tokens),
            formats.duration(model.seconds)]))
    return table([("round", ""), ("parameters", "all"), ("parameters", "non-embedding"), ("loss", "nats/token"),
                  ("excess", "nats/token"), ("distilled on", "tokens"), ("training", "wall clock")], rows,
                 caption="Excess is over the teacher that the round was distilled from. Tokens and time are those of "
                         "the round's own distillation; rounds it starts from come on top.")


_AXES = {"num_layers": "layers", "hidden_size": "hidden", "ffn_hidden_size": "FFN", "num_attention_heads": "heads",
         "num_query_groups": "groups"}


def _candidates(ranking: dict[str, Any], chosen: str) -> Html:
    """One row per candidate; sizes and steps that are the same for all are in the caption."""
    found = ranking["candidates"]
    varied = [key for key in _AXES if len({one["arch"][key] for one in found}) > 1]
    halved = len({one["step"] for one in found}) > 1
    rows = [Row(f"{place}. {one['name']}", [
        *[formats.integer(one["arch"][key]) for key in varied],
        formats.count(one["num_parameters"]), formats.count(one["num_non_embedding_parameters"]),
        formats.loss(one["pruned_loss"]), formats.loss(one["loss"]),
        *([formats.integer(one["step"])] if halved else [])], class_="strong" if one["name"] == chosen else None)
        for place, one in enumerate(found, start=1)]
    shared = [f"{formats.integer(found[0]['arch'][key])} {name}" for key, name in _AXES.items() if key not in varied]
    if not halved:
        shared.append(f"{formats.integer(found[0]['step'])} steps")
    return table([("candidate", ""), *[(_AXES[key], "") for key in varied], ("parameters", "all"),
                  ("parameters", "non-embedding"), ("loss", "after pruning"), ("loss", "after tuning"),
                  *([("steps", "")] if halved else [])], rows,
                 caption=f"Best first; the chosen one is bold. Losses are nats/token on "
                         f"{formats.integer(ranking['heldout_samples'])} held-out samples, the same for all."
                         + (f" All have {', '.join(shared)}." if shared else ""))


def _curves(ranking: dict[str, Any], chosen: str) -> Html:
    series = [charts.Series(xs=[tokens for _, tokens, _ in one["curve"]], ys=[loss for _, _, loss in one["curve"]],
                            tone="distilled" if one["name"] == chosen else "pruned", faint=one["name"] != chosen,
                            label="chosen" if one["name"] == chosen else "", marker="circle", tooltip=one["name"])
              for one in ranking["candidates"] if one["curve"]]
    return _figure("Candidates while they are tuned", charts.line_chart(
        series, title="Held-out loss of every candidate", x_label="training tokens", y_label="nats/token"),
        "Each point is a look at held-out data; its tooltip names the candidate. The loss right after pruning is in "
        "the table.")


def _stability(ranking: dict[str, Any]) -> Html:
    rows = [row for row in ranking["stability"] if row["spearman"] is not None]
    chart = charts.line_chart(
        [charts.Series(xs=[row["step"] for row in rows], ys=[row["spearman"] for row in rows], tone="distilled",
                       marker="circle", tooltip="rank correlation")],
        title="Rank correlation with the end", x_label="steps", y_label="Spearman's rank correlation", y_min=0.0)
    safe = ranking["safe_step"]
    said = "" if safe is None else " The winner led right after pruning already." if safe == 0 else \
        f" The winner leads from step {formats.integer(safe)} on."
    return _figure("How early the ranking was right", chart,
                   "Correlation of the candidates' order at each look, from right after pruning (step 0), with that at "
                   f"the end, over the candidates that were trained to the end.{said}")


def _comparison(round_: Round, chosen: str, before: str) -> list[Html]:
    compared = round_.compared
    if compared is None:
        return []
    if compared.get("same_candidate"):
        return [tag("p", f"{chosen} was also the best right after pruning: nothing to compare.", class_="note")]
    rows = [Row(f"{chosen}, chosen after tuning", [formats.loss(compared.get("chosen"))]),
            Row(f"{before}, best right after pruning", [formats.loss(compared.get("best_after_pruning"))])]
    return [tag("h4", "Was tuning before choosing worth it?"),
            table([("candidate", ""), ("loss", "nats/token")], rows,
                  caption="Both after the same full distillation, on all held-out tokens.")]


def _figure(title: str, chart: Html, caption: str) -> Html:
    return tag("figure", tag("h4", title), chart, tag("figcaption", caption))
