"""Python objects that a user's configuration names as ``package.module:name``. Code runs: never of an archive's."""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nemo_aligner_diffusion.errors import AlignerError, ConfigurationError, first_line
from nemo_aligner_diffusion.keys import closest

_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


def load_callable(
    import_path: str,
    settings: Mapping[str, Any],
    origin: str,
    settings_key: str,
    arguments: Sequence[str],
    error: type[AlignerError] = ConfigurationError,
) -> Any:
    """What stands at ``import_path``, with ``settings``.

    A class is called with ``settings``. A function gets them as keyword arguments of each call. Anything else is taken
    as it stands, without settings. The current directory is searched after everything that is installed.

    Args:
        origin: begins every message: the key and its value.
        settings_key: where the settings come from, for messages.
        arguments: names of what a function is called with.
        error: what is raised.

    Raises:
        AlignerError: of the kind ``error``: it cannot be imported, made, or called so.
    """
    found = _import(import_path, origin, error)
    if inspect.isclass(found):
        try:
            return found(**settings)
        except Exception as failure:
            given = ", ".join(settings) or f"no {settings_key.rpartition('.')[2]}"
            raise error(
                f"{origin}: {found.__name__}({given}) failed with {type(failure).__name__}: {first_line(failure)}. Its "
                f"arguments are {settings_key}."
            ) from failure
    if inspect.isroutine(found):
        check_call(found, settings, origin, settings_key, arguments, error)
        return functools.partial(found, **settings) if settings else found
    if settings:
        raise error(f"{origin} is an object already made; {settings_key} go to a class or a function only.")
    return found


def _import(import_path: str, origin: str, error: type[AlignerError]) -> Any:
    if not _PATH.fullmatch(import_path):
        raise error(f"{origin}: expected package.module:name, such as my_rewards:Redness.")
    module_name, _, name = import_path.partition(":")
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)  # last: a file of the user's never hides an installed package
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as failure:
        if failure.name is None or not (module_name == failure.name or module_name.startswith(f"{failure.name}.")):
            raise error(f"{origin}: importing it needs {failure.name!r}, which is not installed.") from failure
        raise error(
            f"{origin}: there is no module {failure.name!r}. It must be installed, or lie in the current directory "
            f"({here}) or in one of PYTHONPATH."
        ) from failure
    except Exception as failure:  # the module is the user's: anything may happen
        raise error(
            f"{origin}: importing {module_name} failed with {type(failure).__name__}: {first_line(failure)}"
        ) from failure
    for step in name.split("."):
        if not hasattr(found, step):
            hint = closest(step, [entry for entry in dir(found) if not entry.startswith("_")], least=0.6)
            raise error(f"{origin}: {module_name} has no {name!r}{hint}")
        found = getattr(found, step)
    return found


def check_call(
    function: Callable[..., Any],
    settings: Mapping[str, Any],
    origin: str,
    settings_key: str,
    arguments: Sequence[str],
    error: type[AlignerError],
) -> None:
    """Raise ``error`` where ``function`` cannot be called with ``arguments`` and ``settings``."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return  # a builtin that does not tell
    try:
        signature.bind(*arguments, **settings)
    except TypeError as failure:
        raise error(
            f"{origin} cannot be called as ({', '.join([*arguments, *(f'{key}=…' for key in settings)])}): {failure}. "
            f"Its signature is {signature}{f'; keyword arguments are {settings_key}' if settings_key else ''}."
        ) from failure
