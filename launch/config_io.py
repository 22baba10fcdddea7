"""Recipes: YAML files and `a.b=c` overrides become frozen dataclasses, or a one-line error (the yaml/pydantic door).

A recipe is a YAML mapping with the key `kind` and, if it likes, `base: other` (one level). The recipe's mappings merge
into its base's, everything else replaces. The resulting mapping must fit the dataclass of its kind exactly: an unknown
key, a wrong type or an impossible combination raises ConfigError with the path, the value and the remedy. Nothing is
coerced, except that an integer is accepted where a float is wanted. docs/recipes.md is the user's page.
"""

import dataclasses
import difflib
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import pydantic
import yaml

from launch.config_keys import check_keys
from launch.errors import ConfigError

RECIPES_DIR = Path(__file__).parent / "recipes"

_T = TypeVar("_T")
_OVERRIDE = re.compile(r"^([A-Za-z_][\w]*(?:\.\w+)*)=(.*)$", re.DOTALL)


# --- YAML ---------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """Safe YAML whose scalars mean what they look like, without duplicate keys and aliases."""

    # PyYAML follows YAML 1.1, where `1e-4` is text and `no`, `010`, `1:30` and `2020-01-01` are not.
    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.events.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.constructor.ConstructorError(None, None, "aliases (*name) are not supported; use base:", mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            mark = key_node.start_mark
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is not text; quote it", mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice; keep one", mark)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


class _Dumper(yaml.SafeDumper):
    """Writes YAML that `_Loader` and any YAML 1.1 reader understand alike: what either would misread is quoted."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)  # list items stand below their key, indented

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: _Dumper, text: str) -> yaml.Node:
    """Text; YAML 1.1's rarer line breaks would be folded away unless they are escaped."""
    style = '"' if set(text) & set("\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)
_Dumper.yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeDumper.yaml_implicit_resolvers.items()}
_SCALARS: tuple[tuple[str, str, list[str] | None], ...] = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|\.[0-9]+(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+"
        r"|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN)",
        list("-+0123456789."),
    ),
)
for _tag, _pattern, _first in _SCALARS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)


