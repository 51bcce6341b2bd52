"""setuptools as the build backend, which also asks for CUTLASS's headers where the CUDA library is asked for."""

from __future__ import annotations

import os

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403

CUTLASS = "nvidia-cutlass>=4.2,<5"


def _with_cutlass(requirements: list[str]) -> list[str]:
    return [*requirements, CUTLASS] if os.environ.get("CAVMAE_BUILD_CUDA") == "1" else requirements


def get_requires_for_build_wheel(config_settings=None) -> list[str]:
    return _with_cutlass(build_meta.get_requires_for_build_wheel(config_settings))


def get_requires_for_build_editable(config_settings=None) -> list[str]:
    return _with_cutlass(build_meta.get_requires_for_build_editable(config_settings))
