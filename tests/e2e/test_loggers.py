"""`train.loggers`: Weights & Biases by the package itself, offline, and what is refused."""

import json
import signal
import struct

import pytest

from tests.e2e.command import NUM_STEPS, run, run_well
from tests.e2e.test_kill import start_and_wait

KEY = "0123456789abcdef0123456789abcdef01234567"


def records(path):
    """What is in a `.wandb` file: after 7 bytes, 32 KiB blocks of pieces with checksum, length and kind (LevelDB)."""
    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # the whole of a record, or its last piece
            yield whole
            whole = b""


def history(folder):
    """Steps and their numbers from the files that `wandb sync` would send; a step that is there twice counts once."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = {}
    for path in sorted(folder.glob("offline-run-*/*.wandb")):
        for data in records(path):
            record = Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "history":
                numbers = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
                found.setdefault(numbers["step"], {}).update(numbers)
    return found


def test_a_stopped_training_goes_on_in_the_same_run_and_no_key_is_written(halfway, inputs, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    process, _ = start_and_wait(inputs, halfway, 12, train__loggers="[wandb]")
    process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=120)
    assert "stopped by SIGTERM" in stderr
    distill = halfway / "outputs/tiny/round1/distill"
    run_id = json.loads((distill / "loggers.json").read_text())["wandb"]
    again = run_well(inputs.arguments(halfway / "outputs", train__loggers="[wandb]"), halfway)
    assert json.loads((distill / "loggers.json").read_text()) == {"wandb": run_id}
    runs = [path.name for path in (distill / "wandb").glob("offline-run-*")]
    assert len(runs) == 2 and all(name.endswith(f"-{run_id}") for name in runs)
    lines = [json.loads(line) for line in (distill / "metrics.jsonl").read_text().splitlines()]
    sent = history(distill / "wandb")
    assert sorted(sent) == list(range(1, NUM_STEPS + 1))
    for line in lines:
        for name, value in line.items():
            assert name == "step" or sent[line["step"]][f"distill/{name}"] == pytest.approx(value), (line["step"], name)
    assert any("heldout_ce" in line for line in lines)
    for path in (halfway / "outputs").rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes(), path
    assert KEY not in stdout + stderr + again.stdout + again.stderr


def test_what_is_missing_is_told_in_one_line(inputs, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    finished = run(inputs.arguments(tmp_path / "outputs", train__loggers="[wandb]"), tmp_path)
    assert finished.code == 2 and len(finished.stderr.splitlines()) == 1
    assert "WANDB_API_KEY" in finished.stderr and "(change train.loggers)" in finished.stderr
    finished = run(inputs.arguments(tmp_path / "outputs", train__loggers="[tensorflow]"), tmp_path)
    assert finished.code == 2 and "expected wandb, mlflow" in finished.stderr
    assert not (tmp_path / "outputs").exists()
