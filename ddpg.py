# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "torch==2.13.0", "gymnasium[classic-control,mujoco]==1.4.0", "mujoco==3.2.7", "numpy==2.2.6",
#     "tyro==1.0.17", "wandb==0.31.0", "tqdm==4.70.1", "moviepy==2.2.1",
# ]
# ///
# SPDX-License-Identifier: MIT
"""DDPG: a deterministic policy climbs the slope that the critic's value has in the action; both learn off-policy.

    python ddpg.py --env-id Hopper-v4                                   # 1M steps, 50 minutes: return about 1400
    python ddpg.py --env-id Pendulum-v1 --total-timesteps 20000         # 1 minute: then, with --evaluate, about -150

Slides 确定性梯度策略, 深度确定性策略梯度: named in the deck, their text is missing there. What they would derive:

    A stochastic policy gradient tries actions and needs ∂ log πθ(a|s); a deterministic policy a = μ_θ(s) tries none.
    But a critic Q that is differentiable in the action says by itself which way to change a: along ∇_a Q(s,a). The
    chain rule carries this slope on to θ: ∇_θ Q(s, μ_θ(s)) = ∇_θ μ_θ(s) ∇_a Q(s,a)|_{a=μ_θ(s)}. Its mean over the
    states that μ_θ visits is the gradient of J, although these states change with θ too (Silver et al., theorem 1). As
    no expectation is over actions, they may come from a replay buffer, explored with any noise: off-policy learning.

Silver et al. 2014 (DPG, theorem 1); Lillicrap et al. 2015 (DDPG, arXiv:1509.02971, algorithm 1)

    DPG-THM   ∇_θ J(μ_θ) = E_{s~ρ^μ}[ ∇_θ μ_θ(s) ∇_a Q^μ(s,a)|_{a=μ_θ(s)} ]
    Q-TD      Q-learning minimises E[ ½ ( r_t + γ max_a' Q_θ'(s_{t+1},a') − Q_θ(s_t,a_t) )² ]; here μ' finds the max

    DDPG-1    initialise critic Q(s,a|θ^Q) and actor μ(s|θ^μ)
    DDPG-2    initialise targets θ^Q' ← θ^Q, θ^μ' ← θ^μ
    DDPG-3    initialise replay buffer R
    DDPG-4    for each episode: receive initial state s_1
    DDPG-5        for t = 1 to T do
    DDPG-6            a_t = μ(s_t|θ^μ) + N_t                                  (exploration noise N)
    DDPG-7            execute a_t, observe r_t and s_{t+1}
    DDPG-8            store (s_t, a_t, r_t, s_{t+1}) in R
    DDPG-9            sample a minibatch of N transitions from R
    DDPG-10           y_i = r_i + γ Q'(s_{i+1}, μ'(s_{i+1}|θ^μ')|θ^Q')        (no bootstrap where s_{i+1} is terminal)
    DDPG-11           critic: minimise L = 1/N Σ_i (y_i − Q(s_i,a_i|θ^Q))²
    DDPG-12           actor: ∇_θ^μ J ≈ 1/N Σ_i ∇_a Q(s,a|θ^Q)|_{s_i, μ(s_i)} ∇_θ^μ μ(s|θ^μ)|_{s_i}
    DDPG-13           θ^Q' ← τ θ^Q + (1−τ) θ^Q';  θ^μ' ← τ θ^μ + (1−τ) θ^μ'
    DDPG-14       end for

Symbols     variable            shape     meaning
    s_t     obs                 (B,S)     observation; next_obs is s_{t+1}, the true one also when an episode ends
    a_t     actions             (B,A)     action, each number from −1 to 1: the environment's range, rescaled
    r_t     rewards             (B,)      reward
    μ, Q    actor, critic                 policy, and its value; μ', Q' target_actor, target_critic
    N_t     noise               (N,A)     exploration noise of N actors; the slide's other N, the minibatch's, is B
    y_i     target              (B,)      what Q(s_i,a_i) should have been
    θ^μ,θ^Q theta_mu, theta_q   (P,)      parameters, a vector each
    γ, τ    gamma, tau                    discount; how far the targets follow at each step

Departures from the slides
    DDPG-2    none has batch normalisation, which the paper adds to its networks.
    DDPG-6    noise is Gaussian by default, as later work found the paper's Ornstein-Uhlenbeck process no better.
    [DETAIL]  marks whatever else the slides don't have, each with its reason.
"""

