"""Trains every cell of grid.csv, a process with one thread each, on all cores; goes on where it was stopped.

    pip install -r tests/benchmark/requirements.txt
    python tests/benchmark/returns.py --work /tmp/grid                      # writes results/<name>/<env>/<seed>.csv
    python tests/benchmark/returns.py --work /tmp/grid --ray 10.0.0.1:6379  # the same on all machines of a Ray cluster

A cell is a name (of its row in grid.csv), an environment and a seed. Its result has a row for every 10,000 steps of
training, under one line of comment with the command, commit and versions, the mean return of 100 episodes (of an Atari
game 10) of the trained agent without exploration (`--evaluate`), the median of each loss, and what else the tables
need. What a cell was doing when it was stopped, and the log of one that failed, stay in --work, where the same command
at the same commit goes on with it. A run that diverges,
as its script says, counts with the episodes until then and its last checkpoint. A run that was stopped and resumed has
begun new episodes there, so its numbers are not those that its command alone gives: its result says "resumed".

On a Ray cluster, --work is a folder of each machine, or better one that all of them share: a cell whose machine is lost
is begun anew where another finds nothing of it, and gone on with otherwise. Only this process writes results.
"""

import argparse
import csv
import fcntl
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import IO, NamedTuple

import numpy as np
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "gymnasium", "mujoco", "ale-py", "numpy")
ROW = 10_000  # steps
RETRIES = 5  # of a cell whose Ray worker dies
ENDS = "go beyond step", "n't finite"  # of a run's error: stopped between training and evaluation; diverged


class Cell(NamedTuple):
    name: str
    script: str
    env_id: str
    seed: str
    flags: list[str]

    @property
    def path(self) -> Path:
        return Path(self.name, self.env_id.replace("/", "-"), self.seed)


def read_grid(path: Path) -> list[Cell]:
    return [
        Cell(row["name"], row["script"], env_id, seed, shlex.split(row["flags"]))
        for row in csv.DictReader(path.open())
        for seed in row["seeds"].split()
        for env_id in row["env_ids"].split()
    ]


def head() -> str:
    """The commit that the files are of, and whether others than results have been changed since."""
    git = partial(subprocess.check_output, cwd=ROOT, text=True)
    others = ".", ":!tests/benchmark/results"
    changed = git(["git", "status", "--porcelain", "--untracked-files=no", "--", *others])
    return git(["git", "rev-parse", "--short", "HEAD"]).strip() + ("-dirty" if changed else "")


def describe(command: str, commit: str, **more: object) -> str:
    """The first line of a file of results: what made it."""
    versions = {"python": platform.python_version()} | {package: version(package) for package in PACKAGES}
    return "# " + json.dumps({"command": command, "commit": commit, "versions": versions, **more}) + "\n"


def train(command: list[str], root: Path, lock: IO[str], log: IO[str]) -> None:
    environ = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=root, env=environ, stdout=log, stderr=log, pass_fds=[lock.fileno()])
    told = Path(log.name).read_text()
    if not any(end in told for end in ENDS):
        done.check_returncode()


def medians(rows: list[dict[str, str]]) -> dict[str, float]:
    """Of each loss over the iterations"""
    found = {}
    for name in rows[0]:
        values = [float(row[name]) for row in rows if name.startswith("losses/") and row[name]]
        if values:
            found[name] = float(f"{median(values):.3g}")
    return found


def summary(script: str, env_id: str, steps: np.ndarray, returns: np.ndarray, lengths: np.ndarray) -> tuple[dict, str]:
    """Of all episodes, at whose ends the steps are counted: what the tables need, and the rows."""
    means = np.convolve(returns, np.ones(100) / 100)[99 : len(returns)]  # of every 100 in a row
    numbers = {"episodes": len(returns), "mean": returns.mean(), "last_100": returns[-100:].mean()}
    if env_id == "CartPole-v1" and (means >= 475).any():
        solved = 99 + int(np.argmax(means >= 475))
        numbers |= {"solved": int(steps[solved]), "afterwards": returns[solved + 1 :].mean()}
    if "ddpg" in script:  # whose best moment is looked for
        times, tens = np.arange(5000, steps[-1] + 1, 5000), np.convolve(returns, np.ones(10) / 10, "valid")
        numbers["latest_10"] = [round(x, 2) for x in np.interp(times, steps[9:], tens, left=np.nan).tolist()]
    rows = ["global_step,episodic_return,episodic_length,episodes,latest_100"]
    for step in range(ROW, int(steps[-1]) + ROW, ROW):
        here, known = (steps > step - ROW) & (steps <= step), int((steps <= step).sum())
        if here.any():
            latest = f"{means[known - 100]:.6g}" if known >= 100 else ""
            rows.append(f"{step},{returns[here].mean():.6g},{lengths[here].mean():.6g},{here.sum()},{latest}")
    return numbers, "\n".join([*rows, ""])


