"""One prompt file in, its prompts out, in file order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from nemo_aligner_diffusion.data.bad_samples import BadSamples
from nemo_aligner_diffusion.data.paths import is_text_file
from nemo_aligner_diffusion.data.shard_samples import shard_samples, split_name
from nemo_aligner_diffusion.errors import DataError, printable
from nemo_aligner_diffusion.formats.files import decode_utf8, json_type, open_regular, parse_json, text_lines
from nemo_aligner_diffusion.formats.tar import walk_tar

MAX_PROMPT_BYTES = 64 * 1024  # of UTF-8; tokenizers keep some 100 to 500 tokens, so more than this is no prompt
MAX_JSON_BYTES = 1 << 20  # a .json member may carry other metadata beside the prompt
PROMPT_KEYS = ("prompt", "caption")  # of .json members, the first that is there; the user may name another
TEXT, JSON = 0, 1  # kinds of members that hold a prompt
# Two bytes of grace: a prompt of full length may be followed by a line break.
_MOST_BYTES = {"txt": MAX_PROMPT_BYTES + 2, "json": MAX_JSON_BYTES}


class LocatedPrompt(NamedTuple):
    """A prompt and where its text is: ``data`` is a whole member or line, of kind :data:`TEXT` or :data:`JSON`."""

    prompt: str
    offset: int
    data: bytes
    kind: int


def locate_prompts(path: Path, bad: BadSamples, keys: Sequence[str] = PROMPT_KEYS) -> Iterator[LocatedPrompt]:
    """Yield the prompts of a shard or of a text file, in file order, holding one sample at a time.

    A shard is read with webdataset's conventions: members that share the name up to the first dot are one sample. Its
    prompt is the ``.txt`` member, else what the ``.json`` member has under the first of ``keys`` that is there (of a
    list the first text); other members are passed over unread. A prompt is UTF-8 text that is not only white space; a
    byte order mark at its beginning and line breaks at its end do not belong to it, other white space does.

    Under ``skip`` an unusable prompt costs itself; an unusable file (truncated, vanished, no tar) costs its rest.

    Raises:
        DataError: something is unusable and ``bad`` says to stop. The message names file and member or line.
    """
    try:
        count_before = bad.count
        found = False
        for located in _read_text(path, bad) if is_text_file(path) else _read_shard(path, bad, keys):
            found = True
            yield located
        if not found and bad.count == count_before:
            raise DataError(f"{path} holds no prompt{_what_else(path, keys)}")
    except DataError as error:
        bad.shard(error)


def parse_prompt(data: bytes, kind: int, keys: Sequence[str] = PROMPT_KEYS) -> str:
    """The prompt in the bytes of a member or line.

    Raises:
        ValueError: there is none; the message does not name the place.
    """
    return _prompt_from_json(data, keys) if kind == JSON else clean_prompt(decode_utf8(data))


def clean_prompt(text: str) -> str:
    """Drop byte order marks at the beginning and line breaks at the end.

    Raises:
        ValueError: the text is no usable prompt; the message says why, without naming the place.
    """
    text = text.lstrip("\ufeff").rstrip("\r\n")
    if not text.strip():
        raise ValueError("is an empty prompt; expected some text")
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:  # a lone surrogate, which JSON escapes can spell
        raise ValueError(f"is not valid Unicode text ({error.reason}); expected UTF-8") from error
    if size > MAX_PROMPT_BYTES:
        raise ValueError(f"is a prompt of {size:,} bytes; expected at most {MAX_PROMPT_BYTES:,}")
    return text


def read_lines(path: Path, bad: Callable[[str], None]) -> Iterator[tuple[int, LocatedPrompt]]:
    """(number from 1, prompt) of each line of a text file; of an empty line the prompt is empty.

    Args:
        bad: called with what is wrong with a line that holds something else.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        with open_regular(path) as stream:
            for number, (start, line) in enumerate(text_lines(stream, MAX_PROMPT_BYTES + 3), start=1):
                if len(line) > MAX_PROMPT_BYTES + 3:  # with a byte order mark
                    bad(f"{path}: line {number} has more than {MAX_PROMPT_BYTES:,} bytes; expected one prompt a line")
                    continue
                try:
                    prompt = clean_prompt(decode_utf8(line)) if line.strip() else ""
                except ValueError as error:
                    bad(f"{path}: line {number} {error}")
                    continue
                yield number, LocatedPrompt(prompt, start, line, TEXT)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


def _read_text(path: Path, bad: BadSamples) -> Iterator[LocatedPrompt]:
    """Empty lines at the end of the file are nothing, elsewhere they are empty prompts."""
    pending: list[int] = []  # empty lines just before this one

    def bad_after_empty(*messages: str) -> None:
        for number in pending:
            bad(f"{path}: line {number} is an empty prompt; expected one prompt a line")
        pending.clear()
        for message in messages:
            bad(message)

    for number, located in read_lines(path, bad_after_empty):
        if located.prompt:
            bad_after_empty()
            yield located
        else:
            pending.append(number)


def _read_shard(path: Path, bad: BadSamples, keys: Sequence[str]) -> Iterator[LocatedPrompt]:
    def wanted(name: str, kind: str, size: int) -> bool:
        return kind == "file" and size <= _MOST_BYTES.get(split_name(name)[1], -1)

    for key, members in shard_samples(path, walk_tar(path, wanted), _MOST_BYTES, bad):
        extension, kind = ("txt", TEXT) if "txt" in members else ("json", JSON)
        data, offset = members[extension].data, members[extension].offset
        assert data is not None
        try:
            prompt = parse_prompt(data, kind, keys)
        except ValueError as error:
            bad(f"{path}: member '{printable(f'{key}.{extension}')}' {error}")
            continue
        yield LocatedPrompt(prompt, offset, data, kind)


def _what_else(path: Path, keys: Sequence[str]) -> str:
    if is_text_file(path):
        return "; expected one prompt a line"
    found = Counter(
        f".{extension}" if 0 < len(extension := split_name(member.name)[1]) < 20 else "without extension"
        for member in walk_tar(path, lambda *_: False)
        if member.kind != "folder"
    )
    what = ", ".join(f"{count} {printable(name)}" for name, count in found.most_common(5)) or "nothing"
    return f": found {what}; expected .txt members, or .json ones with a key {' or '.join(keys)}"


def _prompt_from_json(data: bytes, keys: Sequence[str]) -> str:
    content = parse_json(data)
    expected = f"expected an object with a {' or '.join(keys)} key"
    if not isinstance(content, dict):
        raise ValueError(f"holds a JSON {json_type(content)}; {expected}")
    name = next((key for key in keys if key in content), None)
    if name is None:
        there = ", ".join(f"'{printable(key, 40)}'" for key in list(content)[:10]) or "none"
        raise ValueError(
            f"lacks the key {' and '.join(map(repr, keys))}; the keys there are: {there}; prompt_key names another"
        )
    value = content[name][0] if isinstance(content[name], list) and content[name] else content[name]
    if not isinstance(value, str):
        raise ValueError(f"has a {json_type(content[name])} under {name!r}; expected a string, or a list of them")
    return clean_prompt(value)
