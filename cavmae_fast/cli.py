"""The command line: `cavmae-fast <command>`. Nothing computes here; `COMMANDS` says what does.

Exit codes: 0 done, 1 the job failed, 2 wrong usage (an option, a file that is not there); 130 interrupted.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn


class Command(NamedTuple):
    """One command. Names are `module:name` within the package and are imported when they are needed: all configurations for
    `--help`, the rest only by the command that runs."""

    config: str
    "The dataclass of its options; its docstring is the help."
    job: str
    "Called with the configuration; returns the result."
    closing: str = ""
    "Called with the configuration and the result; returns the text that is printed. Without it the result is printed."
    interrupted: str = "nothing was written"
    "What is so when the user stopped it."
    passed: Callable[[Any], bool] = lambda result: True
    "Whether the result is a success; exit code 1 where it is none."
    shared: bool = False
    "Whether the processes that torchrun starts do the job together. (The jobs that train see to that themselves.)"


COMMANDS = {
    "pretrain": Command(
        "training.pretrain_config:PretrainConfig",
        "training.pretrain:pretrain",
        "training.closing:pretrained",
        "start the same command again to go on from the newest checkpoint",
    ),
    "finetune": Command(
        "training.finetune_config:FinetuneConfig",
        "training.finetune:finetune",
        "training.finetune_closing:finetuned",
        "start the same command again to go on from the newest checkpoint",
    ),
    "prepare": Command(
        "data.commands.prepare:PrepareConfig",
        "data.commands.prepare:prepare",
        "data.commands.closing:prepared",
        "finished shards are whole; start the same command again to go on",
    ),
    "check": Command(
        "data.commands.check:CheckConfig",
        "data.commands.check:check",
        "data.commands.closing:checked",
        passed=lambda report: report["ok"],
    ),
    "runs": Command("training.runs:RunsConfig", "training.runs:list_runs", "training.runs:render"),
    "retrieve": Command(
        "evaluation.commands.retrieve:RetrieveConfig",
        "evaluation.commands.retrieve:run",
        "evaluation.commands.retrieve:closing",
        shared=True,
    ),
    "evaluate": Command(
        "evaluation.commands.evaluate:EvaluateConfig",
        "evaluation.commands.evaluate:run",
        "evaluation.commands.evaluate:closing",
        shared=True,
    ),
    "embed": Command(
        "evaluation.commands.embed:EmbedConfig",
        "evaluation.commands.embed:run",
        "evaluation.commands.embed:closing",
        "finished parts of the index are whole; start the same command again to go on",
        shared=True,
    ),
    "search": Command(
        "evaluation.commands.search:SearchConfig",
        "evaluation.commands.search:run",
        "evaluation.commands.search:closing",
    ),
    "inpaint": Command(
        "evaluation.commands.inpaint:InpaintConfig",
        "evaluation.commands.inpaint:run",
        "evaluation.commands.inpaint:closing",
        "clips whose folders are there are whole",
    ),
    "average": Command(
        "evaluation.commands.convert:AverageConfig",
        "evaluation.commands.convert:run_average",
        "evaluation.commands.convert:closing",
    ),
    "convert": Command(
        "evaluation.commands.convert:ConvertConfig",
        "evaluation.commands.convert:run_convert",
        "evaluation.commands.convert:closing",
    ),
    "tune": Command(
        "tuning.config:TuneConfig",
        "tuning.tune:tune",
        "tuning.tune:closing",
        "start the same command again to go on with what was found",
    ),
    "doctor": Command("doctor:DoctorConfig", "doctor:examine"),
}


def main() -> None:
    """Entry point of the `cavmae-fast` program."""
    import tyro

    configs = {name: _load(command.config) for name, command in COMMANDS.items()}
    arguments = sys.argv[1:]
    if arguments and (kind := configs.get(arguments[0])) is not None and "config" in kind.__dataclass_fields__:
        arguments[1:] = _run(lambda: _load("training.config_file:expand")(arguments[1:], kind), "nothing was done")
    config = tyro.extras.subcommand_cli_from_dict(
        configs,
        prog="cavmae-fast",
        args=arguments,
        config=(tyro.conf.PositionalRequiredArgs,),
        description="Audio-visual masked autoencoders: from video files to trained models.",
    )
    command = next(COMMANDS[name] for name, kind in configs.items() if type(config) is kind)
    job = _load(command.job)

    def done() -> Any:
        if not command.shared:
            return job(config)
        with _load("training.joining:joined")(config.device):
            return job(config)

    result = _run(done, command.interrupted)
    if os.environ.get("RANK", "0") == "0":  # under torchrun, one process shows what all have done
        print(_load(command.closing)(config, result) if command.closing else result)
    sys.exit(0 if command.passed(result) else 1)


def _load(place: str) -> Any:
    """What `module:name` names within the package."""
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(f"cavmae_fast.{module}"), name)


def _run(job: Callable[[], Any], interrupted: str) -> Any:
    """What the job returns; its errors become one line and an exit code."""
    from cavmae_fast.errors import CavmaeError

    try:
        return job()
    except KeyboardInterrupt:
        _stop(130, f"interrupted; {interrupted}")
    except CavmaeError as error:
        _stop(error.exit_code, str(error))
    except (OSError, MemoryError) as error:
        _stop(1, str(error) or type(error).__name__)
    except ValueError as error:
        _stop(2, str(error))


def _stop(code: int, message: str) -> NoReturn:
    if message:  # else another process shows it
        print(f"cavmae-fast: error: {message}", file=sys.stderr)
    sys.exit(code)
