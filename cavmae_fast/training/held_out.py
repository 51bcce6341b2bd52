"""How pretraining is judged by held-out clips that several ranks share."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from cavmae_fast.data.batches import Batch
from cavmae_fast.data.decode.decoder import Reject, UnusableDataError
from cavmae_fast.evaluation.retrieval import embed, retrieval_metrics
from cavmae_fast.training.ranks import current


def retrieval_among(model: nn.Module, batches: Iterable[Batch]) -> dict[str, float]:
    """`held_out_clips`, and recall and median rank of retrieval between sound and picture in both directions, over the clips
    of all ranks, each embedded by itself. UnusableDataError when none can be used."""
    numbers: list[np.ndarray] = []

    def inputs() -> Iterator[tuple[Tensor, Tensor]]:
        for batch in batches:
            numbers.append(batch.clips)
            yield batch.audio, batch.image

    own = inputs()
    first = next(own, None)
    embedded = None if first is None else embed(model, itertools.chain([first], own))
    parts = [part for part in current().gather(embedded and (np.concatenate(numbers), *embedded)) if part]
    if not parts:
        raise none_usable()
    # In the data's order, so that the figures do not depend on how the clips were shared.
    order = torch.from_numpy(np.argsort(np.concatenate([clips for clips, _, _ in parts]), kind="stable"))
    audio, video = (torch.cat([part[place] for part in parts])[order] for place in (1, 2))
    return {"held_out_clips": len(audio), **retrieval_metrics(audio, video)}


def none_usable() -> UnusableDataError:
    """The error when no held-out clip can be used."""
    return UnusableDataError([Reject("the held-out clips", "of the held-out clips, none can be used")])
