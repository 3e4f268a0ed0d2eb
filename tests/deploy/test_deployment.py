"""What administrators are given: images, the compose file, the chart, the units, and their pages.

No engine runs them here. They are read as an engine would read them: every command in them is one
of the command line's, and what keeps a container or a service small holds in each of them.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from jsonschema import Draft7Validator
from typer.main import get_command

from client import health as client_health
from client.node import EXIT_CODES
from deploy import probe
from deploy.cli import app
from deploy.cli_coordinator import PORT
from deploy.cli_node_service import HEALTH
from server import health as server_health

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
CHART = DEPLOY / "helm" / "cloister"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DOCKERFILES = sorted((DEPLOY / "docker").glob("*.Dockerfile"))
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
PAGES = sorted((ROOT / "docs").glob("deploy-*.md"))
USER = 10001
COORDINATOR_HEALTH = "9093"
SECRET = re.compile(r"pass(word|phrase)|secret|token|private|\bkey\b|_KEY", re.IGNORECASE)

CASES: dict[str, dict[str, Any]] = {
    "node": {},
    "node with a GPU, a proxy, a secret": {
        "gpu": {"count": 1},
        "secretName": "north-keys",
        "image": {"repository": "registry.example.org/node", "digest": "sha256:" + "0" * 64},
        "node": {
            "to": {"cidr": "203.0.113.9/32", "port": 3128},
            "proxy": "http://proxy.example.org:3128",
        },
        "extraVolumes": [{"name": "films", "persistentVolumeClaim": {"claimName": "films"}}],
        "extraVolumeMounts": [{"name": "films", "mountPath": "/films", "readOnly": True}],
        "tolerations": [{"key": "gpu", "operator": "Exists"}],
        "nodeSelector": {"gpu": "yes"},
    },
    "node, maintained": {"maintenance": True},
    "coordinator": {"role": "coordinator", "image": {"repository": "cloister-coordinator"}},
    "coordinator of some networks": {
        "role": "coordinator",
        "storage": {"className": "encrypted"},
        "coordinator": {
            "port": 443,
            "from": ["198.51.100.0/24", "203.0.113.0/24"],
            "service": {"type": "NodePort", "annotations": {"example.org/name": "x y"}},
        },
    },
    "simulation": {"role": "simulation", "gpu": {"count": 2}},
    "simulation on a cluster": {
        "role": "simulation",
        "simulation": {"rayAddress": "ray-head:6379", "run": "my runs/run.toml"},
    },
}


# --- Commands -----------------------------------------------------------------------------------


def check_command(words: list[str]) -> None:
    """Fail unless the command line has this command, and it has these options."""
    command, path = get_command(app), list[str]()
    assert words[0] == "cloister"
    while hasattr(command, "commands") and len(path) + 1 < len(words):
        if words[len(path) + 1].startswith("-"):
            break
        assert words[len(path) + 1] in command.commands, words
        path.append(words[len(path) + 1])
        command = command.commands[path[-1]]
    known = {option for parameter in command.params for option in parameter.opts} | {"--help"}
    assert {word.partition("=")[0] for word in words if word.startswith("--")} <= known, words


def check_any_command(words: list[str]) -> None:
    """Fail unless it is one of ours, or a probe of ours, or one of the shell's that we mean."""
    if words[:1] == ["cloister"]:
        check_command(words)
    elif words[:3] == ["python", "-m", "deploy.probe"]:
        assert words[3] in (HEALTH, f"127.0.0.1:{COORDINATOR_HEALTH}")
        node = {client_health.LIVE, client_health.READY, client_health.GPU}
        assert words[4:]
        assert set(words[4:]) <= node | {server_health.LIVE, "roster"}
    else:
        assert words[:2] == ["sleep", "infinity"] or words[:2] == ["sh", "-c"], words
        for part in re.findall(r"(?:cloister|python) [^&|]*", " ".join(words[2:])):
            check_any_command(shlex.split(part))


