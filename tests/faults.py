"""Killing a run and going on with it."""

import random
import subprocess
import time
from pathlib import Path
from typing import NamedTuple

import torch
from helpers import Script, environment, finish, only_run, start, wait_for

SECONDS = 0.1  # between two checkpoints, instead of CHECKPOINT_SECONDS


class Death(NamedTuple):
    step: int  # that the checkpoint has
    lost: int  # rows of metrics.csv that came after it


def hurried(script: Script, *flags) -> subprocess.Popen:
    """A run that saves every SECONDS."""
    code = f"import {script.name} as script; script.CHECKPOINT_SECONDS = {SECONDS}; script.LOG_STEPS = 100; script.main()"
    tests = script.path.parent / "tests"
    return start("-c", code, *flags, env=environment(PYTHONPATH=f"{tests.parent}:{tests}"))


def last_save(runs_dir: Path) -> float:
    return max((path.stat().st_mtime for path in runs_dir.glob("*/checkpoint.pt")), default=0)


def saved_step(runs_dir: Path) -> int:
    return max((torch.load(path, weights_only=True)["global_step"] for path in runs_dir.glob("*/checkpoint.pt")), default=0)


def kill(script: Script, runs_dir: Path, *flags, seed: int) -> Death:
    """Starts a run, or goes on with one, and kills it at a random moment after it has saved twice."""
    before, process = saved_step(runs_dir), hurried(script, *flags)
    for _ in range(2):
        wait_for(lambda: saved_step(runs_dir) > before, process)  # a3c saves before its workers have begun, too
        before = saved_step(runs_dir)
    time.sleep(random.Random(seed).uniform(0, 2 * SECONDS))
    process.kill()
    finish(process)  # when all that it had started are gone too
    saved = torch.load(only_run(runs_dir) / "checkpoint.pt", weights_only=True)
    rows = (only_run(runs_dir) / "metrics.csv").read_bytes()[saved["metrics_size"]:].count(b"\n")
    return Death(saved["global_step"], rows)
