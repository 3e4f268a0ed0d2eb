"""What is shipped: the wheel, the bundle that Flower carries, and the dependencies.

The packages have plain names, so these tests hold the guards: nothing else owns the
names, nothing but the four packages is installed, and no code travels to a node.
"""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterable, Mapping
from importlib.metadata import packages_distributions
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from flwr.cli.build import build_fab_from_files
from flwr.cli.config_utils import load_and_validate
from flwr.cli.utils import collect_files
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"client", "common", "deploy", "server"}
BUNDLE = {"pyproject.toml", "LICENSE", ".info/CONTENT"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The names of the files in the wheel, built offline from this checkout."""
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    (file,) = out.glob("*.whl")
    return set(zipfile.ZipFile(file).namelist())


@pytest.fixture(scope="module")
def checkout() -> dict[str, bytes | Path]:
    """Every file that Flower finds here, as `flwr build` and `flwr run` collect them."""
    return dict(collect_files(ROOT))


def sources() -> set[str]:
    """The product's files that git tracks or would track."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *sorted(PACKAGES)]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return {name for name in listed.stdout.splitlines() if (ROOT / name).is_file()}


def bundled(files: Mapping[str, bytes | Path]) -> set[str]:
    """The names of what Flower would carry to a node."""
    fab, _ = build_fab_from_files(files)
    return set(zipfile.ZipFile(io.BytesIO(fab)).namelist())


def foreign_owners(owners: Mapping[str, Iterable[str]]) -> set[str]:
    """Distributions other than ours that install one of our top-level names."""
    return {owner for name in PACKAGES for owner in owners.get(name, ())} - {"cloister"}


def project() -> dict[str, Any]:
    table: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    return table


def requirements(*extras: str) -> list[Requirement]:
    """The declared dependencies of the base and of these extras; without any, of all extras."""
    optional = project()["optional-dependencies"]
    lines = chain(project()["dependencies"], *(optional[extra] for extra in extras or optional))
    return [Requirement(line) for line in lines if not line.startswith("cloister[")]


def constraints() -> list[str]:
    text = (ROOT / "constraints.txt").read_text("utf-8")
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def imported(file: Path) -> set[str]:
    """Every dotted name that a file imports; of `from a import b` both `a` and `a.b`."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def reached(start: str) -> set[str]:
    """Every name imported by a module, or by a module of the product that it reaches."""
    names, waiting = set[str](), {start}
    while waiting:
        name = waiting.pop()
        names.add(name)
        path = ROOT.joinpath(*name.split("."))
        files = (path.with_suffix(".py"), path / "__init__.py")
        found = set().union(*(imported(file) for file in files if file.is_file()))
        waiting |= found - names
    return names


def undeclared(names: Iterable[str], declared: Iterable[Requirement]) -> set[str]:
    """Top-level modules from outside that none of the declared distributions provides."""
    tops = {name.partition(".")[0] for name in names} - PACKAGES - sys.stdlib_module_names
    provided = {canonicalize_name(requirement.name) for requirement in declared}
    owners = packages_distributions()
    return {
        top
        for top in tops
        if provided.isdisjoint(canonicalize_name(owner) for owner in owners.get(top, []))
    }


def test_the_wheel_is_the_four_packages(wheel: set[str]) -> None:
    tops = {name.partition("/")[0] for name in wheel}
    metadata = {top for top in tops if top.endswith(".dist-info")}
    assert tops - metadata == PACKAGES
    assert len(metadata) == 1


def test_the_wheel_leaves_nothing_behind(wheel: set[str]) -> None:
    # Code, templates, tables, presets and type markers alike.
    assert {name for name in wheel if name.partition("/")[0] in PACKAGES} == sources()
    assert {f"{package}/py.typed" for package in PACKAGES} <= wheel


def test_the_wheel_carries_the_licence_and_the_command(wheel: set[str]) -> None:
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in wheel)
    assert any(name.endswith(".dist-info/entry_points.txt") for name in wheel)


def test_no_index_takes_an_upload() -> None:
    assert "Private :: Do Not Upload" in project()["classifiers"]


def test_no_other_distribution_owns_our_names() -> None:
    assert not foreign_owners(packages_distributions())
    assert foreign_owners({"server": ["cloister", "some-web-server"]}) == {"some-web-server"}


def test_flower_accepts_the_app() -> None:
    # What `flwr build` and `flwr run` ask of a project, that both components exist included.
    _, warnings = load_and_validate(ROOT / "pyproject.toml")
    assert not warnings


def test_the_bundle_carries_no_code(checkout: dict[str, bytes | Path]) -> None:
    assert bundled(checkout) == BUNDLE


def test_without_the_guard_flower_would_bundle_code(checkout: dict[str, bytes | Path]) -> None:
    lines = (ROOT / "pyproject.toml").read_text("utf-8").splitlines()
    unguarded = "\n".join(line for line in lines if not line.startswith("fab-include"))
    assert "client/__init__.py" in bundled({**checkout, "pyproject.toml": unguarded.encode()})


def test_ci_installs_versions_that_the_project_allows() -> None:
    pinned = dict(line.split("==") for line in constraints())
    pins = {canonicalize_name(name): version for name, version in pinned.items()}
    for requirement in requirements():
        version = pins[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement} but {version} is pinned"


def test_constraints_are_names_and_versions_alone() -> None:
    # No address of an index, no path of a machine, no build mark of a CPU.
    assert not [line for line in constraints() if not re.fullmatch(r"[\w.-]+==[\w.]+", line)]


def test_what_is_imported_is_declared() -> None:
    files = [ROOT / name for name in sources() if name.endswith(".py")]
    names = set().union(*map(imported, files))
    assert not undeclared(names, requirements())
    assert undeclared({"torch.nn", "pluggy", "no_such_module"}, requirements()) == {
        "pluggy",
        "no_such_module",
    }


@pytest.mark.parametrize(
    ("app", "extra", "beside"),
    [("client.app", "node", "client.training"), ("server.app", "coordinator", "server.rounds")],
)
def test_an_extra_is_enough_for_its_side(app: str, extra: str, beside: str) -> None:
    # A hospital installs `cloister[node]` alone, an operator `cloister[coordinator]`.
    assert beside in reached(app)
    assert not undeclared(reached(app), requirements(extra))
