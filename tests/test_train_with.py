"""What a classifier trains in each input mode: exactly the parameters that its loss reaches."""

from __future__ import annotations

import pytest
import tiny
from tiny import one_thread  # noqa: F401

from cavmae_fast import CAVMAEFT, CAVMAEFTAudio
from cavmae_fast.reference.cavmae_parameters import MODES


def trained(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def reached(model, mode: str) -> set[str]:
    audio, imgs = tiny.inputs()
    model.double().zero_grad(set_to_none=True)
    logits = model.forward_pred(audio) if isinstance(model, CAVMAEFTAudio) else model(audio, imgs, mode)
    logits.sum().backward()
    return {name for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("mode", MODES)
def test_exactly_what_the_mode_reaches_is_trained(mode):
    model = CAVMAEFT(4, **tiny.ENCODER)
    everything = trained(model)
    model.train_with(mode)
    assert trained(model) == reached(model, mode)
    model.train_with("multimodal")  # another mode later: what was frozen for this one is trained again
    assert trained(model) == reached(model, "multimodal") < everything


def test_what_others_froze_stays_frozen():
    model = CAVMAEFT(4, **tiny.ENCODER)
    model.patch_embed_a.requires_grad_(False)
    for mode in ("videoonly", "audioonly"):
        model.train_with(mode)
        assert not any(name.startswith("patch_embed_a") for name in trained(model))


def test_the_audio_branch():
    model = CAVMAEFTAudio(4, **tiny.ENCODER)
    model.train_with("audioonly")
    assert trained(model) == reached(model, "audioonly")
    for mode in ("multimodal", "videoonly", "missingvideoonly"):
        with pytest.raises(ValueError, match=r"for CAVMAEFTAudio it must be one of audioonly$"):
            model.train_with(mode)
    with pytest.raises(ValueError, match="mode is 'both'; for CAVMAEFT it must be one of multimodal, audioonly"):
        CAVMAEFT(4, **tiny.ENCODER).train_with("both")
