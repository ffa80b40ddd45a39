"""`minitron import` and `minitron export`: Megatron's distributed checkpoints to and from Hugging Face directories."""

from __future__ import annotations

from pathlib import Path

from nemo_minitron.checkpoint.megatron import export_megatron, import_megatron
from nemo_minitron.errors import ConfigError

FORMATS = ("megatron", "nemo")


def import_command(arguments: list[str]) -> None:
    """`megatron=DIR config=HF_DIR output=DIR`; errors as `import_megatron`."""
    options = _options(arguments, ("megatron", "config", "output"))
    arch = import_megatron(Path(options["megatron"]), Path(options["config"]), Path(options["output"]))
    print(f"{options['output']}: {arch.family}, {arch.num_parameters():,} parameters")


def export_command(arguments: list[str]) -> None:
    """`checkpoint=HF_DIR output=DIR [format=megatron|nemo]`; errors as `export_megatron`."""
    options = _options(arguments, ("checkpoint", "output"), {"format": "megatron"})
    if options["format"] not in FORMATS:
        raise ConfigError("bad value", expected=", ".join(FORMATS), found=repr(options["format"]), key="format")
    export_megatron(Path(options["checkpoint"]), Path(options["output"]), nemo=options["format"] == "nemo")
    print(options["output"])


def _options(arguments: list[str], needed: tuple[str, ...], optional: dict[str, str] | None = None) -> dict[str, str]:
    options = dict(optional or {})
    known = (*needed, *options)
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or key not in known:
            raise ConfigError("unknown argument", expected="key=value of " + ", ".join(known), found=repr(argument))
        options[key] = value
    missing = [name for name in needed if not options.get(name)]
    if missing:
        raise ConfigError("missing argument", expected=" ".join(f"{name}=..." for name in needed),
                          found=f"no {missing[0]}", key=missing[0])
    return options
