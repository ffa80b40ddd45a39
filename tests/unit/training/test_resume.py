import errno
import json
import os

import pytest

from nemo_minitron.training import resume


def write_point(directory, step, world_size=2):
    """A sealed point with files as two ranks of Megatron write them."""
    point = resume.point_path(directory, step)
    point.mkdir(parents=True)
    for name in ("common.pt", ".metadata", "metadata.json", *(f"__{rank}_{i}.distcp" for rank in range(world_size)
                                                              for i in range(2))):
        (point / name).write_bytes(f"{step}{name}".encode() * 50)
    for rank in range(world_size):
        mine = [*resume.shards(point, rank), *(resume.others(point) if rank == 0 else [])]
        resume.write_digests(point, rank, resume.digests(mine))
    resume.seal(point, step, world_size)
    return point


def newest_sound(directory):
    return next((point.step for point in resume.sealed_points(directory) if point.fault() is None), None)


def test_every_file_of_every_rank_is_sealed(tmp_path):
    point = write_point(tmp_path, 10)
    (found,) = resume.sealed_points(tmp_path)
    assert found.step == 10 and found.fault() is None
    assert set(found.files) == {path.name for path in point.iterdir()} - {"complete.json"}


@pytest.mark.parametrize("name", ["__1_0.distcp", "common.pt", ".metadata"])
@pytest.mark.parametrize(("damage", "words"), [
    (lambda path: os.truncate(path, 7), "7 bytes instead of"),
    (lambda path: path.write_bytes(bytes(path.stat().st_size)), "another checksum"),
    (lambda path: path.unlink(), "No such file"),
])
def test_a_damaged_newest_point_is_told_and_the_one_before_is_sound(damage, words, name, tmp_path):
    write_point(tmp_path, 10)
    damage(write_point(tmp_path, 20) / name)
    newest, before = resume.sealed_points(tmp_path)
    assert name in newest.fault() and words in newest.fault()
    assert newest.fault([other for other in newest.files if other != name]) is None, "each rank looks at its share"
    assert before.fault() is None and newest_sound(tmp_path) == 10


@pytest.mark.parametrize("text", ["", "{", "[]", '{"step": 20}', '{"step": 20, "files": {"a": 3}}', None])
def test_a_point_whose_seal_is_torn_or_missing_does_not_count(text, tmp_path):
    write_point(tmp_path, 10)
    seal = write_point(tmp_path, 20) / resume.SEAL
    seal.unlink() if text is None else seal.write_text(text)
    assert newest_sound(tmp_path) == 10


def test_rotation_keeps_two_complete_ones_and_never_drops_the_newest(tmp_path):
    for step in (10, 20, 30):
        write_point(tmp_path, step)
    torn = write_point(tmp_path, 40)
    (torn / resume.SEAL).unlink()
    resume.rotate(tmp_path)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step_00000020", "step_00000030"]
    resume.rotate(tmp_path, kept=0)
    assert newest_sound(tmp_path) == 30


def test_a_removed_point_stops_counting_first(tmp_path, monkeypatch):
    point = write_point(tmp_path, 10)
    monkeypatch.setattr(resume.shutil, "rmtree", lambda *_, **__: None)  # killed in between
    resume.remove(point)
    assert point.exists() and resume.sealed_points(tmp_path) == []


def test_a_missing_folder_has_no_points(tmp_path):
    assert resume.sealed_points(tmp_path / "nowhere") == []


class Failed(Exception):
    """Like torch's CheckpointException: what failed on each rank."""

    def __init__(self, failures):
        super().__init__("write")
        self.failures = failures


def chained(error):
    try:
        raise RuntimeError("while saving") from error
    except RuntimeError as outer:
        return outer


@pytest.mark.parametrize(("error", "full"), [
    (OSError(errno.ENOSPC, "No space left on device"), True), (OSError(errno.EDQUOT, "Disk quota exceeded"), True),
    (OSError(errno.EACCES, "Permission denied"), False), (ValueError("x"), False), (None, False),
    (chained(OSError(errno.ENOSPC, "")), True), (Failed({1: (OSError(errno.ENOSPC, ""), None)}), True),
    (Failed({1: (ValueError("x"), None)}), False), (RuntimeError("[enforce fail] No space left on device"), True),
])
def test_a_full_disk_is_recognised_whatever_it_is_wrapped_in(error, full):
    assert resume.is_disk_full(error) is full


def test_the_seal_is_plain_json(tmp_path):
    record = json.loads((write_point(tmp_path, 10) / resume.SEAL).read_text())
    assert record["step"] == 10 and all(len(digest) == 64 for _, digest in record["files"].values())
