"""Kills runs of every script at random moments, goes on with each, and compares it with one that nothing befell.

    pip install -r tests/benchmark/requirements.txt
    python tests/benchmark/kills.py         # writes tests/benchmark/results/kills.csv

Four runs of each script, killed (SIGKILL) five times each. The runs save every 0.1 seconds, rather than 10, so that the
moments fall before, into and after the saving. A row is a kill: the age of the checkpoint in seconds and the rows of
metrics that came after it, both lost; and whether the run's metrics and networks were, in the end, those of the other.
"""

import csv
import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from returns import RESULTS, describe, head
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from faults import kill  # noqa: E402
from helpers import SCRIPTS, Script, metrics, only_run, run  # noqa: E402

RUNS, KILLS = 4, 5


def outcome(folder: Path) -> tuple[list, dict]:
    return metrics(folder), torch.load(folder / "checkpoint.pt", weights_only=True)["agent"]


def trial(script: Script, seed: int) -> list[tuple]:
    """The rows of one run"""
    with tempfile.TemporaryDirectory() as left_alone, tempfile.TemporaryDirectory() as killed:
        flags = *script.tiny, "--env-id", "Hopper-v4", "--total-timesteps", 15 * script.steps, "--seed", seed
        code, _, err = run(script.path, *flags, "--runs-dir", left_alone)
        assert code == 0, err
        deaths = [kill(script, Path(killed), *flags, "--runs-dir", killed, seed=KILLS * seed)]
        for n in range(1, KILLS):
            deaths.append(kill(script, Path(killed), "--resume", only_run(Path(killed)), seed=KILLS * seed + n))
        code, _, err = run(script.path, "--resume", only_run(Path(killed)))
        assert code == 0, err
        (rows, one), (others, other) = outcome(only_run(Path(killed))), outcome(only_run(Path(left_alone)))
        equal = rows == others and all(torch.equal(x, other[name]) for name, x in one.items())
    return [(script.name, seed, death.step, f"{death.age:.2f}", death.lost, equal) for death in deaths]


def main() -> None:
    (RESULTS / "kills.csv").parent.mkdir(exist_ok=True)
    with (RESULTS / "kills.csv").open("w", newline="") as file, ThreadPoolExecutor(os.cpu_count()) as pool:
        file.write(describe("python tests/benchmark/kills.py", head()))
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("script", "seed", "saved_step", "seconds_lost", "rows_lost", "equal_in_the_end"))
        trials = [pool.submit(trial, script, seed) for seed in range(1, RUNS + 1) for script in SCRIPTS]
        for done in tqdm(trials, unit=" runs"):
            writer.writerows(done.result())
            file.flush()


if __name__ == "__main__":
    main()
