"""From the weights of a published reward to a ``.nemo``, checked before it gets its name."""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_aligner_diffusion.errors import AlignerError, CheckpointError, ConfigurationError, OutputError
from nemo_aligner_diffusion.rewards.convert.kinds import KINDS

if TYPE_CHECKING:
    import torch

    from nemo_aligner_diffusion.rewards.clip.sources import ClipWeights
    from nemo_aligner_diffusion.rewards.support.preprocessing import Preprocessing


@dataclass(frozen=True)
class Conversion:
    """What to convert and how; ``None`` is the kind's own choice, see :data:`.convert_kinds.KINDS`.

    Attributes:
        kind: a key of ``KINDS``.
        source: path or ``owner/name`` of a Hugging Face repository: the reward's weights.
        tokenizer: folder or repository of its tokenizer.
        clip: aesthetic: folder, file or repository of the CLIP whose embeddings the head rates.
        score: ``pickscore``, ``hps`` or ``clipscore``.
        dtype: name of the floating dtype to save in; as in the source when left out.
        activation, vision_heads, text_heads: of an OpenCLIP checkpoint, see :mod:`.open_clip_layout`.
        head_activation: aesthetic: between the head's layers.
        resize: one of :data:`.preprocessing.RESIZES`, see :class:`.Preprocessing`.
        prompt_prefix: words before every prompt.
        name: of the reward in metrics.
        gzip: compress the archive.
    """

    kind: str
    source: str | None = None
    tokenizer: str | None = None
    clip: str | None = None
    score: str | None = None
    dtype: str | None = None
    activation: str | None = None
    vision_heads: int | None = None
    text_heads: int | None = None
    head_activation: str | None = None
    resize: str | None = None
    prompt_prefix: str | None = None
    name: str | None = None
    gzip: bool = False


@dataclass(frozen=True)
class Converted:
    """What was written, and what restoring it gave."""

    path: Path
    size_bytes: int
    target: str
    name: str
    score: str
    parameters: int
    grey_score: float
    restore_seconds: float


def convert_reward(conversion: Conversion, output: str | Path, *, overwrite: bool = False) -> Converted:
    """Write ``output``, restore it, and score a grey picture; nothing appears under that name before all is well.

    Raises:
        ConfigurationError: the kind is unknown, or an option has no effect with it.
        OutputError: ``output`` exists, or its folder cannot be written to.
        CheckpointError, ArchiveError: the source is missing or not what ``kind`` needs.
    """
    output = Path(output).expanduser()
    check_options(conversion)
    check_output(output, overwrite)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.")
    except OSError as error:
        raise OutputError(f"{output}: its folder cannot be written to: {error.strerror}. Choose another.") from error
    with folder:
        draft = Path(folder.name) / output.name
        try:
            _write(conversion, draft)
            result = _verify(draft)
        except AlignerError as error:
            if str(draft) not in str(error):
                raise
            # The draft's name means nothing to the user, who is told about the file that was to be.
            raise CheckpointError(f"Nothing was written: {str(error).replace(str(draft), str(output))}") from error
        check_output(output, overwrite)  # something may have come to lie there meanwhile
        os.replace(draft, output)
    return Converted(output, output.stat().st_size, *result)


def check_output(output: Path, overwrite: bool) -> None:
    """Raises :class:`OutputError` for a folder, and for a file that is there already unless it may be replaced."""
    if output.is_dir():
        raise OutputError(f"{output}: is a folder. Give the name of the .nemo file to write.")
    if output.exists() and not overwrite:
        raise OutputError(f"{output}: exists already. Give --overwrite to replace it, or another name.")


def check_options(conversion: Conversion) -> None:
    """Raises :class:`ConfigurationError` for an unknown kind, and for an option that this kind has no use for."""
    if conversion.kind not in KINDS:
        raise ConfigurationError(f"{conversion.kind!r} is no kind of reward; known are {', '.join(KINDS)}.")
    idle = [name for name in KINDS[conversion.kind].without if getattr(conversion, name) is not None]
    if idle:
        flags = ", ".join("--" + name.replace("_", "-") for name in idle)
        raise ConfigurationError(f"{flags} has no effect with --kind {conversion.kind}; leave it out.")


def _write(conversion: Conversion, path: Path) -> None:
    kind = KINDS[conversion.kind]
    source = conversion.source or kind.source
    if source is None:
        raise CheckpointError(f"--source is needed: {kind.source_help}.")
    common: dict[str, Any] = {
        "dtype": _dtype(conversion.dtype),
        "name": conversion.name or conversion.kind.replace(".", "_"),
        "gzip": conversion.gzip,
        "extra": {"converted": {"kind": conversion.kind, "source": Path(source).name}},
    }
    if conversion.kind == "image_reward":
        _write_image_reward(conversion, source, path, common)
    elif conversion.kind == "aesthetic":
        _write_aesthetic(conversion, source, path, common)
    else:
        _write_clip(conversion, source, path, common)