def result(trained: Path, cell: Cell, command: list[str], root: Path, commit: str, log: IO[str]) -> str:
    """Evaluates the run in a folder, and tells its results."""
    with (trained / "metrics.csv").open() as source:
        rows = list(csv.DictReader(source))
    number = "10" if cell.env_id.startswith("ALE/") else "100"  # a game takes up to half a minute
    evaluate = [sys.executable, command[1], "--evaluate", str(trained), "--eval-episodes", number]
    lines = subprocess.run(evaluate, cwd=root, stdout=subprocess.PIPE, stderr=log, text=True, check=True).stdout
    evaluated = [float(line.split()[3].strip(",")) for line in lines.splitlines() if line.startswith("episode")]
    speeds = [int(row["charts/SPS"]) for row in rows if row["charts/SPS"]]
    resumed = json.loads((trained / "config.json").read_text())["args"]["resume"] is not None
    last = {"resumed": resumed, "steps": int(rows[-1]["global_step"]), "steps_per_second": speeds[-1],
            "evaluated": round(sum(evaluated) / len(evaluated), 1), "medians": medians(rows)}
    columns = "global_step", "charts/episodic_return", "charts/episodic_length"
    episodes = np.array([[float(row[name]) for name in columns] for row in rows if row["charts/episodic_return"]])
    numbers, text = summary(cell.script, cell.env_id, *episodes.T)
    return describe(" ".join(command), commit, **last, **numbers) + text


def run(cell: Cell, root: Path, work: Path, commit: str) -> tuple[str | None, str]:
    """Trains and evaluates a cell, or goes on with it; returns its result, None if it failed, and its log."""
    folder = work / cell.path
    folder.mkdir(parents=True, exist_ok=True)
    command = ["python", f"{cell.script}.py", "--env-id", cell.env_id, "--seed", cell.seed, *cell.flags]
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # training holds it too: what is left of a killed worker ends before we go on
        maker, begun = " ".join(["commit", commit, *command]), folder / "maker"
        if begun.exists() and begun.read_text() != maker:
            return None, f"{folder} was begun by {begun.read_text()}: remove it, or go on from there\n"
        begun.write_text(maker)
        where = ["--runs-dir", str(folder), "--no-cuda"]
        if checkpoints := sorted(folder.glob("*/checkpoint.pt")):
            where = ["--resume", str(checkpoints[-1])]
        with (folder / "log").open("w") as log:
            try:
                train([sys.executable, *command[1:], *where], root, lock, log)
                trained = max(folder.glob("*/metrics.csv")).parent
                return result(trained, cell, command, root, commit, log), ""
            except subprocess.CalledProcessError as error:
                log.flush()
                return None, f"{(folder / 'log').read_text()}{error}\n"


def on_this_machine(cells: list[Cell], jobs: int, *rest: object) -> Iterator[tuple[Cell, Callable]]:
    """(cell, what returns its outcome) as they finish"""
    with ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(run, cell, ROOT, *rest): cell for cell in cells}
        for future in as_completed(futures):
            yield futures[future], future.result


def on_a_cluster(cells: list[Cell], address: str, jobs: int, *rest: object) -> Iterator[tuple[Cell, Callable]]:
    """The same; the address "local" makes a Ray of its own on this machine, with as many workers as jobs."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    files = {"working_dir": str(ROOT), "excludes": [".git", "tests/benchmark/results", "tests/benchmark/figures", "runs"]}
    ray.init(address, num_cpus=jobs if address == "local" else None, runtime_env=files, log_to_driver=False)
    task = ray.remote(num_cpus=1, max_retries=RETRIES)(run)
    running = {task.remote(cell, Path(), *rest): cell for cell in cells}  # Ray's copy of the files is the working folder
    while running:
        (done,), _ = ray.wait(list(running))
        yield running.pop(done), partial(ray.get, done)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--grid", type=Path, default=Path(__file__).parent / "grid.csv", help="table of cells")
    parser.add_argument("--work", type=Path, required=True, help="folder for unfinished runs and logs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the results")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="cells at a time, on this machine")
    parser.add_argument("--ray", metavar="ADDRESS", help="run on the Ray cluster there, or with a Ray of our own: local")
    args = parser.parse_args()
    work, results = args.work.resolve(), args.results.resolve()
    missing = [cell for cell in read_grid(args.grid) if not (results / cell.path).with_suffix(".csv").exists()]
    rest = args.jobs, work, head()
    outcomes = on_a_cluster(missing, args.ray, *rest) if args.ray else on_this_machine(missing, *rest)
    for cell, outcome in tqdm(outcomes, total=len(missing), unit=" cells"):
        try:
            text, log = outcome()
        except Exception as error:
            text, log = None, f"{error!r}\n"
        path = (results / cell.path).with_suffix(".csv") if text else work / cell.path / "log"
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".partial")
        unfinished.write_text(text or log)
        unfinished.replace(path)
        if not text:
            tqdm.write(f"{cell.name} {cell.env_id} {cell.seed} failed: see {path}")


if __name__ == "__main__":
    main()
