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


PROGRAM = """
import importlib, pkgutil, sys
sys.modules.update(dict.fromkeys(["ray", "s3fs", "pipelines", "jobs"]))  # None: importing them fails
import vmt_core
for name in vmt_core.__all__:
    getattr(vmt_core, name)
for module in pkgutil.walk_packages(vmt_core.__path__, "vmt_core."):
    importlib.import_module(module.name)
"""


def test_every_module_of_the_core_runs_without_ray():
    subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, check=True)


def test_importing_the_core_alone_is_quick_to_do():
    program = "import sys, vmt_core; sys.exit(bool({'ray', 'diffusers', 'torch'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
