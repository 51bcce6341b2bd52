"""`cavmae-fast embed`: a data set into an index."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cavmae_fast.evaluation.commands.options import data_of, next_line, printable, progress_bar
from cavmae_fast.evaluation.commands.search import SearchConfig
from cavmae_fast.evaluation.embedding import embed
from cavmae_fast.evaluation.index import Index
from cavmae_fast.evaluation.running import Running


@dataclass(frozen=True, kw_only=True)
class EmbedConfig(Running):
    """Embed clips into an index, for `search` and for your own programs (NumPy memory maps)."""

    checkpoint: Path
    """A folder written by save_pretrained, a published .pth, or .safetensors; pretrained or fine-tuned."""
    data: tuple[Path, ...] = ()
    """Clips: a folder that `cavmae-fast prepare` wrote, or folders of videos, media files, lists."""
    out: Path = Path("runs/index")
    """Folder of the index. The same command goes on where it was interrupted."""
    streams: Literal["both", "audio", "video"] = "both"
    """What is embedded of a clip; both: all that the model has."""
    pooling: Literal["mean", "tokens"] = "mean"
    """One embedding per clip and stream, or all its tokens."""
    frames: int = 1
    """Pictures per clip whose mean is taken: 1, the middle one, or up to 10. Models of several pictures at once take 1: the
    crop in the middle."""
    store: Literal["float32", "float16"] = "float32"
    """What the numbers are written as."""
    overwrite: bool = False
    """Replace the index in --out."""


def run(config: EmbedConfig) -> Index:
    """The command's job. Ranks share it, and the first one writes."""
    with progress_bar("clips") as progress:
        return embed(
            config.checkpoint,
            data_of(config.data),
            config.out,
            streams=None if config.streams == "both" else (config.streams,),
            pooling=config.pooling,
            frames=config.frames,
            store=config.store,
            running=config,
            overwrite=config.overwrite,
            progress=progress,
        )


def closing(config: EmbedConfig, index: Index) -> str:
    """How much was embedded, what could not be used, and what to run next."""
    shape = next(iter(index.arrays(index.streams[0]))).shape[1:]
    lines = [f"{len(index)} clips, {' and '.join(index.streams)}, {' x '.join(map(str, shape))} numbers each: {config.out}"]
    rejects = index.rejects
    if rejects:
        lines.append(f"{len(rejects)} clips could not be used; the first: {rejects[0]['reason']}")
    if config.pooling == "mean":
        lines.append(next_line("search", config.out, *_query(index)))
        lines.append("       or by a file of yours: --audio x.wav, --image y.jpg or --video z.mp4")
    return printable(lines)


def _query(index: Index) -> list[str]:
    """Options that search for a clip of the index: by its sound, the nearest pictures, where there are both. Without its
    file at hand, as in shards, the file is left to the reader."""
    own = index[0].path if Path(index[0].path).is_file() else "FILE"
    top = [] if len(index) >= SearchConfig.top else ["--top", str(len(index))]
    if index.streams == ["video"]:
        return ["--video", own, *top]
    return ["--audio", own, *(["--match", "other"] if "video" in index.streams else []), *top]
