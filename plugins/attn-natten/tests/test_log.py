"""The logger: its level, and where its lines go."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import textwrap

import pytest
from attn_natten import log

LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40, "critical": 50, "DEBUG": 10, " Error ": 40, "": 20}


def stderr_of(code, **environment):
    """What `code` writes to stderr in a process of its own."""
    variables = {name: value for name, value in os.environ.items() if name != log.VARIABLE}
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=variables | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return [line for line in ended.stderr.splitlines() if "attn_natten" in line or log.VARIABLE in line]


@pytest.mark.parametrize(("word", "level"), LEVELS.items(), ids=repr)
def test_the_level_is_what_the_variable_says(word, level, monkeypatch):
    monkeypatch.setenv(log.VARIABLE, word)
    assert log.level_asked_for() == level


def test_the_level_is_info_without_the_variable(monkeypatch):
    monkeypatch.delenv(log.VARIABLE, raising=False)
    assert log.level_asked_for() == logging.INFO


def test_another_word_is_warned_of_and_is_info(monkeypatch):
    monkeypatch.setenv(log.VARIABLE, "loud")
    with pytest.warns(UserWarning, match="NATTEN_LOG_LEVEL: takes debug, info, warning, error, critical, got 'loud'"):
        assert log.level_asked_for() == logging.INFO


def test_whoever_sets_the_variable_sees_the_lines():
    code = """
        from attn_natten.log import logger
        logger.debug("one")
        logger.info("two")
    """
    assert [line.split("attn_natten ", 1)[1] for line in stderr_of(code, NATTEN_LOG_LEVEL="debug")] == [
        "DEBUG: one",
        "INFO: two",
    ]
    assert [line.split("attn_natten ", 1)[1] for line in stderr_of(code, NATTEN_LOG_LEVEL="info")] == ["INFO: two"]
    assert stderr_of(code) == []


def test_a_program_that_has_set_up_logging_gets_every_line_once():
    code = """
        import logging
        from attn_natten.log import logger
        logging.basicConfig(format="%(name)s said %(message)s")
        logger.warning("it")
    """
    assert stderr_of(code, NATTEN_LOG_LEVEL="debug") == ["attn_natten said it"]
