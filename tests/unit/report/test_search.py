"""The table of a search's candidates."""

import re

from nemo_minitron.report.search import _candidates

SIZES = {"num_attention_heads": 6, "num_query_groups": 2}


def candidate(name, step=40, **sizes):
    return {"name": name, "arch": SIZES | {"hidden_size": 192} | sizes, "num_parameters": 1500000,
            "num_non_embedding_parameters": 1200000, "pruned_loss": 3.5, "loss": 2.5, "step": step}


def shown(*candidates):
    """Header cells, first body row's cells, and the text below, of the table of these candidates."""
    page = str(_candidates({"candidates": list(candidates), "heldout_samples": 64}, chosen=candidates[0]["name"]))
    head, _, body = page.partition("<tbody>")
    text = re.sub(r"<[^>]+>", " ", page)
    return re.findall(r"<th[^>]*>(\w+)", head), re.findall(r"<td[^>]*>([^<]*)", body.partition("</tr>")[0]), text


def test_only_what_differs_has_a_column():
    head, cells, text = shown(candidate("a", num_layers=4, ffn_hidden_size=384),
                              candidate("b", num_layers=5, ffn_hidden_size=256))
    assert head == ["candidate", "layers", "FFN", "parameters", "parameters", "loss", "loss"]
    assert len(cells) == len(head) - 1 and cells[:2] == ["4", "384"]
    assert "All have 192 hidden, 6 heads, 2 groups, 40 steps." in text and "1. a" in text


def test_steps_are_told_where_candidates_were_halved():
    head, cells, text = shown(candidate("a", num_layers=4, ffn_hidden_size=384),
                              candidate("b", step=20, num_layers=4, ffn_hidden_size=384))
    assert head[-1] == "steps" and cells[-1] == "40"
    assert "40 steps" not in text