def test_a_command_that_is_not_there_is_noticed() -> None:
    for words in ("cloister node begin", "cloister node start --loud", "python -m deploy.probe x"):
        with pytest.raises(AssertionError):
            check_any_command(words.split())


# --- Images -------------------------------------------------------------------------------------


def instructions(file: Path) -> list[tuple[str, str]]:
    """The instructions of a Dockerfile, without comments, continued lines joined."""
    lines = [line for line in file.read_text().splitlines() if not line.startswith("#")]
    text = re.sub(r"\\\n\s*", "", "\n".join(lines))
    found = [line.partition(" ") for line in text.splitlines() if line.strip()]
    return [(name, rest.strip()) for name, _, rest in found]


def of(name: str, file: Path) -> list[str]:
    return [rest for found, rest in instructions(file) if found == name]


@pytest.fixture(params=DOCKERFILES, ids=lambda file: file.name)
def dockerfile(request: pytest.FixtureRequest) -> Path:
    return Path(request.param)


def test_an_image_is_of_one_python_and_its_user_is_not_root(dockerfile: Path) -> None:
    assert f"{USER}:{USER}" == of("USER", dockerfile)[-1]
    assert set(of("FROM", dockerfile)) == {"${PYTHON} AS build", "${PYTHON}"}
    base = of("ARG", dockerfile)[0].partition("=")[2]
    name, _, tag = base.partition(":")
    assert name == "python"
    assert re.fullmatch(r"3\.11\.\d+-slim-\w+", tag), base


def test_an_image_has_the_tested_versions_and_can_install_nothing(dockerfile: Path) -> None:
    steps = [step for run in of("RUN", dockerfile) for step in run.split("&&")]
    installs = [step for step in steps if re.search(r"pip\S*( --python \S+)? install ", step)]
    assert len(installs) == 2
    assert all("--constraint constraints.txt" in step for step in installs)
    (wheel,) = [step for step in steps if "pip wheel" in step]
    assert "--no-build-isolation" in wheel
    assert any(step.strip().startswith("pip uninstall") for step in steps)
    assert not [step for step in steps if re.search(r"curl|wget|apt|git clone", step)]


def test_an_image_names_extras_that_there_are(dockerfile: Path) -> None:
    defaults = dict(arg.partition("=")[::2] for arg in of("ARG", dockerfile))
    (named,) = re.findall(r"\.whl\)\[([^\]]+)\]", dockerfile.read_text())
    extras = defaults["EXTRA"] if named == "${EXTRA}" else named
    assert set(extras.split(",")) <= set(PROJECT["optional-dependencies"])


def test_what_an_image_runs_is_a_command(dockerfile: Path) -> None:
    (command,), (check,) = of("CMD", dockerfile), of("HEALTHCHECK", dockerfile)
    check_command(json.loads(command))
    check_any_command(json.loads(check.partition("CMD")[2]))
    role = dockerfile.name.partition(".")[0]
    home = f"CLOISTER_{role.upper()}_HOME=/var/lib/cloister/{role}"
    assert home in " ".join(of("ENV", dockerfile))


def test_an_image_is_given_no_secret(dockerfile: Path) -> None:
    named = " ".join([*of("ENV", dockerfile), *of("ARG", dockerfile)])
    assert not SECRET.search(named)
    assert SECRET.search("ENV PASSPHRASE=x")
    assert SECRET.search("CA_KEY=x")


def test_the_build_sees_the_packages_and_nothing_else() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    taken = {rule[1:] for rule in rules if rule.startswith("!")}
    packages = {"client", "common", "deploy", "server"}
    assert rules[0] == "*"
    assert taken == packages | {"LICENSE", "constraints.txt", "pyproject.toml"}
    assert {"**/*.key", "**/*.pem", "**/*.dcm", "**/*.sqlite*"} <= set(rules)


# --- The compose file ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def composed() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    return found


