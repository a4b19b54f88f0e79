"""Trains every cell of grid.csv, a process with one thread each, on all cores; goes on where it was stopped.

    pip install -r tests/benchmark/requirements.txt
    python tests/benchmark/returns.py --work /tmp/grid      # writes tests/benchmark/results/<name>/<env>/<seed>.csv

A cell is a name (of its row in grid.csv), an environment and a seed. Its result holds the return and length of every
episode in training, under one line of comment with the command, commit and versions, and the mean return of 100
episodes of the trained agent without exploration (`--evaluate`). What a cell was doing when it was
stopped, and the log of one that failed, stay in --work. A row with minutes is not trained to the end of its schedule:
its runs are interrupted (Ctrl-C) after as many.
"""

import argparse
import csv
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib.metadata import version
from pathlib import Path
from typing import IO

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "gymnasium", "mujoco", "numpy")


def describe(command: str, **more: object) -> str:
    """The first line of a file of results: what made it."""
    commit = subprocess.check_output(["git", "describe", "--always", "--dirty"], cwd=ROOT, text=True).strip()
    versions = {"python": platform.python_version()} | {package: version(package) for package in PACKAGES}
    return "# " + json.dumps({"command": command, "commit": commit, "versions": versions, **more}) + "\n"


def cells(grid: Path) -> list[tuple[str, str, str, str, list[str], float | None]]:
    """(name, script, environment, seed, flags, minutes) of every cell"""
    rows = csv.DictReader(grid.open())
    return [
        (row["name"], row["script"], env_id, seed, shlex.split(row["flags"]), float(row["minutes"] or 0) or None)
        for row in rows
        for seed in row["seeds"].split()
        for env_id in row["env_ids"].split()
    ]


def result_of(name: str, env_id: str, seed: str) -> Path:
    return RESULTS / name / env_id.replace("/", "-") / f"{seed}.csv"


def train(command: list[str], minutes: float | None, log: IO[str]) -> None:
    environ = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environ, stdout=log, stderr=log)
    try:
        status = process.wait(minutes and 60 * minutes)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        status = 0 if process.wait() == 130 else process.returncode
    if status:
        raise subprocess.CalledProcessError(status, command)


def publish(trained: Path, command: list[str], result: Path) -> None:
    """Evaluates the run in a folder, and writes its file of results."""
    with (trained / "metrics.csv").open() as source:
        rows = list(csv.DictReader(source))
    evaluate = [sys.executable, command[1], "--evaluate", str(trained), "--eval-episodes", "100"]
    lines = subprocess.run(evaluate, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout
    evaluated = [float(line.split()[3].strip(",")) for line in lines.splitlines() if line.startswith("episode")]
    speeds = [int(row["charts/SPS"]) for row in rows if row["charts/SPS"]]
    last = {"steps": int(rows[-1]["global_step"]), "steps_per_second": speeds[-1],
            "evaluated": round(sum(evaluated) / len(evaluated), 1)}
    result.parent.mkdir(parents=True, exist_ok=True)
    partial = result.with_suffix(".partial")
    with partial.open("w", newline="") as file:
        file.write(describe(" ".join(command), **last))
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("global_step", "episodic_return", "episodic_length"))
        for row in rows:
            if row["charts/episodic_return"]:
                episode = float(row["charts/episodic_return"]), int(row["charts/episodic_length"])
                writer.writerow((row["global_step"], f"{episode[0]:.6g}", episode[1]))
    partial.replace(result)


def run(
    work: Path, name: str, script: str, env_id: str, seed: str, flags: list[str], minutes: float | None
) -> None:
    folder = work / name / env_id.replace("/", "-") / seed
    folder.mkdir(parents=True, exist_ok=True)
    command = ["python", f"{script}.py", "--env-id", env_id, "--seed", seed, *flags]
    where = ["--runs-dir", str(folder), "--no-cuda"]
    if checkpoints := sorted(folder.glob("*/checkpoint.pt")):
        where = ["--resume", str(checkpoints[-1])]
    with (folder / "log").open("w") as log:
        train([sys.executable, *command[1:], *where], minutes, log)
    publish(max(folder.glob("*/metrics.csv")).parent, command, result_of(name, env_id, seed))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--grid", type=Path, default=Path(__file__).parent / "grid.csv", help="table of cells")
    parser.add_argument("--work", type=Path, required=True, help="folder for unfinished runs and logs")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="cells at a time")
    args = parser.parse_args()
    missing = [c for c in cells(args.grid) if not result_of(c[0], c[2], c[3]).exists()]
    with ThreadPoolExecutor(args.jobs) as pool:
        futures = {pool.submit(run, args.work, *cell): cell for cell in missing}
        for future in tqdm(as_completed(futures), total=len(futures), unit=" cells"):
            if future.exception():
                name, _, env_id, seed, *_ = futures[future]
                log = args.work / name / env_id.replace("/", "-") / seed / "log"
                tqdm.write(f"{name} {env_id} {seed} failed: see {log}")


if __name__ == "__main__":
    main()
