"""Trains every cell of grid.csv, a process with one thread each, on all cores; goes on where it was stopped.

    pip install -r tests/benchmark/requirements.txt
    python tests/benchmark/returns.py --work /tmp/grid      # writes tests/benchmark/results/<name>/<env>/<seed>.csv

A cell is a name (of its row in grid.csv), an environment and a seed. Its result holds the return and length of every
episode in training, under one line of comment with the command, commit and versions, and the mean return of 100
episodes of the trained agent without exploration (`--evaluate`). What a cell was doing when it was
stopped, and the log of one that failed, stay in --work.
"""

import argparse
import csv
import json
import os
import platform
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib.metadata import version
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "gymnasium", "mujoco", "numpy")


def describe(command: str, **more: object) -> str:
    """The first line of a file of results: what made it."""
    commit = subprocess.check_output(["git", "describe", "--always", "--dirty"], cwd=ROOT, text=True).strip()
    versions = {"python": platform.python_version()} | {package: version(package) for package in PACKAGES}
    return "# " + json.dumps({"command": command, "commit": commit, "versions": versions, **more}) + "\n"


def cells(grid: Path) -> list[tuple[str, str, str, str, list[str]]]:
    """(name, script, environment, seed, flags) of every cell"""
    rows = csv.DictReader(grid.open())
    return [
        (row["name"], row["script"], env_id, seed, shlex.split(row["flags"]))
        for row in rows
        for seed in row["seeds"].split()
        for env_id in row["env_ids"].split()
    ]


def run(work: Path, name: str, script: str, env_id: str, seed: str, flags: list[str]) -> None:
    result = RESULTS / name / env_id / f"{seed}.csv"
    folder = work / name / env_id / seed
    folder.mkdir(parents=True, exist_ok=True)
    command = ["python", f"{script}.py", "--env-id", env_id, "--seed", seed, *flags]
    where = ["--runs-dir", str(folder), "--no-cuda"]
    if checkpoints := sorted(folder.glob("*/checkpoint.pt")):
        where = ["--resume", str(checkpoints[-1])]
    environ = os.environ | {"OMP_NUM_THREADS": "1"}
    with (folder / "log").open("w") as log:
        subprocess.run([sys.executable, *command[1:], *where], cwd=ROOT, env=environ, stdout=log, stderr=log, check=True)
    trained = max(folder.glob("*/metrics.csv"))
    with trained.open() as source:
        rows = list(csv.DictReader(source))
    evaluate = [sys.executable, command[1], "--evaluate", str(trained.parent), "--eval-episodes", "100"]
    lines = subprocess.run(evaluate, cwd=ROOT, env=environ, stdout=subprocess.PIPE, text=True, check=True).stdout
    evaluated = [float(line.split()[3].strip(",")) for line in lines.splitlines() if line.startswith("episode")]
    result.parent.mkdir(parents=True, exist_ok=True)
    partial = result.with_suffix(".partial")
    with partial.open("w", newline="") as file:
        last = {"steps": int(rows[-1]["global_step"]), "steps_per_second": int(rows[-1]["charts/SPS"]),
                "evaluated": round(sum(evaluated) / len(evaluated), 1)}
        file.write(describe(" ".join(command), **last))
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("global_step", "episodic_return", "episodic_length"))
        for row in rows:
            if row["charts/episodic_return"]:
                episode = float(row["charts/episodic_return"]), int(row["charts/episodic_length"])
                writer.writerow((row["global_step"], f"{episode[0]:.6g}", episode[1]))
    partial.replace(result)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--grid", type=Path, default=Path(__file__).parent / "grid.csv", help="table of cells")
    parser.add_argument("--work", type=Path, required=True, help="folder for unfinished runs and logs")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="cells at a time")
    args = parser.parse_args()
    missing = [c for c in cells(args.grid) if not (RESULTS / c[0] / c[2] / f"{c[3]}.csv").exists()]
    with ThreadPoolExecutor(args.jobs) as pool:
        futures = {pool.submit(run, args.work, *cell): cell for cell in missing}
        for future in tqdm(as_completed(futures), total=len(futures), unit=" cells"):
            if future.exception():
                name, _, env_id, seed, _ = futures[future]
                tqdm.write(f"{name} {env_id} {seed} failed: see {args.work / name / env_id / seed / 'log'}")


if __name__ == "__main__":
    main()
