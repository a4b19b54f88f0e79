"""Steps per second and memory of each script, of its peer at the same setting, and of the bare environment.

    pip install -r tests/benchmark/requirements.txt
    python tests/benchmark/speed.py             # writes results/speed.csv: the scripts beside their peers
    python tests/benchmark/speed.py --growth    # writes results/growth.csv: the scripts by their number of actors
    python tests/benchmark/speed.py --cuda      # writes results/cuda.csv: the scripts on the CPU and on the GPU
    python tests/benchmark/speed.py --atari     # writes results/atari.csv: a3c.py on Pong beside its peer

The programs take turns (three times, for growth once), so that a machine whose speed drifts slows all of them alike.
Each measurement is a process of its own. The first third of its steps, in which compilers work, is not counted. A
script is measured from the command line, with all its logging and saving. Each program has one thread (a3c: one for each
worker; SBX: one core). The peers do the same work as the scripts: the same batch, epochs, minibatches, network sizes and gradients per
step. Where the scripts have eight actors, the peers have one, as is their default, and again eight. Memory is the peak
of the largest process. A measurement that the file has of this commit is not made again; a file of another is begun
anew.
"""

import argparse
import csv
import os
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

from returns import describe, head
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
RESULTS = Path(__file__).parent / "results"
REPEATS = 3
CORES = os.cpu_count()
COLUMNS = "env_id", "program", "repeat", "steps_per_second", "peak_mb"
ENV_IDS = "Hopper-v4", "CartPole-v1"

# What is measured on every environment: a program, and how many steps it takes.
PROGRAMS = [
    ("environment", 60_000),
    ("ppo_clip", 40 * 2048), ("ppo_clip --compile", 60 * 2048),
    ("ppo_kl", 40 * 2048), ("ppo_kl --compile", 60 * 2048),
    ("SB3 PPO", 15 * 2048), ("SB3 PPO, 8 actors", 15 * 2048),
    ("SBX PPO", 15 * 2048), ("SBX PPO, 8 actors", 30 * 2048),
    ("trpo", 40 * 2048), ("trpo --compile", 60 * 2048), ("SB3 TRPO", 15 * 2048), ("SB3 TRPO, 8 actors", 15 * 2048),
    ("a3c --num-workers 1", 60_000), ("a3c --num-workers 2", 120_000), ("SB3 A2C, 2 actors", 30_000),
    ("reinforce", 60_000),
    ("ddpg --learning-starts 1000", 6000), ("ddpg --learning-starts 1000 --compile", 9000),
    ("SB3 DDPG", 4000), ("SBX DDPG", 6000),
    ("ddpg --learning-starts 1000 --batch-size 256", 4000),
    ("ddpg --learning-starts 1000 --batch-size 256 --compile", 6000),
    ("SB3 DDPG, batch 256", 3000), ("SBX DDPG, batch 256", 4000),
]  # fmt: skip
ACTORS = 1, 4, 16, 64, 256
GROWTH = [
    *((f"{name} --num-envs {n} --num-steps {2048 // n}", 30 * 2048)
      for name in ("ppo_clip", "ppo_kl", "trpo") for n in ACTORS),
    *((f"reinforce --num-envs {n}", 60_000) for n in ACTORS),
    *((f"ddpg --num-envs {n} --learning-starts 1024", 6144) for n in ACTORS),
    *((f"a3c --num-workers {n}", 60_000 * min(n, CORES)) for n in (1, 2, 4)),
    ("ddpg --learning-starts 990000", 1_000_000),  # a full replay buffer, and what it takes to save it
]  # fmt: skip
PONG = "ALE/Pong-v5"  # a step of it takes as long as many of Hopper
ATARI = [
    ("environment", 60_000), ("a3c --num-workers 1", 60_000), ("a3c --num-workers 2", 120_000),
    ("SB3 A2C, 2 actors", 60_000),
]  # fmt: skip
CUDA = [
    (f"{program} {device}", steps) for program, steps in (
        ("ppo_clip", 12 * 2048), ("ppo_kl", 12 * 2048), ("trpo", 12 * 2048), ("a3c --num-workers 2", 20_000),
        ("reinforce", 20_000), ("ddpg --learning-starts 1000", 4000))
    for device in ("--no-cuda", "--cuda")
]  # fmt: skip


