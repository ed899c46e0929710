"""The exceptions that a user can cause: one complete message each, which entry points print without a traceback."""

from __future__ import annotations


def printable(text: object, limit: int = 200) -> str:
    """``text`` from outside as part of a message: one line, control characters escaped, the middle of a long one cut.

    Names in files are a stranger's: an escape sequence would act on the reader's terminal, a line break forge a line.

    >>> printable("conv\\x1b[2J.weight")
    'conv\\\\x1b[2J.weight'
    """
    line = str(text)
    if len(line) > limit:
        line = f"{line[: limit // 2]}…{line[-(limit - limit // 2 - 1) :]}"
    if line.isprintable():
        return line
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    return line if len(line) <= limit else f"{line[: limit - 1]}…"


class AlignerError(Exception):
    """Base of every error whose cause lies with the input: says what was given, what was expected and what to do.

    Whatever its message quotes, its lines are of printable characters and bounded.
    """

    exit_code = 2
    said = False  # the user has seen it: another process, or an earlier handler, has printed it

    def __init__(self, message: object = "") -> None:
        super().__init__("\n".join(printable(line, 4_000) for line in str(message).split("\n")[:100]))


class ConfigurationError(AlignerError):
    """A key is unknown or misspelt, or its value is impossible."""


class DataError(AlignerError):
    """A prompt shard or text file is missing, damaged, or holds no usable prompt."""


class ArchiveError(AlignerError):
    """A ``.nemo`` archive is damaged, hostile, or not of a kind that can be restored. Its message is one line."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(" ".join(message.split()), 1_500))


class CheckpointError(AlignerError):
    """Model weights or training state do not fit what they are loaded into."""


class RewardError(AlignerError):
    """A reward is unknown, or was called with something it cannot score."""


class OutputError(AlignerError):
    """The results directory cannot be used as asked."""


class NumericalError(AlignerError):
    """Rewards or gradients stayed NaN or infinite for longer than the configuration allows."""

    exit_code = 3


class RankLostError(AlignerError):
    """A process of the run never came, or has gone. Nothing is wrong with the input: try again."""

    exit_code = 4


def first_line(error: BaseException, limit: int = 300) -> str:
    """What another library's error says, in one line, for use in a message of ours; its type where it says nothing."""
    lines = str(error).strip().splitlines()
    return printable(lines[0], limit) if lines else type(error).__name__
