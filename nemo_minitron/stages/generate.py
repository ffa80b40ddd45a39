"""Stage `generate`: the teacher's answers to a file of prompts, `answers.jsonl`; killed, it goes on where it was."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

from nemo_minitron.data.tokenizer import load_tokenizer
from nemo_minitron.errors import DataError
from nemo_minitron.generate.answers import ANSWERS, write_answers
from nemo_minitron.generate.decode import generate, wave_size
from nemo_minitron.generate.prompts import KEY, answered, encode_prompt, read_prompts
from nemo_minitron.generate.sampling import Sampling
from nemo_minitron.generate.stopping import StopAt
from nemo_minitron.model.build import load_model, transformer_config
from nemo_minitron.stages.context import Context


def run(context: Context) -> dict[str, Any]:
    """Answer all prompts; every rank takes part."""
    config, teacher = context.config.generate, context.teacher()
    layout = dataclasses.replace(context.layout, sequence_parallel=False)  # a single position cannot be cut
    layout.check(teacher.arch, name="teacher")
    tokenizer = load_tokenizer(teacher.path)
    rows = read_prompts(config.prompts)
    prompts = [encode_prompt(row, tokenizer) for row in rows]
    room = teacher.arch.max_position_embeddings - config.max_new_tokens
    for number, prompt in enumerate(prompts, 1):
        if not 1 <= len(prompt) <= room:
            raise DataError(f"prompt {number} does not fit the model's context", found=f"{len(prompt)} tokens",
                            expected=f"1 to {room}, with {config.max_new_tokens} new ones to come",
                            key=f"{KEY} or generate.max_new_tokens")
    sampling = Sampling(max_new_tokens=config.max_new_tokens, temperature=config.temperature, top_p=config.top_p,
                        seed=context.config.seed)
    stop = StopAt(tokenizer, config.stop)
    model = load_model(teacher.arch, teacher.path, transformer_config(teacher.arch, layout))
    made = {"prompts": 0, "prompt_tokens": 0, "new_tokens": 0}

    def answer(first: int, last: int) -> list[dict[str, Any]]:
        found = generate(model, prompts[first:last], sampling, stop, layout=layout, row_ids=range(first, last),
                         micro_batch_size=config.micro_batch_size)
        made["prompts"] += last - first
        made["prompt_tokens"] += sum(len(prompt) for prompt in prompts[first:last])
        made["new_tokens"] += sum(len(tokens) for tokens in found)
        return [answered(row, stop.cut(tokens), finished=stop(tokens))
                for row, tokens in zip(rows[first:last], found, strict=True)]

    started = time.monotonic()
    write_answers(context.stage_dir("generate") / ANSWERS, len(rows),
                  wave_size(layout, config.micro_batch_size) * layout.dp, answer, rank=context.rank,
                  share=context.share, say=context.say)
    seconds = time.monotonic() - started
    return {"num_prompts": len(rows), "in_this_run": made, "seconds": round(seconds, 3),
            "new_tokens_per_s": made["new_tokens"] / seconds}
