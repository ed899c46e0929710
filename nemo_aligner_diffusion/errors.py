"""The exceptions that a user can cause: one complete message each, which entry points print without a traceback."""

from __future__ import annotations


class AlignerError(Exception):
    """Base of every error whose cause lies with the input: says what was given, what was expected and what to do."""

    exit_code = 2
    said = False  # the user has seen it: another process, or an earlier handler, has printed it


class ConfigurationError(AlignerError):
    """A key is unknown or misspelt, or its value is impossible."""


class DataError(AlignerError):
    """A prompt shard or text file is missing, damaged, or holds no usable prompt."""


class ArchiveError(AlignerError):
    """A ``.nemo`` archive is damaged, hostile, or not of a kind that can be restored.

    Its message is one line of printable characters and bounded, whatever names and values of the file it quotes.
    """

    longest = 1500

    def __init__(self, message: str) -> None:
        line = "".join(character if character.isprintable() else "?" for character in " ".join(message.split()))
        super().__init__(line if len(line) <= self.longest else f"{line[: self.longest - 1]}…")


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
    return lines[0][:limit] if lines else type(error).__name__
