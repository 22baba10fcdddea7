"""Which keys a recipe's dataclass knows, and the nearest right name for one it does not."""

import dataclasses
import difflib
import types
from collections.abc import Iterator, Mapping
from typing import Any, Union, get_args, get_origin, get_type_hints

from launch.errors import ConfigError


def _dataclass_in(hint: Any) -> type | None:
    """The dataclass that a mapping at this type must fill (looks through `X | None`), or None."""
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return hint
    if get_origin(hint) in (Union, types.UnionType):
        return next((found for arg in get_args(hint) if (found := _dataclass_in(arg)) is not None), None)
    return None


def _element_dataclass(hint: Any, index: int) -> type | None:
    """The dataclass of element `index` of a tuple or list type, or None."""
    if get_origin(hint) in (Union, types.UnionType):
        return next((f for arg in get_args(hint) if (f := _element_dataclass(arg, index)) is not None), None)
    if get_origin(hint) not in (tuple, list):
        return None
    args = get_args(hint)
    if get_origin(hint) is list or (len(args) == 2 and args[1] is Ellipsis):
        return _dataclass_in(args[0])
    return _dataclass_in(args[index]) if index < len(args) else None


def _value_dataclass(hint: Any) -> type | None:
    """The dataclass of the values of a `Mapping[str, X]`, or None."""
    return _dataclass_in(get_args(hint)[1]) if get_origin(hint) in (dict, Mapping) else None


def check_keys(cls: type, values: Any, where: str, prefix: str, root: type) -> None:
    """Refuses unknown and missing keys at every level, before types are looked at."""
    if not isinstance(values, Mapping):
        return  # a type error, which the validation words
    hints = get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    for key, value in values.items():
        if key not in fields:
            raise ConfigError(
                f"{where}: unknown key {prefix + str(key)!r}{_nearest_key(str(key), prefix, fields, root)}"
            )
        inner = _dataclass_in(hints[key])
        if inner is not None:
            check_keys(inner, value, where, f"{prefix}{key}.", root)
        elif (named := _value_dataclass(hints[key])) is not None and isinstance(value, Mapping):
            for name, element in value.items():
                check_keys(named, element, where, f"{prefix}{key}.{name}.", root)
        elif isinstance(value, list | tuple):
            for index, element in enumerate(value):
                element_class = _element_dataclass(hints[key], index)
                if element_class is not None:
                    check_keys(element_class, element, where, f"{prefix}{key}.{index}.", root)
    for name, field in fields.items():
        has_default = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        if name not in values and not has_default:
            raise ConfigError(f"{where}: {prefix}{name} is missing; give it in the recipe or as {prefix}{name}=VALUE")


def _all_paths(cls: type, prefix: str = "") -> Iterator[str]:
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        yield prefix + field.name
        inner = _dataclass_in(hints[field.name])
        if inner is not None:
            yield from _all_paths(inner, f"{prefix}{field.name}.")


def _nearest_key(key: str, prefix: str, fields: Mapping[str, Any], root: type) -> str:
    """`; did you mean …`: a like name at this level first, then a like name anywhere in the recipe."""
    near = difflib.get_close_matches(key, list(fields), n=1)
    if near:
        return f"; did you mean {prefix + near[0]!r}?"
    by_name: dict[str, str] = {}
    for path in _all_paths(root):
        by_name.setdefault(path.rpartition(".")[2], path)
    near = difflib.get_close_matches(key, list(by_name), n=1, cutoff=0.75)
    if near:
        return f"; did you mean {by_name[near[0]]!r}?"
    return f"; known here: {', '.join(sorted(fields))}"
