"""From the weights of a published reward to a ``.nemo``, checked before it gets its name. The kinds need no torch."""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_aligner_diffusion.errors import AlignerError, CheckpointError, ConfigurationError, OutputError

if TYPE_CHECKING:
    from transformers import CLIPModel

    from nemo_aligner_diffusion.rewards.support.preprocessing import Preprocessing


@dataclass(frozen=True)
class Kind:
    """One kind of published reward.

    Attributes:
        help: one line for the command.
        source: Hugging Face repository of the weights, where there is one usual place.
        source_help: what ``--source`` should be.
        file: the one file that is needed of a folder or repository.
        tokenizer: repository of the tokenizer, where the source doesn't carry its own.
        score: of a CLIP: ``pickscore``, ``hps`` or ``clipscore``.
        activation: of an OpenCLIP checkpoint of this kind, where all have the same.
        resize: how its own code prepares pictures that are no squares, where that isn't what the weights' folder says.
        without: options of the command that have no effect.
    """

    help: str
    source: str | None = None
    source_help: str = "a Hugging Face folder or repository of a CLIP, or an OpenCLIP checkpoint"
    file: str | None = None
    tokenizer: str = "openai/clip-vit-large-patch14"
    score: str = "pickscore"
    activation: str | None = None
    resize: str | None = None
    without: tuple[str, ...] = ("clip", "head_activation")


_VIT_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
_HPS = Kind(
    "HPSv2: cos",
    "xswu/HPSv2",
    file="HPS_v2_compressed.pt",
    tokenizer=_VIT_H,
    score="hps",
    activation="gelu",
    resize="pad",
)
KINDS: dict[str, Kind] = {
    "pickscore": Kind("PickScore: exp(logit_scale)·cos", "yuvalkirstain/PickScore_v1", tokenizer=_VIT_H),
    "clip": Kind("any CLIP, scored like PickScore (or see --score)"),
    "clipscore": Kind("CLIPScore: 2.5·max(cos, 0)", "openai/clip-vit-base-patch32", score="clipscore", resize="crop"),
    "hps": _HPS,
    "hps_v2.1": replace(_HPS, help="HPSv2.1: cos", file="HPS_v2.1_compressed.pt"),
    "aesthetic": Kind(
        "LAION's aesthetic predictor: a head on a CLIP's image embedding",
        source_help="the head's .pth, such as sac+logos+ava1-l14-linearMSE.pth",
        resize="crop",
        without=("tokenizer", "score", "prompt_prefix", "text_heads"),
    ),
    "image_reward": Kind(
        "ImageReward: a BLIP with a head",
        "THUDM/ImageReward",
        file="ImageReward.pt",
        tokenizer="google-bert/bert-base-uncased",
        without=("clip", "head_activation", "score", "prompt_prefix", "activation", "resize"),
    ),
}


@dataclass(frozen=True)
class Conversion:
    """What to convert and how: the command's options; ``None`` is the kind's own choice, see :data:`KINDS`."""

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


def convert_reward(conversion: Conversion, output: str | Path, *, overwrite: bool = False) -> list[str]:
    """Write ``output``, restore it, and score a grey picture; nothing appears under that name before all is well.

    Returns:
        What was written, in lines for the user.

    Raises:
        ConfigurationError: the kind is unknown, or an option has no effect with it.
        OutputError: ``output`` exists, or its folder cannot be written to.
        CheckpointError, ArchiveError: the source is missing or not what ``kind`` needs.
    """
    output = Path(output).expanduser()
    if conversion.kind not in KINDS:
        raise ConfigurationError(f"{conversion.kind!r} is no kind of reward; known are {', '.join(KINDS)}.")
    idle = [name for name in KINDS[conversion.kind].without if getattr(conversion, name) is not None]
    if idle:
        flags = ", ".join("--" + name.replace("_", "-") for name in idle)
        raise ConfigurationError(f"{flags} has no effect with --kind {conversion.kind}; leave it out.")
    _check_output(output, overwrite)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.")
    except OSError as error:
        raise OutputError(f"{output}: its folder cannot be written to: {error.strerror}. Choose another.") from error
    with folder:
        draft = Path(folder.name) / output.name
        try:
            _write(conversion, draft)
            facts = _verify(draft)
        except AlignerError as error:
            if str(draft) not in str(error):
                raise
            # The draft's name means nothing to the user, who is told about the file that was to be.
            raise CheckpointError(f"Nothing was written: {str(error).replace(str(draft), str(output))}") from error
        _check_output(output, overwrite)  # something may have come to lie there meanwhile
        os.replace(draft, output)
    return [f"wrote        {output} ({output.stat().st_size:,} bytes)", *facts]


