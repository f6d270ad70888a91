"""Things that a config names: an entry of a built-in table, or `module:attribute` of the user's own.

In: a name, the table, and the field that holds the name. Out: what it names, with the options that it takes checked.
"""

import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from echo_jax.system.errors import ConfigError


def add_to_path(config_file: Path) -> None:
    """Lets Python find the modules beside a config file, after all others: the config may name what they hold."""
    folder = str(config_file.absolute().parent)
    if folder not in sys.path:
        sys.path.append(folder)


def find(name: str, table: Mapping[str, Any], field: str) -> Any:
    """Returns `table[name]`, or what `module:attribute` names. Python finds the module as it finds any other.

    Raises:
      ConfigError: the table has no such entry, or the module or its attribute does not exist.
    """
    if name in table:
        return table[name]
    module, colon, attribute = str(name).partition(":")
    if not colon:
        choices = f"choose one of {', '.join(table)}, or name" if table else "name"
        raise ConfigError(f"config.{field} = {name!r}: {choices} yours as module:function")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"config.{field} = {name!r}: {error}. Write it as module:function; the module lies in the folder of "
            "the config file or the one you start from, or is installed"
        ) from error


def check_callable(found: Any, name: str, field: str) -> None:
    """Raises `ConfigError` if what a field names cannot be called."""
    if not callable(found):
        raise ConfigError(f"config.{field} = {name!r} is a {type(found).__name__}; it must be a function or a class")


def check_options(function: Callable, options: Mapping[str, Any], field: str, *, given: int = 0) -> None:
    """Raises `ConfigError` unless `function` can be called with these options as keyword arguments.

    Args:
      field: the section of the config that holds the options.
      given: positional arguments that the caller passes before them.
    """
    parameters = list(inspect.signature(function).parameters.values())[given:]
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return
    named = {p.name: p for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}
    if unknown := sorted(options.keys() - named.keys()):
        takes = f"takes {', '.join(named)}" if named else "takes none"
        raise ConfigError(f"config.{field} has {', '.join(unknown)}; {getattr(function, '__name__', function)} {takes}")
    if missing := [name for name, p in named.items() if p.default is p.empty and name not in options]:
        name = getattr(function, "__name__", function)
        raise ConfigError(f"config.{field} lacks {', '.join(missing)}, which {name} needs")
