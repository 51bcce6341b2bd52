"""A checkpoint of sharded parameters: a folder in which each rank has written its part, whole again for whoever reads it.

The format is `torch.distributed.checkpoint`'s: one file of tensors per rank and `.metadata`, which says where the parts are.
Everything that is not sharded lies in `state.pt`, with a note in the place of each sharded tensor. Nothing in the folder can
run code: tensors are read with `weights_only=True`, and `.metadata`, a pickle, by an unpickler that knows its classes alone.
"""

from __future__ import annotations

import contextlib
import functools
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.tensor import DTensor

from cavmae_fast.data.sets.shards import put_whole

STATE_FILE = "state.pt"
_NOTE = "__sharded__"


def is_sharded(state: Any) -> bool:
    """Whether there is a sharded tensor anywhere in `state`."""
    if isinstance(state, dict):
        return any(map(is_sharded, state.values()))
    if isinstance(state, list | tuple):
        return any(map(is_sharded, state))
    return isinstance(state, DTensor)


def host_shard(value: DTensor) -> DTensor:
    """The same shards, copied to the host. The first call for shards on GPUs makes a group, so every rank must call it."""
    mesh = value.device_mesh if value.device_mesh.device_type == "cpu" else _host_mesh(value.device_mesh.size())
    local = value.to_local().detach().to("cpu", copy=True)
    return DTensor.from_local(local, mesh, value.placements, run_check=False, shape=value.shape, stride=value.stride())


@functools.cache
def _host_mesh(ranks: int) -> dist.DeviceMesh:
    return dist.init_device_mesh("cpu", (ranks,))


def write(folder: Path, state: dict[str, Any], group: dist.ProcessGroup) -> None:
    """Writes `state`, whose tensors are on the host, into the new folder `folder`. All ranks of `group` call it together,
    and all of them raise when one cannot write."""
    shards: dict[str, Tensor] = {}
    rest = _taken_apart(state, "", shards)
    with _ordinary_errors():
        dcp.save(shards, storage_writer=dcp.FileSystemWriter(folder), process_group=group)
    if dist.get_rank(group) == 0:
        put_whole(folder / STATE_FILE, lambda file: torch.save(rest, file))


def read(folder: Path) -> dict[str, Any]:
    """The state that was written into `folder`, with whole tensors on the CPU, on any number of ranks or none."""
    rest = torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True)
    reader = _Reader(folder)
    described = reader.read_metadata().state_dict_metadata
    tensors = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in described.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    with _ordinary_errors(), warnings.catch_warnings():  # which say that it reads alone
        warnings.simplefilter("ignore", UserWarning)
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    return _put_together(rest, tensors)


def _taken_apart(value: Any, key: str, shards: dict[str, Tensor]) -> Any:
    """`value` with a note in the place of each sharded tensor, which goes into `shards`."""
    if isinstance(value, DTensor):
        shards[key] = value
        return {_NOTE: key}
    if isinstance(value, dict):
        return {name: _taken_apart(item, f"{key}/{name}", shards) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_taken_apart(item, f"{key}/{place}", shards) for place, item in enumerate(value))
    return value


def _put_together(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if value.keys() == {_NOTE}:
            return tensors[value[_NOTE]]
        return {name: _put_together(item, tensors) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_put_together(item, tensors) for item in value)
    return value


@contextlib.contextmanager
def _ordinary_errors() -> Iterator[None]:
    """What went wrong on one rank or more, which PyTorch raises as an exception that `except Exception` passes by."""
    try:
        yield
    except dcp.CheckpointException as error:
        rank, (reason, _) = min(error.failures.items())
        raise OSError(f"rank {rank}: {reason}") from error


class _Reader(dcp.FileSystemReader):
    """PyTorch's reader, with an unpickler that cannot be made to run code."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._folder = folder

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """What the folder holds, and where."""
        with (self._folder / ".metadata").open("rb") as file:
            metadata = _Unpickler(file).load()
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Unpickler(pickle.Unpickler):
    allowed: ClassVar[set[tuple[str, str]]] = {
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        ("collections", "OrderedDict"),
        ("pathlib", "PosixPath"),
        ("pathlib._local", "PosixPath"),
        *(
            ("torch.distributed.checkpoint.metadata", name)
            for name in (
                "BytesStorageMetadata",
                "ChunkStorageMetadata",
                "Metadata",
                "MetadataIndex",
                "StorageMeta",
                "TensorProperties",
                "TensorStorageMetadata",
                "_MEM_FORMAT_ENCODING",
            )
        ),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self.allowed or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f".metadata names {module}.{name}, which no checkpoint needs")