def test_every_service_is_small(composed: dict[str, Any]) -> None:
    for name, service in composed["services"].items():
        assert service["user"] == f"{USER}:{USER}", name
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert "no-new-privileges:true" in service["security_opt"], name
        assert not service.keys() & {"privileged", "cap_add", "pid", "network_mode"}, name
        assert service["ulimits"]["core"] == 0, name


def test_every_service_has_a_version_a_profile_of_its_own_and_a_command(
    composed: dict[str, Any],
) -> None:
    services = composed["services"]
    for name, service in services.items():
        assert service["profiles"] == [name]  # a profile never starts two processes of one ledger
        assert service["image"].partition(":")[2].partition("-")[0] == PROJECT["version"]
        check_command(service["command"])
        if "build" in service:
            file = ROOT / service["build"]["dockerfile"]
            known = {arg.partition("=")[0] for arg in of("ARG", file)}
            assert set(service["build"]["args"]) <= known


def test_two_ports_are_open_and_none_of_a_node(composed: dict[str, Any]) -> None:
    ports = {name: service.get("ports", []) for name, service in composed["services"].items()}
    assert ports["coordinator"] == [f"{PORT}:{PORT}"]
    assert ports["node"] == ports["node-gpu"] == []
    assert ports["listen"] == ["11112:11112"]


def test_no_secret_is_in_an_environment(composed: dict[str, Any]) -> None:
    for service in composed["services"].values():
        assert set(service.get("environment", {})) <= {"HTTPS_PROXY", "NO_PROXY"}


# --- The units ----------------------------------------------------------------------------------

HARDENED = {
    "ProtectSystem": "strict",
    "ProtectHome": "yes",
    "PrivateTmp": "yes",
    "PrivateDevices": "yes",
    "DevicePolicy": "closed",
    "NoNewPrivileges": "yes",
    "CapabilityBoundingSet": "",
    "RestrictAddressFamilies": "AF_INET AF_INET6 AF_UNIX",
    "RestrictNamespaces": "yes",
    "SystemCallArchitectures": "native",
    "ProtectProc": "invisible",
    "UMask": "0077",
    "LimitCORE": "0",
    "StateDirectoryMode": "0700",
    "User": "cloister",
}


def settings(file: Path) -> dict[str, list[str]]:
    """The settings of a unit, each with all its values; every line has to be understood."""
    found: dict[str, list[str]] = {}
    section = ""
    for line in file.read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        if named := re.fullmatch(r"\[(Unit|Service|Install)\]", line):
            section = named[1]
            continue
        name, equals, value = line.partition("=")
        assert section, line
        assert re.fullmatch(r"\w+=", name + equals), line
        found.setdefault(name, []).append(value)
    return found


@pytest.fixture(params=UNITS, ids=lambda file: file.stem)
def unit(request: pytest.FixtureRequest) -> Path:
    return Path(request.param)


def test_a_unit_is_hardened(unit: Path) -> None:
    found = settings(unit)
    assert {name: found[name] for name in HARDENED} == {k: [v] for k, v in HARDENED.items()}
    assert found["SystemCallFilter"][0] == "@system-service"
    assert "@privileged" in found["SystemCallFilter"][1]


def test_a_unit_starts_a_command_and_knows_its_folder(unit: Path) -> None:
    found = settings(unit)
    (start,) = found["ExecStart"]
    program, *words = start.split()
    assert program == "/opt/cloister/bin/cloister"
    check_command(["cloister", *words])
    homes = {word.partition("=")[0] for line in found["Environment"] for word in line.split()}
    role = "COORDINATOR" if "coordinator" in unit.name else "NODE"
    assert f"CLOISTER_{role}_HOME" in homes
    assert not [name for name in homes if SECRET.search(name)]


def test_a_node_that_needs_a_person_is_not_started_again() -> None:
    found = settings(DEPLOY / "systemd" / "cloister-node.service")
    for_good = {code for _, code in EXIT_CODES} - {os.EX_TEMPFAIL}
    assert {int(code) for code in found["RestartPreventExitStatus"][0].split()} == for_good


