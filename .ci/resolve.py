"""Can this project be installed where torch comes with CUDA? Asks pip to resolve it against PyPI, downloading metadata only.

The CPU build of torch requires no Triton, so an install on a machine without a GPU does not show that constraints.txt pins a
Triton which the CUDA build refuses. Exit code 1 means that pip found a conflict; a registry that does not answer is tried
again, reported, and passed over. Needs Python's standard library and a pip that knows `--use-feature=fast-deps`.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ("3.11", "3.12", "3.13")
EXTRAS = ("dali", "xformers")
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in range(5, 40)]
PLATFORMS += [f"manylinux{name}_x86_64" for name in ("1", "2010", "2014")]
ATTEMPTS, PAUSE, LIMIT = 3, 10, 120
"How often a registry is asked, seconds between two attempts, and seconds one attempt may take."

# Variables of pip that say how to reach the network. All others could name another source of packages than PyPI.
KEPT = ("PIP_CERT", "PIP_CLIENT_CERT", "PIP_PROXY", "PIP_CACHE_DIR")
# What pip prints when it gives up on a page or a file. A page that answers 404 is of a package that does not exist, which is
# a conflict.
GAVE_UP = re.compile(
    r"Could not fetch URL (?!.*\b404 Client Error)|Max retries exceeded|TimeoutError|Read timed out|ConnectionError"
    r"|Connection (aborted|broken|reset)|IncompleteRead|\b5\d\d Server Error|\b429 Client Error"
)


def requirements(project: dict, extras: tuple[str, ...]) -> list[str]:
    """The requirements in pyproject.toml's table `project` with those of the extras, where an extra may name others."""
    found = list(project["dependencies"])
    for extra in extras:
        for line in project["optional-dependencies"][extra]:
            own = re.fullmatch(rf"{re.escape(project['name'])}\[(.+)\]", line.replace(" ", ""))
            found += requirements({**project, "dependencies": []}, tuple(own[1].split(","))) if own else [line]
    return list(dict.fromkeys(found))


def verdict(returncode: int, output: str) -> tuple[str, str]:
    """("ok" or "unreachable" or "conflict", why), from what pip returned and printed with `-vv`.

    A page that pip could not fetch hides versions, so that pip reports a conflict where there may be none: this is
    "unreachable". What pip tried again and then received is not. A failure of any other kind, such as an unknown option,
    counts as a conflict: otherwise this check could stop checking without anyone noticing.
    """
    if returncode == 0:
        return "ok", ""
    for line in output.splitlines():
        if GAVE_UP.search(line) and not line.startswith("WARNING: Retrying"):
            return "unreachable", line
    _, error, rest = output.partition("ERROR: ")  # before it stands pip's log, after "Exception information" its traceback
    return "conflict", (error + rest).partition("Exception information:")[0].strip() or output[-2000:]


def resolve(python: str, wanted: list[str], constraints: Path) -> tuple[str, str]:
    """The verdict for one version of Python."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PIP_") or k in KEPT}
    environment["PIP_CONFIG_FILE"] = os.devnull
    with tempfile.TemporaryDirectory() as target:
        command = [sys.executable, "-m", "pip", "install", "-vv", "--dry-run", "--ignore-installed", "--target", target]
        command += ["--disable-pip-version-check", "--use-feature=fast-deps", "--only-binary=:all:", "--implementation=cp"]
        command += ["--python-version", python, *(f"--platform={name}" for name in PLATFORMS), "-c", str(constraints)]
        try:
            pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            run = subprocess.run([*command, *wanted], **pipe, env=environment, timeout=LIMIT)
        except subprocess.TimeoutExpired:
            return "unreachable", f"no answer within {LIMIT} s"
    return verdict(run.returncode, run.stdout)


def resolve_patiently(python: str, wanted: list[str], constraints: Path) -> tuple[str, str]:
    """`resolve`, asked again while the registry does not answer."""
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(PAUSE)
        found, why = resolve(python, wanted, constraints)
        if found != "unreachable":
            break
    return found, why


def main() -> int:
    wanted = requirements(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"], EXTRAS)
    with ThreadPoolExecutor(len(PYTHONS)) as pool:
        results = list(pool.map(lambda python: resolve_patiently(python, wanted, ROOT / "constraints.txt"), PYTHONS))
    for python, (found, why) in zip(PYTHONS, results):
        head = f"resolve: Python {python} with {', '.join(EXTRAS)}:"
        if found == "unreachable":
            print(f"{head} PASSED OVER, the registry did not answer {ATTEMPTS} times: {why}")
        else:
            print(head, found, why)
    return int(any(found == "conflict" for found, _ in results))


if __name__ == "__main__":
    sys.exit(main())
