"""The house as DESIGN says it is built, read from the syntax trees of the product.

Each law is a function from one file to its offences. It is run over every product file,
and over a small offending source that it must find: a law that cannot fail is none.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

MAY_IMPORT = {
    "common": {"common"},
    "client": {"client", "common"},
    "server": {"server", "common"},
    "deploy": {"deploy", "server", "client", "common"},
}
HOUSE = {*MAY_IMPORT, "tests", "benchmarks"}

ONLY_IN = {
    "flwr": (
        "client/app.py",
        "client/link.py",
        "client/node.py",
        "common/messages.py",
        "common/parcel.py",
        "deploy/local_engine.py",
        "deploy/ray_engine.py",
        "deploy/simulation*.py",
        "server/allowance.py",
        "server/app.py",
        "server/coordinator.py",
        "server/link.py",
        "server/post.py",
        "server/rounds.py",
    ),
    "opacus": ("client/training.py",),
    "cryptography": (
        "client/link.py",
        "client/intake/keys.py",
        "client/kept.py",
        "client/intake/reidentify.py",
        "common/certificates.py",
        "common/enrolment.py",
        "common/noise.py",
        "common/sealed.py",
        "server/issuing.py",
    ),
}

# Each of these runs code that is found in the bytes it reads.
UNPICKLERS = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}
# Libraries whose own loggers the product may turn down.
TALKATIVE = {"dicomweb_client", "flwr", "matplotlib", "pydicom", "pynetdicom", "ray", "urllib3"}
LONGEST_FUNCTION = 50

Law = Callable[[str, ast.Module], Iterator[str]]


def imported(path: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and absolute module of each import, those within functions included."""
    package = path.split("/")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            yield node.lineno, ".".join([*base, *filter(None, [node.module])])


def layers(path: str, tree: ast.Module) -> Iterator[str]:
    """deploy → server → common ← client ← deploy, and nothing imports the tests."""
    room, _, _ = path.partition("/")
    for line, module in imported(path, tree):
        other = module.split(".")[0]
        if other in HOUSE - MAY_IMPORT[room]:
            yield f"{path}:{line}: {room} imports {module}"


def heavy_libraries(path: str, tree: ast.Module) -> Iterator[str]:
    """Flower, Opacus and cryptography are imported where ONLY_IN says."""
    for line, module in imported(path, tree):
        library = module.split(".")[0]
        allowed = ONLY_IN.get(library)
        if allowed is not None and not any(fnmatch(path, pattern) for pattern in allowed):
            yield f"{path}:{line}: {library} is imported outside {', '.join(allowed)}"


def no_assert(path: str, tree: ast.Module) -> Iterator[str]:
    """`python -O` removes an assert, and with it the check."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert):
            yield f"{path}:{node.lineno}: assert"


def no_pickle(path: str, tree: ast.Module) -> Iterator[str]:
    """Weights rest as safetensors; nothing that is read may run."""
    for line, module in imported(path, tree):
        if module.split(".")[0] in UNPICKLERS:
            yield f"{path}:{line}: imports {module}"
    for node in ast.walk(tree):
        match node:
            case ast.Attribute() if ast.unparse(node) in {"torch.load", "torch.save"}:
                yield f"{path}:{node.lineno}: {ast.unparse(node)}"
            case ast.ImportFrom(module="torch", names=names):
                taken = {alias.name for alias in names} & {"load", "save"}
                yield from (f"{path}:{node.lineno}: torch.{name}" for name in sorted(taken))
            case ast.keyword(arg="allow_pickle", value=value) if ast.unparse(value) != "False":
                yield f"{path}:{value.lineno}: allow_pickle"


def short_functions(path: str, tree: ast.Module) -> Iterator[str]:
    """A function fits on a screen, its docstring included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > LONGEST_FUNCTION:
                yield f"{path}:{node.lineno}: {node.name} has {length} lines"


