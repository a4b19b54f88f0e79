"""DDPG and A2C of stable-baselines3, as a script that returns.py can run beside ours: it has the flags, the files and
the output of an evaluation that returns.py counts on.

ddpg: the settings of ddpg.py. The same networks (256-256 ReLU), batch, step sizes, τ, Gaussian noise of 0.1, and 10,000
      random actions before the first of one update per step.
a2c:  for Atari. a3c.py's environment, layers, signs of rewards and entropy bonus; but 16 actors, a gradient of 5 steps
      of each, and a step size that falls from 0.0007 to 0.
"""

import argparse
import csv
import json
import time
import warnings
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from speed import body_of_a3c, make_env
from stable_baselines3 import A2C, DDPG
from stable_baselines3.common.atari_wrappers import ClipRewardEnv
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.sb2_compat.rmsprop_tf_like import RMSpropTFLike


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


def ddpg(env_id: str, seed: int) -> DDPG:
    env = Monitor(gym.make(env_id))
    noise = NormalActionNoise(np.zeros(env.action_space.shape), np.full(env.action_space.shape, 0.1))
    return DDPG("MlpPolicy", env, learning_rate=1e-3, buffer_size=1_000_000, learning_starts=10_000, batch_size=64,
                tau=0.005, gamma=0.99, train_freq=1, gradient_steps=1, action_noise=noise, seed=seed, device="cpu",
                policy_kwargs={"net_arch": [256, 256]})  # fmt: skip


def a2c(env_id: str, seed: int) -> A2C:
    np.random.seed(seed)  # a3c.py's make_env draws from it
    env = make_vec_env(lambda: make_env(env_id), n_envs=16, seed=seed, wrapper_class=ClipRewardEnv)
    return A2C("CnnPolicy", env, learning_rate=lambda left: 7e-4 * left, n_steps=5, ent_coef=0.01, vf_coef=0.25,
               seed=seed, device="cpu",
               policy_kwargs={"features_extractor_class": body_of_a3c(), "net_arch": [],
                              "optimizer_class": RMSpropTFLike, "optimizer_kwargs": {"eps": 1e-5}})  # fmt: skip


ALGORITHMS = {"ddpg": ddpg, "a2c": a2c}


def train(args: argparse.Namespace) -> None:
    name = f"{args.env_id.replace('/', '-')}__sb3_{args.algorithm}__{args.seed}__{time.time():.3f}"
    run = Path(args.runs_dir) / name
    run.mkdir(parents=True)
    (run / "config.json").write_text(json.dumps({"args": {**vars(args), "resume": None}}))
    model = ALGORITHMS[args.algorithm](args.env_id, args.seed)
    model.learn(args.total_timesteps, callback=Metrics(run / "metrics.csv"))
    torch.save(model.policy.state_dict(), run / "policy.pt")


def evaluate(args: argparse.Namespace) -> None:
    run = Path(args.evaluate)
    trained = argparse.Namespace(**json.loads((run / "config.json").read_text())["args"])
    model = ALGORITHMS[trained.algorithm](trained.env_id, args.seed)
    model.policy.load_state_dict(torch.load(run / "policy.pt", weights_only=True))
    env = Monitor(make_env(trained.env_id))
    env.reset(seed=args.seed)
    returns, _ = evaluate_policy(model, env, args.eval_episodes, deterministic=True, return_episode_rewards=True)
    for number, episodic_return in enumerate(returns, 1):
        print(f"episode {number}: return {episodic_return:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--algorithm", choices=ALGORITHMS, default="ddpg", help="which of the two")
    parser.add_argument("--env-id", default="HalfCheetah-v4", help="environment")
    parser.add_argument("--seed", type=int, default=1, help="seed of the networks, the actions and the environments")
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
