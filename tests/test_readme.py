"""What the README says stands in the files it says it from."""

import re
import sys

import pytest
from helpers import ROOT, SCRIPTS

sys.path.insert(0, str(ROOT / "tests" / "benchmark"))
import report  # noqa: E402

README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("path", report.TABLES)
def test_the_tables_are_what_the_committed_results_give(path):
    assert report.filled(path) == (ROOT / path).read_text()


def test_every_result_names_its_command_commit_and_versions():
    paths = sorted(report.RESULTS.rglob("*.csv"))
    assert paths
    for path in paths:
        about, (_, _, *rows) = report.about(path), path.read_text().splitlines()
        assert about["command"].startswith("python ") and re.fullmatch(r"[0-9a-f]{7,}", about["commit"])
        assert {"python", "torch", "gymnasium", "mujoco"} <= about["versions"].keys() and rows


@pytest.mark.parametrize("path", report.TABLES)
def test_the_files_that_it_links_exist(path):
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", (ROOT / path).read_text())
    assert len(links) >= 3 and all((ROOT / path).parent.joinpath(link).exists() for link in links)


def test_the_slide_table_names_functions_and_identifiers_that_the_scripts_have():
    rows = re.findall(r"^\|.*\| (`\w+\.py`[^|]*)\|(.*)\|$", README, re.M)
    assert len(rows) >= 3 * len(SCRIPTS)
    for scripts, functions in rows:
        for script in re.findall(r"(\w+)\.py", scripts):
            source = (ROOT / f"{script}.py").read_text()
            assert all(re.search(rf"(def|class) {name}[(:]", source) for name in re.findall(r"`(\w+)`", functions))


def test_every_identifier_of_every_script_is_in_the_slide_table():
    for script in SCRIPTS:
        for tag in set(re.findall(r"\[([A-Z][A-Z0-9]*(?:-[A-Z0-9]+)+)\]", script.source)):
            family, _, number = tag.rpartition("-")
            ranges = re.findall(rf"`{family}-(\d+)` … `{family}-(\d+)`", README)
            in_range = number.isdigit() and any(int(a) <= int(number) <= int(b) for a, b in ranges)
            assert f"`{tag}`" in README or in_range, f"{script.name}: {tag}"
