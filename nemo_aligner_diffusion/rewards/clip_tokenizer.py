"""CLIP's byte-pair tokenizer out of a ``.nemo``, without unpacking it to disk."""

from __future__ import annotations

import inspect
import json
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_aligner_diffusion.errors import ArchiveError
from nemo_aligner_diffusion.nemo_archive import NemoArchive

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def load_tokenizer(archive: NemoArchive, folder: str | Path | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of ``archive``: from ``folder`` if given, else from its artifacts, else by the name it gives.

    NeMo's own archives often only name a Hugging Face repository (``tokenizer.type: openai/clip-vit-large-patch14``);
    that one is taken from the local cache or, failing that, from the Hub. A tokenizer holds data only, never code.

    Raises:
        ArchiveError: there is none, or its files are damaged.
    """
    section = archive.config.get("tokenizer")
    section = section if isinstance(section, dict) else {}
    vocab_reference = section.get("vocab_file")
    merges_reference = section.get("merges_file") or section.get("merge_file")  # the latter is NeMo's spelling
    if folder is not None:
        try:
            vocab, merges = Path(folder, "vocab.json").read_bytes(), Path(folder, "merges.txt").read_bytes()
        except OSError as error:
            raise ArchiveError(
                f"{folder}: no CLIP tokenizer here ({error.strerror}: {error.filename}). "
                "Give a folder with vocab.json and merges.txt."
            ) from error
        return tokenizer_from_bytes(vocab, merges, str(folder))
    if vocab_reference and merges_reference:
        return tokenizer_from_bytes(
            archive.artifact(vocab_reference), archive.artifact(merges_reference), str(archive.path)
        )
    name = section.get("type")
    if isinstance(name, str) and _HUB_NAME.fullmatch(name):
        from transformers import CLIPTokenizer

        try:
            tokenizer: PreTrainedTokenizerBase = CLIPTokenizer.from_pretrained(name)
            return tokenizer
        # Network, cache and file-format errors of several libraries.
        except Exception as error:
            raise ArchiveError(
                f"{archive.path}: it holds no tokenizer files and names {name!r}, which could not be loaded "
                f"({type(error).__name__}). Set rm.model.tokenizer to a folder with its vocab.json and merges.txt."
            ) from error
    raise ArchiveError(
        f"{archive.path}: its configuration names no tokenizer (tokenizer.vocab_file and tokenizer.merges_file as "
        "nemo:<hash>_<name>). Set rm.model.tokenizer to a folder with vocab.json and merges.txt."
    )


def tokenizer_from_bytes(vocab: bytes, merges: bytes, origin: str) -> PreTrainedTokenizerBase:
    """A ``CLIPTokenizer`` from the contents of ``vocab.json`` and ``merges.txt``; ``origin`` is named in errors."""
    from transformers import CLIPTokenizer

    try:
        vocabulary = _vocabulary(vocab)
        pairs: Any = _merges(merges, vocabulary)
        if "vocab" in inspect.signature(CLIPTokenizer.__init__).parameters:  # transformers 5
            tokenizer: Any = CLIPTokenizer(vocab=vocabulary, merges=pairs)
        else:  # transformers 4 reads files only
            with tempfile.TemporaryDirectory() as folder:
                vocab_path, merges_path = Path(folder, "vocab.json"), Path(folder, "merges.txt")
                vocab_path.write_bytes(vocab)
                merges_path.write_bytes(merges)
                tokenizer = CLIPTokenizer(str(vocab_path), str(merges_path))
    except ValueError as error:  # JSON and Unicode errors too
        raise ArchiveError(
            f"{origin}: its tokenizer files are damaged: {str(error)[:200]}. Save the archive again."
        ) from (error)
    # The tokenizers library raises bare Exception.
    except Exception as error:
        raise ArchiveError(
            f"{origin}: its tokenizer files don't make a tokenizer ({str(error)[:200]}). Save the archive again."
        ) from error
    loaded: PreTrainedTokenizerBase = tokenizer
    return loaded


def _vocabulary(content: bytes) -> dict[str, int]:
    try:
        vocabulary = json.loads(content)
    except RecursionError:
        raise ValueError("the vocabulary is nested") from None
    if not isinstance(vocabulary, dict) or not all(
        isinstance(number, int) and not isinstance(number, bool) and 0 <= number < 2**31
        for number in vocabulary.values()
    ):
        raise ValueError("the vocabulary should map strings to token ids")
    if len(set(vocabulary.values())) != len(vocabulary):
        raise ValueError("two entries of the vocabulary share a token id")
    for token in ("<|startoftext|>", "<|endoftext|>"):
        if token not in vocabulary:
            raise ValueError(f"the vocabulary lacks {token}")
    return vocabulary


def _merges(content: bytes, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    pairs = []
    for number, line in enumerate(content.decode("utf-8").split("\n"), start=1):
        line = line.rstrip("\r")
        if not line or (number == 1 and line.startswith("#version")):
            continue
        parts = line.split(" ")
        if len(parts) != 2 or not all(part in vocabulary for part in parts) or "".join(parts) not in vocabulary:
            raise ValueError(f"line {number} of the merges, {line[:60]!r}, is no pair of vocabulary entries")
        pairs.append((parts[0], parts[1]))
    return pairs
