"""The tests named in the checklist exist, and its statements about the code as a whole hold."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("src/resight", "service", "training", "exporters")
RUNS_TEXT = {"eval", "exec", "compile", "__import__"}


def test_every_test_named_in_the_checklist_exists() -> None:
    text = (ROOT / "docs" / "checklist.md").read_text()
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", text)
    assert len(named) > 60
    for file, name in named:
        tree = ast.parse((ROOT / file).read_text())
        tests = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
        assert not name or name in tests, f"{file}::{name}"


def test_every_line_of_the_checklist_names_a_test_or_says_why_not() -> None:
    text = (ROOT / "docs" / "checklist.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith(("| line", "| ---"))]
    assert len(rows) > 30
    for row in rows:
        proof = row.rsplit(" | ", 1)[1]
        assert "tests/" in proof or re.match(r"no(ne| test)\b", proof), row


def test_nothing_evaluates_text_as_code() -> None:
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).glob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                    assert node.func.id not in RUNS_TEXT, (path, node.lineno)
                if isinstance(node, ast.Import | ast.ImportFrom):
                    modules = {alias.name for alias in node.names} | {getattr(node, "module", "")}
                    assert not modules & {"pickle", "marshal", "shelve", "dill"}, (path, node.lineno)