import contextlib
import copy
import csv
import io
import json
import math
import os
import re
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections import deque
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import tyro
from torch import Tensor, nn
from tqdm import tqdm

SCRIPT = "ddpg"


# ── Arguments ─────────────────────────────────────────────────────────────────────────────────────────────────────

@dataclass
class Args:
    env_id: str = "Hopper-v4"  # Gymnasium environment: observes a vector; continuous (Box) actions with bounds
    seed: int = 1  # of the networks, the actions, the minibatches and the environments
    total_timesteps: int = 1_000_000  # environment steps, counted over all actors
    num_envs: int = 1  # actors, each with an environment of its own; as many gradients follow a step of all
    buffer_size: int = 1_000_000  # transitions that R keeps: Hopper-v4's million take 108 MB, and as much on the disk
    batch_size: int = 64  # N: transitions per gradient
    learning_starts: int = 10_000  # steps of random actions before the first gradient
    actor_lr: float = 1e-3  # Adam's step size for μ
    critic_lr: float = 1e-3  # Adam's step size for Q
    tau: float = 0.005  # τ: share of the way that the targets go to the networks at each step
    noise: Literal["gaussian", "ou"] = "gaussian"  # N_t: independent, or the paper's Ornstein-Uhlenbeck process
    noise_std: float = 0.1  # σ of the noise; actions range from -1 to 1
    ou_theta: float = 0.15  # share of the Ornstein-Uhlenbeck process that decays at each step
    gamma: float = 0.99  # γ: discount per step
    cuda: bool = False  # run on the GPU if there is one; networks this small are faster on the CPU
    track: bool = False  # send the metrics to Weights & Biases too
    wandb_project_name: str = "deep-policy-gradients"  # project to track under
    wandb_entity: str | None = None  # user or team to track under
    capture_video: bool = False  # record episodes 0, 1, 8, 27, 64, … of the first actor
    runs_dir: str = "runs"  # where the run's folder is made
    resume: str | None = None  # run's folder or checkpoint to go on with; its settings hold unless given again
    evaluate: str | None = None  # run's folder or checkpoint to evaluate instead of training
    eval_episodes: int = 10  # episodes to evaluate


# ── Environments ──────────────────────────────────────────────────────────────────────────────────────────────────

def make_env(env_id: str, render: bool = False) -> gym.Env:
    """The environment, rendering to pictures if asked."""
    if render and sys.platform == "linux":  # draw without a screen; MuJoCo and pygame ask when they are imported
        os.environ.setdefault("MUJOCO_GL", "egl")
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
    env = gym.make(env_id, render_mode="rgb_array" if render else None, disable_env_checker=True)
    if render and getattr(getattr(env.unwrapped, "model", None), "ncam", 0):
        env.unwrapped.mujoco_renderer.camera_id = 0  # MuJoCo: the model's camera follows the body, the default one not
    if isinstance(env.action_space, gym.spaces.Box) and env.action_space.is_bounded():
        # [DETAIL] What a policy calls ±1, a Gaussian's first deviation or all of tanh, becomes the environment's range.
        low, high = env.action_space.low, env.action_space.high
        middle, half, unit = (high + low) / 2, (high - low) / 2, gym.spaces.Box(-1, 1, low.shape, low.dtype)
        env = gym.wrappers.TransformAction(env, lambda action: (middle + half * action).clip(low, high), unit)
    return env


class Actor:
    """One of the N actors. Its seed and its actions so far are all it takes to bring a running episode back."""

    def __init__(self, env: gym.Env):
        self.env = env
        self.reset()

    def reset(self, seed: int | None = None, actions: np.ndarray = ()) -> None:
        """A new episode, or that of a checkpoint: its actions taken again."""
        self.seed = torch.randint(2**31, ()).item() if seed is None else seed
        self.actions, self.episodic_return = [], 0.0
        try:
            self.obs, _ = self.env.reset(seed=self.seed)
        except Exception as error:
            raise blame(error)
        for action in actions:
            _, _, terminated, truncated = self.step(action)
            if terminated or truncated:  # a simulator that doesn't repeat itself
                return self.reset()

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool]:
        """a_t → s_{t+1}, r_t, terminated (s_{t+1} has no future), truncated (it has one that we don't see)"""
        try:
            self.obs, reward, terminated, truncated, _ = self.env.step(action)
            self.episodic_return += float(reward)
        except Exception as error:
            raise blame(error)
        self.actions.append(action)
        return self.obs, reward, terminated, truncated


