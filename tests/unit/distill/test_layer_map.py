"""Layer maps are read as written, refused with the key that is at fault, and placed on the right stage."""

import pytest

from nemo_minitron.distill.layer_map import resolve_term, stage_of
from nemo_minitron.errors import ConfigError
from nemo_minitron.parallel.layout import Layout


def term(layers, state="hidden", loss="cosine", weight=1.0):
    return resolve_term(state=state, layers=layers, loss=loss, weight=weight, teacher_layers=32, student_layers=16)


@pytest.mark.parametrize(("layers", "expected"), [
    ("last-2:last-2", (29, 13)), ("29:13", (29, 13)), ("last:last", (31, 15)), (" last - 1 : 0 ", (30, 0)),
])
def test_a_map_is_teacher_to_student(layers, expected):
    """(last-2):(last-2) of 32 and 16 layers is 29:13 of arXiv:2407.14679, Table 17."""
    found = term(layers)
    assert (found.teacher_layer, found.student_layer) == expected


def test_the_embedding_has_no_layer():
    assert term("nonsense", state="embedding").name == "embedding"


@pytest.mark.parametrize(("arguments", "message"), [
    ({"layers": "31:16"}, "beyond the student; expected 0 to 15"),
    ({"layers": "32:0"}, "beyond the teacher; expected 0 to 31"),
    ({"layers": "last-40:0"}, "beyond the teacher"),
    ({"layers": "29"}, "TEACHER:STUDENT"),
    ({"layers": "a:b"}, "not a layer"),
    ({"layers": "0:-1"}, "not a layer"),
    ({"layers": "0:0", "state": "logits"}, "unknown state"),
    ({"layers": "0:0", "loss": "huber"}, "unknown loss"),
    ({"layers": "0:0", "weight": 0.0}, "positive"),
])
def test_what_cannot_be_is_refused(arguments, message):
    with pytest.raises(ConfigError, match=message) as error:
        term(**arguments)
    assert "distill.intermediate.terms" in str(error.value)


def test_an_output_after_its_norm_is_on_the_next_layers_stage():
    layout = Layout(pp=2)  # layers 0 and 1, then 2 and 3
    assert [stage_of("hidden", layer, layout, 4) for layer in range(4)] == [0, 1, 1, 1]
    assert [stage_of("mlp_input", layer, layout, 4) for layer in range(4)] == [0, 0, 1, 1]
    assert [stage_of("attention", layer, Layout(pp=2), 3) for layer in range(3)] == [0, 0, 1]  # uneven stages
    assert stage_of("embedding", 0, layout, 4) == 0