def _parse_yaml(text: str, where: str) -> Any:
    """Parses one YAML document. Raises ConfigError naming `where`, the line and the problem."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark is not None else ""
        raise ConfigError(f"{where}{line}: {error.problem or 'not valid YAML'}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{where}: not valid YAML ({_one_line(str(error))})") from None


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Reads a YAML file whose top level is a mapping (a recipe, or a run's run.yaml). Raises ConfigError."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; check the path") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); check the path") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not UTF-8 text; give a YAML file") from None
    value = _parse_yaml(text, str(path))
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: expected a mapping of keys to values, found {_describe(value)}")
    return value


def dump_yaml(obj: Any) -> str:
    """YAML text of a dataclass or a plain mapping, in the order of its fields; `read_yaml` gives it back exactly."""
    return yaml.dump(_plain(obj), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


# --- dataclasses --------------------------------------------------------------------------------------------------


def to_dict(obj: Any) -> dict[str, Any]:
    """A dataclass as nested plain dicts and lists (tuples become lists), ready for YAML or JSON."""
    if not dataclasses.is_dataclass(obj) or isinstance(obj, type):
        raise TypeError(f"to_dict wants a dataclass instance, got {type(obj).__name__}")
    return _plain(obj)


def from_dict(cls: type[_T], values: Mapping[str, Any], where: str = "config", prefix: str = "") -> _T:
    """Builds the dataclass `cls` from a nested mapping, strictly.

    Args:
        cls: a dataclass of stdlib types (int, float, str, bool, Literal, tuple, nested dataclasses, X | None).
        values: the nested mapping; missing keys take the dataclass's defaults.
        where: what the values came from, for messages ("recipe 'digits-dit'").
        prefix: the dotted path at which `values` stands in it, with its dot ("" = the top).

    Raises:
        ConfigError: an unknown or missing key, a wrong type, or what a `__post_init__` refuses.
    """
    check_keys(cls, values, where, prefix, root=cls)
    try:
        text = json.dumps(values, allow_nan=False)
    except (TypeError, ValueError):
        bad = next((path for path, value in _leaves(values) if not _is_plain_value(value)), "")
        raise ConfigError(f"{where}: {prefix}{bad} is not a finite number, text, truth value or null") from None
    try:
        # JSON mode, because only there strict mode builds dataclasses and tuples from mappings and lists.
        return pydantic.TypeAdapter(cls).validate_json(text, strict=True)
    except pydantic.ValidationError as error:
        raise ConfigError(_validation_message(error, values, where, prefix)) from None


def _is_plain_value(value: Any) -> bool:
    return value is None or isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))


def _plain(obj: Any) -> Any:
    if dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        return {field.name: _plain(getattr(obj, field.name)) for field in dataclasses.fields(obj) if field.init}
    if isinstance(obj, Mapping):
        return {str(key): _plain(value) for key, value in obj.items()}
    if isinstance(obj, list | tuple):
        return [_plain(value) for value in obj]
    if isinstance(obj, Path):
        return str(obj)
    return obj


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from _leaves(inner, f"{path}.{index}")
    else:
        yield path, value


_WANTED = {
    "int_type": "an integer",
    "int_from_float": "an integer",
    "int_parsing": "an integer",
    "float_type": "a number",
    "string_type": "text",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "list_type": "a list",
    "dataclass_type": "a mapping of keys to values",
    "dataclass_exact_type": "a mapping of keys to values",
    "none_required": "null",
}


def _validation_message(error: pydantic.ValidationError, values: Any, where: str, prefix: str) -> str:
    """The first error of pydantic's list in our words: where, path, value, what was wanted."""
    first = error.errors(include_url=False)[0]
    path, here = _follow(first["loc"], values)
    dotted = (prefix + ".".join(path)).rstrip(".")
    if first["type"] in ("value_error", "assertion_error"):
        reason = _one_line(str(first["ctx"]["error"]))
        return f"{where}: {dotted + ': ' if dotted else ''}{reason}"
    if first["type"] == "literal_error":
        wanted = "one of " + first["ctx"]["expected"].replace(" or ", ", ")
    else:
        wanted = _WANTED.get(first["type"], _one_line(first["msg"]))
    quote = " (quote it to make it text: '\"…\"')" if wanted == "text" and isinstance(here, int | float) else ""
    return f"{where}: {dotted or 'the top level'}: expected {wanted}, found {_describe(here)}{quote}"


def _follow(location: tuple[int | str, ...], values: Any) -> tuple[list[str], Any]:
    """The parts of pydantic's location that lead through the values, and the value they lead to."""
    path: list[str] = []
    here = values
    for part in location:
        # A union adds its members' names to the location; those lead nowhere and are left out.
        is_key = isinstance(here, Mapping) and part in here
        is_index = isinstance(here, list) and isinstance(part, int) and part < len(here)
        if is_key or is_index:
            here = here[part]
            path.append(str(part))
    return path, here


def _describe(value: Any) -> str:
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return f"{str(value).lower()} (a truth value)"
    if isinstance(value, str):
        return f"{_one_line(value)[:60]!r} (text)"
    if isinstance(value, int):
        return f"{value} (an integer)"
    if isinstance(value, float):
        return f"{value} (a number)"
    return "a list" if isinstance(value, list | tuple) else "a mapping"


def _one_line(text: str) -> str:
    return " ".join(text.split())


# --- recipes ------------------------------------------------------------------------------------------------------


def recipe_names() -> list[str]:
    """The recipes that come with Darkroom, sorted."""
    return sorted(path.stem for path in RECIPES_DIR.glob("*.yaml"))