# ── Networks ──────────────────────────────────────────────────────────────────────────────────────────────────────

def mlp(inputs: int, outputs: int) -> list[nn.Module]:
    """inputs → 256 → 256 → outputs, with ReLU between."""
    return [nn.Linear(inputs, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, outputs)]


class Critic(nn.Module):
    """Q(s,a), in the rewards' unit."""

    def __init__(self, S: int, A: int):
        super().__init__()
        self.layers = nn.Sequential(*mlp(S + A, 1))

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        """(B,S), (B,A) → (B,)"""
        return self.layers(torch.cat([obs, action], -1)).squeeze(-1)


class Agent(nn.Module):
    """Actor μ(s), critic Q(s,a), and a copy of each that follows slowly: Q's own target must not run away from it."""

    def __init__(self, observation_space: gym.spaces.Box, action_space: gym.spaces.Box):
        super().__init__()
        S, A = observation_space.shape[0], action_space.shape[0]
        # [DDPG-1] initialise critic Q(s,a|θ^Q) and actor μ(s|θ^μ); tanh keeps μ within the actions' bounds
        self.actor, self.critic = nn.Sequential(*mlp(S, A), nn.Tanh()), Critic(S, A)
        # [DDPG-2] initialise targets θ^Q' ← θ^Q, θ^μ' ← θ^μ
        self.target_actor, self.target_critic = copy.deepcopy(self.actor), copy.deepcopy(self.critic)

    def act(self, obs: Tensor, noise: Tensor | float = 0.0) -> Tensor:
        """(N,S) → (N,A): μ(s) + N_t, within bounds; without noise the action that the policy thinks best"""
        return (self.actor(obs) + noise).clamp(-1, 1)


def as_vector(parameters: Iterable[nn.Parameter]) -> nn.Parameter:
    """θ: one vector, of which the parameters become views, and their gradients views of its gradient.

    [DETAIL] An optimiser's step costs by the tensor rather than by the number, and this is one tensor, not a dozen."""
    parameters = list(parameters)
    sizes = [parameter.numel() for parameter in parameters]
    theta = nn.Parameter(torch.cat([parameter.detach().flatten() for parameter in parameters]))
    theta.grad = torch.zeros_like(theta)
    for parameter, value, grad in zip(parameters, theta.data.split(sizes), theta.grad.split(sizes)):
        parameter.data, parameter.grad = value.view_as(parameter), grad.view_as(parameter)
    return theta


# ── Mathematics ───────────────────────────────────────────────────────────────────────────────────────────────────
# Pure functions of tensors, which they leave as they are; shapes that don't broadcast raise torch's RuntimeError.

def td_target(reward: Tensor, next_value: Tensor, terminated: Tensor, gamma: float) -> Tensor:
    """y = r + γ Q'(s', μ'(s')), if s' is terminal r (DDPG-10; paper, eq. 5);   all (B,) → (B,), in the rewards' unit

    A truncated episode's last s' has a future that we don't see, and counts as any other."""
    return reward + gamma * next_value * (1 - terminated)  # [Q-TD] with μ' for the max over a'


def critic_loss(value: Tensor, target: Tensor) -> Tensor:
    """L = 1/N Σ (y − Q(s,a))² (DDPG-11; paper, eq. 4);   value, target (B,) → ()"""
    return (target - value).square().mean()


def action_gradient(value: Tensor, action: Tensor) -> Tensor:
    """1/N ∇_a Q(s,a) of DDPG-12 (paper, eq. 6), for [DPG-THM];   value Q (B,), action (B,A) → (B,A)

    Divided by N already, so that back-propagation's sum over the minibatch is the mean."""
    (gradient,) = torch.autograd.grad(value.mean(), action)  # of the action alone: Q's parameters get none
    return gradient


def soft_update(target: Tensor, source: Tensor, tau: float) -> Tensor:
    """θ' ← τ θ + (1−τ) θ' (DDPG-13);   target θ', source θ (P,) → (P,)"""
    return target.lerp(source, tau)  # θ' + τ (θ − θ'), in one pass over the numbers


