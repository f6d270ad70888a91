"""Overrides of a config on the command line, beyond what `ml_collections.config_flags` takes.

In: a config and the arguments. Out: the same config, prepared so that these arguments can add an entry to an open
section, and can set a field to None.
"""

import ast
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np
from absl import flags
from ml_collections import config_dict, config_flags

_OVERRIDE = re.compile(r"--?config\.([\w.]+)(?:=(.*))?", re.DOTALL)
MayAdd = Callable[[str], bool]  # whether a field of this dotted name may be added to a config


def define_config_file(may_add: MayAdd, help: str) -> None:
    """Defines --config for a config file, of which any field can be set: --config.section.field=value."""
    config_flags.DEFINE_config_file("config", None, help)
    flag = flags.FLAGS["config"]
    flag.parser = _Parser(flag.parser, may_add)


def define_config(config: ml_collections.ConfigDict, may_add: MayAdd, help: str, **options: Any) -> None:
    """Defines --config for a config at hand, of which any field can be set.

    Args:
      options: as for `config_flags.DEFINE_config_dict`.

    Raises:
      AttributeError, KeyError, TypeError, ValueError: of an override, which is parsed at once.
    """
    make_room(config, options.get("sys_argv", sys.argv), may_add)
    config_flags.DEFINE_config_dict("config", config, help, **options)


class _Parser(flags.ArgumentParser):
    """Reads a config file as `inner` does, then makes room for the overrides on the command line."""

    def __init__(self, inner: flags.ArgumentParser, may_add: MayAdd):
        self._inner, self._may_add = inner, may_add

    def parse(self, argument: str) -> ml_collections.ConfigDict:
        config = self._inner.parse(argument)
        if isinstance(config, ml_collections.ConfigDict):
            make_room(config, sys.argv, self._may_add)
        return config

    def flag_type(self) -> str:
        return self._inner.flag_type()


def make_room(config: ml_collections.ConfigDict, arguments: Sequence[str], may_add: MayAdd) -> None:
    """Prepares a config for the overrides among these arguments, which config_flags will then parse. By itself it
    refuses a field that does not exist, and reads a value by the type of the field, which does not include None, nor a
    fraction if a dictionary in a config file has an integer.

    Raises:
      ValueError: an override would replace a whole section, and a later one sets an entry of it.
    """
    arguments = flags.FLAGS.read_flags_from_files(list(arguments), force_gnu=False)
    given = {found[1]: found[2] for found in map(_OVERRIDE.fullmatch, arguments) if found}
    with config.unlocked():
        for name, value in given.items():
            *sections, leaf = name.split(".")
            parents = [".".join(sections[: i + 1]) for i in range(len(sections))]
            if replaced := [parent for parent in parents if parent in given]:
                raise ValueError(f"--config.{replaced[0]} replaces the whole section: write {name} into it as well")
            section = _section(config, sections, create=may_add(name))
            if section is None:
                continue  # config_flags says what is wrong
            if may_add(name) and _is_section(value) and not isinstance(section.get(leaf), ml_collections.ConfigDict):
                with section.ignore_type():
                    section[leaf] = ml_collections.ConfigDict()  # config_flags reads a value for it as a section
            elif leaf not in section:
                if may_add(name):
                    section[leaf] = config_dict.placeholder(object)
            elif (value == "None" and _may_be_none(section, leaf)) or (
                may_add(name) and type(section[leaf]) is int and isinstance(literal(value), float)
            ):
                del section[leaf]
                section[leaf] = config_dict.placeholder(object)


def _section(
    config: ml_collections.ConfigDict, names: Sequence[str], *, create: bool
) -> ml_collections.ConfigDict | None:
    """Returns the section with these names, one within the other; None if it does not exist and `create` is not set."""
    for name in names:
        if name not in config and create:
            config[name] = ml_collections.ConfigDict()
        config = config.get(name, None)
        if not isinstance(config, ml_collections.ConfigDict):
            return None
    return config


def _is_section(text: str | None) -> bool:
    """Returns whether a text spells a dictionary that can be a section."""
    found = literal(text)
    return isinstance(found, dict) and all(isinstance(name, str) for name in found)


def _may_be_none(section: ml_collections.ConfigDict, name: str) -> bool:
    """Returns whether a field was declared as a placeholder, which is None unless it is set."""
    return isinstance(dict(section.items(preserve_field_references=True))[name], config_dict.FieldReference)


def literal(text: str | None) -> Any:
    """Returns the Python literal that a text spells, as config_flags reads a field without a type; else the text."""
    if text in ("true", "false"):
        return text == "true"
    try:
        return ast.literal_eval(text or "")
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):  # `{[]: 1}`; too deep
        return text


def plain(value: Any) -> Any:
    """Returns a value without numpy's types: its scalars become numbers, its arrays tuples."""
    if isinstance(value, np.generic | np.ndarray):
        return plain(value.tolist())
    if isinstance(value, ml_collections.ConfigDict):
        return plain(value.to_dict())
    if isinstance(value, Mapping):
        return {name: plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return tuple(map(plain, value))
    return value
