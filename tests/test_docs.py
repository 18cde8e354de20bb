"""The site: every public docstring has a page, and those of arrays give their shapes."""

import importlib
import inspect
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

import noisefl

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "docs"))

import generate  # noqa: E402  # pyright: ignore[reportMissingImports]

MODULES = generate.modules()


def public() -> Iterator[tuple[str, Any, bool]]:
    """What a module defines for others: its path, the function or class, and whether it overrides
    what a base says already."""
    for module in MODULES:
        for name, one in vars(importlib.import_module(module)).items():
            if name.startswith("_") or getattr(one, "__module__", None) != module:
                continue
            if inspect.isfunction(one):
                yield f"{module}.{name}", one, False
            if not inspect.isclass(one):
                continue
            yield f"{module}.{name}", one, False
            for field, member in vars(one).items():
                function = getattr(member, "fget", None) or getattr(member, "__func__", member)
                # What a decorator made has no docstring that we wrote.
                if field.startswith("_") or getattr(function, "__module__", None) != module:
                    continue
                if inspect.isfunction(function):
                    above = any(field in vars(base) for base in one.__mro__[1:])
                    yield f"{module}.{name}.{field}", function, above


def arrays(function: Any) -> list[str]:
    """Arrays that it takes or returns, but keys, which are [] everywhere."""
    signature = inspect.signature(function)
    said = {name: str(p.annotation) for name, p in signature.parameters.items()}
    said["return"] = str(signature.return_annotation)
    return [name for name, kind in said.items() if "jax.Array" in kind and "key" not in name]


def test_the_modules_are_those_of_the_package():
    files = (ROOT / "noisefl").rglob("*.py")
    names = {".".join(f.relative_to(ROOT).with_suffix("").parts) for f in files}
    wanted = {name.removesuffix(".__init__") for name in names} - {"noisefl"}
    assert set(MODULES) == {name for name in wanted if "._" not in name}


def test_the_list_of_modules_leaves_none_out():
    text = generate.index()
    for module in MODULES:
        assert text.count(f"| [{module}]({module}.md) | ") == 1
        assert generate.first_line(importlib.import_module(module))


def test_public_things_say_what_they_are():
    silent = [path for path, one, above in public()
              if inspect.isclass(one) and not (one.__doc__ or "").strip()]  # fmt: skip
    assert silent == []


def test_functions_of_arrays_give_shapes():
    """An override says what its base says, if it says nothing else."""
    bare = [f"{path}: {', '.join(arrays(one))}" for path, one, above in public()
            if not inspect.isclass(one) and not above and arrays(one)
            and "[" not in (one.__doc__ or "")]  # fmt: skip
    assert bare == []


def test_every_flag_is_on_the_page():
    text = generate.flags()
    for flag in ("--cap=", "--partition=", "--thieves", "--schemes", "--merge", "--grid="):
        assert flag in text


@pytest.mark.slow
def test_the_site_builds_strictly_and_shows_every_docstring(tmp_path):
    """With the tutorial's notebook run from beginning to end."""
    from sphinx.util.inventory import InventoryFile

    command = [sys.executable, "-m", "sphinx", "-q", "-W", "-b", "html", "docs", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    with (tmp_path / "objects.inv").open("rb") as file:
        found = InventoryFile.load(file, "", lambda base, uri: uri)
    shown = {name for kind, items in found.items() if kind.startswith("py:") for name in items}
    written = {path for path, one, _ in public() if one.__doc__}
    assert written - shown == set()
    assert len(written) > 300
    tutorial = (tmp_path / "tutorial.html").read_text()
    assert len(re.findall(r'<img [^>]*src="_images/', tutorial)) >= 1


def test_the_version_is_the_same_everywhere():
    version = noisefl.__version__
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"version = {{{version}}}" in (ROOT / "docs" / "cite.md").read_text()
    changes = re.findall(r"^## ([\d.]+) ", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert changes[0] == version
    assert metadata.version("noisefl") == version


def test_the_hooks_are_what_ci_checks_after_the_tests():
    hooks = re.findall(r"entry: (.*)", (ROOT / ".pre-commit-config.yaml").read_text())
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    own = [line for line in lines if line.startswith(".venv/bin/") and "pytest" not in line]
    assert hooks == own


def test_the_oldest_versions_are_those_that_are_allowed():
    """Of what the library and the drivers need; jaxlib comes with jax."""
    said = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needs = said["dependencies"] + said["optional-dependencies"]["experiments"]
    least = dict(need.split(">=") for need in needs if not need.startswith("importlib"))
    lines = (ROOT / ".ci" / "oldest.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if "==" in line and "jaxlib" not in line)
    assert pinned.keys() == least.keys()
    for name, version in least.items():
        assert f"{pinned[name]}.".startswith(f"{version}."), name
