"""Pages that are read off the package: one a module, and one of all flags."""

import importlib
import io
import os
import pkgutil
from contextlib import redirect_stdout
from pathlib import Path
from types import ModuleType

import noisefl
from experiments import frontier, run

GROUPS = {  # packages and modules by what they are for; what none names is of the last one
    "Experiments and rounds": ("experiment", "presets", "round", "simulate", "sweep", "keys"),
    "Parts": ("parts", "cohort", "local", "augmentation", "average", "server", "owner",
              "optimizers", "noise"),
    "Schemes": ("schemes",),
    "Calibrators": ("calibrate", "probing"),
    "Thieves and what protection is worth": ("attacks", "theft", "protection"),
    "Measures": ("measure", "record"),
    "Models": ("models", "running", "split"),
    "Data": ("data",),
    "How it is computed": (),
}  # fmt: skip


def modules() -> list[str]:
    """Names of the package's modules without what begins with an underscore, in order."""
    found = pkgutil.walk_packages(noisefl.__path__, "noisefl.")
    return [one.name for one in found if not any(w.startswith("_") for w in one.name.split("."))]


def write(folder: Path) -> None:
    """All pages; a page that is as it was keeps its time, so that nothing is built twice.

    Args:
      folder: of them, made if missing.
    """
    pages = {"api.md": index(), "flags.md": flags()}
    pages |= {f"{name}.md": api(name) for name in modules()}
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.md"):
        if old.name not in pages:
            old.unlink()
    for name, text in pages.items():
        path = folder / name
        if not path.exists() or path.read_text() != text:
            path.write_text(text)


def index() -> str:
    """The list of modules in groups, each with the first line of its docstring."""
    lines, left = ["# The library, module by module", ""], modules()
    for title, names in GROUPS.items():
        mine = [one for one in left if not names or one.split(".")[1] in names]
        left = [one for one in left if one not in mine]
        lines += [f"## {title}", "", "| module | what it is |", "| --- | --- |"]
        lines += [f"| [{one}]({one}.md) | {first_line(importlib.import_module(one))} |"
                  for one in mine]  # fmt: skip
        lines += [""]
    listed = "\n".join(modules())
    return "\n".join([*lines, "```{toctree}", ":hidden:", "", listed, "```", ""])


def first_line(module: ModuleType) -> str:
    return (module.__doc__ or "").strip().split("\n")[0]


def api(name: str) -> str:
    """The page of a module: what it defines itself, in the order of its source."""
    return "\n".join([
        f"# {name}", "", "```{eval-rst}", f".. automodule:: {name}", "   :members:",
        "   :undoc-members:", "   :show-inheritance:", "```", "",
    ])  # fmt: skip


def flags() -> str:
    """Every flag of `experiments.run` and `experiments.frontier`, as they themselves print them."""
    os.environ["COLUMNS"] = "100"  # not the terminal's that builds it
    lines = ["# Every flag", ""]
    for name, main in (("run", run.main), ("frontier", frontier.main)):
        said = io.StringIO()
        with redirect_stdout(said):
            main([name, "--help"])
        lines += [f"## python -m experiments.{name}", "", "```text", said.getvalue().strip()]
        lines += ["```", ""]
    return "\n".join(lines)
