import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = """
import os, subprocess, sys
from pathlib import Path
from nemo_minitron.launch.rank_log import RankLog

rank = int(sys.argv[2])
log = RankLog(Path(sys.argv[1]), rank)
print("before the first stage")
log.turn_to("score")
print("[score] a line")
os.write(1, b"of a library\\n")
subprocess.run(["echo", "of a child"])
print("a warning", file=sys.stderr)
log.turn_to("round1/search/a/distill")
print("[distill] a line")
log.turn_to("score")
log.tell_launcher("to the launcher")
raise SystemExit("the end")
"""


def run(folder, rank):
    done = subprocess.run([sys.executable, "-c", SCRIPT, folder, str(rank)], env={"PYTHONPATH": str(ROOT)},
                          capture_output=True, text=True, timeout=50, check=False)
    assert done.stderr == "to the launcher\n"
    return done.stdout


def test_all_is_in_the_rank_s_files_and_rank_0_is_on_the_terminal(tmp_path):
    shown = run(tmp_path, 0)
    assert shown == "before the first stage\n[score] a line\n[distill] a line\n", "what Python's rank 0 printed"
    found = {stage: (tmp_path / stage / "rank_0.log").read_text().splitlines()
             for stage in ("start", "score", "round1/search/a/distill")}
    assert all(re.fullmatch(r"--- \S+Z rank 0, process \d+ on \S+", lines.pop(0)) for lines in found.values())
    assert found["start"] == ["before the first stage"]
    assert found["score"][:4] == ["[score] a line", "of a library", "of a child", "a warning"]
    assert found["score"][4].startswith("--- ") and found["score"][5:] == ["the end"], "it came back to this stage"
    assert found["round1/search/a/distill"] == ["[distill] a line"]


def test_other_ranks_are_in_their_files_alone_and_a_later_run_appends(tmp_path):
    assert [run(tmp_path, 3), run(tmp_path, 3)] == ["", ""]
    assert (tmp_path / "score/rank_3.log").read_text().count("of a library") == 2
    assert {path.name for path in tmp_path.rglob("*.log")} == {"rank_3.log"}
