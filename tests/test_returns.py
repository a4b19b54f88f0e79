"""The grid of benchmarks: each cell once, whatever happens to what trains it."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import ROOT, environment, finish, iterations, only_run, wait_for
from helpers import start as begin

sys.path.insert(0, str(ROOT / "tests" / "benchmark"))
import returns  # noqa: E402

GRID = """name,script,env_ids,seeds,flags
short,reinforce,CartPole-v1,1,--total-timesteps 3000
long,ppo_clip,envs:Held-v0,1,--total-timesteps 10240 --update-epochs 1
wrong,reinforce,CartPole-v1,1,--gamma -2
"""
CELLS = "short/CartPole-v1/1", "long/envs:Held-v0/1"


def start(folder: Path, *flags: str) -> subprocess.Popen:
    folder.mkdir(exist_ok=True)
    (folder / "grid.csv").write_text(GRID)
    command = [sys.executable, ROOT / "tests/benchmark/returns.py", "--grid", folder / "grid.csv", "--jobs", "2"]
    where = "--work", folder / "work", "--results", folder / "results"
    log, released = (folder / "log").open("w"), environment(RELEASE=str(folder / "release"))
    return subprocess.Popen([*command, *where, *flags], stdout=log, stderr=log, start_new_session=True, env=released)


def results(folder: Path) -> dict[str, tuple[dict, str]]:
    """cell → what made its result, but for the speed, and its rows"""
    found = {}
    for path in (folder / "results").rglob("*.csv"):
        about, _, rows = path.read_text().partition("\n")
        about = json.loads(about.removeprefix("# "))
        assert about.pop("steps_per_second") > 0
        found[str(path.relative_to(folder / "results").with_suffix(""))] = about, rows
    return found


def assert_same(found: dict, expected: dict) -> None:
    """A run that wasn't resumed gives the same; one that was, which is timing's choice, goes on to the same step."""
    assert found.keys() == expected.keys()
    for cell, (about, rows) in found.items():
        assert about["steps"] == expected[cell][0]["steps"] and about["episodes"] > 10
        assert about["resumed"] or (about, rows) == expected[cell]


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The results of a grid that ran undisturbed on this machine."""
    folder = tmp_path_factory.mktemp("local")
    (folder / "release").touch()
    assert start(folder).wait(300) == 0, (folder / "log").read_text()
    return folder


def test_every_cell_has_a_result_and_one_that_failed_a_log(expected):
    assert results(expected).keys() == set(CELLS)
    for about, rows in results(expected).values():
        assert about["steps"] >= 2048 and not about["resumed"] and "evaluated" in about and about["episodes"] > 10
        assert sum(int(row.split(",")[3]) for row in rows.splitlines()[1:]) == about["episodes"]
        assert 0 < about["medians"]["losses/entropy"]
    assert "--gamma can't be -2" in (expected / "work/wrong/CartPole-v1/1/log").read_text()
    assert "wrong CartPole-v1 1 failed" in (expected / "log").read_text()


def test_the_medians_are_of_each_loss_that_was_logged():
    rows = [{"global_step": "1", "losses/kl": kl, "losses/beta": ""} for kl in ("1", "", "9", "2")]
    assert returns.medians(rows) == {"losses/kl": 2.0}


def processes(text: str) -> list[int]:
    """Those whose command line has it"""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found += [int(path.parent.name)] * (text in path.read_bytes().replace(b"\0", b" ").decode())
        except OSError:  # it has ended
            pass
    return found


def wait_for_training(folder: Path) -> None:
    deadline = time.time() + 120
    while not list((folder / "work/long").rglob("metrics.csv")):
        assert time.time() < deadline, (folder / "log").read_text()
        time.sleep(0.1)