def find_recipe(name_or_path: str, beside: Path | None = None) -> Path:
    """The file of a recipe: the name of one in launch/recipes/, or a path (relative to `beside`, if given).

    Raises ConfigError with the nearest names when there is none.
    """
    named = RECIPES_DIR / f"{name_or_path}.yaml"
    if "/" not in name_or_path and named.is_file():
        return named
    path = Path(name_or_path) if beside is None else beside / name_or_path
    for candidate in (path, path.with_name(path.name + ".yaml")):
        if candidate.is_file():
            return candidate
    if "/" in name_or_path or name_or_path.endswith((".yaml", ".yml")):
        raise ConfigError(f"recipe file {path} does not exist; check the path")
    near = difflib.get_close_matches(name_or_path, recipe_names(), n=3)
    remedy = f"did you mean {', '.join(near)}?" if near else f"there are {', '.join(recipe_names()) or 'none'}"
    raise ConfigError(f"no recipe is called {name_or_path!r}; {remedy}")


def load_recipe(
    name_or_path: str, overrides: list[str] | tuple[str, ...], schemas: Mapping[str, type]
) -> tuple[str, Any]:
    """Loads a recipe, merges its base, applies the overrides and validates the whole.

    Args:
        name_or_path: a name in launch/recipes/ or a path.
        overrides: `a.b=c` each; c is YAML. A mapping merges, anything else replaces. Numbers index lists.
        schemas: kind -> dataclass; a recipe of any other kind is refused.

    Returns:
        The recipe's kind and the frozen dataclass.

    Raises:
        ConfigError: one line with the path, the value and the remedy.
    """
    path = find_recipe(name_or_path)
    where = f"recipe {path.stem!r}"
    values = _read_with_base(path)
    for override in overrides:
        _apply_override(values, override)
    kind = values.pop("kind", None)
    if not isinstance(kind, str) or kind not in schemas:
        known = ", ".join(sorted(schemas))
        if kind is None:
            raise ConfigError(f"{where}: kind is missing; give one of {known}")
        raise ConfigError(f"{where}: kind is {kind!r}, but this command wants {known}")
    return kind, from_dict(schemas[kind], values, where)


def _read_with_base(path: Path) -> dict[str, Any]:
    values = read_yaml(path)
    base_name = values.pop("base", None)
    if base_name is None:
        return values
    if not isinstance(base_name, str):
        raise ConfigError(f"{path}: base: expected the name of a recipe, found {_describe(base_name)}")
    base_path = find_recipe(base_name, beside=path.parent)
    base = read_yaml(base_path)
    if "base" in base:
        raise ConfigError(f"{path}: its base {base_name!r} has a base itself; only one level is allowed, so copy it in")
    if "kind" in values and values["kind"] != base.get("kind"):
        raise ConfigError(
            f"{path}: kind is {values['kind']!r}, but its base {base_name!r} is of kind {base.get('kind')!r}"
        )
    return _merge(base, values)


def _merge(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(under)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def _apply_override(values: dict[str, Any], override: str) -> None:
    match = _OVERRIDE.match(override)
    if match is None:
        raise ConfigError(f"override {override!r} is not of the form a.b=value")
    dotted, text = match.groups()
    if dotted in ("kind", "base"):
        raise ConfigError(f"override {override!r}: {dotted} cannot be overridden; choose another recipe")
    if not text.strip():  # YAML would read null: a shell's variable that is not set, more often than not
        raise ConfigError(f"override {override!r} has no value; write {dotted}=null for none")
    value = _parse_yaml(text, f"override {dotted}={_one_line(text)}")
    parts = dotted.split(".")
    here: Any = values
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        key: Any = part
        if isinstance(here, list):
            if not part.isdigit() or int(part) >= len(here):
                raise ConfigError(
                    f"override {override!r}: {'.'.join(parts[:depth])} is a list of {len(here)}; "
                    + (f"give a position from 0 to {len(here) - 1}" if here else "give the whole list")
                )
            key = int(part)
        elif not isinstance(here, dict):
            raise ConfigError(f"override {override!r}: {'.'.join(parts[:depth])} is {_describe(here)}, it has no keys")
        old = here[key] if isinstance(here, list) else here.get(key)
        if last:
            here[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
        else:
            if old is None:
                here[key] = old = {}
            here = old