def test_a_gpu_is_allowed_by_the_unit_itself() -> None:
    found = settings(DEPLOY / "systemd" / "cloister-node.service.d" / "gpu.conf")
    assert found["DevicePolicy"] == ["closed"]
    assert found["DeviceAllow"] == ["char-nvidia* rw"]
    assert found["PrivateDevices"] == ["no"]


def verified(folder: Path) -> subprocess.CompletedProcess[str]:
    """`systemd-analyze verify` of the units, with a program that is on this machine."""
    for file in [*UNITS, *(DEPLOY / "systemd").glob("*.d/*.conf")]:
        target = folder / file.relative_to(DEPLOY / "systemd")
        target.parent.mkdir(exist_ok=True)
        text = file.read_text().replace("/opt/cloister/bin/cloister", sys.executable)
        target.write_text(text)
    units = [str(folder / unit.name) for unit in UNITS]
    command = ["systemd-analyze", "verify", "--man=no", *units]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="there is no systemd-analyze")
def test_systemd_takes_the_units_and_finds_little_exposed(tmp_path: Path) -> None:
    said = verified(tmp_path)
    assert said.returncode == 0, said.stderr
    assert not re.search(r"Unknown|[Ii]nvalid|[Ii]gnor", said.stderr), said.stderr
    for unit in UNITS:
        command = ["systemd-analyze", "security", "--offline=yes", "--threshold=20"]
        judged = subprocess.run(
            [*command, str(tmp_path / unit.name)], capture_output=True, text=True, check=False
        )
        assert judged.returncode == 0, judged.stdout[-500:]
    bad = tmp_path / UNITS[0].name
    bad.write_text(bad.read_text().replace("ProtectSystem=strict", "ProtectSystem=stern"))
    command = ["systemd-analyze", "verify", "--man=no", str(bad)]
    control = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "stern" in control.stderr


# --- The chart ----------------------------------------------------------------------------------


