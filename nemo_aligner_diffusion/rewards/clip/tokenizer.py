"""CLIP's byte-pair tokenizer out of a ``.nemo``, without unpacking it to disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_aligner_diffusion.errors import AlignerError, ArchiveError
from nemo_aligner_diffusion.formats.files import parse_json, read_bytes
from nemo_aligner_diffusion.formats.hub import is_hub_name, locate
from nemo_aligner_diffusion.formats.nemo import NemoArchive
from nemo_aligner_diffusion.rewards.support.archive import mapping

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VOCAB_FILE, MERGES_FILE, FAST_FILE = "vocab.json", "merges.txt", "tokenizer.json"
MOST_BYTES = 4 << 20  # of either file in an archive; CLIP's have 862 and 525 kB


def load_tokenizer(archive: NemoArchive, folder: str | Path | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of ``archive``: from ``folder`` if given, else from its artifacts, else by the name it gives.

    NeMo's own archives often only name a Hugging Face repository (``tokenizer.type: openai/clip-vit-large-patch14``);
    that one is taken from the local cache or, failing that, from the Hub. A tokenizer holds data only, never code.

    Raises:
        ArchiveError: there is none, or its files are damaged.
    """
    section = mapping(archive, archive.config, "tokenizer", optional=True)
    # merge_file is NeMo's spelling
    references: list[Any] = [section.get("vocab_file"), section.get("merges_file") or section.get("merge_file")]
    if folder is not None:
        files = read_tokenizer_files(folder)
        return tokenizer_from_bytes(files[VOCAB_FILE], files[MERGES_FILE], str(folder))
    if all(references):
        vocab, merges = (archive.artifact(reference, MOST_BYTES) for reference in references)
        return tokenizer_from_bytes(vocab, merges, str(archive.path))
    name = section.get("type")
    if isinstance(name, str) and is_hub_name(name):
        try:
            files = read_tokenizer_files(name)
        except AlignerError as error:
            raise ArchiveError(
                f"{archive.path}: it holds no tokenizer files and names {name!r}, which could not be loaded ({error}) "
                "Set rm.model.tokenizer to a folder with its vocab.json and merges.txt."
            ) from error
        return tokenizer_from_bytes(files[VOCAB_FILE], files[MERGES_FILE], name)
    raise ArchiveError(
        f"{archive.path}: its configuration names no tokenizer (tokenizer.vocab_file and tokenizer.merges_file as "
        "nemo:<hash>_<name>). Set rm.model.tokenizer to a folder with vocab.json and merges.txt."
    )


def read_tokenizer_files(source: str | Path) -> dict[str, bytes]:
    """``vocab.json`` and ``merges.txt`` of a folder; where it holds ``tokenizer.json`` only, made out of that.

    Args:
        source: the folder, or ``owner/name`` on the Hugging Face Hub.

    Raises:
        ArchiveError, CheckpointError: neither is there, or ``tokenizer.json`` is not of CLIP's kind.
    """
    folder = locate(
        source,
        ((VOCAB_FILE, MERGES_FILE, FAST_FILE),),
        lambda found: _has_pair(found) or (found / FAST_FILE).is_file(),
        f"a folder with CLIP's {VOCAB_FILE} and {MERGES_FILE}",
    )
    try:
        if not _has_pair(folder) and (folder / FAST_FILE).is_file():
            return pair_of_files(read_bytes(folder / FAST_FILE), folder / FAST_FILE)
        return {name: read_bytes(folder / name) for name in (VOCAB_FILE, MERGES_FILE)}
    except OSError as error:
        raise ArchiveError(
            f"{folder}: no CLIP tokenizer here ({error.strerror}: {error.filename}). "
            f"Give a folder with {VOCAB_FILE} and {MERGES_FILE}, or with {FAST_FILE}."
        ) from error


def _has_pair(folder: Path) -> bool:
    return (folder / VOCAB_FILE).is_file() and (folder / MERGES_FILE).is_file()


def pair_of_files(fast_file: bytes, origin: object) -> dict[str, bytes]:
    """``vocab.json`` and ``merges.txt`` of what transformers 5 saves instead, ``tokenizer.json``."""
    try:
        model = parse_json(fast_file)["model"]
        if model["type"] != "BPE" or model["end_of_word_suffix"] != "</w>":
            raise ValueError("no byte-pair encoding with </w> at the end of words")
        lines = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
        return {
            VOCAB_FILE: json.dumps(model["vocab"], ensure_ascii=False).encode(),
            MERGES_FILE: "\n".join(["#version: 0.2", *lines, ""]).encode(),
        }
    except (ValueError, KeyError, TypeError) as error:
        raise ArchiveError(
            f"{origin}: not the tokenizer of a CLIP ({type(error).__name__}: {str(error)[:200]}). "
            f"Give a folder with CLIP's {VOCAB_FILE} and {MERGES_FILE}."
        ) from error


def tokenizer_from_bytes(vocab: bytes, merges: bytes, origin: str) -> PreTrainedTokenizerBase:
    """A ``CLIPTokenizer`` from the contents of ``vocab.json`` and ``merges.txt``; ``origin`` is named in errors."""
    from transformers import CLIPTokenizer

    try:
        vocabulary = parse_json(vocab)
        if not isinstance(vocabulary, dict):
            raise ValueError("the vocabulary should map strings to token ids")
        if len(set(vocabulary.values())) != len(vocabulary):
            raise ValueError("two entries of the vocabulary share a token id")
        if lacking := [token for token in ("<|startoftext|>", "<|endoftext|>") if token not in vocabulary]:
            raise ValueError(f"the vocabulary lacks {', '.join(lacking)}")
        lines = [line.rstrip("\r") for line in merges.decode().split("\n")]
        pairs: Any = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
        tokenizer: PreTrainedTokenizerBase = CLIPTokenizer(vocab=vocabulary, merges=pairs)
    except Exception as error:  # JSON and Unicode errors too; the tokenizers library raises bare Exception
        raise ArchiveError(
            f"{origin}: its tokenizer files are damaged ({str(error)[:200]}). Save the archive again."
        ) from error
    return tokenizer
