"""The ``.nemo`` writer: atomic, and deterministic to the byte."""

from __future__ import annotations

import contextlib
import gzip as gzip_module
import io
import os
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from nemo_aligner_diffusion.errors import ArchiveError, first_line
from nemo_aligner_diffusion.formats.nemo.common import (
    ARTIFACT_SCHEME,
    CONFIG_NAME,
    OUR_VERSION,
    WEIGHTS_NAME,
    artifact_digest,
    listing,
)

if TYPE_CHECKING:
    import torch


def save_nemo(
    path: str | os.PathLike[str],
    config: Mapping[str, Any],
    state_dict: Mapping[str, torch.Tensor],
    artifacts: Mapping[str, str | Path | bytes] | None = None,
    *,
    gzip: bool = False,
) -> Path:
    """Write a ``.nemo``. The same input gives the same bytes; an interrupted write leaves no file behind.

    Args:
        path: the file to write; replaced if it exists. Missing folders are made.
        config: plain values, or an OmegaConf container. ``target`` is required, ``nemo_version`` is set here. A string
            value ``nemo:<name>`` names the artifact ``<name>`` and is rewritten to ``nemo:<hash>_<name>``, the name it
            gets in the archive.
        state_dict: tensors of any device, saved in their order and dtype.
        artifacts: file name to its content (a path or the bytes). Every one must be named in ``config``.
        gzip: compress. Weights hardly shrink and opening gets slower, so the default is a plain tar, as in NeMo.

    Raises:
        ArchiveError: ``config`` has no target, an artifact is missing or unused, or the folder cannot be written to.
    """
    import torch
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    path = Path(path)
    stored_names: dict[str, str] = {}
    contents: dict[str, bytes] = {}
    for name, source in (artifacts or {}).items():
        if name in ("", ".", "..") or "/" in name or "\\" in name or not name.isprintable():
            raise ArchiveError(f"{path}: {name!r} is no plain file name for an artifact.")
        try:
            content = source if isinstance(source, bytes) else Path(source).read_bytes()
        except OSError as error:
            raise ArchiveError(
                f"{path}: the artifact {name!r} is not readable at {source!r}: {error.strerror}."
            ) from error
        stored_names[name] = f"{artifact_digest(content)}_{name}"
        contents[stored_names[name]] = content
    used: set[str] = set()

    def rename(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: rename(item) for key, item in value.items()}
        if isinstance(value, list):
            return [rename(item) for item in value]
        if isinstance(value, str) and value.startswith(ARTIFACT_SCHEME):
            name = value.removeprefix(ARTIFACT_SCHEME)
            if name not in stored_names:
                raise ArchiveError(
                    f"{path}: the config names {value!r}, but the artifacts are {listing(stored_names)}."
                )
            used.add(name)
            return ARTIFACT_SCHEME + stored_names[name]
        return value

    try:
        container = OmegaConf.to_container(config, resolve=True) if OmegaConf.is_config(config) else dict(config)
        plain = {**rename(container), "nemo_version": OUR_VERSION}
        yaml_text = OmegaConf.to_yaml(OmegaConf.create(plain))
    except (OmegaConfBaseException, YAMLError, ValueError) as error:
        raise ArchiveError(f"{path}: the config cannot be written as YAML: {first_line(error)}") from error
    if not isinstance(plain.get("target"), str):
        raise ArchiveError(f"{path}: the config has no 'target', the dotted name of the class that restores it.")
    if unused := sorted(set(stored_names) - used):
        raise ArchiveError(f"{path}: no config value names the artifacts {unused}; refer to them as 'nemo:<name>'.")

    # A fresh copy of each: torch.save would otherwise store the whole storage behind a view.
    tensors = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in state_dict.items()
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with (
            tempfile.TemporaryFile(dir=path.parent) as weights,
            tempfile.NamedTemporaryFile(
                dir=path.parent, prefix=f".{path.name}.", suffix=".tmp", delete=False
            ) as output,
        ):
            try:
                torch.save(tensors, weights)
                _write_tar(output, yaml_text, weights, contents, gzip)
                output.flush()
                os.fsync(output.fileno())
                os.chmod(output.name, 0o644)  # temporary files are private; an archive is for sharing
                os.replace(output.name, path)
            except BaseException:
                Path(output.name).unlink(missing_ok=True)
                raise
    except OSError as error:
        raise ArchiveError(f"{path}: cannot be written: {error.strerror}. Choose a folder you can write to.") from error
    return path


def _write_tar(
    output: IO[bytes], yaml_text: str, weights: IO[bytes], artifacts: Mapping[str, bytes], gzip: bool
) -> None:
    members: list[tuple[str, IO[bytes]]] = [
        (CONFIG_NAME, io.BytesIO(yaml_text.encode())),
        *((name, io.BytesIO(artifacts[name])) for name in sorted(artifacts)),
        (WEIGHTS_NAME, weights),
    ]
    with contextlib.ExitStack() as stack:
        stream: Any = output
        if gzip:
            stream = stack.enter_context(gzip_module.GzipFile(filename="", mode="wb", fileobj=output, mtime=0))
        tar = stack.enter_context(tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT))
        for name, content in members:
            info = tarfile.TarInfo(f"./{name}")  # NeMo's own writer prefixes "./"; owner, time and mode are fixed
            info.size = content.seek(0, io.SEEK_END)
            content.seek(0)
            tar.addfile(info, content)
