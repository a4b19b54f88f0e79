"""DDPG of stable-baselines3 at the settings of ddpg.py, as a script that returns.py can run beside it.

The same networks (256-256 ReLU), batch, step sizes, τ, Gaussian noise of 0.1, and 10,000 random actions before the
first of one update per step; the flags, the metrics and the evaluation that returns.py counts on.
"""

import argparse
import csv
import time
import warnings
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from stable_baselines3 import DDPG
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.noise import NormalActionNoise


class Metrics(BaseCallback):
    """A row for every finished episode, as the scripts write them."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.file = path.open("w", newline="", buffering=1)
        self.writer = csv.writer(self.file)
        self.writer.writerow(("global_step", "charts/episodic_return", "charts/episodic_length", "charts/SPS"))
        self.begin = time.perf_counter()

    def _on_step(self) -> bool:
        for info in self.locals["infos"]:
            if "episode" in info:
                sps = int(self.num_timesteps / (time.perf_counter() - self.begin))
                self.writer.writerow((self.num_timesteps, info["episode"]["r"], info["episode"]["l"], sps))
        return True


def train(args: argparse.Namespace) -> None:
    run = Path(args.runs_dir) / f"{args.env_id}__sb3_ddpg__{args.seed}__{int(time.time())}"
    run.mkdir(parents=True)
    env = Monitor(gym.make(args.env_id))
    noise = NormalActionNoise(np.zeros(env.action_space.shape), np.full(env.action_space.shape, 0.1))
    networks = {"net_arch": [256, 256]}
    model = DDPG("MlpPolicy", env, learning_rate=1e-3, buffer_size=1_000_000, learning_starts=10_000, batch_size=64,
                 tau=0.005, gamma=0.99, train_freq=1, gradient_steps=1, action_noise=noise, policy_kwargs=networks,
                 seed=args.seed, device="cpu")  # fmt: skip
    model.learn(args.total_timesteps, callback=Metrics(run / "metrics.csv"))
    model.save(run / f"{args.env_id}.zip")


def evaluate(args: argparse.Namespace) -> None:
    (path,) = Path(args.evaluate).glob("*.zip")
    model = DDPG.load(path, device="cpu")
    env = Monitor(gym.make(path.stem))
    env.reset(seed=args.seed)
    returns, _ = evaluate_policy(model, env, args.eval_episodes, deterministic=True, return_episode_rewards=True)
    for number, episodic_return in enumerate(returns, 1):
        print(f"episode {number}: return {episodic_return:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--env-id", default="HalfCheetah-v4", help="environment")
    parser.add_argument("--seed", type=int, default=1, help="seed of the networks, the noise and the environment")
    parser.add_argument("--total-timesteps", type=int, default=300_000, help="environment steps")
    parser.add_argument("--runs-dir", default="runs", help="where to make the run's folder")
    parser.add_argument("--no-cuda", action="store_true", help="nothing: it always runs on the CPU")
    parser.add_argument("--evaluate", metavar="RUN", help="folder of a finished run to evaluate instead")
    parser.add_argument("--eval-episodes", type=int, default=10, help="episodes of the evaluation")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    evaluate(args) if args.evaluate else train(args)


if __name__ == "__main__":
    main()