def named_loggers(path: str, tree: ast.Module) -> Iterator[str]:
    """A logger is `cloister.…`: the package names are words that others may use too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("getLogger"):
            name = node.args[0] if node.args else None
            value = str(name.value) if isinstance(name, ast.Constant) else ""
            if not value.startswith("cloister.") and value.partition(".")[0] not in TALKATIVE:
                yield f"{path}:{node.lineno}: {ast.unparse(node)}"


LAWS: list[Law] = [
    layers,
    heavy_libraries,
    no_assert,
    no_pickle,
    short_functions,
    named_loggers,
]

OFFENCES = [
    (layers, "client/gate.py", "import server.rounds"),
    (layers, "server/rounds.py", "from client import gate"),
    (layers, "common/spec.py", "from client.intake import pixels"),
    (layers, "server/rounds.py", "def late():\n    from deploy.cli import main"),
    (layers, "deploy/demo.py", "from tests.doubles import Node"),
    (heavy_libraries, "client/gate.py", "import flwr"),
    (heavy_libraries, "deploy/cli.py", "from flwr.app import Message"),
    (heavy_libraries, "server/aggregation.py", "import opacus.accountants"),
    (heavy_libraries, "client/policy.py", "from cryptography.fernet import Fernet"),
    (no_assert, "common/spec.py", "def f(q):\n    assert q <= 1"),
    (no_pickle, "server/checkpoint.py", "import pickle"),
    (no_pickle, "server/checkpoint.py", "from joblib import load"),
    (no_pickle, "server/checkpoint.py", "weights = torch.load(path)"),
    (no_pickle, "server/checkpoint.py", "from torch import load"),
    (no_pickle, "common/cohort.py", "np.load(path, allow_pickle=True)"),
    (short_functions, "common/spec.py", "def f():\n" + "    x = 1\n" * LONGEST_FUNCTION),
    (short_functions, "common/spec.py", "async def f():\n" + "    x = 1\n" * LONGEST_FUNCTION),
    (named_loggers, "client/gate.py", "log = logging.getLogger(__name__)"),
    (named_loggers, "client/gate.py", "log = getLogger()"),
    (named_loggers, "client/gate.py", 'log = logging.getLogger("client.gate")'),
]

LAWFUL = [
    (layers, "deploy/cli.py", "import server.rounds\nimport client.gate\nimport torch"),
    (layers, "client/intake/reading.py", "from .pixels import decode\nfrom .. import policy"),
    (heavy_libraries, "deploy/simulation_report.py", "from flwr.app import Message"),
    (no_pickle, "common/cohort.py", "np.load(path, allow_pickle=False)\nnp.load(path)"),
    (short_functions, "common/spec.py", "def f():\n" + "    x = 1\n" * (LONGEST_FUNCTION - 1)),
    (named_loggers, "client/gate.py", 'log = logging.getLogger("cloister.gate")'),
    (named_loggers, "server/figures.py", 'logging.getLogger("matplotlib.font_manager")'),
]


def product_files() -> list[str]:
    """Every Python file of the four packages, relative to the repository."""
    found = (file for room in MAY_IMPORT for file in (ROOT / room).rglob("*.py"))
    return sorted(file.relative_to(ROOT).as_posix() for file in found)


def packages_among(tests: Path) -> list[str]:
    """The __init__.py files under a folder of tests."""
    return [str(file) for file in tests.rglob("__init__.py")]


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_the_product_obeys(law: Law) -> None:
    sources = {path: (ROOT / path).read_text("utf-8") for path in product_files()}
    found = [offence for path, text in sources.items() for offence in law(path, ast.parse(text))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(("law", "path", "source"), OFFENCES)
def test_an_offence_is_found(law: Law, path: str, source: str) -> None:
    assert list(law(path, ast.parse(source)))


@pytest.mark.parametrize(("law", "path", "source"), LAWFUL)
def test_what_is_lawful_is_let_be(law: Law, path: str, source: str) -> None:
    assert not list(law(path, ast.parse(source)))


def test_every_room_is_looked_into() -> None:
    assert {path.split("/")[0] for path in product_files()} == set(MAY_IMPORT)


def test_the_tests_are_no_package(tmp_path: Path) -> None:
    # A `tests` package beside `server` and `client` would be importable from the product.
    assert not packages_among(ROOT / "tests")
    (tmp_path / "system").mkdir()
    (tmp_path / "system" / "__init__.py").touch()
    assert packages_among(tmp_path)
