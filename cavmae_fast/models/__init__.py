"""The modules users import. Parameters, names and numbers are those of the published code; the speed is in `ops`."""

from cavmae_fast.models.cavmae import CAVMAE
from cavmae_fast.models.cavmae_ft import CAVMAEFT, CAVMAEFTAudio
from cavmae_fast.models.imagenet_mae import load_imagenet_mae
from cavmae_fast.models.mae import MAE, MAEFT
from cavmae_fast.models.mavil import MAViL, MAViLFT
from cavmae_fast.models.presets import PRESETS, Preset, create_model
from cavmae_fast.models.tower_weights import load_mae, load_tower
from cavmae_fast.models.weights import PRETRAINED_TO_FINE_TUNED, CheckpointError, load_checkpoint
from cavmae_fast.reference.outputs import FeatureOutput, InpaintOutput, PretrainOutput, PretrainParts

__all__ = [
    "CAVMAE",
    "CAVMAEFT",
    "MAE",
    "MAEFT",
    "PRESETS",
    "PRETRAINED_TO_FINE_TUNED",
    "CAVMAEFTAudio",
    "CheckpointError",
    "FeatureOutput",
    "InpaintOutput",
    "MAViL",
    "MAViLFT",
    "Preset",
    "PretrainOutput",
    "PretrainParts",
    "create_model",
    "load_checkpoint",
    "load_imagenet_mae",
    "load_mae",
    "load_tower",
]