class Chart:
    """As much of Go's templates as the chart uses, and an error for anything else.

    Where `helm` is installed, a test compares the two.
    """

    def __init__(self) -> None:
        self.parts: dict[str, list[Any]] = {}
        self.files: dict[str, list[Any]] = {}
        for file in sorted((CHART / "templates").iterdir()):
            tree, rest = self._parsed(self._tokens(file.read_text()))
            assert not rest, file
            self.files[file.name] = tree

    def render(self, name: str, dot: Any) -> str:
        return self._run(self.files[name], dot, dot)

    @staticmethod
    def _tokens(text: str) -> list[str]:
        text = re.sub(r"\s*\{\{- ", "{{ ", text)
        text = re.sub(r" -\}\}\s*", " }}", text)
        return [part for part in re.split(r"(\{\{.*?\}\})", text, flags=re.DOTALL) if part]

    def _parsed(self, tokens: list[str]) -> tuple[list[Any], list[str]]:
        """A list of texts and of (word, argument, branches), up to the end that closes it."""
        tree: list[Any] = []
        while tokens:
            token, *tokens = tokens
            if not token.startswith("{{"):
                tree.append(token)
                continue
            code = token[2:-2].strip()
            word, _, rest = code.partition(" ")
            if word in ("end", "else"):
                return tree, [code, *tokens]
            if word in ("if", "range", "define"):
                node, tokens = self._block(word, rest, tokens)
                if word == "define":
                    self.parts[json.loads(rest)] = node[2][0]
                else:
                    tree.append(node)
            elif not word.startswith("/*"):
                tree.append(("show", code, []))
        return tree, []

    def _block(self, word: str, argument: str, tokens: list[str]) -> tuple[Any, list[str]]:
        body, (mark, *rest) = self._parsed(tokens)
        if mark == "end":
            return (word, argument, [body, []]), rest
        if mark == "else":
            other, (_, *rest) = self._parsed(rest)
            return (word, argument, [body, other]), rest
        chained, rest = self._block("if", mark.removeprefix("else if "), rest)
        return (word, argument, [body, [chained]]), rest

    def _run(self, tree: list[Any], dot: Any, root: Any) -> str:
        out = ""
        for node in tree:
            if isinstance(node, str):
                out += node
                continue
            word, argument, branches = node
            value = self._value(argument, dot, root)
            if word == "show":
                out += str(value)
            elif word == "if":
                out += self._run(branches[0] if value else branches[1], dot, root)
            else:
                out += "".join(self._run(branches[0], each, root) for each in value)
        return out

    def _value(self, code: str, dot: Any, root: Any) -> Any:
        first, *filters = code.split(" | ")
        value = self._call(self._words(first), dot, root)
        for each in filters:
            name, *rest = self._words(each)
            value = self._function(name, [*(self._atom(word, dot, root) for word in rest), value])
        return value

    @staticmethod
    def _words(code: str) -> list[str]:
        return re.findall(r"\([^()]*\)|\"[^\"]*\"|\S+", code)

    def _call(self, words: list[str], dot: Any, root: Any) -> Any:
        if len(words) == 1:
            return self._atom(words[0], dot, root)
        arguments = [self._atom(word, dot, root) for word in words[1:]]
        if words[0] == "include":
            return self._run(self.parts[arguments[0]], arguments[1], arguments[1])
        return self._function(words[0], arguments)

    def _atom(self, word: str, dot: Any, root: Any) -> Any:
        if word.startswith("("):
            return self._call(self._words(word[1:-1]), dot, root)
        if word.startswith('"') or word.isdigit():
            return json.loads(word)
        assert word.startswith("."), word
        value = dot
        for name in filter(None, word.split(".")):
            value = value[name]
        return value

    @staticmethod
    def _function(name: str, given: list[Any]) -> Any:
        match name, given:
            case "eq", [one, other]:
                return one == other
            case "not", [value]:
                return not value
            case "and", values:
                return next((value for value in values if not value), values[-1])
            case "quote", [value]:
                return json.dumps(str(value))
            case "toYaml", [value]:
                return yaml.safe_dump(value, default_flow_style=False).rstrip("\n")
            case "nindent", [width, text]:
                return "".join(f"\n{' ' * width}{line}".rstrip(" ") for line in text.splitlines())
        raise AssertionError(f"the chart uses {name}, which this test does not know")


def values(changes: dict[str, Any]) -> dict[str, Any]:
    """values.yaml with changes, merged as Helm merges them."""

    def merged(base: Any, more: Any) -> Any:
        if not isinstance(base, dict) or not isinstance(more, dict):
            return more
        return base | {key: merged(base.get(key), value) for key, value in more.items()}

    return dict(merged(yaml.safe_load((CHART / "values.yaml").read_text()), changes))


def rendered(changes: dict[str, Any]) -> list[dict[str, Any]]:
    """Every object that a release `north` would be."""
    release = {"Name": "north", "Namespace": "default"}
    dot, chart = {"Values": values(changes), "Release": release}, Chart()
    texts = [chart.render(name, dot) for name in chart.files if name.endswith(".yaml")]
    return [each for text in texts for each in yaml.safe_load_all(text) if each]


@pytest.fixture(params=CASES, ids=str)
def case(request: pytest.FixtureRequest) -> dict[str, Any]:
    return CASES[request.param]


