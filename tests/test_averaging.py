"""The mean of checkpoints: exact, in the first one's dtype, and no mean of what does not belong together."""

from __future__ import annotations

import pytest
import torch

from cavmae_fast.models import CheckpointError
from cavmae_fast.models.averaging import average_states


@pytest.fixture
def saved(tmp_path):
    def save(name, state):
        torch.save(state, tmp_path / name)
        return tmp_path / name

    return save


def test_mean_in_float64(saved):
    # In float16 itself the sum of these would round: 2048 + 1 is 2048.
    values = [2048.0, 1.0, 3.0]
    paths = [
        saved(f"{i}.pth", {"w": torch.full((2,), v, dtype=torch.float16), "n": torch.tensor(7)})
        for i, v in enumerate(values)
    ]
    mean = average_states(paths)
    assert mean["w"].dtype == torch.float16 and mean["w"].tolist() == [684.0, 684.0]
    assert mean["n"].dtype == torch.int64 and mean["n"] == 7
    assert torch.equal(average_states(paths[:1])["w"], torch.full((2,), 2048.0, dtype=torch.float16))


def test_what_does_not_belong_together(saved):
    first = saved("first.pth", {"w": torch.zeros(2), "n": torch.tensor(1)})
    with pytest.raises(ValueError, match=r"paths is empty"):
        average_states([])
    for state, words in (
        ({"w": torch.zeros(3), "n": torch.tensor(1)}, r"other.pth does not fit .*first.pth: w has shape \[3\], there \[2\]"),
        ({"w": torch.zeros(2)}, r"other.pth does not fit .*: n is in .*first.pth alone"),
        ({"w": torch.zeros(2), "n": torch.tensor(1), "x": torch.zeros(1)}, r"x is in .*other.pth alone"),
        ({"w": torch.zeros(2), "n": torch.tensor(2)}, r"n differs and is no float"),
    ):
        with pytest.raises(CheckpointError, match=words):
            average_states([first, saved("other.pth", state)])
