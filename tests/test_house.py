"""Tests that hold the house itself: who imports whom, what the wheel carries, what the docs promise."""

from __future__ import annotations

import ast
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {
    "resight": ROOT / "src/resight",
    "resight.cycle": ROOT / "src/resight/cycle",
    "resight.training": ROOT / "training",
    "resight.exporters": ROOT / "exporters",
    "resight.service": ROOT / "service",
    "resight.v1": ROOT / "proto/resight/v1",
}
OURS = sorted({path for name, folder in FOLDERS.items() if name != "resight.v1" for path in folder.rglob("*.py")})
TORCH_ROOMS = {"backbone", "model", "weights", "checkpoint"}
# The command line and the demo start the other rooms, inside their functions; nobody imports them.
ROADS = {
    "cli",
    "cli_bundle",
    "cli_bundle_show",
    "cli_collect",
    "cli_connect",
    "cli_cycle",
    "cli_cycle_demo",
    "cli_demo",
    "cli_doctor",
    "cli_evaluate",
    "cli_export",
    "cli_gallery",
    "cli_ingest",
    "cli_ingest_call",
    "cli_ingest_footage",
    "cli_json",
    "cli_judge",
    "cli_judge_table",
    "cli_lessons",
    "cli_models",
    "cli_search",
    "cli_serve",
    "cli_snapshot",
    "cli_token",
    "cli_train",
    "cycle_demo",
    "demo",
    "export_site",
    "nights_road",
    "served",
}
HEAVY = ("torch", "torchvision", "faiss", "onnx", "onnxruntime", "sklearn", "scipy")


def imports(path: Path, *, top_level: bool = False) -> set[str]:
    """Modules a file imports; `top_level` leaves out those inside functions and under TYPE_CHECKING."""
    tree = ast.parse(path.read_text())
    nodes: list[ast.AST] = list(tree.body) if top_level else list(ast.walk(tree))
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def within(modules: set[str], *packages: str) -> set[str]:
    return {module for module in modules if any(module == name or module.startswith(name + ".") for name in packages)}


@pytest.mark.parametrize(
    "folder, forbidden",
    [
        ("training", ("resight.exporters", "resight.service", "resight.client", "grpc")),
        ("exporters", ("resight.training", "resight.service", "resight.client", "grpc")),
        ("service", ("resight.training", "resight.exporters", "resight.model", "resight.weights", "resight.checkpoint",
                     "resight.backbone", "torch", "torchvision")),
    ],
)  # fmt: skip
def test_working_folders_never_import_one_another(folder: str, forbidden: tuple[str, ...]) -> None:
    for path in sorted((ROOT / folder).glob("*.py")):
        assert not within(imports(path), *forbidden), path


def test_the_cycle_meets_the_other_rooms_in_files_commands_and_calls() -> None:
    for path in sorted(FOLDERS["resight.cycle"].glob("*.py")):
        found = imports(path)
        assert not within(found, "resight.training", "resight.exporters", "resight.service", *HEAVY), path


def test_torch_stays_in_its_rooms() -> None:
    for path in sorted(FOLDERS["resight"].glob("*.py")):
        found = within(imports(path), "torch", "torchvision", "safetensors")
        assert not found or path.stem in TORCH_ROOMS, (path, found)


def test_what_all_rooms_share_imports_none_of_them() -> None:
    for path in sorted(FOLDERS["resight"].glob("*.py")):
        if path.stem not in ROADS:
            assert not within(imports(path), "resight.training", "resight.exporters", "resight.service"), path


def test_the_command_line_imports_heavy_things_inside_its_functions() -> None:
    for name in ROADS:
        path = FOLDERS["resight"] / f"{name}.py"
        late = ("resight.training", "resight.exporters", "resight.service", "resight.model", "resight.weights", *HEAVY)
        assert not within(imports(path, top_level=True), *late), path


@pytest.mark.parametrize("path", OURS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_bare_folder_import_no_hard_device_no_long_file_or_function(path: Path) -> None:
    assert not within(imports(path), "training", "exporters", "service", "proto")
    text = path.read_text()
    assert ".cuda(" not in text
    assert len(text.splitlines()) <= 300
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            documented = isinstance(node.body[0], ast.Expr) and isinstance(node.body[0].value, ast.Constant)
            doc = (node.body[0].end_lineno or 0) - node.body[0].lineno + 1 if documented else 0
            assert (node.end_lineno or 0) - node.lineno + 1 - doc <= 60, node.name


@pytest.mark.parametrize(
    "module, absent",
    [
        ("resight", HEAVY),
        ("resight.client", (*HEAVY, "resight.service", "resight.training")),
        ("resight.cli", (*HEAVY, "resight.service", "resight.training")),
        ("resight.service.app", ("torch", "torchvision", "sklearn", "resight.training", "resight.exporters")),
    ],
)
def test_importing_loads_nothing_it_does_not_need(module: str, absent: tuple[str, ...]) -> None:
    code = f"import sys, {module}; print([name for name in {absent!r} if name in sys.modules])"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert answer.stdout.strip() == "[]"


def test_the_public_names_are_these() -> None:
    import resight

    names = ["ImageSpec", "Manifest", "ReIDError", "__version__", "cosine_similarity", "open_bundle"]
    assert sorted(resight.__all__) == sorted(names)


def test_the_drawn_error_tree_is_the_real_one() -> None:
    from resight import errors

    assert errors.__doc__
    drawn = re.findall(r"^ *[│├└─ ]*(\w+Error)\b", errors.__doc__, re.MULTILINE)
    real = [name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)]
    assert sorted(drawn) == sorted(real)