def rate(times: list[tuple[int, float]]) -> float:
    """Steps per second after the burn-in, from (step, seconds) of every iteration."""
    (first, begin), (last, end) = times[len(times) // 3], times[-1]
    return (last - first) / (end - begin)


def make_env(env_id: str):
    """As the script sees it, where that is more than a library's"""
    import gymnasium as gym

    if not env_id.startswith("ALE/"):
        return gym.make(env_id)
    import a3c

    return a3c.make_env(env_id)


def environment(env_id: str, steps: int) -> float:
    """Random actions and nothing else."""
    env, times = make_env(env_id), []
    env.reset(seed=1)
    env.action_space.seed(1)
    for step in range(steps):
        if step % 1000 == 0:
            times.append((step, time.perf_counter()))
        _, _, terminated, truncated, _ = env.step(env.action_space.sample())
        if terminated or truncated:
            env.reset()
    return rate(times)


def script(program: str, env_id: str, steps: int) -> float:
    """A whole run from the command line, with its logging and saving; its metrics tell the time."""
    name, *flags = program.split()
    with tempfile.TemporaryDirectory() as runs:
        command = [sys.executable, f"{name}.py", "--env-id", env_id, "--total-timesteps", str(steps)]
        subprocess.run([*command, "--no-cuda", *flags, "--runs-dir", runs], cwd=ROOT, check=True, capture_output=True)
        (metrics,) = Path(runs).glob("*/metrics.csv")
        rows = [(int(row["global_step"]), row["charts/SPS"]) for row in csv.DictReader(metrics.open())]
    return rate([(step, step / float(sps)) for step, sps in rows if sps and float(sps)])


def body_of_a3c() -> type:
    """Of a3c.py's network all but the heads, for stable-baselines3"""
    import a3c
    from gymnasium.spaces import Discrete
    from stable_baselines3.common.torch_layers import BaseFeaturesExtractor

    class Body(BaseFeaturesExtractor):
        def __init__(self, space):
            super().__init__(space, 256)
            self.body = a3c.Agent(space, Discrete(6)).body

        def forward(self, obs):
            return self.body(obs)

    return Body


def peer(program: str, env_id: str, steps: int) -> float:
    """An algorithm of stable-baselines3 or of its likes, at the settings of the script that it stands beside"""
    import sb3_contrib
    import stable_baselines3 as sb3
    import torch
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env

    class Clock(BaseCallback):
        def _on_step(self) -> bool:
            if self.num_timesteps - times[-1][0] >= 1000:
                times.append((self.num_timesteps, time.perf_counter()))
            return True

    torch.set_num_threads(1)
    (package, name), (_, _, more) = program.partition(",")[0].split(), program.partition(", ")
    library, options = sb3_contrib if name == "TRPO" else sb3, {"device": "cpu"}
    if package == "SBX":
        import sbx as library

        os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])  # JAX has a thread for each core
        options = {}
    n = int(more.partition(" ")[0]) if "actors" in more else 1
    batch_size = int(more.removeprefix("batch ")) if "batch" in more else 64
    options |= {
        "PPO": {"n_steps": 2048 // n},  # 10 epochs, minibatches of 64
        "TRPO": {"n_steps": 1024 // n, "batch_size": 128, "cg_max_steps": 25, "cg_damping": 0.1, "n_critic_updates": 20},
        "A2C": {"n_steps": 20 // n},  # a gradient of 20 steps, every 20 steps
        "DDPG": {"batch_size": batch_size, "learning_starts": 1000, "train_freq": 1, "gradient_steps": 1,
                 "policy_kwargs": {"net_arch": [256, 256]}},
    }[name]  # fmt: skip
    policy = "MlpPolicy"
    if env_id == PONG:
        policy, options["policy_kwargs"] = "CnnPolicy", {"features_extractor_class": body_of_a3c(), "net_arch": []}
    model = getattr(library, name)(policy, make_vec_env(lambda: make_env(env_id), n_envs=n, seed=1), **options)
    times = [(0, time.perf_counter())]
    model.learn(steps, callback=Clock())
    return rate(times)


def measure(program: str, env_id: str, steps: int) -> tuple[float, float]:
    """Steps per second, and megabytes"""
    warnings.simplefilter("ignore")
    if program == "environment":
        speed, who = environment(env_id, steps), resource.RUSAGE_SELF
    elif program.startswith("SB"):
        speed, who = peer(program, env_id, steps), resource.RUSAGE_SELF
    else:
        speed, who = script(program, env_id, steps), resource.RUSAGE_CHILDREN
    return speed, resource.getrusage(who).ru_maxrss / 1024


def suits(program: str, env_id: str) -> bool:
    if env_id == PONG:
        return program in dict(ATARI) or program.startswith("a3c")
    return env_id != "CartPole-v1" or "ddpg" not in program.lower()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--growth", action="store_true", help="measure the scripts by their number of actors")
    parser.add_argument("--cuda", action="store_true", help="measure the scripts on the CPU and on the GPU")
    parser.add_argument("--atari", action="store_true", help="measure a3c.py on Pong beside its peer")
    parser.add_argument("--measure", nargs=3, metavar=("PROGRAM", "ENV_ID", "STEPS"), help="one measurement, to stdout")
    args = parser.parse_args()
    if args.measure:
        program, env_id, steps = args.measure
        return print(*measure(program, env_id, int(steps)))
    path, programs, env_ids, repeats, more = RESULTS / "speed.csv", PROGRAMS, ENV_IDS, REPEATS, {"cores": CORES}
    if args.growth:
        path, programs, env_ids, repeats = RESULTS / "growth.csv", GROWTH, ENV_IDS[:1], 1
    elif args.atari:
        path, programs, env_ids = RESULTS / "atari.csv", ATARI, (PONG,)
    elif args.cuda:
        import torch

        if not torch.cuda.is_available():
            parser.error("torch finds no GPU here")
        path, programs, env_ids = RESULTS / "cuda.csv", CUDA, ("Hopper-v4", "CartPole-v1", PONG)
        more["gpu"] = torch.cuda.get_device_name()
    cells = [(env_id, program, str(repeat), steps // 5 if env_id == PONG else steps)
             for repeat in range(repeats) for env_id in env_ids for program, steps in programs if suits(program, env_id)]
    command = " ".join(["python tests/benchmark/speed.py", *sys.argv[1:]])
    begin = describe(command, head(), **more) + ",".join(COLUMNS) + "\n"
    if not (path.exists() and path.read_text().startswith(begin)):  # measurements of another commit don't mix with these
        path.write_text(begin)
    done = {tuple(row[:3]) for row in csv.reader(path.open())}
    with path.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        for *cell, steps in tqdm([cell for cell in cells if cell[:3] not in done], unit=" measurements"):
            env_id, program, _ = cell
            command = [sys.executable, __file__, "--measure", program, env_id, str(steps)]
            environ = os.environ | {"OMP_NUM_THREADS": "1"}
            output = subprocess.run(command, env=environ, check=True, stdout=subprocess.PIPE, text=True).stdout
            writer.writerow((*cell, *(round(float(number)) for number in output.split()[-2:])))
            file.flush()


if __name__ == "__main__":
    main()
