"""What the node `distill` asks for: the teacher's place, the losses of intermediate states. No torch."""

from __future__ import annotations

from nemo_minitron.arch import ArchSpec
from nemo_minitron.config import DistillConfig, TrainConfig
from nemo_minitron.distill.layer_map import Term, resolve_term
from nemo_minitron.errors import ConfigError, LayoutError
from nemo_minitron.parallel.layout import Layout


def teacher_layout(distill: DistillConfig, student: Layout) -> Layout:
    """The teacher's layout over the student's ranks; `LayoutError` where its degrees do not divide them."""
    tp, pp = distill.teacher.tp or student.tp, distill.teacher.pp or student.pp
    if student.world_size % (tp * pp):
        raise LayoutError("the teacher's layout does not fit the processes", found=f"tp={tp} pp={pp}",
                          expected=f"a tp * pp that divides the {student.world_size} of the student",
                          key="distill.teacher.tp or distill.teacher.pp")
    return Layout(tp=tp, pp=pp, dp=student.world_size // (tp * pp), sequence_parallel=student.sequence_parallel,
                  read_once=student.read_once)


def teacher_precision(distill: DistillConfig, train: TrainConfig) -> str:
    """32, bf16 or fp8."""
    return distill.teacher.precision or ("bf16" if train.precision == "bf16-mixed" else "32")


def intermediate_terms(distill: DistillConfig, teacher: ArchSpec, student: ArchSpec) -> list[Term]:
    """The recipe's terms with their layers; `ConfigError` where a model does not have them or one is there twice."""
    terms = [resolve_term(state=term.state, layers=term.layers, loss=term.loss, weight=term.weight,
                          teacher_layers=teacher.num_layers, student_layers=student.num_layers)
             for term in distill.intermediate.terms]
    names = [term.name for term in terms]
    if len(set(names)) < len(names):
        raise ConfigError("a term of the intermediate losses is there twice", expected="each pair of states once",
                          found=", ".join(names), key="distill.intermediate.terms")
    return terms


def relation_heads(distill: DistillConfig, terms: list[Term], teacher: ArchSpec, student: ArchSpec, tp: int) -> int:
    """Relation heads of the attention term, over all TP ranks: `relation_heads`, else the student's KV groups.

    Raises:
        ConfigError: they do not divide over `tp`, or not the channels of queries and keys of both models.
    """
    heads = distill.intermediate.relation_heads or student.num_query_groups
    if any(term.state == "attention" for term in terms):
        odd = [f"{count * arch.head_dim} {what} of the {model}"
               for model, arch in (("teacher", teacher), ("student", student))
               for what, count in (("query channels", arch.num_attention_heads),
                                   ("key channels", arch.num_query_groups))
               if (count * arch.head_dim) % heads]
        if odd or heads % tp:
            raise ConfigError("relation heads that do not divide", found=f"{heads}",
                              expected=f"a multiple of tp={tp} that divides {odd[0] if odd else 'the channels'}",
                              key="distill.intermediate.relation_heads")
    return heads
