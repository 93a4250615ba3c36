"""Where lines of progress go."""

import errno
import logging
import re

import pytest

from ray_jobs import logs
from tests.conftest import ROOT


@pytest.fixture
def loggers():
    """Restores the project's loggers."""
    found = [logging.getLogger(name) for name in logs.LOGGERS]
    before = [(logger.handlers[:], logger.level, logger.propagate) for logger in found]
    yield
    for logger, (handlers, level, propagate) in zip(found, before, strict=True):
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


@pytest.mark.parametrize(
    ("flag", "shown"), [(None, ["usual", "warning"]), ("--quiet", ["warning"]), ("--verbose", ["detail", "usual", "warning"])]
)
def test_the_terminal_shows_what_is_asked_for_and_the_log_file_has_all_that_is_usual(flag, shown, loggers, capsys, tmp_path):
    assert logs.show_progress(["quickstart", *filter(None, [flag])]) == ["quickstart"]
    logger = logging.getLogger("perceiver.training.record")
    with logs.log_file(tmp_path / "log.txt"):
        logger.debug("detail")
        logger.info("usual")
        logger.warning("warning")
    logger.info("later")
    assert [line for line in capsys.readouterr().out.splitlines() if line != "later"] == shown
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d+ [A-Z]+ ", line) for line in lines)
    assert [line.split()[-1] for line in lines if "detail" not in line] == ["usual", "warning"]


def test_a_log_file_that_cannot_be_written_is_one_warning(loggers, capsys, tmp_path):
    with logs.log_file(tmp_path / "absent" / "log.txt"):
        logging.getLogger("ray_jobs.worker").info("one")
        logging.getLogger("ray_jobs.worker").info("two")
    assert capsys.readouterr().err.count("log.txt cannot be written") == 1


def test_a_module_that_may_be_run_as_a_program_logs_under_its_own_name_all_the_same():
    for path in [*(ROOT / "ray_jobs").glob("*.py"), *(ROOT / "tuning").glob("*.py")]:
        if "main_entry(main)" in (text := path.read_text()):
            assert "getLogger(__name__)" not in text, path


def test_a_full_disk_under_the_terminals_output_ends_nothing(loggers, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    logs.show_progress([])
    monkeypatch.setattr("builtins.print", full)
    logging.getLogger("ray_jobs.train").info("a line")


def test_a_reader_of_the_output_that_has_gone_is_heard_of(loggers, monkeypatch):
    def gone(*args, **kwargs):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    logs.show_progress([])
    monkeypatch.setattr("builtins.print", gone)
    with pytest.raises(BrokenPipeError):
        logging.getLogger("ray_jobs.train").info("a line")
