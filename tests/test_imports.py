"""Imports point downwards only."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FORBIDDEN = {
    "schemas": {"vmt_core", "pipelines", "jobs", "ray", "torch", "fsspec", "s3fs"},
    "vmt_core": {"pipelines", "jobs", "ray", "fsspec", "s3fs", "argparse"},
    "pipelines": {"jobs", "argparse"},
}


def imported(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_a_folder_knows_only_what_is_below_it(folder):
    files = list((ROOT / folder).rglob("*.py"))
    assert files
    wrong = {str(file): found for file in files if (found := FORBIDDEN[folder] & set(imported(file)))}
    assert not wrong


def test_the_core_runs_without_ray():
    program = "import sys, vmt_core; sys.exit('ray' in sys.modules or 's3fs' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0
