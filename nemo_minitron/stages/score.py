"""Stage `score`: importance of every prunable unit of the teacher, from one forward pass."""

from __future__ import annotations

from typing import Any

from nemo_minitron.data.batch import calibration_ids
from nemo_minitron.importance.hooks import collect_scores
from nemo_minitron.model.build import load_model, transformer_config
from nemo_minitron.stages.context import Context
from nemo_minitron.stages.data import prepared_data, split_samples


def run(context: Context) -> dict[str, Any]:
    """Write `scores.safetensors` and `scores.json`; every rank takes part."""
    config = context.config
    teacher = context.teacher()
    context.layout.check(teacher.arch, name="teacher", seq_length=config.data.seq_length)
    prepared = prepared_data(context, teacher.path, teacher.arch)
    samples = split_samples(context, prepared, "calibration", teacher.arch)
    ids = calibration_ids(samples.spec.num_training_samples, config.importance.num_samples, config.seed)
    model = load_model(teacher.arch, teacher.path, transformer_config(teacher.arch, context.layout), unfused_norms=True)
    scores = collect_scores(model, samples, ids, layout=context.layout, source_digest=teacher.weights_digest,
                            micro_batch_size=config.importance.micro_batch_size)
    if context.rank == 0:
        scores.save(context.stage_dir("score"))
    context.say(f"[score] {len(ids)} samples of {config.data.seq_length} tokens; axes {', '.join(scores.axes())}")
    return {"scores_digest": scores.digest(), "num_samples": len(ids), "data_digest": prepared.digest,
            "tokens": len(ids) * config.data.seq_length}
