"""The import order of the library: a module imports only from its left."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import noisefl

PACKAGE = Path(noisefl.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# Left to right; names on one line do not import each other.
ORDER = [
    {"errors"},
    {"parts"},
    {"keys", "mesh", "protection"},
    {"data"},
    {"models"},
    {"evaluate", "strategy", "augmentation"},
    {"optimizers"},
    {"cohort", "split", "local", "average", "server", "running"},
    {"noise"},
    {"calibrate"},
    {"probing"},
    {"schemes", "owner"},
    {"experiment"},
    {"round", "presets"},
    {"attacks"},
    {"theft"},
    {"measure"},
    {"simulate"},
    {"layout"},
    {"sweep"},
    {"record"},
]
PLACE = {name: place for place, names in enumerate(ORDER) for name in names}


def subject(file: Path) -> str:
    """The first name below the package: "models" for noisefl/models/mlp.py."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(file: Path) -> Iterator[str]:
    """Full names of all imports of a file, those inside functions included."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file.name}:{node.lineno}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_every_module_has_its_place():
    assert {subject(file) for file in FILES} - {"__init__"} <= set(PLACE)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_come_from_the_left(file):
    own = subject(file)
    for name in imported(file):
        root, _, rest = name.partition(".")
        assert root not in {"experiments", "tests", "absl", "matplotlib", "rich"}, name
        if root == "noisefl" and own != "__init__":
            other = rest.partition(".")[0]
            assert other, "the library imports its modules, not itself"
            assert other == own or PLACE[other] < PLACE[own], f"{own} imports {name}"


def test_this_test_sees_imports(tmp_path):
    file = tmp_path / "file.py"
    file.write_text("import a.b\ndef f():\n    from noisefl import round as r\n    import c\n")
    assert list(imported(file)) == ["a.b", "noisefl.round", "c"]
    modules = {name for file in FILES for name in imported(file) if name.startswith("noisefl.")}
    assert {"noisefl.parts.part", "noisefl.keys", "noisefl.round.step"} <= modules


def test_importing_the_library_is_cheap():
    """TFDS and the drivers' dependencies cost a second or more each, and most runs need none."""
    code = "import noisefl, sys; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(out.stdout.split())
    assert "jax" in loaded
    heavy = {"tensorflow", "tensorflow_datasets", "matplotlib", "pandas", "rich", "experiments"}
    assert not loaded & (heavy - {"rich"})  # flax brings rich


def test_the_public_api_is_re_exported_explicitly():
    for node in ast.parse((PACKAGE / "__init__.py").read_text()).body:
        if isinstance(node, ast.ImportFrom):
            assert all(alias.asname == alias.name for alias in node.names), ast.unparse(node)


@pytest.mark.parametrize("folder", ["noisefl", "experiments"])
def test_nothing_is_called_by_what_it_is_not(folder):
    for file in (PACKAGE.parent / folder).rglob("*.py"):
        assert file.stem not in {"utils", "util", "helpers", "common", "misc"}, file
