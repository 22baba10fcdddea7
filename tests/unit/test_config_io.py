"""Recipes: what is accepted comes back exactly, what is wrong is named in one line."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from launch.config_io import (
    RECIPES_DIR,
    ConfigError,
    dump_yaml,
    from_dict,
    load_recipe,
    read_yaml,
    recipe_names,
    to_dict,
)


@dataclass(frozen=True, kw_only=True)
class Optim:
    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    kind: Literal["adamw", "sgd"] = "adamw"


@dataclass(frozen=True, kw_only=True)
class Encoder:
    name: str
    width: int = 8

    def __post_init__(self) -> None:
        if self.width % 2:
            raise ValueError(f"width {self.width} must be even")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    steps: int
    title: str = "none"
    resume: bool = True
    limit: int | None = None
    optim: Optim = Optim()
    extra: Optim | None = None
    encoders: tuple[Encoder, ...] = field(default=())

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit > self.steps:
            raise ValueError(f"limit {self.limit} is above steps {self.steps}; lower it")


SCHEMAS = {"toy": Recipe}


def write(folder: Path, text: str, name: str = "toy.yaml") -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def load(folder: Path, text: str, *overrides: str) -> Any:
    kind, recipe = load_recipe(write(folder, text), overrides, SCHEMAS)
    assert kind == "toy"
    return recipe


def test_a_recipe_becomes_its_dataclass(tmp_path: Path) -> None:
    recipe = load(
        tmp_path,
        """
        kind: toy
        steps: 10
        limit: ~
        optim: {learning_rate: 1e-4, betas: [0.9, 1]}
        encoders:
          - {name: a}
          - {name: b, width: 4}
        """,
    )
    assert recipe == Recipe(
        steps=10,
        optim=Optim(learning_rate=1e-4, betas=(0.9, 1.0)),
        encoders=(Encoder(name="a"), Encoder(name="b", width=4)),
    )
    assert isinstance(recipe.optim.betas, tuple)
    assert isinstance(recipe.optim.learning_rate, float)


def test_overrides_reach_every_place(tmp_path: Path) -> None:
    text = "kind: toy\nsteps: 10\nencoders: [{name: a}, {name: b}]\n"
    recipe = load(
        tmp_path,
        text,
        "optim.learning_rate=1e-5",
        "encoders.1.width=6",
        "extra.kind=sgd",
        "optim={kind: sgd}",
        "title=s3://bucket/a=b",
        "limit=3",
        "limit=null",
    )
    assert recipe.optim == Optim(learning_rate=1e-5, kind="sgd"), "a mapping merges"
    assert recipe.encoders[1].width == 6
    assert recipe.extra == Optim(kind="sgd")
    assert recipe.title == "s3://bucket/a=b"
    assert recipe.limit is None


def test_a_base_is_merged_below(tmp_path: Path) -> None:
    write(
        tmp_path, "kind: toy\nsteps: 10\noptim: {learning_rate: 0.5, kind: sgd}\nencoders: [{name: a}]\n", "base.yaml"
    )
    recipe = load(tmp_path, "base: base\nsteps: 20\noptim: {learning_rate: 0.25}\nencoders: [{name: b}]\n")
    assert recipe == Recipe(steps=20, optim=Optim(learning_rate=0.25, kind="sgd"), encoders=(Encoder(name="b"),))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("steps: 1\nstep: 2", "unknown key 'step'; did you mean 'steps'?"),
        ("steps: 1\noptim: {learning_rat: 1}", "unknown key 'optim.learning_rat'; did you mean 'optim.learning_rate'?"),
        ("steps: 1\nlearning_rate: 1", "unknown key 'learning_rate'; did you mean 'optim.learning_rate'?"),
        (
            "steps: 1\nencoders: [{name: a, widht: 4}]",
            "unknown key 'encoders.0.widht'; did you mean 'encoders.0.width'?",
        ),
        ("steps: 1\nextra: {zzzzzz: 1}", "unknown key 'extra.zzzzzz'; known here: betas, kind, learning_rate"),
        ("title: x", "steps is missing"),
        ("steps: 1\nencoders: [{width: 4}]", "encoders.0.name is missing"),
        ("steps: '1'", "steps: expected an integer, found '1' (text)"),
        ("steps: 1.0", "steps: expected an integer, found 1.0 (a number)"),
        ("steps: true", "steps: expected an integer, found true (a truth value)"),
        ("steps: 1\nresume: 1", "resume: expected true or false, found 1 (an integer)"),
        ("steps: 1\nresume: yes", "resume: expected true or false, found 'yes' (text)"),
        ("steps: 1\ntitle: 7", "title: expected text, found 7 (an integer) (quote it to make it text"),
        ("steps: 1\noptim: {learning_rate: fast}", "optim.learning_rate: expected a number, found 'fast' (text)"),
        ("steps: 1\noptim: {learning_rate: .nan}", "optim.learning_rate is not a finite number"),
        ("steps: 1\noptim: {kind: adam}", "optim.kind: expected one of 'adamw', 'sgd', found 'adam' (text)"),
        ("steps: 1\noptim: 3", "optim: expected a mapping of keys to values, found 3 (an integer)"),
        ("steps: 1\noptim: {betas: [0.9]}", "optim.betas"),
        ("steps: 1\nencoders: {name: a}", "encoders: expected a list, found a mapping"),
        ("steps: 1\nextra: [1]", "extra: expected a mapping of keys to values, found a list"),
        ("steps: 1\nlimit: 5", "limit 5 is above steps 1; lower it"),
        ("steps: 1\nencoders: [{name: a, width: 3}]", "encoders.0: width 3 must be even"),
        ("steps: 1\nsteps: 2", "line 3: key 'steps' is given twice"),
        ("steps: 1\noptim: {1: 2}", "key 1 is not text"),
        ("steps: [1", "toy.yaml, line"),
        ("steps: &a 1\nlimit: *a", "aliases"),
        ("steps: !!python/object/apply:os.system ['true']", "could not determine a constructor"),
        ("steps: !!binary aGk=", "steps is not a finite number, text, truth value or null"),
    ],
)
def test_a_mistake_is_one_line_with_its_path(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, f"kind: toy\n{text}\n")
    message = str(caught.value)
    assert expected in message
    assert "\n" not in message
    assert "toy" in message, "the recipe is named"
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("steps", "not of the form a.b=value"),
        ("--steps=1", "not of the form a.b=value"),
        ("stepz=1", "unknown key 'stepz'; did you mean 'steps'?"),
        ("encoders.7.width=4", "encoders is a list of 1; give a position from 0 to 0"),
        ("steps.a=4", "steps is 1 (an integer), it has no keys"),
        ("title=[", "override title=["),
        ("kind=other", "kind cannot be overridden"),
        ("title=", "has no value; write title=null for none"),
    ],
)
def test_a_wrong_override_is_named(tmp_path: Path, override: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, "kind: toy\nsteps: 1\nencoders: [{name: a}]\n", override)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_position_in_an_empty_list_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="encoders is a list of 0; give the whole list"):
        load(tmp_path, "kind: toy\nsteps: 1\nencoders: []\n", "encoders.0.width=4")


def test_kind_and_base_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="kind is 'boat', but this command wants toy"):
        load(tmp_path, "kind: boat")
    with pytest.raises(ConfigError, match="kind is missing; give one of toy"):
        load(tmp_path, "steps: 1")
    write(tmp_path, "base: other\n", "middle.yaml")
    with pytest.raises(ConfigError, match="only one level"):
        load(tmp_path, "base: middle\n")
    with pytest.raises(ConfigError, match="no recipe is called 'nowhere'"):
        load(tmp_path, "base: nowhere\n")
    write(tmp_path, "kind: boat\n", "boat.yaml")
    with pytest.raises(ConfigError, match="of kind 'boat'"):
        load(tmp_path, "base: boat\nkind: toy\n")


def test_a_missing_recipe_lists_the_nearest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="digits-dit"):
        load_recipe("digit-dit", [], SCHEMAS)
    with pytest.raises(ConfigError, match=r"some/where.yaml does not exist"):
        load_recipe("some/where.yaml", [], SCHEMAS)
    (tmp_path / "latin.yaml").write_bytes(b"kind: \xff")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_recipe("latin.yaml", [], SCHEMAS)


recipes = st.builds(
    Recipe,
    steps=st.integers(min_value=100, max_value=10**15),
    title=st.one_of(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
        st.sampled_from(
            [
                "\x85",
                "a\u2028b ",
                "1e-4",
                "no",
                "on",
                "null",
                "~",
                "010",
                "1:30",
                "2020-01-01",
                "true",
                "1_0",
                ".5",
                "- a",
                "a: b",
            ]
        ),
    ),
    resume=st.booleans(),
    limit=st.none() | st.integers(min_value=-100, max_value=100),
    optim=st.builds(Optim, learning_rate=st.floats(allow_nan=False, allow_infinity=False)),
    encoders=st.lists(st.builds(Encoder, name=st.just("e"), width=st.just(4)), max_size=2).map(tuple),
)


@given(recipes)
def test_what_is_dumped_is_read_back(recipe: Recipe) -> None:
    text = dump_yaml(recipe)
    assert from_dict(Recipe, to_dict(recipe)) == recipe
    # Through our reader and through any other YAML reader.
    import launch.config_io as config_io

    assert from_dict(Recipe, config_io._parse_yaml(text, "test")) == recipe
    assert from_dict(Recipe, yaml.safe_load(text)) == recipe


def test_read_yaml_wants_a_mapping(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected a mapping"):
        read_yaml(write(tmp_path, "- a\n"))
    assert read_yaml(write(tmp_path, dump_yaml({"a": (1, 2), "b": {"c": None}}))) == {"a": [1, 2], "b": {"c": None}}


# --- the recipes that come with Darkroom --------------------------------------------------------------------------


def schemas() -> dict[str, type]:
    from eval.config import EvalRecipe
    from launch.pipeline import Pipeline
    from training.config import AutoencoderRecipe, DiTRecipe, EncodeRecipe

    return {
        "autoencoder": AutoencoderRecipe,
        "dit": DiTRecipe,
        "encode": EncodeRecipe,
        "eval": EvalRecipe,
        "pipeline": Pipeline,
    }


def test_every_yaml_of_the_repository_is_a_recipe() -> None:
    root = RECIPES_DIR.parents[1]
    packages = ("training", "data", "models", "launch", "eval", "docs", "tests")
    found = {path for folder in packages for ending in ("*.yaml", "*.yml") for path in (root / folder).rglob(ending)}
    assert found == {RECIPES_DIR / f"{name}.yaml" for name in recipe_names()}


@pytest.mark.parametrize("name", recipe_names())
def test_recipe_loads_and_survives_its_own_dump(name: str) -> None:
    kind, recipe = load_recipe(name, [], schemas())
    again = from_dict(type(recipe), yaml.safe_load(dump_yaml(recipe)))
    assert again == recipe
    assert kind in name or kind == "eval"


def _fields(cls: type, seen: set[type]) -> None:
    if cls in seen or not dataclasses.is_dataclass(cls):
        return
    seen.add(cls)
    import typing

    for hint in typing.get_type_hints(cls).values():
        for part in (hint, *typing.get_args(hint)):
            if isinstance(part, type):
                _fields(part, seen)


def test_no_config_field_is_read_by_nobody() -> None:
    """Each field's name must stand behind a dot somewhere outside the class that declares it."""
    classes: set[type] = set()
    for schema in schemas().values():
        _fields(schema, classes)
    root = RECIPES_DIR.parents[1]
    source = "\n".join(
        path.read_text()
        for folder in ("training", "data", "models", "eval", "launch")
        for path in (root / folder).glob("*.py")
    )
    unread = [
        f"{cls.__name__}.{item.name}"
        for cls in classes
        for item in dataclasses.fields(cls)
        if f".{item.name}" not in source
    ]
    assert not unread, f"nothing reads {unread}"