def ornstein_uhlenbeck(noise: Tensor, normal: Tensor, theta: float, sigma: float) -> Tensor:
    """N_t = (1−θ) N_{t−1} + σ ε, noise that lasts (paper, section 7);   N_{t−1}, normal ε ~ N(0,1) (N,A) → (N,A)"""
    return (1 - theta) * noise + sigma * normal


# ── Collecting ────────────────────────────────────────────────────────────────────────────────────────────────────

class Replay:
    """[DDPG-3] replay buffer R: the latest transitions, a row of numbers each, oldest overwritten first."""

    def __init__(self, capacity: int, S: int, A: int, device: torch.device):
        self.widths = S, A, 1, S, 1  # s, a, r, s', terminated
        self.rows, self.added = torch.zeros(capacity, sum(self.widths), device=device), 0

    def __len__(self) -> int:
        return min(self.added, len(self.rows))

    def add(self, obs: np.ndarray, action: np.ndarray, reward: float, next_obs: np.ndarray, terminated: bool) -> None:
        row = np.concatenate([obs, action, (reward,), next_obs, (terminated,)], dtype=np.float32)
        self.rows[self.added % len(self.rows)] = torch.from_numpy(row)
        self.added += 1

    def sample(self, size: int) -> tuple[Tensor, ...]:
        """(B,S), (B,A), (B,), (B,S), (B,)"""
        obs, action, reward, next_obs, terminated = self.rows[torch.randint(len(self), (size,))].split(self.widths, 1)
        return obs, action, reward.squeeze(1), next_obs, terminated.squeeze(1)


@torch.no_grad()
def collect(agent: Agent, actors: list[Actor], replay: Replay, noise: Tensor, args: Args) -> list[tuple[float, int]]:
    """A step of each of the N actors; returns (return, length) of the episodes that ended."""
    episodes = []
    # [DDPG-4] for each episode: receive initial state s_1: an actor resets as its episode ends
    obs = np.array([actor.obs for actor in actors], np.float32)
    # [DDPG-5] for t = 1 to T do
    if replay.added < args.learning_starts:
        # [DETAIL] At first actions are uniform: a policy that knows nothing would fill R with one kind of failure.
        actions = torch.rand(noise.shape) * 2 - 1
    else:
        # [DDPG-6] a_t = μ(s_t|θ^μ) + N_t
        normal, decay = torch.randn(noise.shape).to(noise.device), args.ou_theta if args.noise == "ou" else 1.0
        noise.copy_(ornstein_uhlenbeck(noise, normal, decay, args.noise_std))
        actions = agent.act(torch.from_numpy(obs).to(replay.rows.device), noise).cpu()
    for n, (actor, s, a) in enumerate(zip(actors, obs, actions.numpy())):
        # [DDPG-7] execute a_t, observe r_t and s_{t+1}
        next_obs, reward, terminated, truncated = actor.step(a)
        # [DDPG-8] store (s_t, a_t, r_t, s_{t+1}) in R
        replay.add(s, a, reward, next_obs, terminated)
        if terminated or truncated:
            episodes.append((actor.episodic_return, len(actor.actions)))
            actor.reset()
            noise[n] = 0
    return episodes


# ── Update ────────────────────────────────────────────────────────────────────────────────────────────────────────

