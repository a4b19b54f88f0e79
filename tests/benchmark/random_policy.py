"""Uniformly random actions, as a script that returns.py can run beside the others: what a score of 0 means."""

import argparse
import csv
import json
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import gymnasium as gym


def episodes(env_id: str, seed: int) -> Iterator[tuple[float, int]]:
    """return, length"""
    env = gym.make(env_id)
    env.action_space.seed(seed)
    env.reset(seed=seed)
    while True:
        episodic_return, length, over = 0.0, 0, False
        while not over:
            _, reward, terminated, truncated, _ = env.step(env.action_space.sample())
            episodic_return, length, over = episodic_return + float(reward), length + 1, terminated or truncated
        yield episodic_return, length
        env.reset()


def play(args: argparse.Namespace) -> None:
    run = Path(args.runs_dir) / f"{args.env_id}__random__{args.seed}__{int(time.time())}"
    run.mkdir(parents=True)
    (run / "config.json").write_text(json.dumps({"args": {"resume": None}}))
    step, begin = 0, time.perf_counter()
    with (run / "metrics.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("global_step", "charts/episodic_return", "charts/episodic_length", "charts/SPS"))
        for episodic_return, length in episodes(args.env_id, args.seed):
            step += length
            writer.writerow((step, episodic_return, length, int(step / (time.perf_counter() - begin))))
            if step >= args.total_timesteps:
                return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--env-id", default="HalfCheetah-v4", help="environment")
    parser.add_argument("--seed", type=int, default=1, help="seed of the actions and the environment")
    parser.add_argument("--total-timesteps", type=int, default=100_000, help="environment steps, to an episode's end")
    parser.add_argument("--runs-dir", default="runs", help="where to make the run's folder")
    parser.add_argument("--no-cuda", action="store_true", help="nothing: there is no network")
    parser.add_argument("--evaluate", metavar="RUN", help="folder of a finished run, whose environment is played again")
    parser.add_argument("--eval-episodes", type=int, default=10, help="episodes of the evaluation")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    if not args.evaluate:
        return play(args)
    env_id = Path(args.evaluate).name.partition("__")[0]
    for number, (episodic_return, _) in zip(range(args.eval_episodes), episodes(env_id, args.seed + 1)):
        print(f"episode {number}: return {episodic_return:.2f}")


if __name__ == "__main__":
    main()
