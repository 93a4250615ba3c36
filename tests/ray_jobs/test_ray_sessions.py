"""Ray's temporary files: those of jobs that have ended go, the newest and everybody else's stay."""

import os
import subprocess

from ray_jobs.ray_sessions import DAYS, KEEP, MARK, mark, remove_old


def session(root, name, pid, age=0.0):
    folder = root / f"session_{name}"
    (folder / "logs").mkdir(parents=True)
    if pid is not None:
        (folder / MARK).write_text(str(pid))
        then = (folder / MARK).stat().st_mtime - age
        os.utime(folder / MARK, (then, then))
    return folder


def ended_process() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_the_newest_and_those_that_run_are_kept_and_others_are_not_touched(tmp_path):
    pid = ended_process()
    ended = [session(tmp_path, f"ended_{age}", pid, age) for age in range(KEEP + 3)]
    week_old = session(tmp_path, "old", pid, 86_400 * DAYS + 60)
    kept = [session(tmp_path, "running", os.getpid(), 1e8), session(tmp_path, "others", None), session(tmp_path, "strange", "x", 1e8)]
    (tmp_path / "session_latest").symlink_to(week_old)
    assert remove_old(tmp_path) == 4
    assert all(folder.exists() for folder in [*ended[:KEEP], *kept]) and not any(folder.exists() for folder in [*ended[KEEP:], week_old])


def test_a_session_is_marked_with_the_process_that_began_it(tmp_path):
    folder = session(tmp_path, "own", None)
    mark(folder)
    assert (folder / MARK).read_text() == str(os.getpid())
    mark(tmp_path / "nowhere")


def test_a_root_that_is_not_there_is_nothing(tmp_path):
    assert remove_old(tmp_path / "nowhere") == 0
