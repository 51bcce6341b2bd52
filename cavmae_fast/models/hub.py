"""Model folders on the Hugging Face Hub, through its own client, which is needed only here."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from cavmae_fast.errors import CavmaeError, first_line

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


class HubError(CavmaeError, OSError):
    """A repository that cannot be read or written; the message names it and says why."""


def names_repository(name: str | os.PathLike) -> bool:
    """Whether `name` is a repository's, `org/name`. What lies on the disk under this name comes before the Hub, and so does
    a path that says so itself (`./org/name`)."""
    return isinstance(name, str) and _REPOSITORY.fullmatch(name) is not None and not Path(name).exists()


def download(
    repository: str,
    files: Sequence[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> Path:
    """The folder of the client's cache with `files` of the repository `org/name`, downloaded where they are not there yet.

    Args:
        repository: `org/name`.
        files: what is needed of it; nothing else is downloaded.
        revision: branch, tag or commit; default: its main branch.
        token: access token; default: the one that the client is logged in with.
        local_files_only: take what the cache holds, and ask nobody.

    Raises:
        HubError: the client is not installed, the repository or a file is not there, or the network is not.
    """
    hub = _client(f"{repository} is no folder here, and to read it from the Hub")
    options = {"revision": revision, "token": token, "local_files_only": local_files_only}
    try:
        return Path(hub.snapshot_download(repository, allow_patterns=list(files), **options))
    except Exception as error:  # the client raises errors of the network library it was built with
        raise HubError(f"{repository} is no folder here, and cannot be read from the Hub: {first_line(error)}") from error


def upload(
    folder: Path,
    repository: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    message: str,
) -> str:
    """Uploads the files of `folder` in one commit, makes the repository if there is none, and returns the commit's address.

    Raises HubError when the client is not installed, or when the Hub refuses.
    """
    hub = _client(f"to write {repository} on the Hub")
    try:
        api = hub.HfApi(token=token)
        api.create_repo(repository, private=private, exist_ok=True)
        commit = api.upload_folder(repo_id=repository, folder_path=folder, commit_message=message, revision=revision)
    except Exception as error:
        raise HubError(f"{repository} cannot be written on the Hub: {first_line(error)}") from error
    return commit.commit_url


def _client(purpose: str) -> ModuleType:
    try:
        import huggingface_hub
    except ImportError as error:
        raise HubError(f"{purpose}, huggingface_hub must be installed: pip install 'cavmae_fast[hub]'") from error
    return huggingface_hub