def _write_clip(conversion: Conversion, source: str, path: Path, common: dict[str, Any]) -> None:
    from nemo_aligner_diffusion.rewards.clip.archive import convert_hf_clip_to_nemo
    from nemo_aligner_diffusion.rewards.clip.tokenizer import locate_tokenizer, read_tokenizer_files

    kind = KINDS[conversion.kind]
    weights, preprocessing = _clip_weights(conversion, source)
    if conversion.tokenizer is not None:
        tokenizer = locate_tokenizer(conversion.tokenizer)
    else:
        beside = weights.origin if weights.origin.is_dir() else weights.origin.parent
        has_its_own = any((beside / name).is_file() for name in ("vocab.json", "tokenizer.json"))
        tokenizer = beside if has_its_own else locate_tokenizer(kind.tokenizer or "openai/clip-vit-large-patch14")
    convert_hf_clip_to_nemo(
        weights.model(),
        read_tokenizer_files(tokenizer),
        path,
        score=conversion.score or kind.score,
        prompt_prefix=conversion.prompt_prefix or "",
        preprocessing=preprocessing,
        **common,
    )


def _write_aesthetic(conversion: Conversion, source: str, path: Path, common: dict[str, Any]) -> None:
    from nemo_aligner_diffusion.formats.checkpoints import read_tensors
    from nemo_aligner_diffusion.rewards.clip.aesthetic import convert_aesthetic_to_nemo

    head = read_tensors(Path(source).expanduser())
    weights, preprocessing = _clip_weights(conversion, conversion.clip or KINDS["aesthetic"].clip or "")
    try:
        convert_aesthetic_to_nemo(
            head,
            weights.vision_model(),
            path,
            activation=conversion.head_activation,
            preprocessing=preprocessing,
            **common,
        )
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from error


def _write_image_reward(conversion: Conversion, source: str, path: Path, common: dict[str, Any]) -> None:
    from nemo_aligner_diffusion.formats.hub import locate
    from nemo_aligner_diffusion.rewards.image_reward.archive import convert_image_reward_to_nemo

    kind = KINDS["image_reward"]
    checkpoint = _single_file(source, kind.file or "")
    folder = locate(
        conversion.tokenizer or kind.tokenizer or "",
        (("vocab.txt",),),
        lambda candidate: (candidate / "vocab.txt").is_file(),
        "a folder with the vocab.txt of bert-base-uncased",
    )
    convert_image_reward_to_nemo(
        checkpoint, folder, path, vision_heads=conversion.vision_heads, text_heads=conversion.text_heads, **common
    )


def _clip_weights(conversion: Conversion, source: str) -> tuple[ClipWeights, Preprocessing]:
    from nemo_aligner_diffusion.formats.open_clip import OpenClipChoices
    from nemo_aligner_diffusion.rewards.clip.sources import locate_clip, read_clip

    kind = KINDS[conversion.kind]
    path = locate_clip(source) if kind.file is None else _single_file(source, kind.file)
    activation = conversion.activation
    if activation is None and not (path.is_dir() and (path / "config.json").is_file()):
        activation = kind.activation
    weights = read_clip(path, OpenClipChoices(activation, conversion.vision_heads, conversion.text_heads))
    resize = conversion.resize or kind.resize or weights.preprocessing.resize
    return weights, replace(weights.preprocessing, resize=resize)


def _single_file(source: str, file: str) -> Path:
    """``source`` itself, or the file of that name in it where it is a folder or a repository."""
    from nemo_aligner_diffusion.formats.hub import locate

    path = locate(source, ((file,),), lambda folder: (folder / file).is_file(), f"a folder with {file}, or the file")
    if path.is_dir() and (path / file).is_file():
        return path / file
    return path


def _verify(path: Path) -> tuple[str, str, str, int, float, float]:
    """Restore the archive and score one picture: ``(target, name, score, parameters, its score, seconds)``."""
    import torch

    from nemo_aligner_diffusion.formats.nemo import load_nemo
    from nemo_aligner_diffusion.rewards.restore import restore_reward

    archive = load_nemo(path)
    started = time.perf_counter()
    reward = restore_reward(path)
    seconds = time.perf_counter() - started
    with torch.no_grad():
        score = reward(torch.full((1, 3, 64, 64), 0.5), ["a grey picture"]).item()
    if not torch.isfinite(torch.tensor(score)):
        raise CheckpointError(
            f"{path}: the restored reward scores a grey picture {score}. The weights hold NaN, or don't fit the dtype "
            "they were to be saved in: give --dtype float32 or bfloat16."
        )
    kind = archive.config.get("score")
    return (
        archive.target,
        reward.name,
        kind if isinstance(kind, str) else "",
        sum(parameter.numel() for parameter in reward.parameters()),
        score,
        seconds,
    )


def _dtype(name: str | None) -> torch.dtype | None:
    import torch

    return None if name is None else getattr(torch, name)
