"""What a config names is found, and an error says whether the name or what it names is wrong."""

import functools

import pytest

from echo_jax.system.errors import ConfigError
from echo_jax.system.named import add_to_path, check_options, find


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Returns a function that writes a module next to a config file, which names can then have."""
    monkeypatch.setattr("sys.path", ["", *__import__("sys").path])

    def write(name, text):
        (tmp_path / f"{name}.py").write_text(text)
        add_to_path(tmp_path / "config.py")

    return write


def test_names_of_the_table_come_first_and_others_from_modules(module):
    module("named_here", "thing = 7")
    assert find("a", {"a": 1}, "x") == 1
    assert find("named_here:thing", {"a": 1}, "x") == 7
    assert find("a:b", {"a:b": 2}, "x") == 2


def test_a_module_next_to_the_config_hides_no_other(module):
    module("json", "dumps = 'mine'")
    assert callable(find("json:dumps", {}, "x"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("b", "config.x = 'b': choose one of a, or write your own as module:function"),
        ("no_such_module:f", "No module named 'no_such_module'"),
        ("json:no_such", "module 'json' has no attribute 'no_such'"),
        (".relative:f", "is not the name of a module"),
        (":f", "is not the name of a module"),
        ("json:", "is not the name of a module"),
        ("json:a b", "is not the name of a module"),
    ],
)
def test_a_name_that_leads_nowhere_is_reported_with_its_field(name, message):
    with pytest.raises(ConfigError, match=f"config.x = .*{message}" if "config" not in message else message):
        find(name, {"a": 1}, "x")


@pytest.mark.parametrize(
    ("text", "error"),
    [("import no_such_library", ModuleNotFoundError), ("1 +", SyntaxError), ("{}['key']", KeyError)],
)
def test_an_error_inside_a_users_module_keeps_its_place(module, text, error):
    module(f"broken_{error.__name__}", text)
    with pytest.raises(error) as caught:
        find(f"broken_{error.__name__}:f", {}, "x")
    assert not isinstance(caught.value, ConfigError)


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        (lambda a, *, b: 0, {}, "lacks b"),
        (lambda a, *, b=1: 0, {"c": 2}, "has c, but .* takes b"),
        (lambda: 0, {}, "must take 1 arguments"),
        (lambda a, b, c: 0, {"c": 1}, "lacks b"),
    ],
)
def test_options_that_a_function_does_not_take_are_refused(function, options, message):
    with pytest.raises(ConfigError, match=message):
        check_options(function, options, "x", given=1)


def test_what_can_be_called_so_is_taken():
    class Callable:
        def __call__(self, tokens, *, b=1): ...

    for function in (lambda a: 0, lambda a, **k: 0, Callable(), functools.partial(lambda a, b: 0, b=1), min):
        check_options(function, {}, "x", given=1)
    check_options(lambda a, *, b: 0, {"b": 3}, "x", given=1)