def update(agent: Agent, vectors: tuple[nn.Parameter, ...], actor_optimizer: torch.optim.Optimizer,
           critic_optimizer: torch.optim.Optimizer, replay: Replay, args: Args) -> Tensor:
    """One gradient step of critic and actor; returns their losses and the mean of Q."""
    theta_mu, theta_q, target_mu, target_q = vectors
    # [DDPG-9] sample a minibatch of N transitions from R
    obs, action, reward, next_obs, terminated = replay.sample(args.batch_size)
    # [DDPG-10] y_i = r_i + γ Q'(s_{i+1}, μ'(s_{i+1}|θ^μ')|θ^Q')
    with torch.no_grad():
        target = td_target(reward, agent.target_critic(next_obs, agent.target_actor(next_obs)), terminated, args.gamma)
    # [DDPG-11] critic: minimise L = 1/N Σ_i (y_i − Q(s_i,a_i|θ^Q))²
    value = agent.critic(obs, action)
    loss = critic_loss(value, target)
    theta_q.grad.zero_()
    loss.backward()
    critic_optimizer.step()
    # [DDPG-12] actor: ∇_θ^μ J ≈ 1/N Σ_i ∇_a Q(s,a|θ^Q)|_{s_i, μ(s_i)} ∇_θ^μ μ(s|θ^μ)|_{s_i}
    best = agent.actor(obs)
    best_value = agent.critic(obs, best)
    theta_mu.grad.zero_()
    best.backward(-action_gradient(best_value, best))  # the chain rule: from ∇_a Q on to θ^μ, uphill
    actor_optimizer.step()
    # [DDPG-13] θ^Q' ← τ θ^Q + (1−τ) θ^Q';  θ^μ' ← τ θ^μ + (1−τ) θ^μ'
    with torch.no_grad():
        target_q.copy_(soft_update(target_q, theta_q, args.tau))
        target_mu.copy_(soft_update(target_mu, theta_mu, args.tau))
    # [DDPG-14] end for
    return torch.stack([-best_value.mean(), loss, value.mean()]).detach()


# ══ The slides end here. Below: running, saving, evaluating, the command line ═════════════════════════════════════

METRICS = (
    "charts/episodic_return", "charts/episodic_length", "charts/SPS", "losses/policy_loss", "losses/qf_loss",
    "losses/qf_values",
)
LOG_STEPS = 1000  # over which the losses of a row are averaged
FIXED = ("env_id", "num_envs", "buffer_size")  # settings that hold for every use of a checkpoint
CHECKPOINT_SECONDS = 10  # what a crash costs at most, or 20 times what it takes to save


class Failure(Exception):
    """Something that the user can mend; shown as one line."""


def blame(error: Exception) -> Failure:
    """What an environment raised, which may be whatever it likes, and where."""
    where, text = traceback.extract_tb(error.__traceback__)[-1], " ".join(f"{type(error).__name__}: {error}".split())
    return Failure(f"the environment failed in line {where.lineno} of {Path(where.filename).name}: {text}")


def new_folder(args: Args) -> Path:
    while True:
        name = f"{args.env_id}__{SCRIPT}__{args.seed}__{int(time.time())}"
        folder = Path(args.runs_dir, re.sub(r"[^\w.-]", "-", name))
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            if not folder.is_dir():
                raise
            time.sleep(0.1)  # of two runs that start in the same second, one waits for the next


