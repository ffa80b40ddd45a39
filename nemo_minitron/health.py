"""`python -m nemo_minitron.health`: imports what training needs; Docker's health check and the image's last step.

`--record FILE` writes the versions of compiled packages before this package is installed (then, as a plain script, with
the standard library alone); `--unchanged FILE` compares with that, and `--pins FILE` with NAME==VERSION lines.
"""

from __future__ import annotations

import json
import sys
from importlib import import_module, metadata
from pathlib import Path

COMPILED = ("torch", "transformer-engine", "apex", "flash_attn", "numpy", "triton", "pytorch-triton")
"""What an image was built around and no installation over it may replace."""
NEEDED = ("megatron.core", "nemo.lightning", "nemo_minitron.training.trainer", "nemo_minitron.distill.module",
          "nemo_minitron.stages.distill", "nemo_minitron.stages.score", "nemo_minitron.stages.evaluate")


def main(arguments: list[str]) -> int:
    """Returns 0 where all is well, 1 with a line for everything that is not."""
    options = dict(zip(arguments[::2], arguments[1::2], strict=True))
    if "--record" in options:
        Path(options["--record"]).write_text(json.dumps(compiled_versions()), encoding="utf-8")
        return 0
    faults: list[str] = []
    if "--unchanged" in options:
        before = json.loads(Path(options["--unchanged"]).read_text(encoding="utf-8"))
        faults += [f"{name} was {before.get(name)} and is {version}" for name, version in compiled_versions().items()
                   if before.get(name) != version]
    if "--pins" in options:
        faults += wrong_pins(Path(options["--pins"]).read_text(encoding="utf-8"))
    faults += failed_imports()
    for fault in faults:
        print(f"nemo_minitron.health: {fault}", file=sys.stderr)
    return 1 if faults else 0


def compiled_versions() -> dict[str, str | None]:
    """Version of each of COMPILED; None where it is not installed."""
    return {name: installed_version(name) for name in COMPILED}


def installed_version(name: str) -> str | None:
    """From the package's metadata; None where there is none."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def wrong_pins(text: str) -> list[str]:
    """A line for every NAME==VERSION in `text` that is not what is installed."""
    pins = [line.split("#")[0].strip().split("==") for line in text.splitlines() if "==" in line.split("#")[0]]
    return [f"{name} is {installed_version(name)}, not {version}" for name, version in pins
            if installed_version(name) != version]


def failed_imports() -> list[str]:
    """A line for every module of NEEDED that cannot be imported, and for Megatron-core or NeMo from elsewhere."""
    from nemo_minitron.parallel.cpu import open_cpu_door

    open_cpu_door()
    faults = []
    for name in NEEDED:
        try:
            module = import_module(name)
        except Exception as error:
            faults.append(f"{name}: {type(error).__name__}: {error}")
            continue
        distribution = {"megatron.core": "megatron-core", "nemo.lightning": "nemo_toolkit"}.get(name)
        top = "nemo" if name == "nemo.lightning" else name
        version = getattr(import_module(top), "__version__", None)
        if distribution and version is not None and version != installed_version(distribution):
            faults.append(f"{name} {version} comes from {module.__file__}, not from the installed {distribution} "
                          f"{installed_version(distribution)}")
    return faults


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
