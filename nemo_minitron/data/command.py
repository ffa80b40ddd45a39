"""`minitron data prepare`: text or JSON lines -> Megatron .bin/.idx, for `data.path`."""

from __future__ import annotations

import os
from pathlib import Path

from nemo_minitron.data.bulk import BulkInput, build_bulk
from nemo_minitron.errors import ConfigError

KEYS = ("input", "output", "tokenizer", "json_key", "separator", "workers")


def prepare(arguments: list[str]) -> None:
    """Tokenize `input` (a file or folder) into `output`.bin and `output`.idx.

    `arguments`: key=value of `KEYS`; `tokenizer` is a Hugging Face directory, such as the teacher's.

    Raises:
        ConfigError, DataError: a bad argument, input that cannot be used, no space left.
    """
    options = dict(_pair(argument) for argument in arguments)
    for name in ("input", "output", "tokenizer"):
        if not options.get(name):
            raise ConfigError("missing argument", expected="input=TEXT output=PREFIX tokenizer=DIR", found=f"no {name}",
                              key=name)
    workers = options.get("workers", str(os.cpu_count() or 1))
    if not workers.isdigit() or int(workers) < 1:
        raise ConfigError("bad value", expected="a positive number", found=repr(workers), key="workers")
    what = BulkInput(path=Path(options["input"]), tokenizer=Path(options["tokenizer"]),
                     json_key=options.get("json_key", "text"), separator=options.get("separator") or None)
    build_bulk(what, Path(options["output"]), workers=int(workers))


def _pair(argument: str) -> tuple[str, str]:
    key, equals, value = argument.partition("=")
    if not equals or key not in KEYS:
        raise ConfigError("unknown argument", expected="key=value of " + ", ".join(KEYS), found=repr(argument), key=key)
    return key, value