class Run:
    """A run's folder, its progress bar, and the signal that asked it to stop, if one did."""

    def __init__(self, args: Args, checkpoint: dict | None):
        self.args, self.signal = args, 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.stop)
        self.returns = deque(checkpoint["returns"] if checkpoint else (), maxlen=100)
        if checkpoint:
            self.folder = checkpoint_path(args.resume).parent
        else:
            self.folder = new_folder(args)
        if args.track:
            self.wandb = self.start_wandb()
        versions = {module.__name__: module.__version__ for module in (torch, gym, np)}
        config = {"script": SCRIPT, "args": asdict(args), "versions": versions}
        self.write("config.json", json.dumps(config, indent=2).encode())
        self.metrics = open(self.folder / "metrics.csv", "a", buffering=1, newline="")
        if checkpoint:  # the rows after the checkpoint will be made again
            self.metrics.truncate(min(self.metrics.tell(), checkpoint["metrics_size"]))
            self.metrics.seek(0, os.SEEK_END)  # or a save before the next row would count those that were just cut
        self.writer = csv.DictWriter(self.metrics, ("global_step", *METRICS), lineterminator="\n")
        if self.metrics.tell() == 0:
            self.writer.writeheader()
        step = checkpoint["global_step"] if checkpoint else 0
        self.bar = tqdm(total=args.total_timesteps, initial=step, unit=" steps", dynamic_ncols=True)
        self.due = time.time() + CHECKPOINT_SECONDS  # for a checkpoint

    def start_wandb(self) -> "wandb.Run":
        try:
            import wandb

            name, project, entity = self.folder.name, self.args.wandb_project_name, self.args.wandb_entity
            tracked = wandb.init(project=project, entity=entity, config=asdict(self.args), id=name, name=name,
                                 dir=self.folder, resume="allow")
        except Exception as error:
            if not self.args.resume:
                shutil.rmtree(self.folder)
            raise Failure(f"--track fails ({' '.join(str(error).split())}): log in, or set WANDB_MODE=offline")
        tracked.define_metric("*", step_metric="global_step")
        return tracked

    def stop(self, number: int, _frame) -> None:
        """Lets the iteration end, so that it can be saved; a second Ctrl-C doesn't wait."""
        self.signal = number
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """One row: an episode that ended at this step, or an iteration that did."""
        if not all(map(math.isfinite, metrics.values())):
            raise Failure(f"the numbers of step {step} aren't finite: lower the learning rate, or look for NaN in the "
                          "environment's observations and rewards")
        row = {"global_step": step, **metrics}
        self.writer.writerow(row)
        if self.args.track:
            self.wandb.log(row)
        if "charts/episodic_return" in metrics:
            self.returns.append(metrics["charts/episodic_return"])
            self.bar.set_postfix_str(f"return {np.mean(self.returns):.1f}", refresh=False)
        self.bar.total = max(self.bar.total, step)  # an algorithm of whole episodes takes a few steps more
        self.bar.update(step - self.bar.n)

    def sps(self, step: int) -> int:
        return round((step - self.bar.initial) / self.bar.format_dict["elapsed"])

    def save(self, step: int, state: dict) -> None:
        begun = time.time()
        state |= {"script": SCRIPT, "args": asdict(self.args), "global_step": step, "returns": list(self.returns)}
        state["metrics_size"] = self.metrics.tell()
        buffer = io.BytesIO()
        torch.save(state, buffer)
        self.write("checkpoint.pt", buffer.getbuffer())
        self.due = time.time() + max(CHECKPOINT_SECONDS, 20 * (time.time() - begun))

    def write(self, name: str, data: bytes | memoryview) -> None:
        """A crash or a full disk leaves the old file or the new one, never half of one."""
        partial = self.folder / f"{name}.partial"
        try:
            with open(partial, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, self.folder / name)
        finally:
            partial.unlink(missing_ok=True)

    def summarize(self, step: int) -> None:
        print(f"{step} steps, {self.sps(step)} steps/s{', stopped early' if self.signal else ''}")
        if self.returns:
            mean, std, count = np.mean(self.returns), np.std(self.returns), len(self.returns)
            print(f"return {mean:.1f} ± {std:.1f} over the last {count} episodes")
        print(f"saved in {self.folder}: go on with --resume, look at it with --evaluate")

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, _kind, error: BaseException | None, _trace) -> None:
        self.bar.close()
        self.metrics.close()
        if self.args.track:
            self.wandb.finish()
        if isinstance(error, Failure):
            saved = (self.folder / "checkpoint.pt").exists()
            raise Failure(f"{error}; {self.folder} {'is as last saved' if saved else 'has no checkpoint yet'}")


def open_envs(args: Args, count: int) -> list[gym.Env]:
    """The environments, once the first has shown that the algorithm can serve it."""
    try:
        envs = [make_env(args.env_id, args.capture_video and n == 0) for n in range(count)]
        obs, _ = envs[0].reset(seed=args.seed)
        if args.capture_video:
            envs[0].render()
    except Exception as error:  # a wrong name, a missing package or graphics driver: each raises a class of its own
        sys.unraisablehook = lambda _: None  # a half-made renderer complains once more when it is collected
        raise Failure(f"{args.env_id} doesn't start: {' '.join(str(error).split()) or repr(error)}")
    observed, acted = envs[0].observation_space, envs[0].action_space
    if not (isinstance(observed, gym.spaces.Box) and len(observed.shape) == 1):
        raise Failure(f"{args.env_id} observes {observed}: choose an --env-id that observes a vector")
    if np.shape(obs) != observed.shape:
        raise Failure(f"{args.env_id} says that it observes {observed}, but observes {np.shape(obs)}: mend it")
    if not (isinstance(acted, gym.spaces.Box) and len(acted.shape) == 1 and acted.dtype.kind == "f"):
        raise Failure(f"{args.env_id} takes {acted}, and DDPG a vector of numbers: choose another --env-id, or for "
                      "Discrete actions reinforce.py, a3c.py, trpo.py, ppo_clip.py or ppo_kl.py")
    if not acted.is_bounded():
        raise Failure(f"{args.env_id} takes {acted}, and DDPG needs bounds to explore within: choose another --env-id")
    return envs


