"""What the README says stands in the files it says it from."""

import ast
import re
import sys

import pytest
from helpers import ROOT, SCRIPTS, complaints, environment, only_run, run

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
def test_the_files_and_headings_that_it_links_exist(path):
    links = re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", (ROOT / path).read_text())
    assert len(links) >= 3
    for file, anchor in links:
        target = (ROOT / path).parent / file if file else ROOT / path
        assert target.exists()
        if anchor and target.suffix == ".md":
            headings = re.findall(r"^#+ (.*)", target.read_text(), re.M)
            assert anchor in {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_programs_that_it_shows_run(tmp_path):
    curve, load, lake = re.findall(r"```python\n(.*?)```", README, re.S)
    (tmp_path / "mine.py").write_text(lake)
    mine = environment(PYTHONPATH=f"{ROOT}:{tmp_path}")
    for name, env_id in {"ppo_clip": "Pendulum-v1", "reinforce": "mine:Lake-v0"}.items():
        flags = "--env-id", env_id, "--total-timesteps", 2048, "--runs-dir", tmp_path / name
        code, _, err = run(ROOT / f"{name}.py", *flags, env=mine)
        assert (code, complaints(err)) == (0, [])
    folder = only_run(tmp_path / "ppo_clip")
    code, out, err = run("-c", load, folder, env=mine)
    assert (code, err) == (0, "") and re.fullmatch(r"return -\d+\.\d+\n", out)
    code, out, err = run("-c", curve, folder, env=mine)
    assert (code, err) == (0, "") and len(out.splitlines()) == 1


# ── The lecture's identifiers: slides.csv has all of them, in the lecture's words, not a script's ───────────────

TAG = r"\[([A-Z][A-Z0-9]*(?:-[A-Z0-9]+)+)\]"


@pytest.mark.parametrize("row", report.slides(), ids=lambda row: f"{row['file']}:{row['identifiers'].split()[0]}")
def test_every_identifier_of_the_lecture_has_its_line(row):
    source = (ROOT / row["file"]).read_text()
    for name in row["identifiers"].split():
        assert source.splitlines()[report.line_of(name, row["file"]) - 1].lstrip()
        assert row["file"].startswith("tests/") or re.search(rf"^    {name} ", source, re.M), f"{name}: not in the header"


def test_no_script_has_an_identifier_that_the_lecture_has_not_and_none_only_in_a_docstring():
    names = {(row["file"], name) for row in report.slides() for name in row["identifiers"].split()}
    for script in SCRIPTS:
        header = ast.get_docstring(script.syntax, clean=False)
        for tag in re.findall(TAG, script.source.replace(header, "")):
            assert (script.path.name, tag) in names
        for node in ast.walk(script.syntax):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                assert not re.search(TAG, ast.get_docstring(node) or ""), node.name