def _check_output(output: Path, overwrite: bool) -> None:
    if output.is_dir():
        raise OutputError(f"{output}: is a folder. Give the name of the .nemo file to write.")
    if output.exists() and not overwrite:
        raise OutputError(f"{output}: exists already. Give --overwrite to replace it, or another name.")


def _write(conversion: Conversion, path: Path) -> None:
    import torch

    kind = KINDS[conversion.kind]
    source = conversion.source or kind.source
    if source is None:
        raise CheckpointError(f"--source is needed: {kind.source_help}.")
    common: dict[str, Any] = {
        "dtype": getattr(torch, conversion.dtype) if conversion.dtype else None,
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
    from nemo_aligner_diffusion.rewards.clip.tokenizer import read_tokenizer_files

    kind = KINDS[conversion.kind]
    origin, model, preprocessing = _clip(conversion, source)
    beside = origin if origin.is_dir() else origin.parent
    has_its_own = any((beside / name).is_file() for name in ("vocab.json", "tokenizer.json"))
    given = conversion.tokenizer or (beside if has_its_own else kind.tokenizer)
    convert_hf_clip_to_nemo(
        model,
        read_tokenizer_files(given),
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
    # the CLIP whose embeddings the published heads rate
    _, model, preprocessing = _clip(conversion, conversion.clip or "openai/clip-vit-large-patch14")
    activation = conversion.head_activation
    try:
        convert_aesthetic_to_nemo(head, model, path, activation=activation, preprocessing=preprocessing, **common)
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from error


def _write_image_reward(conversion: Conversion, source: str, path: Path, common: dict[str, Any]) -> None:
    from nemo_aligner_diffusion.formats.hub import locate
    from nemo_aligner_diffusion.rewards.image_reward.archive import convert_image_reward_to_nemo

    kind = KINDS["image_reward"]
    checkpoint = _single_file(source, kind.file or "")
    folder = locate(
        conversion.tokenizer or kind.tokenizer,
        (("vocab.txt",),),
        lambda candidate: (candidate / "vocab.txt").is_file(),
        "a folder with the vocab.txt of bert-base-uncased",
    )
    convert_image_reward_to_nemo(
        checkpoint, folder, path, vision_heads=conversion.vision_heads, text_heads=conversion.text_heads, **common
    )


def _clip(conversion: Conversion, source: str) -> tuple[Path, CLIPModel, Preprocessing]:
    """Where a CLIP lies, the model, and how its pictures are prepared."""
    from nemo_aligner_diffusion.formats.open_clip import OpenClipChoices
    from nemo_aligner_diffusion.rewards.clip.sources import locate_clip, read_clip

    kind = KINDS[conversion.kind]
    path = locate_clip(source) if kind.file is None else _single_file(source, kind.file)
    activation = conversion.activation
    if activation is None and not (path.is_dir() and (path / "config.json").is_file()):
        activation = kind.activation
    choices = OpenClipChoices(activation, conversion.vision_heads, conversion.text_heads)
    model, preprocessing = read_clip(path, choices)
    return path, model, replace(preprocessing, resize=conversion.resize or kind.resize or preprocessing.resize)


def _single_file(source: str, file: str) -> Path:
    """``source`` itself, or the file of that name in it where it is a folder or a repository."""
    from nemo_aligner_diffusion.formats.hub import locate

    path = locate(source, ((file,),), lambda folder: (folder / file).is_file(), f"a folder with {file}, or the file")
    return path / file if (path / file).is_file() else path


def _verify(path: Path) -> list[str]:
    """Restore the archive and score one picture; what it is, in lines."""
    import torch

    from nemo_aligner_diffusion.rewards.restore import restore_reward

    started = time.perf_counter()
    reward = restore_reward(path)
    seconds = time.perf_counter() - started
    with torch.no_grad():
        score = reward(torch.full((1, 3, 64, 64), 0.5), ["a grey picture"])
    if not score.isfinite():
        raise CheckpointError(
            f"{path}: the restored reward scores a grey picture {score.item()}. The weights hold NaN, or don't fit the "
            "dtype they were to be saved in: give --dtype float32 or bfloat16."
        )
    kind = getattr(reward, "score_type", None)
    parameters = sum(parameter.numel() for parameter in reward.parameters())
    return [
        f"reward       {reward.name} ({type(reward).__name__}{f', score {kind}' if kind else ''})",
        f"model        {parameters:,} parameters",
        f"restored     in {seconds:.1f} s; a grey picture scores {score.item():.4g}",
    ]
