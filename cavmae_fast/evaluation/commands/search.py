"""`cavmae-fast search`: the clips of an index nearest to a file."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from cavmae_fast.evaluation.commands.options import next_line, printable
from cavmae_fast.evaluation.index import Index
from cavmae_fast.evaluation.report.page import check_target
from cavmae_fast.evaluation.report.searched import compared, write_search_page
from cavmae_fast.evaluation.running import Running
from cavmae_fast.evaluation.searching import Answer, search


@dataclass(frozen=True, kw_only=True)
class SearchConfig(Running):
    """Search an index by a sound, an image or a video."""

    index: Path
    """Folder that `cavmae-fast embed` wrote."""
    audio: Path | None = None
    """Search by this sound: WAV, FLAC, MP3, or the sound of a video."""
    image: Path | None = None
    """Search by this picture: JPEG or PNG."""
    video: Path | None = None
    """Search by sound and picture of this video."""
    top: int = 10
    """Clips to find."""
    match: Literal["auto", "other", "same", "all"] = "auto"
    """same: a sound with the clips' sounds, a picture with their pictures; other: a sound with pictures, a picture with
    sounds; all: both; auto: same, where the index has it."""
    checkpoint: Path | None = None
    """The model that made the index; default: where it was then."""
    backend: Literal["auto", "exact", "faiss"] = "auto"
    """exact: with every clip; faiss: with those that are likely; auto: faiss beyond ten million clips."""
    report: Path | None = None
    """Write a page here (HTML, one file) on which the clips can be heard and seen."""


def run(config: SearchConfig) -> Answer:
    """The command's job."""
    if config.report is not None:
        check_target(config.report)
    index = Index(config.index)
    answer = search(
        index,
        audio=config.audio,
        image=config.image,
        video=config.video,
        top=config.top,
        match=config.match,
        model=config.checkpoint,
        backend=config.backend,
        running=config,
    )
    if config.report is not None:
        write_search_page(index, answer, config.report, index.manifest["clip"]["sample_rate"])
    return answer


def closing(config: SearchConfig, answer: Answer) -> str:
    """The answers as a table."""
    lines = [f"{answer.query.name}: the nearest of {answer.searched} clips, comparing {compared(answer)}"]
    lines += [f"{hit.rank:>4}  {hit.score:6.3f}  {hit.id}   {hit.path}" for hit in answer.hits]
    if config.report is None:
        lines.append(next_line("search", config.index, *_options(config), "--report", "found.html"))
    else:
        lines.append(f"page  {config.report}   (open it in a browser)")
        best, model = answer.hits[0].path, config.checkpoint or Index(config.index).manifest["model"]["path"]
        if model is not None and Path(best).is_file():
            lines.append(next_line("inpaint", model, "--data", best))
    return printable(lines)


def _options(config: SearchConfig) -> list[str]:
    """The options by which this search differs from the defaults, as they are typed."""
    given = ((field.name, getattr(config, field.name)) for field in fields(config) if field.name not in ("index", "report"))
    return [
        word
        for name, value in given
        if value != getattr(SearchConfig, name)
        for word in (f"--{name.replace('_', '-')}", str(value))
    ]
