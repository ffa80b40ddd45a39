"""Which of the teacher's intermediate states is compared with which of the student's, and where each lives. Pure.

arXiv:2407.14679, section 3 and appendix A.6. A layer is a number from 0, or `last`, or `last-N`; a map is
`TEACHER:STUDENT`.
"""

from __future__ import annotations

import dataclasses
import re

from nemo_minitron.errors import ConfigError
from nemo_minitron.parallel.layout import Layout

STATES = {
    "hidden": "the output of a layer, after the norm that follows it: the next layer's input norm, or the final norm",
    "mlp_input": "the input of a layer's MLP, after its norm",
    "embedding": "the output of the embedding",
    "attention": "a layer's queries, keys and values as they enter the attention, as relations between tokens",
}
LOSSES = ("cosine", "mse")
_LAYER = re.compile(r"\s*(?:(last)\s*(?:-\s*(\d+))?|(\d+))\s*")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Term:
    """One comparison: `state` of layer `teacher_layer` with that of `student_layer` (both 0 for the embedding).

    `loss` is cosine or mse; attention has its own (a KL of relations). `weight` is its factor among the terms.
    """

    state: str
    teacher_layer: int = 0
    student_layer: int = 0
    loss: str = "cosine"
    weight: float = 1.0

    @property
    def name(self) -> str:
        """Its name among the meters."""
        return self.state if self.state == "embedding" else f"{self.state}_{self.teacher_layer}_{self.student_layer}"

    @property
    def num_parts(self) -> int:
        """Tensors it takes: queries, keys and values of attention, else one."""
        return 3 if self.state == "attention" else 1

    @property
    def needs_norms(self) -> bool:
        """Whether it reads the output of a norm, which Transformer Engine would fuse away."""
        return self.state in ("hidden", "mlp_input")


def resolve_term(*, state: str, layers: str, loss: str, weight: float, teacher_layers: int,
                 student_layers: int) -> Term:
    """The term that a recipe describes.

    Raises:
        ConfigError: an unknown state or loss, a map of another form, or a layer that one of the models does not have.
    """
    key = "distill.intermediate.terms"
    if state not in STATES:
        raise ConfigError("unknown state", expected=", ".join(STATES), found=repr(state), key=key)
    if loss not in LOSSES:
        raise ConfigError("unknown loss of states", expected=", ".join(LOSSES), found=repr(loss), key=key)
    if not weight > 0:
        raise ConfigError("bad weight of a term", expected="a positive number", found=str(weight), key=key)
    if state == "embedding":
        return Term(state=state, loss=loss, weight=weight)
    parts = layers.split(":")
    if len(parts) != 2:
        raise ConfigError("not a layer map", expected="TEACHER:STUDENT, such as last-2:last-2 or 29:13",
                          found=repr(layers), key=key)
    numbers = [_layer(part, count, model, layers) for part, count, model in
               zip(parts, (teacher_layers, student_layers), ("teacher", "student"), strict=True)]
    return Term(state=state, teacher_layer=numbers[0], student_layer=numbers[1], loss=loss, weight=weight)


def _layer(text: str, num_layers: int, model: str, layers: str) -> int:
    match = _LAYER.fullmatch(text)
    if match is None:
        raise ConfigError("not a layer", expected="a number from 0, last, or last-N", found=repr(layers),
                          key="distill.intermediate.terms")
    last, back, number = match.groups()
    found = num_layers - 1 - int(back or 0) if last else int(number)
    if not 0 <= found < num_layers:
        raise ConfigError(f"a layer map beyond the {model}", expected=f"0 to {num_layers - 1} (last) of the {model}",
                          found=repr(layers), key="distill.intermediate.terms")
    return found


def stage_of(state: str, layer: int, layout: Layout, num_layers: int) -> int:
    """The pipeline stage where the state of `layer` is: for `hidden`, that of the norm that follows the layer."""
    if state == "embedding":
        return 0
    layer = min(layer + 1, num_layers - 1) if state == "hidden" else layer
    ends, end = [], 0
    for count in layout.stage_layers(num_layers):
        end += count
        ends.append(end)
    return next(stage for stage, end in enumerate(ends) if layer < end)
