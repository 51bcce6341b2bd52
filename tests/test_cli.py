"""The table of commands: what each line names is there, and the program turns results into text and exit codes."""

from __future__ import annotations

import dataclasses
import inspect
import sys

import pytest

from cavmae_fast import cli


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_each_line_of_the_table_names_what_exists(name):
    command = cli.COMMANDS[name]
    config = cli._load(command.config)
    assert dataclasses.is_dataclass(config) and inspect.getdoc(config)
    inspect.signature(cli._load(command.job)).bind("configuration")
    if command.closing:
        inspect.signature(cli._load(command.closing)).bind("configuration", "result")


def test_configurations_tell_the_commands_apart():
    configs = [cli._load(command.config) for command in cli.COMMANDS.values()]
    assert len(set(configs)) == len(configs)


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (ValueError("--top is 0"), 2, "error: --top is 0"),
        (OSError("disk full"), 1, "error: disk full"),
        (KeyboardInterrupt(), 130, "error: interrupted; nothing was written"),
    ],
)
def test_errors_are_one_line(error, code, words, monkeypatch, capsys):
    def job(config):
        raise error

    monkeypatch.setattr("cavmae_fast.doctor.examine", job)
    monkeypatch.setattr(sys, "argv", ["cavmae-fast", "doctor"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == code
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1


def test_a_result_that_did_not_pass_ends_with_1(monkeypatch, capsys):
    line = cli.COMMANDS["doctor"]._replace(passed=lambda result: False)
    monkeypatch.setitem(cli.COMMANDS, "doctor", line)
    monkeypatch.setattr("cavmae_fast.doctor.examine", lambda config: "all is bad")
    monkeypatch.setattr(sys, "argv", ["cavmae-fast", "doctor"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 1 and capsys.readouterr().out == "all is bad\n"
