"""Steps per second of each script, of its peer at the same setting, and of the bare environment.

    pip install -r tests/benchmark/requirements.txt
    python tests/benchmark/speed.py                 # writes tests/benchmark/results/speed.csv

The programs take turns, so that a machine whose speed drifts slows all of them alike; each measurement is a process
of its own, on one thread (a3c: on one for each worker). The first third of its steps is burn-in and not counted.
"""

import argparse
import csv
import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

from returns import describe

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).parent / "results" / "speed.csv"
ENV_IDS = ("Hopper-v4",)
REPEATS = 3
STEPS = 30 * 2048
PROGRAMS = ("environment", "ppo_clip", "SB3 PPO",  # SB3 at its defaults: 2048 steps, 10 epochs, minibatches of 64
            "a3c --num-workers 1", "a3c --num-workers 2")


def rate(times: list[tuple[int, float]]) -> float:
    """Steps per second after the burn-in, from (step, seconds) of every iteration."""
    (first, begin), (last, end) = times[len(times) // 3], times[-1]
    return (last - first) / (end - begin)


def environment(env_id: str) -> float:
    """Random actions and nothing else."""
    import gymnasium as gym

    env, times = gym.make(env_id), []
    env.reset(seed=1)
    env.action_space.seed(1)
    for step in range(STEPS):
        if step % 2048 == 0:
            times.append((step, time.perf_counter()))
        _, _, terminated, truncated, _ = env.step(env.action_space.sample())
        if terminated or truncated:
            env.reset()
    return rate(times)


def script(program: str, env_id: str) -> float:
    """A whole run from the command line, with its logging and saving; its metrics tell the time."""
    name, *flags = program.split()
    with tempfile.TemporaryDirectory() as runs:
        command = [sys.executable, f"{name}.py", "--env-id", env_id, "--total-timesteps", str(STEPS), "--no-cuda"]
        subprocess.run([*command, *flags, "--runs-dir", runs], cwd=ROOT, check=True, capture_output=True)
        (metrics,) = Path(runs).glob("*/metrics.csv")
        rows = [(int(row["global_step"]), row["charts/SPS"]) for row in csv.DictReader(metrics.open())]
    return rate([(step, step / float(sps)) for step, sps in rows if sps])


def sb3_ppo(env_id: str) -> float:
    import torch
    from stable_baselines3 import PPO
    from stable_baselines3.common.callbacks import BaseCallback

    class Clock(BaseCallback):
        def _on_rollout_start(self) -> None:
            times.append((self.num_timesteps, time.perf_counter()))

        def _on_step(self) -> bool:
            return True

    torch.set_num_threads(1)
    times = []
    PPO("MlpPolicy", env_id, seed=1, device="cpu").learn(STEPS, callback=Clock())
    return rate(times)


def measure(program: str, env_id: str) -> float:
    warnings.simplefilter("ignore")
    if program == "environment":
        return environment(env_id)
    return sb3_ppo(env_id) if program == "SB3 PPO" else script(program, env_id)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--measure", nargs=2, metavar=("PROGRAM", "ENV_ID"), help="one measurement, to stdout")
    args = parser.parse_args()
    if args.measure:
        return print(measure(*args.measure))
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("w", newline="") as file:
        file.write(describe("python tests/benchmark/speed.py"))
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("env_id", "program", "repeat", "steps_per_second"))
        for repeat in range(REPEATS):
            for env_id in ENV_IDS:
                for program in PROGRAMS:
                    command = [sys.executable, __file__, "--measure", program, env_id]
                    environ = os.environ | {"OMP_NUM_THREADS": "1"}
                    output = subprocess.run(command, env=environ, check=True, stdout=subprocess.PIPE, text=True).stdout
                    writer.writerow((env_id, program, repeat, round(float(output.split()[-1]))))
                    file.flush()
                    print(env_id, program, output.split()[-1], flush=True)


if __name__ == "__main__":
    main()
