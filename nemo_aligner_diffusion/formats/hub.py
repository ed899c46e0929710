"""Where weights and tokenizers named in a command lie: a local path, or a Hugging Face repository fetched to the cache.

An existing path always wins, and what the cache already holds is taken without asking the network.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from nemo_aligner_diffusion.errors import CheckpointError, first_line

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")  # the Hub allows no longer ones


def is_hub_name(text: str) -> bool:
    """Whether ``text`` looks like ``owner/name`` of a Hugging Face repository."""
    return _HUB_NAME.fullmatch(text) is not None


def locate(
    source: str | Path,
    choices: Sequence[Sequence[str]],
    complete: Callable[[Path], bool],
    wanted: str,
    revision: str | None = None,
    fetch: bool = True,
) -> Path:
    """The local path of ``source``, fetched first where it names a repository that isn't at hand.

    Args:
        source: a path, or ``owner/name`` on the Hugging Face Hub.
        choices: file patterns to fetch, a group at a time until ``complete``; the preferred group first.
        complete: whether a folder holds what is needed.
        wanted: what is looked for, in words, for errors.
        revision: branch, tag or commit of a repository; ``None``: its main branch.
        fetch: ask the network for what the cache has not.

    Raises:
        CheckpointError: there is no such path, and no such repository can be had.
    """
    path = Path(source).expanduser()
    if path.exists():
        return path
    name = str(source)
    if not is_hub_name(name):
        raise CheckpointError(
            f"{name}: no such file or folder. Give the path of {wanted}, or a Hugging Face repository as owner/name."
        )
    from huggingface_hub import snapshot_download

    problem = "its files are not among those of the repository"
    for local_files_only in (True, False) if fetch else (True,):
        for patterns in choices:
            try:
                fetched = snapshot_download(
                    name, revision=revision, allow_patterns=list(patterns), local_files_only=local_files_only
                )
                folder = Path(fetched)
            # Network, cache, access and validation errors of several libraries, which share no base.
            except Exception as error:
                problem = f"{type(error).__name__}: {first_line(error)}"
                continue
            if complete(folder):
                return folder
    raise CheckpointError(
        f"{name}: no such path here, and {wanted} could not be had from that Hugging Face repository ({problem}). "
        f"Fetch it where there is a network (hf download {name}) and give the folder, or copy the cache (HF_HOME)."
    )
