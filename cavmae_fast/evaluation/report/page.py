"""The page itself: typed rows in, one HTML file out.

Names come with the data, and a file may be called anything. So all text is escaped, and a Content-Security-Policy allows
the page nothing but its own style and script, known by their hashes, and pictures and sounds that are part of it: even a
mistake in escaping could neither run a script nor load anything.
"""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from pathlib import Path

from cavmae_fast.data.sets.shards import put_whole
from cavmae_fast.errors import CavmaeError


class PageError(CavmaeError, ValueError):
    """The page cannot be written where it is wanted."""

    exit_code = 2


@dataclass(frozen=True)
class Exhibit:
    """A clip that one can hear and see.

    Attributes:
        name: of the clip.
        sound: an MP3 file, or None.
        frames: JPEG files, in order of time.
        note: a few words below the name, such as the cosine.
        right: whether it is the clip that was sought; None where nobody can say.
    """

    name: str
    sound: bytes | None = None
    frames: tuple[bytes, ...] = ()
    note: str = ""
    right: bool | None = None


@dataclass(frozen=True)
class Answers:
    """A ranked list: what it is, what is to be said of it, and the clips, best first."""

    title: str
    summary: str
    exhibits: tuple[Exhibit, ...]


@dataclass(frozen=True)
class Case:
    """A query and what was found for it."""

    query: Exhibit
    groups: tuple[Answers, ...]


@dataclass(frozen=True)
class Table:
    """Numbers of the whole: a heading row and rows of text."""

    caption: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Page:
    """All that a page shows."""

    title: str
    lead: str
    tables: tuple[Table, ...]
    cases: tuple[Case, ...]


def check_target(path: Path) -> None:
    """PageError unless a file can be written at `path`; asked before any work is done, so that none is lost."""
    try:
        if path.is_dir():
            raise PageError(f"--report is {path}, which is a folder; it must be a file, such as {path / 'report.html'}")
        if not path.parent.is_dir():
            raise PageError(f"--report is {path}, but {path.parent} is no folder; it must be there")
        part = path.with_name(f".{path.name}.part")
        part.touch()
        part.unlink()
    except OSError as error:
        raise PageError(f"--report is {path}, which cannot be written ({error.strerror}); name another file") from error


def write_page(page: Page, path: Path) -> None:
    """Writes the page, whole or not at all."""
    # A name that is no text, for a file's name may be any bytes, is shown with question marks.
    data = render(page).encode("utf-8", errors="replace")
    put_whole(path, lambda file: file.write(data))


def render(page: Page) -> str:
    """The page as HTML."""
    style, script = (_asset(name) for name in ("page.css", "page.js"))
    policy = (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; img-src data:; media-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    cases = "\n".join(_case(case, number, len(page.cases)) for number, case in enumerate(page.cases, start=1))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{escape(page.title)}</title>
<style>{style}</style>
</head>
<body>
<a class="skip" href="#cases">Skip to the queries</a>
<header>
<h1>{escape(page.title)}</h1>
<p class="lead">{escape(page.lead)}</p>
{"".join(map(_table, page.tables))}</header>
<nav aria-label="Queries" id="steps" hidden>
<button type="button" id="previous">Previous</button>
<p id="place" role="status"></p>
<button type="button" id="next">Next</button>
<label><input type="checkbox" id="keys" checked> Keys <kbd>P</kbd> and <kbd>N</kbd></label>
</nav>
<main id="cases">
{cases}
</main>
<script>{script}</script>
</body>
</html>
"""


def _table(table: Table) -> str:
    headings = "".join(f'<th scope="col">{escape(text)}</th>' for text in table.headings)
    rows = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>{"".join(f"<td>{escape(text)}</td>" for text in row[1:])}</tr>'
        for row in table.rows
    )
    return (
        f'<div class="scroll"><table><caption>{escape(table.caption)}</caption><thead><tr>{headings}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>\n"
    )


def _case(case: Case, number: int, total: int) -> str:
    groups = "".join(_answers(group) for group in case.groups)
    counted = f"Query {number} of {total}" if total > 1 else "Query"
    return (
        f'<section class="case" aria-labelledby="query-{number}">\n'
        f'<h2 id="query-{number}" tabindex="-1"><span class="count">{counted}</span> '
        f"<bdi>{escape(case.query.name)}</bdi></h2>\n"
        f'<div class="query">{_media(case.query)}</div>\n{groups}</section>'
    )


def _answers(group: Answers) -> str:
    cards = "".join(_card(exhibit, rank) for rank, exhibit in enumerate(group.exhibits, start=1))
    return (
        f'<h3>{escape(group.title)}</h3>\n<p class="summary">{escape(group.summary)}</p>\n<ol class="cards">{cards}</ol>\n'
    )


def _card(exhibit: Exhibit, rank: int) -> str:
    mark = '<span class="mark">✓ the right clip</span>' if exhibit.right else ""
    return (
        f'<li class="card{" right" if exhibit.right else ""}">{_media(exhibit)}'
        f'<p class="name"><span class="rank">{rank}</span> <bdi>{escape(exhibit.name)}</bdi></p>'
        f'<p class="note">{escape(exhibit.note)}{mark}</p></li>\n'
    )


def _media(exhibit: Exhibit) -> str:
    """Frames and sound. The first picture carries the description; to hear it for each one would tire."""
    name, count = escape(exhibit.name), len(exhibit.frames)
    described = f"{count} frames of {name}" if count > 1 else f"frame of {name}"
    pictures = "".join(
        f'<img src="{_data(frame, "image/jpeg")}" alt="{described if place == 0 else ""}">'
        for place, frame in enumerate(exhibit.frames)
    )
    strip = f'<div class="frames">{pictures}</div>' if pictures else ""
    if exhibit.sound is None:
        return strip
    source = _data(exhibit.sound, "audio/mpeg")
    return f'{strip}<audio controls preload="metadata" aria-label="sound of {name}" src="{source}"></audio>'


def _data(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _asset(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def plural(count: int, word: str) -> str:
    """`1 clip`, `2 clips`."""
    return f"{count:,} {word}{'' if count == 1 else 's'}"
