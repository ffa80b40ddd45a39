"""Logs of the ranks."""


def lines(path):
    """Of a log, without those that say when it was opened."""
    return [line for line in path.read_text().splitlines() if not line.startswith("--- ")]


def test_what_the_terminal_shows_is_in_rank_0_s_logs(undisturbed):
    run_dir, finished = undisturbed
    logged = [lines(run_dir / f"logs/{stage}/rank_0.log")
              for stage in ("score", "prune", "distill", "evaluate", "report")]
    assert [line for part in logged for line in part] == finished.stdout.splitlines()
    assert all(part[0].startswith("== ") and len(part) > 1 for part in logged)