def test_the_wheel_carries_the_tree(tmp_path: Path) -> None:
    clean = tmp_path / "tree"  # in the checkout setuptools would pack what an earlier build left in build/
    shutil.copytree(ROOT, clean, ignore=shutil.ignore_patterns(".*", "build", "*demo", "*.egg-info", "__pycache__"))
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--disable-pip-version-check",
        "-w",
        tmp_path,
        clean,
    ]
    subprocess.run(command, check=True, capture_output=True)
    [wheel] = tmp_path.glob("resight-*.whl")
    carried = {name for name in zipfile.ZipFile(wheel).namelist() if not name.split("/")[0].endswith(".dist-info")}
    expected = set()
    for package, folder in FOLDERS.items():
        for path in folder.rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".pyc":
                expected.add(f"{package.replace('.', '/')}/{path.relative_to(folder).as_posix()}")
    assert carried == expected


def test_both_lists_of_packages_agree() -> None:
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert set(tools["packages"]) == set(tools["package-dir"]) == set(FOLDERS)


def shell_lines(path: Path) -> list[str]:
    blocks = re.findall(r"```(?:bash|sh|console)\n(.*?)```", path.read_text(), re.DOTALL)
    return [line.strip().removeprefix("$ ") for block in blocks for line in block.splitlines() if line.strip()]


def test_every_make_target_in_the_docs_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    documents = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
    for path in documents:
        used = {line.split()[1] for line in shell_lines(path) if line.startswith("make ")}
        used |= set(re.findall(r"`make ([a-z-]+)", path.read_text()))
        assert used <= targets, path


def test_every_resight_line_in_the_docs_is_a_command_with_such_options() -> None:
    from typer.main import get_command

    from resight.cli import app

    documents = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    lines = [line for path in documents for line in shell_lines(path) if line.startswith("resight ")]
    assert lines
    for line in lines:
        command, words = get_command(app), shlex.split(line, comments=True)[1:]
        while words and hasattr(command, "commands"):
            assert words[0] in command.commands, line
            command = command.commands[words.pop(0)]
        known = {name for option in command.params for name in (*option.opts, *option.secondary_opts)}
        assert {word for word in words if word.startswith("--")} <= known, line


def test_every_command_is_in_the_readme() -> None:
    from typer.main import get_command

    from resight.cli import app

    commands = get_command(app).commands  # type: ignore[attr-defined]
    named = set(re.findall(r"resight (\w+)", (ROOT / "README.md").read_text()))
    assert {name for name, command in commands.items() if not command.hidden} <= named


def test_every_recipe_is_in_the_readme() -> None:
    from resight.training.recipe import recipe_names

    text = (ROOT / "README.md").read_text()
    assert [name for name in recipe_names() if f"`{name}`" not in text] == []


def test_containers_run_as_nobody_in_particular_and_the_service_has_no_torch() -> None:
    stages = re.split(r"^FROM ", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)[1:]
    named = {re.search(r"AS (\S+)", stage)[1]: stage for stage in stages}  # type: ignore[index]
    assert set(named) == {"wheel", "service", "gpu-service", "training"}
    for name, stage in named.items():
        assert re.match(r"python:\d+\.\d+-slim-\w+ ", stage), name
        assert "ADD " not in stage and ":latest" not in stage
        if name != "wheel":
            assert "\nUSER 10001\n" in stage and "HEALTHCHECK" in stage
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for stage, extra in (("service", "cpu"), ("gpu-service", "gpu")):
        assert f"[{extra}]" in named[stage]
        assert not any(requirement.startswith("torch") for requirement in extras[extra] + extras["service"])


def test_the_dockerfile_passes_hadolint() -> None:
    linted = subprocess.run(
        [Path(sys.executable).parent / "hadolint", ROOT / "Dockerfile"], capture_output=True, text=True
    )
    assert linted.returncode == 0, linted.stdout


def test_compose_publishes_on_loopback_only_and_takes_rights_away() -> None:
    services = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    targets = set(re.findall(r"AS (\S+)", (ROOT / "Dockerfile").read_text()))
    for service in services.values():
        assert service["build"]["target"] in targets
        assert service["cap_drop"] == ["ALL"]
        assert all(str(port).startswith("127.0.0.1:") for port in service.get("ports", []))
    assert services["service"]["read_only"] is True


def test_extras_that_exclude_each_other_are_both_there() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {"cpu", "gpu", "train", "export", "milvus", "cycle", "dev"} <= set(extras)
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    locked = {line.split("==")[0].lower().replace("_", "-") for line in lines if "==" in line}
    for extra in ("cpu", "train", "export", "cycle", "dev", "service"):
        for requirement in extras[extra]:
            name = re.split(r"[>=<\[]", requirement)[0].lower()
            assert name == "resight" or name in locked, requirement
