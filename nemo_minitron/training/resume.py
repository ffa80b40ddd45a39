"""Resume points on disk: which are complete and undamaged, and which may go. Pure: files only.

A point is a folder `step_N`. Each rank hashes the files it wrote (`digests`, `write_digests`); when all are done, rank
0 writes `complete.json` (`seal`), which makes the folder count. A point is used only when every file has the size and,
where asked for, the SHA-256 that `complete.json` tells.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nemo_minitron.artifacts import write_json

SEAL = "complete.json"
KEPT = 2
"""Complete points that stay: the newest, and the one before it in case the newest turns out to be damaged."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """A sealed point: `files` maps names to (bytes, SHA-256)."""

    path: Path
    step: int
    files: dict[str, tuple[int, str]]

    def fault(self, names: list[str] | None = None) -> str | None:
        """What is wrong with the files (all, or those of `names`), in words; None where nothing is."""
        for name, (size, digest) in sorted(self.files.items()):
            if names is not None and name not in names:
                continue
            path = self.path / name
            try:
                found = path.stat().st_size
                if found != size:
                    return f"{name} has {found} bytes instead of {size}"
                if file_digest(path) != digest:
                    return f"{name} has another checksum than when it was written"
            except OSError as error:
                return f"{name}: {error.strerror}"
        return None


def point_path(directory: Path, step: int) -> Path:
    """Folder of the point after `step` steps."""
    return directory / f"step_{step:08d}"


def file_digest(path: Path) -> str:
    """SHA-256 (hex) of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def shards(point: Path, rank: int) -> list[Path]:
    """The files of tensors that `rank` wrote: `__RANK_*`."""
    return sorted(point.glob(f"__{rank}_*"))


def others(point: Path) -> list[Path]:
    """What is no rank's share: written, and so hashed, by rank 0."""
    return sorted(path for path in point.iterdir() if path.is_file() and "digests_" not in path.name
                  and not re.match(r"__\d+_", path.name))


def digests(paths: Iterable[Path]) -> dict[str, tuple[int, str]]:
    """Name -> (bytes, SHA-256); best asked for while the files are still in the page cache."""
    return {path.name: (path.stat().st_size, file_digest(path)) for path in paths}


def write_digests(point: Path, rank: int, found: dict[str, tuple[int, str]]) -> None:
    """Leave what `rank` hashed where `seal` looks for it."""
    write_json(point / f"digests_{rank}.json", {name: list(entry) for name, entry in found.items()})


def seal(point: Path, step: int, world_size: int) -> None:
    """Make the point count: every rank's digests in one file, written last."""
    files: dict[str, Any] = {}
    for rank in range(world_size):
        share = point / f"digests_{rank}.json"
        files |= json.loads(share.read_text(encoding="utf-8"))
        share.unlink()
    write_json(point / SEAL, {"step": step, "files": files})


def sealed_points(directory: Path) -> list[Point]:
    """The complete points in `directory`, newest first; a torn `complete.json` makes none."""
    points = []
    for path in directory.glob("step_*"):
        try:
            record = json.loads((path / SEAL).read_text(encoding="utf-8"))
            files = {name: (int(size), str(digest)) for name, (size, digest) in record["files"].items()}
            points.append(Point(path=path, step=int(record["step"]), files=files))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
    return sorted(points, key=lambda point: -point.step)


def rotate(directory: Path, kept: int = KEPT) -> None:
    """Remove all but the newest `kept` complete points; the newest complete one never goes."""
    stay = {point.path for point in sealed_points(directory)[: max(kept, 1)]}
    for path in directory.glob("step_*"):
        if path not in stay:
            remove(path)


def remove(point: Path) -> None:
    """Remove a point, its seal first, so that a kill in between leaves nothing that counts."""
    (point / SEAL).unlink(missing_ok=True)
    shutil.rmtree(point, ignore_errors=True)


def is_disk_full(error: BaseException | None) -> bool:
    """Whether `error`, or anything it comes from, says that the disk or a quota is full."""
    seen: set[int] = set()
    waiting = [error]
    while waiting:
        found = waiting.pop()
        if found is None or id(found) in seen:
            continue
        seen.add(id(found))
        if isinstance(found, OSError) and found.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "No space left on device" in str(found) or "Disk quota exceeded" in str(found):
            return True
        failures = getattr(found, "failures", {})  # torch's CheckpointException: rank -> (exception, traceback)
        waiting += [found.__cause__, found.__context__, *(item[0] for item in failures.values())]
    return False
