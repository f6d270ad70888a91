"""Look-up of what a config names: an entry of a built-in table, or the user's `module:attribute`.

In: a name, the table, and the field that holds the name. Out: the object, with its options checked.
"""

import importlib
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from echo_jax.system.errors import ConfigError

folders: list[str] = []  # those added by `add_to_path`


def add_to_path(config_file: Path) -> None:
    """Lets Python find modules in a config file's folder, after all others, so that the config can name their
    contents."""
    add_folder(str(config_file.absolute().parent))


def add_folder(folder: str) -> None:
    """Lets Python find the modules in a folder, after all others."""
    if folder not in folders:
        folders.append(folder)
    if folder not in sys.path:
        sys.path.append(folder)


def find(name: str, table: Mapping[str, Any], field: str) -> Any:
    """Returns `table[name]`, or the object that `module:attribute` names, imported the usual way.

    Raises:
      ConfigError: the table has no such entry, or the module or attribute does not exist.
    """
    if name in table:
        return table[name]
    module, colon, attribute = str(name).partition(":")
    if not colon:
        choices = f"choose one of {', '.join(table)}, or write" if table else "write"
        raise ConfigError(f"config.{field} = {name!r}: {choices} your own as module:function")
    advice = (
        "write it as module:function; the module must be in the config file's folder or the current one, or installed"
    )
    if not all(part.isidentifier() for part in (*module.split("."), attribute)):
        raise ConfigError(f"config.{field} = {name!r} is not the name of a module and a function in it: {advice}")
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module and not module.startswith(f"{error.name}."):
            raise  # the module is there; one that it imports is not
        raise ConfigError(f"config.{field} = {name!r}: {error}; {advice}") from error
    if not hasattr(found, attribute):
        raise ConfigError(f"config.{field} = {name!r}: module {module!r} has no attribute {attribute!r}")
    return getattr(found, attribute)


def check_callable(found: Any, name: str, field: str) -> None:
    """Raises `ConfigError` if the object that a field names is not callable."""
    if not callable(found):
        raise ConfigError(f"config.{field} = {name!r} is a {type(found).__name__}; it must be a function or a class")


def check_options(
    function: Callable, options: Mapping[str, Any], field: str, *, given: int = 0, provided: Sequence[str] = ()
) -> None:
    """Raises `ConfigError` unless `function` can be called with these options as keyword arguments.

    Args:
      field: the section of the config that holds the options.
      given: positional arguments that the caller passes before them.
      provided: keyword arguments that the caller passes if the function has them.
    """
    called = getattr(function, "__name__", function)
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some built-in ones have none
        return
    parameters = [p for p in list(signature.parameters.values())[given:] if p.name not in provided]
    named = {p.name: p for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    if not takes_any and (unknown := sorted(options.keys() - named.keys())):
        takes = f"takes {', '.join(named)}" if named else "takes no options"
        raise ConfigError(f"config.{field} has {', '.join(unknown)}, but {called} {takes}")
    if missing := [name for name, p in named.items() if p.default is p.empty and name not in options]:
        raise ConfigError(f"config.{field} lacks {', '.join(missing)}, which {called} needs")
    try:
        passed = {name: None for name in provided if name in signature.parameters}
        signature.bind(*[None] * given, **options, **passed)
    except TypeError as error:
        raise ConfigError(
            f"{called}, with the options of config.{field}, must take {given} arguments: {error}"
        ) from error


def takes(function: Callable, name: str) -> bool:
    """Returns whether a function has an argument of this name."""
    try:
        return name in inspect.signature(function).parameters
    except (TypeError, ValueError):  # some built-in ones have no signature
        return False


def name_of(function: Callable) -> str:
    """Returns the name of a function that a config named, without its options."""
    inner = getattr(function, "func", function)  # of a functools.partial
    return getattr(inner, "__name__", repr(inner))