def pods(objects: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [each["spec"]["template"]["spec"] for each in objects if "template" in each["spec"]]


def containers(objects: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for pod in pods(objects):
        yield from [*pod["containers"], *pod.get("initContainers", [])]


def test_a_pod_is_restricted(case: dict[str, Any]) -> None:
    (pod,) = pods(rendered(case))
    security = pod["securityContext"]
    assert security["runAsNonRoot"] is True
    assert security["runAsUser"] == USER
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    assert security["fsGroupChangePolicy"] == "OnRootMismatch"
    assert pod["automountServiceAccountToken"] is False
    for container in containers(rendered(case)):
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert "memory" in container["resources"]["limits"]


def test_what_a_pod_runs_are_commands(case: dict[str, Any]) -> None:
    for container in containers(rendered(case)):
        check_any_command(container["command"])
        for kind in ("startupProbe", "livenessProbe", "readinessProbe"):
            if kind in container:
                check_any_command(container[kind]["exec"]["command"])


def test_a_pod_that_serves_is_probed(case: dict[str, Any]) -> None:
    changed = values(case)
    serving = changed["role"] != "simulation" and not changed["maintenance"]
    (pod,) = pods(rendered(case))
    kinds = {kind for kind in pod["containers"][0] if kind.endswith("Probe")}
    assert kinds == ({"startupProbe", "livenessProbe", "readinessProbe"} if serving else set())


def test_a_pod_has_no_secret_in_its_environment(case: dict[str, Any]) -> None:
    for container in containers(rendered(case)):
        assert "envFrom" not in container
        for variable in container.get("env", []):
            assert variable["name"] in {"HTTPS_PROXY", "NO_PROXY", "RAY_ADDRESS", "RUN"}
            assert set(variable) == {"name", "value"}


def test_an_image_of_the_chart_has_a_version(case: dict[str, Any]) -> None:
    for container in containers(rendered(case)):
        assert re.search(rf":{PROJECT['version']}$|@sha256:[0-9a-f]{{64}}$", container["image"])


def of_kind(kind: str, case: str) -> list[dict[str, Any]]:
    return [each for each in rendered(CASES[case]) if each["kind"] == kind]


def test_a_node_speaks_to_one_address_and_nobody_speaks_to_it() -> None:
    for case in ("node", "node with a GPU, a proxy, a secret", "node, maintained"):
        (policy,) = of_kind("NetworkPolicy", case)
        names, out = policy["spec"]["egress"]
        assert set(policy["spec"]["policyTypes"]) == {"Ingress", "Egress"}
        assert policy["spec"]["ingress"] == []
        assert [port["port"] for port in names["ports"]] == [53, 53]
        to = values(CASES[case])["node"]["to"]
        assert out["to"] == [{"ipBlock": {"cidr": to["cidr"]}}]
        assert out["ports"] == [{"protocol": "TCP", "port": to["port"]}]
        assert not of_kind("Service", case)


def test_a_coordinator_is_heard_at_one_port_and_speaks_to_nobody() -> None:
    for case, port in (("coordinator", PORT), ("coordinator of some networks", 443)):
        (policy,), (service,) = of_kind("NetworkPolicy", case), of_kind("Service", case)
        (heard,) = policy["spec"]["ingress"]
        assert heard["ports"] == [{"protocol": "TCP", "port": port}]
        assert policy["spec"]["egress"] == []
        assert [each["port"] for each in service["spec"]["ports"]] == [port]
    assert [each["ipBlock"]["cidr"] for each in heard["from"]] == [
        "198.51.100.0/24",
        "203.0.113.0/24",
    ]


def test_policies_services_and_pods_are_about_the_same(case: dict[str, Any]) -> None:
    objects = rendered(case)
    selectors = [
        found.get("matchLabels", found)
        for each in objects
        for name in ("selector", "podSelector")
        if (found := each["spec"].get(name)) is not None
    ]
    (labels,) = [
        each["spec"]["template"]["metadata"]["labels"]
        for each in objects
        if "template" in each["spec"]
    ]
    assert all(selector == labels for selector in selectors)


def test_a_lost_gpu_is_part_of_being_alive() -> None:
    (pod,) = pods(rendered(CASES["node with a GPU, a proxy, a secret"]))
    (container,) = pod["containers"]
    assert container["livenessProbe"]["exec"]["command"][-2:] == ["live", "gpu"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1


def test_what_a_secret_holds_becomes_files_of_one_user() -> None:
    (pod,) = pods(rendered(CASES["node with a GPU, a proxy, a secret"]))
    (copying,) = pod["initContainers"]
    assert "install -m 0400 /secrets/* /run/cloister/" in copying["command"][-1]
    run = next(volume for volume in pod["volumes"] if volume["name"] == "run")
    assert run["emptyDir"]["medium"] == "Memory"
    mounts = {mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
    assert "secrets" not in mounts
    assert "run" in mounts


def test_the_chart_has_the_version_of_the_project() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["version"] == chart["appVersion"] == PROJECT["version"]
    assert values({})["image"]["tag"] == PROJECT["version"]


def test_values_that_would_do_harm_are_refused() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    judge = Draft7Validator(schema)
    for good in CASES.values():
        judge.validate(values(good))
    for bad in (
        {"image": {"tag": "latest"}},
        {"role": "both"},
        {"node": {"proxy": "http://name:password@proxy.example.org:3128"}},
        {"securityContext": {"runAsUser": 0}},
        {"node": {"to": {"cidr": "everywhere"}}},
    ):
        assert not judge.is_valid(values(bad)), bad


@pytest.mark.skipif(not shutil.which("helm"), reason="there is no helm")
def test_helm_renders_the_same(case: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "values.yaml"
    file.write_text(yaml.safe_dump(case))
    command = ["helm", "template", "north", str(CHART), "--values", str(file)]
    said = subprocess.run(command, capture_output=True, text=True, check=True)
    objects = [each for each in yaml.safe_load_all(said.stdout) if each]
    key = lambda each: (each["kind"], each["metadata"]["name"])  # noqa: E731
    assert sorted(objects, key=key) == sorted(rendered(case), key=key)


# --- The probe ----------------------------------------------------------------------------------


@pytest.fixture
def served() -> Iterator[str]:
    """A health service: `ready` serves, `live` does not; its address."""
    server, servicer = grpc.server(ThreadPoolExecutor(2)), health.HealthServicer()
    servicer.set("ready", health_pb2.HealthCheckResponse.SERVING)
    servicer.set("live", health_pb2.HealthCheckResponse.NOT_SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None).wait()


def test_a_probe_says_yes_for_what_serves_alone(served: str) -> None:
    assert probe.main([served, "ready"]) is None
    assert "does not serve" in (probe.main([served, "live"]) or "")
    assert "NOT_FOUND" in (probe.main([served, "no-such-part"]) or "")
    assert "usage" in (probe.main([served]) or "")
    assert probe.main([served, "ready", "ready"]) is None
    assert "live: does not serve" in (probe.main([served, "ready", "live"]) or "")


def test_a_probe_of_nobody_says_no(served: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "UNAVAILABLE" in (probe.main(["127.0.0.1:1", "ready"]) or "")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")  # it is never sent to a proxy
    assert probe.main([served, "ready"]) is None


def test_a_probe_ends_with_what_an_engine_understands(served: str) -> None:
    for part, code in (("ready", 0), ("live", 1)):
        command = [sys.executable, "-m", "deploy.probe", served, part]
        said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert said.returncode == code, said.stderr


# --- The pages ----------------------------------------------------------------------------------


def test_there_is_a_page_for_each_way() -> None:
    assert [page.stem for page in PAGES] == ["deploy-docker", "deploy-kubernetes", "deploy-systemd"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_on_a_page_is_one(page: Path) -> None:
    """Also those that an engine passes on: `docker compose run --rm node cloister …`."""
    blocks = re.findall(r"```(?:console|sh)\n(.*?)```", page.read_text(), re.DOTALL)
    text = re.sub(r"\\\n\s*", "", "\n".join(blocks))
    lines = re.findall(
        r"(?<![\w/.-])cloister (?:node|coordinator|intake|simulate) [^'|>#\n]*", text
    )
    assert lines
    for line in lines:
        check_command(shlex.split(line))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_file_of_ours_on_a_page_is_there(page: Path) -> None:
    for name in re.findall(r"deploy/[\w./-]+\w", page.read_text()):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_says_what_was_not_run(page: Path) -> None:
    assert "was not run" in page.read_text() or "were not run" in page.read_text()