def record(env: gym.Env, folder: Path, name: str) -> gym.Env:
    return gym.wrappers.RecordVideo(env, str(folder / "videos"), name_prefix=name, disable_logger=True)


def train(args: Args, checkpoint: dict | None) -> int:
    """Iterates from the start or from a checkpoint; returns the signal that stopped it, or 0."""
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    envs = open_envs(args, args.num_envs)
    agent = Agent(envs[0].observation_space, envs[0].action_space).to(device)
    networks = agent.actor, agent.critic, agent.target_actor, agent.target_critic
    vectors = tuple(as_vector(network.parameters()) for network in networks)
    actor_optimizer = torch.optim.Adam([vectors[0]], lr=args.actor_lr, fused=True)
    critic_optimizer = torch.optim.Adam([vectors[1]], lr=args.critic_lr, fused=True)
    S, A = envs[0].observation_space.shape[0], envs[0].action_space.shape[0]
    try:
        replay, noise = Replay(args.buffer_size, S, A, device), torch.zeros(args.num_envs, A, device=device)
    except RuntimeError:
        raise Failure(f"there is no memory for --buffer-size {args.buffer_size}: lower it")
    step, losses = 0, []
    if checkpoint:
        step = checkpoint["global_step"]
        if step + args.num_envs > args.total_timesteps:
            raise Failure(f"{args.resume} is complete at step {step}: go on with a larger --total-timesteps")
        agent.load_state_dict(checkpoint["agent"])
        actor_optimizer.load_state_dict(checkpoint["actor_optimizer"])
        critic_optimizer.load_state_dict(checkpoint["critic_optimizer"])
        actor_optimizer.param_groups[0]["lr"], critic_optimizer.param_groups[0]["lr"] = args.actor_lr, args.critic_lr
        replay.added = step
        replay.rows[:len(replay)] = checkpoint["replay"]
        noise, losses = checkpoint["noise"].to(device), [*checkpoint["losses"].to(device)]
    with Run(args, checkpoint) as run:
        if args.capture_video:
            envs[0] = record(envs[0], run.folder, f"step-{step}")
        actors = [Actor(env) for env in envs]
        if checkpoint:
            for actor, (seed, actions) in zip(actors, checkpoint["running_episodes"]):
                actor.reset(seed, actions.numpy())
            torch.set_rng_state(checkpoint["rng_state"])
        over = False
        while not over:
            episodes = collect(agent, actors, replay, noise, args)
            step += args.num_envs
            for episodic_return, length in episodes:
                run.log(step, {"charts/episodic_return": episodic_return, "charts/episodic_length": length})
            if step > args.learning_starts:
                losses += [update(agent, vectors, actor_optimizer, critic_optimizer, replay, args) for _ in actors]
            ended = step + args.num_envs > args.total_timesteps
            over = ended or run.signal  # what ends the run is saved before
            if losses and (step % LOG_STEPS < args.num_envs or ended):
                means = torch.stack(losses).mean(0).tolist()
                run.log(step, {"charts/SPS": run.sps(step), **dict(zip(METRICS[3:], means))})
                losses = []
            if over or time.time() > run.due:
                filled = replay.rows[:len(replay)].cpu().numpy()  # by way of NumPy, or the rest would be saved with it
                if not (np.isfinite(filled).all() and all(loss.isfinite().all() for loss in losses)):
                    raise Failure(f"the numbers before step {step} aren't finite: lower the learning rate, or look for "
                                  "NaN in the environment's observations and rewards")
                run.save(step, {
                    "agent": agent.state_dict(),
                    "actor_optimizer": actor_optimizer.state_dict(),
                    "critic_optimizer": critic_optimizer.state_dict(),
                    "replay": torch.from_numpy(filled),
                    "noise": noise,
                    "losses": torch.stack(losses) if losses else torch.empty(0, 3),
                    "rng_state": torch.get_rng_state(),
                    "running_episodes": [(a.seed, torch.from_numpy(np.array(a.actions))) for a in actors],
                })
        for env in envs:
            env.close()
    run.summarize(step)
    return run.signal