@pytest.mark.parametrize("kill", [os.killpg, os.kill], ids=["with_what_it_trains", "alone"])
def test_a_grid_that_is_stopped_goes_on_to_its_end(kill, expected, tmp_path):
    stopped = start(tmp_path)
    wait_for_training(tmp_path)
    kill(stopped.pid, signal.SIGKILL)
    stopped.wait()
    (tmp_path / "release").touch()
    assert results(tmp_path).keys() < set(CELLS)
    assert start(tmp_path).wait(300) == 0
    assert_same(results(tmp_path), results(expected))
    if kill is os.kill:  # what was left training was waited for, not begun a second time beside it
        assert all(len(list((tmp_path / "work" / cell).glob("*/metrics.csv"))) == 1 for cell in CELLS)


def test_a_cell_goes_on_with_what_its_command_began_and_with_nothing_else(tmp_path):
    cell = returns.Cell("part", "ppo_clip", "CartPole-v1", "1", ["--total-timesteps", "20480", "--update-epochs", "1"])
    folder = tmp_path / cell.path
    training = begin(ROOT / "ppo_clip.py", "--env-id", cell.env_id, *cell.flags, "--runs-dir", folder)
    wait_for(lambda: list(folder.glob("*/metrics.csv")) and iterations(only_run(folder)), training)
    training.terminate()
    assert finish(training)[0] == 143
    text, log = returns.run(cell, ROOT, tmp_path, "1234567")
    assert text, log
    about = json.loads(text.splitlines()[0].removeprefix("# "))
    assert (about["steps"], about["resumed"]) == (20480, True)
    for other, commit in (cell, "7654321"), (cell._replace(flags=[*cell.flags, "--gamma", "0.9"]), "1234567"):
        text, log = returns.run(other, ROOT, tmp_path, commit)
        assert text is None and "commit 1234567 python ppo_clip.py" in log


@pytest.mark.parametrize("script, flags", [("sb3", ["--algorithm", "ddpg"]), ("random_policy", [])])
def test_a_peer_is_a_cell_like_any_other(script, flags, tmp_path):
    cell = returns.Cell("peer", f"tests/benchmark/{script}", "Pendulum-v1", "1", [*flags, "--total-timesteps", "3000"])
    text, log = returns.run(cell, ROOT, tmp_path, "")
    assert text, log
    about = json.loads(text.splitlines()[0].removeprefix("# "))
    assert (about["steps"], about["episodes"], about["resumed"]) == (3000, 15, False) and "evaluated" in about


def test_a_ray_worker_that_is_killed_costs_no_cell_and_none_counts_twice(expected, tmp_path):
    grid = start(tmp_path, "--ray", "local")
    wait_for_training(tmp_path)
    (training, *_) = processes(f"--runs-dir {tmp_path}/work/long")
    worker = int(Path(f"/proc/{training}/stat").read_text().rpartition(")")[2].split()[1])
    assert "ray::run" in Path(f"/proc/{worker}/cmdline").read_text()
    os.kill(worker, signal.SIGKILL)
    (tmp_path / "release").touch()
    assert grid.wait(300) == 0, (tmp_path / "log").read_text()
    assert_same(results(tmp_path), results(expected))
    assert "--gamma can't be -2" in (tmp_path / "work/wrong/CartPole-v1/1/log").read_text()


@pytest.mark.parametrize("text, counts", [
    ("error: step 2048 has numbers that aren't finite: lower learning rates, or mend the environment", True),
    ("error: step 20 has a gradient that isn't finite: lower learning rates, or mend the environment", True),
    ("error: --total-timesteps: go beyond step 2048", True),
    ("ValueError: x", False),
])
def test_a_run_that_diverged_or_is_complete_counts_and_one_that_failed_does_not(text, counts, tmp_path):
    command = [sys.executable, "-c", f"import sys; print({text!r}, file=sys.stderr); sys.exit(2)"]
    with (tmp_path / "lock").open("w") as lock, (tmp_path / "log").open("w") as log:
        with contextlib.nullcontext() if counts else pytest.raises(subprocess.CalledProcessError):
            returns.train(command, tmp_path, lock, log)
    assert (tmp_path / "log").read_text().strip() == text
