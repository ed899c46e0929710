"""BLIP's tokenizer: ``bert-base-uncased`` with two tokens more, built from the bytes of its ``vocab.txt``.

``[DEC]`` and ``[ENC]`` follow the vocabulary (ids 30522 and 30523), in this order, as BLIP's ``init_tokenizer`` adds
them. ImageReward reads a prompt as ``[CLS] … [SEP]``; its text encoder only has rows for the two.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from nemo_aligner_diffusion.errors import ArchiveError
from nemo_aligner_diffusion.formats.files import read_bytes
from nemo_aligner_diffusion.formats.nemo import NemoArchive
from nemo_aligner_diffusion.rewards.support.archive import mapping

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VOCABULARY_FILE = "vocab.txt"
_MOST_BYTES = 2 << 20  # bert-base-uncased has 230 kB
_NEEDED = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def load_tokenizer(archive: NemoArchive, rows: int, folder: str | Path | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer inside ``archive``, or of ``folder`` if one is given; ``rows`` as below."""
    if folder is not None:
        return tokenizer_from_bytes(read_vocabulary(folder), rows, str(folder))
    reference = mapping(archive, archive.config, "tokenizer", optional=True).get("vocab_file")
    if not reference:
        raise ArchiveError(
            f"{archive.path}: its configuration names no tokenizer (tokenizer.vocab_file as nemo:<hash>_vocab.txt). "
            "Set rm.model.tokenizer to a folder with the vocab.txt of bert-base-uncased."
        )
    return tokenizer_from_bytes(archive.artifact(reference, _MOST_BYTES), rows, str(archive.path))


def read_vocabulary(folder: str | Path) -> bytes:
    """The bytes of ``folder/vocab.txt``."""
    path = Path(folder, VOCABULARY_FILE)
    try:
        return read_bytes(path, _MOST_BYTES)
    except OSError as error:
        raise ArchiveError(
            f"{path}: no BERT tokenizer here ({error.strerror}). Give a folder with the vocab.txt of bert-base-uncased."
        ) from error


def tokenizer_from_bytes(vocabulary_text: bytes, rows: int, origin: str) -> PreTrainedTokenizerBase:
    """BLIP's tokenizer over the entries in ``vocabulary_text``.

    Args:
        vocabulary_text: one entry per line in UTF-8, its id being the line's number from 0.
        rows: of the text encoder's embedding; every id must be below.
        origin: named in errors.

    Raises:
        ArchiveError: the text is no vocabulary, or a larger one than the embedding.
    """
    from transformers import BertTokenizer

    try:
        # Only line feeds end a line: entries may hold other separators of Unicode.
        lines = [line.removesuffix("\r") for line in vocabulary_text.decode().removesuffix("\n").split("\n")]
        if len(set(lines)) != len(lines):
            raise ValueError("an entry appears twice")
        if missing := [token for token in _NEEDED if token not in lines]:
            raise ValueError(f"it lacks {', '.join(missing)}")
        tokenizer: PreTrainedTokenizerBase = BertTokenizer(vocab={line: number for number, line in enumerate(lines)})
        tokenizer.add_special_tokens({"bos_token": "[DEC]"})
        tokenizer.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
    except Exception as error:  # Unicode errors too; the tokenizers library raises bare Exception
        raise ArchiveError(
            f"{origin}: its {VOCABULARY_FILE} is damaged ({str(error)[:200]}). Save it again."
        ) from error
    highest = max(tokenizer.get_vocab().values())
    if highest >= rows:
        raise ArchiveError(
            f"{origin}: its tokenizer gives ids up to {highest}, its text model has {rows} of them. Tokenizer and "
            "weights must come from the same model: ImageReward goes with bert-base-uncased."
        )
    return tokenizer
