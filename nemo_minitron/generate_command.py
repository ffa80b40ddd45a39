"""`minitron generate`: the stage `generate` alone, of any Hugging Face directory, its result where it is wanted."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

from nemo_minitron.compose import config_from_dict, load_config
from nemo_minitron.config import GenerateConfig
from nemo_minitron.errors import ConfigError
from nemo_minitron.generate.answers import ANSWERS
from nemo_minitron.pipeline import run
from nemo_minitron.stages.context import ROUND

_NEEDED = ("checkpoint", "prompts", "output")
_GENERATE = tuple(field.name for field in dataclasses.fields(GenerateConfig) if field.name != "prompts")
_PARALLEL = ("tp", "pp", "dp", "num_threads")
KEYS = (*_NEEDED, *_GENERATE, *_PARALLEL, "seed")


def generate(arguments: list[str]) -> None:
    """`checkpoint=DIR prompts=FILE.jsonl output=FILE.jsonl [key=value ...]`.

    The run's own folder is `output`.run. A killed run goes on with the same command; with other keys it starts afresh.

    Raises:
        UserError: a bad argument, prompts or a model that cannot be used.
    """
    options = _options(arguments)
    output = Path(options["output"])
    data = load_config([]).to_dict()
    data |= {"name": output.name + ".run", "output_dir": str(output.parent), "stages": ["generate"],
             "seed": options.get("seed", data["seed"])}
    data["teacher"]["path"] = options["checkpoint"]
    data["generate"]["prompts"] = options["prompts"]
    data["generate"] |= {key: options[key] for key in _GENERATE if key in options}
    data["parallel"] |= {key: options[key] for key in _PARALLEL if key in options}
    config = config_from_dict(data)
    config.data.seq_length = 1  # of no meaning here, and shorter than any model's context
    config.train.micro_batch_size, config.train.global_batch_size = 1, config.parallel.dp
    run(config, ["generate", *arguments])
    temporary = output.with_name(f".{output.name}.{os.getpid()}")
    shutil.copyfile(config.run_dir / ROUND / "generate" / ANSWERS, temporary)
    os.replace(temporary, output)
    print(output)


def _options(arguments: list[str]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or key not in KEYS:
            raise ConfigError("unknown argument", expected="key=value of " + ", ".join(KEYS), found=repr(argument))
        options[key] = value
    missing = [key for key in _NEEDED if not options.get(key)]
    if missing:
        raise ConfigError("missing argument", expected=" ".join(f"{key}=..." for key in _NEEDED),
                          found=f"no {missing[0]}", key=missing[0])
    if "stop" in options:
        try:
            texts = json.loads(options["stop"])
        except ValueError:
            texts = None
        if not isinstance(texts, list):
            raise ConfigError("bad value", expected='a JSON list of texts, such as ["\\n\\n"]', found=options["stop"],
                              key="stop")
        options["stop"] = texts
    return options
