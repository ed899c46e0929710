"""One prompt file in, its prompts out, in file order; what makes a prompt or a shard unusable, and what then."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from nemo_aligner_diffusion.data.paths import is_text_file
from nemo_aligner_diffusion.errors import DataError
from nemo_aligner_diffusion.formats.tar import open_regular, walk_tar

logger = logging.getLogger(__name__)

MAX_PROMPT_BYTES = 64 * 1024  # of UTF-8; tokenizers keep some 100 to 500 tokens, so more than this is no prompt
MAX_JSON_BYTES = 1 << 20  # a .json member may carry other metadata beside the prompt
PROMPT_KEYS = ("prompt", "caption")  # of .json members, the first that is there
TEXT, JSON = 0, 1  # kinds of members that hold a prompt
WARNINGS_IN_FULL = 5  # unusable samples described one by one before they are only counted

OnBadSample = Literal["error", "skip"]


class BadSampleError(DataError):
    """One sample is unusable; its shard may be sound."""


class BadSamples:
    """What to do about an unusable prompt or shard: stop with a DataError, or warn, count and go on.

    Args:
        policy: ``"error"`` or ``"skip"``.
        quiet: count without warnings (all processes read the same files; one of them should speak).
        shard_policy: the same for files that are unreadable or damaged; None: as ``policy``.

    Attributes:
        count: unusable samples and files so far.
        shards: the files among them.
        messages: what was wrong with the first of them.
    """

    def __init__(
        self, policy: OnBadSample = "error", quiet: bool = False, shard_policy: OnBadSample | None = None
    ) -> None:
        for name, value in (("on_bad_sample", policy), ("on_bad_shard", shard_policy or policy)):
            if value not in ("error", "skip"):
                raise DataError(f"{name} is {value!r}; expected 'error' or 'skip'")
        self.policy = policy
        self.shard_policy: OnBadSample = shard_policy or policy
        self.quiet = quiet
        self.count = 0
        self.shards = 0
        self.messages: list[str] = []

    def __call__(self, message: str) -> None:
        """A sample is unusable.

        Raises:
            BadSampleError: under ``policy="error"``.
        """
        if self.policy == "error":
            raise BadSampleError(message)
        self._note(message)

    def shard(self, error: DataError) -> None:
        """A file is unusable from here on.

        Raises:
            DataError: ``error``, under ``shard_policy="error"``, or if it is about one sample.
        """
        if self.shard_policy == "error" or isinstance(error, BadSampleError):
            raise error
        self.shards += 1
        self._note(str(error))

    def _note(self, message: str) -> None:
        self.count += 1
        if self.count <= WARNINGS_IN_FULL:
            self.messages.append(message)
            if not self.quiet:
                warn_of(self.messages[-1:], self.count)


def warn_of(messages: list[str], count: int) -> None:
    """Say what was skipped; ``count`` is the number so far, the last of ``messages`` included."""
    for message in messages:
        logger.warning("skipped: %s", message)
    if count >= WARNINGS_IN_FULL:
        logger.warning("further unusable samples are counted and reported at the end of the epoch")


class LocatedPrompt(NamedTuple):
    """A prompt and where its text is: ``data`` is a whole member or line, of kind :data:`TEXT` or :data:`JSON`."""

    prompt: str
    offset: int
    data: bytes
    kind: int


def read_file(path: Path, bad: BadSamples) -> Iterator[str]:
    """The prompts of :func:`locate_prompts` alone."""
    return (located.prompt for located in locate_prompts(path, bad))


def locate_prompts(path: Path, bad: BadSamples) -> Iterator[LocatedPrompt]:
    """Yield the prompts of a shard or of a text file, in file order, holding one sample at a time.

    A shard is read with webdataset's conventions: members that share the name up to the first dot are one sample. Its
    prompt is the ``.txt`` member, else the ``prompt`` or ``caption`` of the ``.json`` member; other members are passed
    over unread. A prompt is UTF-8 text that is not only white space; line breaks at its end do not belong to it,
    other white space does.

    Under ``skip`` an unusable prompt costs itself; an unusable file (truncated, vanished, no tar) costs its rest.

    Raises:
        DataError: something is unusable and ``bad`` says to stop. The message names file and member or line.
    """
    try:
        count_before = bad.count
        found = False
        for located in _read_text(path, bad) if is_text_file(path) else _read_shard(path, bad):
            found = True
            yield located
        if not found and bad.count == count_before:
            # Only an empty text file comes here: the walk through a shard says itself what it found instead.
            raise DataError(f"{path} holds no prompt; expected one prompt a line")
    except DataError as error:
        bad.shard(error)


def parse_prompt(data: bytes, kind: int) -> str:
    """The prompt in the bytes of a member or line.

    Raises:
        ValueError: there is none; the message does not name the place.
    """
    return _prompt_from_json(data) if kind == JSON else clean_prompt(decode_utf8(data))


def clean_prompt(text: str) -> str:
    """Drop line breaks at the end.

    Raises:
        ValueError: the text is no usable prompt; the message says why, without naming the place.
    """
    text = text.rstrip("\r\n")
    if not text.strip():
        raise ValueError("is an empty prompt; expected some text")
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:  # a lone surrogate, which JSON escapes can spell
        raise ValueError(f"is not valid Unicode text ({error.reason}); expected UTF-8") from error
    if size > MAX_PROMPT_BYTES:
        raise ValueError(f"is a prompt of {size:,} bytes; expected at most {MAX_PROMPT_BYTES:,}")
    return text


def decode_utf8(data: bytes) -> str:
    """Decode, or raise a ValueError that says where it went wrong and what to do."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"is not UTF-8: byte 0x{data[error.start]:02x} at position {error.start} ({data[:40]!r}…); expected UTF-8: "
            "convert it, for example with iconv -f latin1 -t utf-8"
        ) from error