def evaluate(agent: Agent, env: gym.Env, episodes: int) -> list[tuple[float, int]]:
    """(return, length) of episodes without exploration, while nothing learns"""
    results = []
    for episode in range(episodes):
        actor, over = Actor(env), False
        while not over:
            with torch.no_grad():
                action = agent.act(torch.as_tensor(actor.obs, dtype=torch.float32)[None]).numpy()[0]
            over = any(actor.step(action)[2:])
        results.append((actor.episodic_return, len(actor.actions)))
        print(f"episode {episode}: return {actor.episodic_return:.1f}, length {len(actor.actions)}", flush=True)
    return results


def checkpoint_path(path: str) -> Path:
    """A run's folder stands for the checkpoint in it."""
    return Path(path, "checkpoint.pt") if Path(path).is_dir() else Path(path)


def load_checkpoint(path: str) -> dict:
    if not checkpoint_path(path).is_file():
        raise Failure(f"there is no checkpoint at {path}: name a run's folder or its checkpoint.pt")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch thinks of a file that isn't its own
            checkpoint = torch.load(checkpoint_path(path), map_location="cpu", weights_only=True)
            script = checkpoint["script"]
            _ = script != SCRIPT or Args(**checkpoint["args"])
    except Exception:  # torch.load raises whatever its parts do
        raise Failure(f"{path} is not a checkpoint, or not a whole one: name another")
    if script != SCRIPT:
        raise Failure(f"{path} was made by {script}.py: go on with that script")
    return checkpoint


def check(args: Args) -> None:
    rules = {
        "--num-envs, --buffer-size, --batch-size, --eval-episodes: at least 1": min(
            args.num_envs, args.buffer_size, args.batch_size, args.eval_episodes) >= 1,
        "--total-timesteps: at least --num-envs": args.total_timesteps >= args.num_envs,
        "--learning-starts: at least 0": args.learning_starts >= 0,
        "--actor-lr, --critic-lr: above 0, and finite": all(0 < x < math.inf for x in (args.actor_lr, args.critic_lr)),
        "--noise-std: at least 0, and finite": 0 <= args.noise_std < math.inf,
        "--gamma, --tau, --ou-theta: from 0 to 1": all(0 <= x <= 1 for x in (args.gamma, args.tau, args.ou_theta)),
        "--seed: from 0 to 2^63 - 1": 0 <= args.seed < 2**63,
    }
    if broken := [rule for rule, kept in rules.items() if not kept]:
        raise Failure("; ".join(broken))


def parse(default: Args) -> Args:
    """The command line over `default`, with tyro's boxed complaints in one line."""
    with contextlib.redirect_stderr(io.StringIO()) as box:
        try:
            return tyro.cli(Args, default=default, description=__doc__.partition("\n")[0])
        except SystemExit as end:
            if not end.code:
                raise
    raise Failure(" ".join(re.findall(r"[^\s╭╮╰╯─│]+", box.getvalue().partition("\n")[2])))


def main() -> None:
    warnings.filterwarnings("ignore", message=".*is out of date")  # to a user of Hopper-v4, Hopper-v5 is no news
    torch.set_num_threads(1)  # matrices this small take longer when they are shared out
    try:
        args, checkpoint = parse(Args()), None
        if path := args.resume or args.evaluate:
            checkpoint = load_checkpoint(path)
            saved = Args(**checkpoint["args"])
            args = parse(saved)
            fixed = (*FIXED, "seed") if args.resume else FIXED  # an evaluation may draw other episodes
            kept = [f"--{name.replace('_', '-')} {getattr(saved, name)}" for name in fixed]
            if any(getattr(args, name) != getattr(saved, name) for name in fixed):
                raise Failure(f"{path} has {' '.join(kept)}: leave them so")
        check(args)
        torch.manual_seed(args.seed)
        if args.evaluate:
            (env,) = open_envs(args, 1)
            agent = Agent(env.observation_space, env.action_space)
            agent.load_state_dict(checkpoint["agent"])
            if args.capture_video:
                env = record(env, checkpoint_path(path).parent, "evaluation")
            returns, _ = zip(*evaluate(agent, env, args.eval_episodes))
            env.close()
            print(f"return {np.mean(returns):.1f} ± {np.std(returns):.1f} over {len(returns)} episodes")
        elif number := train(args, checkpoint):
            sys.exit(128 + number)
    except (Failure, OSError) as error:
        if isinstance(error, OSError):
            error = (f"{error.filename or 'the disk'}: {error.strerror}; see that it has room and can be written to, or "
                     "choose another --runs-dir")
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
