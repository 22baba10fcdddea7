"""The rules of the house: who may import whom, one door per heavy library, sizes, words."""

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("training", "data", "models", "launch", "eval")
ARROWS: dict[str, tuple[str, ...]] = {
    "models": (),
    "data": (),
    "launch": (),
    "training": ("models", "data", "launch"),
    "eval": ("models", "data", "launch"),
}
# And import them inside their commands only.
NAMES_EVERYBODY = tuple(
    f"launch/{name}.py" for name in ("cli", "cli_checkpoint", "cli_data", "cli_doctor", "cli_launch")
)
DOORS: dict[str, tuple[str, ...]] = {
    "boto3": ("data/s3_client.py",),
    "botocore": ("data/s3_client.py",),
    "webdataset": ("data/shards.py", "data/shard_reader.py"),
    "yaml": ("launch/config_io.py",),
    "pydantic": ("launch/config_io.py",),
    "typer": (*NAMES_EVERYBODY, "launch/cli_common.py"),
    "accelerate": ("training/engine.py", "training/metrics.py"),
    "deepspeed": ("training/engine.py",),
    "tensorboard": ("training/metrics.py",),
    "open_clip": ("models/text_encoder.py",),
    "transformers": ("models/text_encoder.py", "models/diffusers_map.py", "models/export.py"),
    "diffusers": ("models/export.py", "models/diffusers_map.py"),
    "sklearn": ("data/digits.py",),
    "simplejpeg": ("data/decode.py",),
    "matplotlib": ("data/stats.py",),
}
PICKLE = ("pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal")
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60


def files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """(top-level name, whether the import runs when the module is imported) of every import, lazy ones included."""

    def visit(node: ast.AST, at_import: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name.partition(".")[0], at_import) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{name_of(path)}: relative import; write the package's name"
                yield (child.module or "").partition(".")[0], at_import
            else:
                inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                yield from visit(child, at_import and not inside)

    yield from visit(tree(path), True)


ALL = files(*PACKAGES)


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_along_the_arrows(package: str) -> None:
    allowed = {package, *ARROWS[package]}
    wrong = [
        f"{name_of(path)} imports {name}"
        for path in files(package)
        if name_of(path) not in NAMES_EVERYBODY
        for name, _ in imports(path)
        if name in PACKAGES and name not in allowed
    ]
    assert not wrong, wrong


def test_the_command_line_imports_lazily() -> None:
    at_import = {name for file in NAMES_EVERYBODY for name, early in imports(ROOT / file) if early}
    assert at_import <= set(sys.stdlib_module_names) | {"typer", "launch"}, at_import


@pytest.mark.parametrize("library", DOORS)
def test_heavy_libraries_have_one_door(library: str) -> None:
    users = {name_of(path) for path in ALL for name, _ in imports(path) if name == library}
    assert users <= set(DOORS[library]), f"{library} enters through {DOORS[library]}, not {users - set(DOORS[library])}"


def test_diffusers_is_imported_lazily() -> None:
    # It is an extra: the packages must import without it.
    early = [name_of(path) for path in ALL for name, at_import in imports(path) if name == "diffusers" and at_import]
    assert not early, early


def test_nothing_is_pickled() -> None:
    wrong = [f"{name_of(path)} imports {name}" for path in ALL for name, _ in imports(path) if name in PICKLE]
    for path in ALL:
        for node in ast.walk(tree(path)):
            if not isinstance(node, ast.Attribute) or not isinstance(node.value, ast.Name):
                continue
            if (node.value.id, node.attr) in {("torch", "load"), ("torch", "save")}:
                wrong.append(f"{name_of(path)}:{node.lineno} torch.{node.attr}")
    assert not wrong, wrong


GLOBAL_RANDOM = re.compile(
    r"(torch|np|numpy)(\.cuda)?(\.random)?\.(manual_seed|manual_seed_all|seed)|random\.(?!Random$)\w+"
    r"|(np|numpy)\.random\.(rand\w*|normal|uniform|permutation|shuffle|choice)"
)


def calls_outside_a_fork(node: ast.AST) -> Iterator[ast.Call]:
    """Every call that is not inside `with torch.random.fork_rng(…)`, which gives the global state back."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.With) and any("fork_rng" in ast.unparse(item) for item in child.items):
            continue
        if isinstance(child, ast.Call):
            yield child
        yield from calls_outside_a_fork(child)


def test_no_global_random_state() -> None:
    wrong = [
        f"{name_of(path)}:{call.lineno} {ast.unparse(call.func)}"
        for path in ALL
        for call in calls_outside_a_fork(tree(path))
        if GLOBAL_RANDOM.fullmatch(ast.unparse(call.func))
    ]
    assert not wrong, wrong


@pytest.mark.parametrize("package", PACKAGES)
def test_every_package_says_what_it_is(package: str) -> None:
    for path in files(package):
        assert ast.get_docstring(tree(path)), f"{name_of(path)} has no docstring"
    assert (ROOT / package / "__init__.py").is_file()


def test_files_and_functions_stay_readable() -> None:
    wrong = []
    for path in ALL:
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > MAX_FILE_LINES:
            wrong.append(f"{name_of(path)} has {lines} lines")
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                if length > MAX_FUNCTION_LINES:
                    wrong.append(f"{name_of(path)}:{node.lineno} {node.name} has {length} lines")
    assert not wrong, wrong


def texts() -> list[Path]:
    found = files(*PACKAGES, "tests")
    for pattern in ("*.md", "docs/*.md", "launch/recipes/*.yaml", "Makefile", ".ci/run", "pyproject.toml"):
        found += sorted(ROOT.glob(pattern))
    return found


def test_the_lock_names_no_address() -> None:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    odd = [line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.!+]+", line)]
    assert not odd, odd
    assert len({line.partition("==")[0].lower() for line in lines}) == len(lines)


def test_configs_never_name_a_secret() -> None:
    """Credentials come from the environment and the AWS config chain alone; no dataclass field may hold one."""
    secret = re.compile(r"(?i)(secret|password|passwd|credential|access_key|session_token|api_key)")
    wrong = [
        f"{name_of(path)}:{node.lineno} {node.target.id}"
        for path in ALL
        for owner in ast.walk(tree(path))
        if isinstance(owner, ast.ClassDef)
        for node in owner.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and secret.search(node.target.id)
    ]
    assert not wrong, wrong


def test_no_text_points_outside_the_repository() -> None:
    """No absolute path of somebody's machine, no leftover marker and no number of some tracker in any text."""
    paths = r"/home/\w+/|/Users/\w+/|(?<![\w./])/wo" r"rk/"
    markers = r"\b(?:FIX" r"ME|XX" r"X|HA" r"CK)\b|(?i:\bissue #?\d)"
    wrong = [
        f"{name_of(path)}: {match.group(0)}"
        for path in texts()
        for match in re.finditer(f"{paths}|{markers}", path.read_text(encoding="utf-8"))
    ]
    assert not wrong, wrong