def _read_text(path: Path, bad: BadSamples) -> Iterator[LocatedPrompt]:
    """One prompt a line; empty lines at the end of the file are nothing, elsewhere they are empty prompts."""
    pending = 0  # empty lines just before this one
    try:
        with open_regular(path) as stream:
            number = end = 0
            while line := stream.readline(MAX_PROMPT_BYTES + 2):
                number += 1
                start, end = end, end + len(line)
                too_long = len(line) > MAX_PROMPT_BYTES and not line.endswith(b"\n")
                if number == 1 and line.startswith(b"\xef\xbb\xbf"):  # the mark some editors put before UTF-8
                    line, start = line[3:], 3
                if not too_long and not line.strip():
                    pending += 1
                    continue
                for empty in range(number - pending, number):
                    bad(f"{path}: line {empty} is an empty prompt; expected one prompt a line")
                pending = 0
                if too_long:
                    bad(f"{path}: line {number} has more than {MAX_PROMPT_BYTES:,} bytes; expected one prompt a line")
                    while line and not line.endswith(b"\n"):
                        line = stream.readline(MAX_PROMPT_BYTES)
                        end += len(line)
                    continue
                try:
                    prompt = clean_prompt(decode_utf8(line))
                except ValueError as error:
                    bad(f"{path}: line {number} {error}")
                    continue
                yield LocatedPrompt(prompt, start, line, TEXT)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


def _read_shard(path: Path, bad: BadSamples) -> Iterator[LocatedPrompt]:
    # Imported here: it takes a second, and writers and path handling do without it.
    from webdataset.tariterators import base_plus_ext, group_by_keys

    seen: Counter[str] = Counter()
    prompt_members = 0
    name = ""

    def wanted(name: str, kind: str, size: int) -> bool:
        return kind == "file" and size <= _limit(base_plus_ext(name)[1])

    def members() -> Iterator[dict[str, Any]]:
        nonlocal prompt_members, name
        for name, kind, size, data, _, offset in walk_tar(path, wanted):
            extension = base_plus_ext(name)[1]
            limit = _limit(extension)
            if kind == "folder" or name.startswith("__"):  # webdataset keeps its own notes under __names__
                continue
            if limit == 0:
                seen[f".{extension}" if extension and len(extension) < 20 else "without extension"] += 1
                continue
            prompt_members += 1
            if kind != "file":
                bad(f"{path}: member {name!r} is a {kind}, not a file; expected the text itself (no link is followed)")
            elif data is None:
                bad(f"{path}: member {name!r} has {size:,} bytes; expected at most {limit:,}: this is no prompt")
            else:
                yield {"fname": name, "data": (data, offset), "__url__": str(path)}

    def duplicate(_: Exception) -> bool:
        # group_by_keys knows one error only: a second member with the name of an earlier one.
        bad(f"{path}: member {name!r} is there twice; expected a name of its own for every sample")
        return True

    for sample in group_by_keys(members(), handler=duplicate):
        member = "txt" if "txt" in sample else "json"
        (data, offset), text_kind = sample[member], TEXT if member == "txt" else JSON
        try:
            prompt = parse_prompt(data, text_kind)
        except ValueError as error:
            bad(f"{path}: member {sample['__key__'] + '.' + member!r} {error}")
            continue
        yield LocatedPrompt(prompt, offset, data, text_kind)
    if prompt_members == 0:
        what = ", ".join(f"{count} {name}" for name, count in seen.most_common(5)) or "nothing"
        raise DataError(
            f"{path} holds no prompt: found {what}; expected .txt members, or .json ones with a key prompt or caption"
        )


def _limit(extension: str | None) -> int:
    """The most bytes a member may have to be read as a prompt; 0 for members that hold none."""
    # Two bytes of grace: a prompt of full length may be followed by a line break.
    return {"txt": MAX_PROMPT_BYTES + 2, "json": MAX_JSON_BYTES}.get((extension or "").lower(), 0)


def _prompt_from_json(data: bytes) -> str:
    text = decode_utf8(data.removeprefix(b"\xef\xbb\xbf"))
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not valid JSON ({error}); expected an object with a prompt or caption key") from error
    if not isinstance(content, dict):
        raise ValueError(f"holds a JSON {_json_type(content)}; expected an object with a prompt or caption key")
    for name in PROMPT_KEYS:
        if name in content:
            if not isinstance(content[name], str):
                raise ValueError(f"has a {_json_type(content[name])} under {name!r}; expected a string")
            return clean_prompt(content[name])
    keys = ", ".join(repr(key[:40]) for key in list(content)[:10]) or "none"
    raise ValueError(f"has neither of the keys 'prompt', 'caption'; the keys there are: {keys}")


def _json_type(value: object) -> str:
    names: dict[type, str] = {dict: "object", list: "list", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")
