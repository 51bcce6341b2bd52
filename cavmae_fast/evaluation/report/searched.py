"""The page of a search: the query, and the clips that were found."""

from __future__ import annotations

from pathlib import Path

from cavmae_fast.clip import SAMPLE_RATE
from cavmae_fast.data.sets.opening import open_clips
from cavmae_fast.evaluation.index import Index, IndexFolderError
from cavmae_fast.evaluation.report.media import exhibit, exhibit_clip
from cavmae_fast.evaluation.report.page import Answers, Case, Page, plural, write_page
from cavmae_fast.evaluation.searching import Answer

WORDS = {"audio": "sounds", "video": "pictures"}


def compared(answer: Answer) -> str:
    """In words, what was compared with what: "a sound with the clips' pictures"."""
    query = {"audio": "the query's sound", "video": "the query's picture"}
    return " and ".join(f"{query[mine]} with the clips' {WORDS[theirs]}" for mine, theirs in answer.pairs)


def write_search_page(index: Index, answer: Answer, path: Path, sample_rate: int = SAMPLE_RATE) -> None:
    """Writes the page. IndexFolderError or MediaError when the clips are not where they were when they were embedded."""
    places, count = index.manifest["data"]["places"], index.manifest["data"]["clips"]
    if not places:
        raise IndexFolderError(f"{index.folder}: does not name where its clips are, so a page cannot show them")
    clips = open_clips(places)
    if len(clips) != count:
        raise IndexFolderError(f"{index.folder}: was made of {count} clips; {', '.join(places)} names {len(clips)} now")
    query = exhibit(answer.query.name, answer.query.sound, answer.query.frames, sample_rate=sample_rate)
    found = tuple(exhibit_clip(clips, hit.number, hit.id, f"cosine {hit.score:.3f}") for hit in answer.hits)
    page = Page(
        title=f"Search: {answer.query.name}",
        lead=f"The nearest of {plural(answer.searched, 'clip')} by cosine, comparing {compared(answer)}.",
        tables=(),
        cases=(Case(query, (Answers("Found", f"the best {len(found)}, best first", found),)),),
    )
    write_page(page, path)
