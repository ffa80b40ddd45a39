"""The frozen values that pass between stages, and the manifest that says a stage is done.

Pure: standard library and numpy only. Everything here is read from and written to JSON or safetensors;
nothing is ever unpickled. A stage directory counts as done only when its `manifest.json` says so, and
that file is written last (`Manifest.write` replaces it atomically).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from nemo_minitron.arch import ArchSpec
from nemo_minitron.errors import UserError


def digest_json(value: Any) -> str:
    """SHA-256 (hex) of `value` as canonical JSON: sorted keys, no spaces."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def digest_files(paths: list[Path]) -> str:
    """SHA-256 (hex) over the names and bytes of `paths`, in the order of their names."""
    total = hashlib.sha256()
    for path in sorted(paths, key=lambda p: p.name):
        with open(path, "rb") as file:
            total.update(f"{path.name}:{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically: to a neighbour, flushed to disk, then renamed over `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_json(path: Path) -> Any:
    """Read a JSON file; a missing or unreadable one is a `UserError` that names it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError("file not found", expected=f"a JSON file at {path}", found="nothing") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise UserError("not valid JSON", expected=f"JSON in {path}", found=str(error)) from None


def held_out_looks(directory: Path) -> list[tuple[int, int, float]]:
    """(step, training tokens, held-out cross-entropy in nats/token) of a training stage's looks, by ascending step.

    From its `metrics.jsonl`. The last line of a step counts; a last line that is still being written does not.
    """
    looks: dict[int, tuple[int, int, float]] = {}
    for text in (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True):
        if not text.endswith("\n"):
            break
        line = json.loads(text)
        if "heldout_ce" in line:
            looks[line["step"]] = (line["step"], line["tokens"], line["heldout_ce"])
    return [looks[step] for step in sorted(looks)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A Hugging Face directory: its architecture and what identifies its weights and tokenizer.

    `tokens_seen` counts training tokens of this lineage in this project (None where unknown).
    """

    path: Path
    arch: ArchSpec
    tokenizer_digest: str
    weights_digest: str
    tokens_seen: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What surgery keeps: ascending source indices per axis.

    `layers` and `hidden` are network-wide; `ffn`, `heads` and `groups` have one tuple per kept layer,
    in the order of `layers`. An axis that is not cut lists all its indices. `head_pairs`, where used, has for each
    kept layer the pairs (kept head, pruned head): the queries of the kept one become
    kept + `head_residual` * (kept - pruned).
    """

    source: ArchSpec
    target: ArchSpec
    layers: tuple[int, ...]
    hidden: tuple[int, ...]
    ffn: tuple[tuple[int, ...], ...]
    heads: tuple[tuple[int, ...], ...]
    groups: tuple[tuple[int, ...], ...]
    head_pairs: tuple[tuple[tuple[int, int], ...], ...] = ()
    head_residual: float = 0.0
    scores_digest: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data; `from_dict` reads it back."""
        return {**dataclasses.asdict(self), "source": self.source.to_dict(), "target": self.target.to_dict()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Plan:
        """Inverse of `to_dict`."""
        rows = {axis: tuple(tuple(row) for row in data[axis]) for axis in ("ffn", "heads", "groups")}
        return cls(source=ArchSpec.from_dict(data["source"]), target=ArchSpec.from_dict(data["target"]),
                   layers=tuple(data["layers"]), hidden=tuple(data["hidden"]),
                   head_pairs=tuple(tuple((kept, cut) for kept, cut in row) for row in data.get("head_pairs", ())),
                   head_residual=data.get("head_residual", 0.0),
                   scores_digest=data.get("scores_digest"), **rows)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """An architecture of a search, pruned and distilled for a while.

    Losses are held-out cross-entropy, nats/token: `pruned_loss` before any training, `curve` has (step, training
    tokens, loss) of every look on the way, ascending. `sizes` are its prunable sizes by name.
    """

    name: str
    arch: ArchSpec
    sizes: dict[str, int]
    pruned_loss: float
    curve: tuple[tuple[int, int, float], ...] = ()
    seconds: float | None = None

    @property
    def step(self) -> int:
        """Steps it was trained for."""
        return self.curve[-1][0] if self.curve else 0

    @property
    def loss(self) -> float:
        """After these."""
        return self.curve[-1][2] if self.curve else self.pruned_loss


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """The record of one finished stage.

    `fingerprint` digests the stage's name, its inputs' digests and its part of the configuration; the
    parallel layout is not in it, because results do not depend on it, but in `world`. `times` are in
    seconds. `result` holds the stage's own small facts (losses in nats/token, tokens, digests).
    """

    stage: str
    fingerprint: str
    inputs: dict[str, str]
    config: dict[str, Any]
    versions: dict[str, str]
    world: dict[str, Any]
    times: dict[str, float]
    result: dict[str, Any]
    status: str = "done"

    def write(self, directory: Path) -> None:
        """Write `manifest.json` into `directory`: the last thing a stage does."""
        write_json(directory / "manifest.json", dataclasses.asdict(self))

    @classmethod
    def read(cls, directory: Path) -> Manifest | None:
        """The manifest in `directory`, or None where the stage is not done."""
        path = directory / "manifest.json"
        if not path.exists():
            return None
        try:
            return cls(**read_json(path))
        except TypeError as error:
            raise UserError("not a manifest", expected=f"the record of a finished stage in {path}",
                            found=str(error)) from None
