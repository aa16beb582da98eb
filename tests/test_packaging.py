"""What stands twice in files that are no code says the same."""

import re
from pathlib import Path

import yaml

import ssd
from ssd.boxes import LAYOUTS
from ssd.cli import VERBS

ROOT = Path(__file__).parents[1]
PYPROJECT = (ROOT / "pyproject.toml").read_text()


def test_the_oldest_versions_are_those_that_are_allowed():
    allowed = dict(re.findall(r'^    "([\w.-]+)>=([\w.]+)",$', PYPROJECT, re.MULTILINE))
    lines = (ROOT / ".ci" / "oldest.txt").read_text().splitlines()
    tested = dict(line.removesuffix(".*").split("==") for line in lines if not line.startswith("#"))
    assert tested == allowed


def test_the_citation_is_of_this_version():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == ssd.__version__


def test_the_workflows_run_what_is_there():
    oldest = re.search(r'requires-python = ">=([\d.]+)"', PYPROJECT)[1]
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    rows = workflow["jobs"]["run"]["strategy"]["matrix"]["include"]
    assert rows[0]["python"] == oldest
    for row in rows:
        assert (ROOT / row["constraints"]).exists()
        assert f"Programming Language :: Python :: {row['python']}" in PYPROJECT
    assert yaml.safe_load((ROOT / ".github" / "workflows" / "publish.yml").read_text())
    assert yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())


def test_the_recipes_name_files_and_tables_that_are_there():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    for name in re.findall(r"`((?:ssd|tests)/[\w/]+(?:\.py)?)/?`", text):
        assert (ROOT / name).exists(), name
    for verb, option in re.findall(r"`ssd (\w+) --(\w+)", text):
        assert verb in VERBS, (verb, option)
    assert "300" in LAYOUTS
