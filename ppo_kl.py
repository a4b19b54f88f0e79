# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "torch==2.13.0", "gymnasium[classic-control,mujoco]==1.4.0", "mujoco==3.2.7", "numpy==2.2.6",
#     "tyro==1.0.17", "wandb==0.31.0", "tqdm==4.70.1", "moviepy==2.2.1",
# ]
# ///
# SPDX-License-Identifier: MIT
"""PPO with the KL penalty: several epochs on the same data, at a price of β for every nat that the policy moves.

    python ppo_kl.py --env-id Hopper-v4                                 # 1M steps, 4 minutes: return about 2100
    python ppo_kl.py --env-id CartPole-v1 --total-timesteps 200000      # 30 seconds: return about 480

Slides 近端策略优化 PPO: "3. 自适应的KL惩罚项参数", "2. 优势函数选用多步时序差分" (Schulman et al. 2017, arXiv:1707.06347)

    PPO-KLPEN   L^KLPEN(θ) = Ê_t[ r_t(θ) Â_t − β KL[πθ_old(·|s_t), πθ(·|s_t)] ],  r_t(θ) = πθ(a_t|s_t) / πθ_old(a_t|s_t)
    PPO-BETA-1  d = Ê_t[ KL[πθ_old(·|s_t), πθ(·|s_t)] ]
    PPO-BETA-2  if d < d_targ / 1.5:  β ← β / 2
    PPO-BETA-3  if d > d_targ × 1.5:  β ← β × 2
    PPO-ADV     Â_t = −V(s_t) + r_t + γ r_{t+1} + … + γ^{T−1−t} r_{T−1} + γ^{T−t} V(s_T)
    PPO-1       in each iteration, N actors in parallel collect T steps each with π_θold
    PPO-2       compute Â_t for every step, and L of minibatches
    PPO-3       for K epochs over minibatches: update θ by L^KLPEN
    PPO-4       θ_old ← θ

Symbols     variable            shape     meaning
    s_t     obs                 (T,N,S)   observation; next_obs is s_{t+1}, the true one also when an episode ends
    a_t     actions             (T,N[,A]) continuous: A numbers; discrete: the index of one of A actions
    r_t     rewards             (T,N)     reward. r_t(θ), the probability ratio, is `ratio`
    V       values              (T,N)     critic's estimate of the return from s_t; next_values from s_{t+1}
    Â_t     advantages          (T,N)     how much better a_t was than the policy's average action
    θ       theta               (P,)      parameters of the policy and of the value function, one vector
    γ, λ    gamma, gae_lambda             discount; how far the advantage looks before it trusts V
    β       agent.beta                    price of the KL, adapted so that the KL per iteration stays near d_targ nats
    K       update_epochs                 passes over the T·N steps of an iteration, by minibatches

Departures from the slides
    PPO-ADV   is the λ = 1 case of the λ-weighted sum here (GAE, arXiv:1506.02438); λ < 1 trades variance for bias.
              The deck prints γ^{T−t+1} r_{T−1}, as the paper does; the sum needs γ^{T−1−t}.
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
from typing import NamedTuple

import gymnasium as gym
import numpy as np
import torch
import tyro
from torch import Tensor, nn
from tqdm import tqdm

SCRIPT = "ppo_kl"


# ── Arguments ─────────────────────────────────────────────────────────────────────────────────────────────────────

@dataclass
class Args:
    env_id: str = "Hopper-v4"  # Gymnasium environment: observes a vector; continuous (Box) or discrete actions
    seed: int = 1  # of the networks, the actions, the minibatches and the environments
    total_timesteps: int = 1_000_000  # environment steps, counted over all actors
    num_envs: int = 8  # N: actors, each with an environment of its own
    num_steps: int = 256  # T: steps that each actor collects per iteration
    minibatch_size: int = 64  # steps per gradient; divides N·T
    update_epochs: int = 10  # K: passes over the N·T steps of an iteration
    learning_rate: float = 3e-4  # Adam's step size at the start
    anneal_lr: bool = True  # lower the step size linearly to 0 over the run
    gamma: float = 0.99  # γ: discount per step
    gae_lambda: float = 0.95  # λ of the advantage: 1 is the slide's sum, 0 the one-step TD error
    beta: float = 1.0  # β at the start: price of each nat of KL; 0: neither clipping nor penalty (L^CPI)
    adapt_beta: bool = True  # halve or double β to keep the KL near d_targ
    d_targ: float = 0.01  # KL per iteration, in nats, that β is adapted to
    ent_coef: float = 0.0  # weight of the entropy bonus: above 0 keeps the policy exploring
    max_grad_norm: float = 0.5  # length that a gradient is shortened to; inf: never
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

def mlp(inputs: int, outputs: int, gain: float) -> nn.Sequential:
    """inputs → 64 → 64 → outputs, with tanh between.

    [DETAIL] Orthogonal weights keep the signal's size; a last layer near 0 gives all actions an even start."""
    layers = [nn.Linear(inputs, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, outputs)]
    for layer, layer_gain in zip(layers[::2], (2**0.5, 2**0.5, gain)):
        nn.init.orthogonal_(layer.weight, layer_gain)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


class RunningNorm(nn.Module):
    """[DETAIL] Subtracts the mean and divides by the standard deviation of all data so far: tanh and Adam work best on
    numbers around ±1. The statistics are buffers, so they are saved, and frozen in evaluation, with the network."""

    def __init__(self, *shape: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("var", torch.ones(shape))
        self.register_buffer("std", torch.ones(shape))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    def update(self, x: Tensor) -> None:
        """x: (B, *shape). Pools two samples' moments (Chan et al. 1979)."""
        self.count += len(x)
        weight = (len(x) / self.count).float()
        mean = x.mean(0)
        var, delta = (x - mean).square().mean(0), mean - self.mean
        self.mean += weight * delta
        self.var += weight * (var - self.var) + weight * (1 - weight) * delta**2
        self.std.copy_((self.var + 1e-8).sqrt())

    def forward(self, x: Tensor) -> Tensor:
        return ((x - self.mean) / self.std).clamp(-10, 10)  # what has hardly moved so far has a std of almost 0

    def inverse(self, y: Tensor) -> Tensor:
        return y * self.std + self.mean


class Agent(nn.Module):
    """Policy πθ(a|s), value function V(s), and the running statistics of what the two see."""

    def __init__(self, observation_space: gym.spaces.Box, action_space: gym.spaces.Space):
        super().__init__()
        self.discrete = isinstance(action_space, gym.spaces.Discrete)
        S, A = observation_space.shape[0], action_space.n if self.discrete else action_space.shape[0]
        self.obs_norm, self.value_norm = RunningNorm(S), RunningNorm(1)
        self.register_buffer("beta", torch.tensor(1.0))  # saved with the networks: a resumed run goes on with it
        self.actor = mlp(S, A, gain=0.01)  # continuous: mean of a Gaussian; discrete: scores f_θ(s,a) of a softmax
        self.critic = mlp(S, 1, gain=1.0)
        # [DETAIL] σ, the same in every state, begins at 0.6: at 1 a third of the actions would be beyond their bounds.
        self.log_std = None if self.discrete else nn.Parameter(torch.full((A,), -0.5))

    def noise(self, *shape: int) -> Tensor:
        """(…,A): what makes actions random. Gaussian: σ·N(0,1). Softmax: Gumbel, as argmax(f + Gumbel) ~ softmax(f)."""
        shape = (*shape, self.actor[-1].out_features)
        if self.discrete:
            return -torch.empty(shape).exponential_().log()
        return torch.randn(shape) * self.log_std.cpu().exp()  # drawn on the CPU: the same numbers on every device

    def act(self, obs: Tensor, noise: Tensor | float = 0.0) -> Tensor:
        """(N,S) → (N[,A]): an action drawn from πθ(·|s); without noise the most probable one"""
        output = self.actor(self.obs_norm(obs)) + noise
        return output.argmax(-1) if self.discrete else output

    def log_prob(self, output: Tensor, action: Tensor) -> Tensor:
        """actor's output (B,A), action (B[,A]) → log πθ(a|s) (B,)"""
        if self.discrete:
            return softmax_log_prob(output, action)
        return gaussian_log_prob(output, self.log_std, action)

    def entropy(self, output: Tensor) -> Tensor:
        """actor's output (B,A) → mean entropy of πθ(·|s), in nats"""
        return softmax_entropy(output).mean() if self.discrete else gaussian_entropy(self.log_std)

    def kl(self, old: tuple[Tensor, Tensor | None], output: Tensor) -> Tensor:
        """actor's (output, log_std) of θ_old, and its output (B,A) → KL[πθ_old(·|s), πθ(·|s)] (B,)"""
        return softmax_kl(old[0], output) if self.discrete else gaussian_kl(*old, output, self.log_std)

    def value(self, x: Tensor) -> Tensor:
        """normalised obs x (B,S) → V(s) (B,), in the rewards' unit"""
        return self.value_norm.inverse(self.critic(x).squeeze(-1))


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

def gaussian_log_prob(mean: Tensor, log_std: Tensor, action: Tensor) -> Tensor:
    """log N(a; μ, σ²) = Σ_A −½ ((a−μ)/σ)² − log σ − ½ log 2π;   mean, action (B,A), log_std (A,) → (B,)"""
    z = (action - mean) * (-log_std).exp()
    return -0.5 * (z * z).sum(-1) - log_std.sum() - 0.5 * math.log(2 * math.pi) * log_std.numel()


def gaussian_entropy(log_std: Tensor) -> Tensor:
    """H = Σ_A log σ + ½ log 2πe in nats;   log_std (A,) → ()"""
    return log_std.sum() + 0.5 * math.log(2 * math.pi * math.e) * log_std.numel()


def softmax_log_prob(scores: Tensor, action: Tensor) -> Tensor:
    """log πθ(a|s) = f_θ(s,a) − log Σ_a' exp f_θ(s,a');   scores (B,A), action (B,) → (B,)"""
    return scores.log_softmax(-1).gather(-1, action.unsqueeze(-1)).squeeze(-1)


def softmax_entropy(scores: Tensor) -> Tensor:
    """H = −Σ_a π log π in nats;   scores (B,A) → (B,)"""
    log_probs = scores.log_softmax(-1)
    return -(log_probs.exp() * log_probs).sum(-1)


def gaussian_kl(mean_p: Tensor, log_std_p: Tensor, mean_q: Tensor, log_std_q: Tensor) -> Tensor:
    """D_KL(p ‖ q) = Σ_A log σ_q/σ_p + (σ_p² + (μ_p−μ_q)²) / 2σ_q² − ½ in nats;   means (B,A), log_stds (A,) → (B,)"""
    squares = (2 * log_std_p).exp() + (mean_p - mean_q).square()
    return (log_std_q - log_std_p + 0.5 * squares * (-2 * log_std_q).exp() - 0.5).sum(-1)


def softmax_kl(scores_p: Tensor, scores_q: Tensor) -> Tensor:
    """D_KL(p ‖ q) = Σ_a p (log p − log q) in nats;   scores (B,A) → (B,)"""
    log_p, log_q = scores_p.log_softmax(-1), scores_q.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def penalized_surrogate(ratio: Tensor, advantage: Tensor, kl: Tensor, beta: Tensor | float) -> Tensor:
    """r Â − β KL of every step (paper, eq. 8);   ratio, advantage, kl (B,) → (B,)"""
    return ratio * advantage - beta * kl  # [PPO-KLPEN]


def adapted_beta(beta: Tensor, kl: Tensor, d_targ: float) -> Tensor:
    """β for the next iteration, from the KL (B,) of this one's steps (paper, section 4)"""
    d = kl.mean()  # [PPO-BETA-1]
    if d < d_targ / 1.5:  # [PPO-BETA-2]
        return beta / 2
    if d > d_targ * 1.5:  # [PPO-BETA-3]
        return beta * 2
    return beta


def gae(rewards: Tensor, values: Tensor, next_values: Tensor, terminated: Tensor, truncated: Tensor,
        gamma: float, lmbda: float) -> Tensor:
    """[PPO-ADV] Â_t = Σ_l (γλ)^l δ_{t+l}, δ_t = r_t + γ V(s_{t+1}) − V(s_t) (paper, eq. 11), for λ = 1 the slide's sum.

    All (T,N) → (T,N), in the rewards' unit. A terminal s_{t+1} is worth 0; a truncated one keeps its value."""
    td_delta = rewards + gamma * next_values * ~terminated - values
    carry = gamma * lmbda * ~(terminated | truncated)  # what comes after an episode's end belongs to another episode
    advantages, advantage = torch.zeros_like(rewards), torch.zeros_like(rewards[0])
    for t in reversed(range(len(rewards))):
        advantages[t] = advantage = td_delta[t] + carry[t] * advantage
    return advantages


# ── Collecting ────────────────────────────────────────────────────────────────────────────────────────────────────

class Rollout(NamedTuple):
    obs: Tensor  # (T,N,S) and so on, as in the table above
    actions: Tensor
    rewards: Tensor
    next_obs: Tensor
    terminated: Tensor
    truncated: Tensor
    episodes: list[tuple[int, float, int]]  # of those that ended: steps into the rollout, return, length


@torch.no_grad()
def collect(agent: Agent, actors: list[Actor], T: int, device: torch.device) -> Rollout:
    """[PPO-1] N actors collect T steps each with π_θold."""
    N, S = len(actors), agent.obs_norm.mean.shape[0]
    obs, next_obs = np.zeros((2, T, N, S), np.float32)
    rewards, (terminated, truncated) = np.zeros((T, N), np.float32), np.zeros((2, T, N), bool)
    noise, actions, episodes = agent.noise(T, N).to(device), [], []
    for t in range(T):
        obs[t] = [actor.obs for actor in actors]
        actions.append(agent.act(torch.from_numpy(obs[t]).to(device), noise[t]))
        for n, (actor, action) in enumerate(zip(actors, actions[t].cpu().numpy())):
            next_obs[t, n], rewards[t, n], terminated[t, n], truncated[t, n] = actor.step(action)
            if terminated[t, n] or truncated[t, n]:
                episodes.append(((t + 1) * N, actor.episodic_return, len(actor.actions)))
                actor.reset()
    arrays = obs, torch.stack(actions), rewards, next_obs, terminated, truncated
    return Rollout(*(torch.as_tensor(x, device=device) for x in arrays), episodes)


# ── Update ────────────────────────────────────────────────────────────────────────────────────────────────────────

def update(agent: Agent, theta: nn.Parameter, optimizer: torch.optim.Optimizer, rollout: Rollout, args: Args) -> dict:
    """One iteration's learning, from a rollout to the mean losses of its minibatches."""
    # [DETAIL] Statistics first, then θ: the policy that is optimised here is to the letter the one that acts next.
    # The price: π_θold below sees these statistics too, a little newer than those that the actors acted by.
    agent.obs_norm.update(rollout.obs.flatten(0, 1))
    with torch.no_grad():
        # [PPO-2] compute Â_t for every step
        x, next_x = agent.obs_norm(rollout.obs), agent.obs_norm(rollout.next_obs)
        values, next_values = agent.value(x), agent.value(next_x)
        advantages = gae(rollout.rewards, values, next_values, rollout.terminated, rollout.truncated,
                         args.gamma, args.gae_lambda)
        returns = advantages + values  # the λ-return: what V(s_t) should have been
        agent.value_norm.update(returns.reshape(-1, 1))
        # [DETAIL] Â of mean 0 and variance 1 makes one learning rate fit environments with any size of reward.
        advantages = (advantages - advantages.mean()) / (advantages.std(correction=0) + 1e-8)
        old_output, old_log_std = agent.actor(x), copy.deepcopy(agent.log_std)  # π_θold, before θ moves
        old_log_probs = agent.log_prob(old_output, rollout.actions)
    targets = agent.value_norm(returns)
    batch = [y.flatten(0, 1) for y in (x, rollout.actions, old_log_probs, old_output, advantages, targets)]

    # [PPO-3] for K epochs over minibatches: update θ by L^KLPEN
    losses = []
    for _ in range(args.update_epochs):
        shuffled = torch.randperm(len(batch[0]))
        minibatches = zip(*(y[shuffled].split(args.minibatch_size) for y in batch))
        for x, action, old_log_prob, old_output, advantage, target in minibatches:
            output = agent.actor(x)
            ratio = (agent.log_prob(output, action) - old_log_prob).exp()  # r_t(θ)
            kl = agent.kl((old_output, old_log_std), output)
            policy_loss = -penalized_surrogate(ratio, advantage, kl, agent.beta).mean()
            value_loss = 0.5 * (agent.critic(x).squeeze(-1) - target).square().mean()
            loss = policy_loss + 0.5 * value_loss  # [DETAIL] one step for both networks (paper, eq. 9)
            if args.ent_coef:
                loss = loss - args.ent_coef * agent.entropy(output)
            theta.grad.zero_()
            loss.backward()
            theta.grad *= (args.max_grad_norm / theta.grad.norm()).clamp(max=1)  # [DETAIL] no leap on an odd minibatch
            optimizer.step()
            losses.append(torch.stack([policy_loss, value_loss]).detach())

    # [PPO-4] θ_old ← θ: the next rollout is collected with the new θ
    with torch.no_grad():
        output = agent.actor(batch[0])
        kl = agent.kl((batch[3], old_log_std), output)
        policy_loss, value_loss = torch.stack(losses).mean(0)
        metrics = {
            "losses/policy_loss": policy_loss,
            "losses/value_loss": value_loss,
            "losses/entropy": agent.entropy(output),
            "losses/kl": kl.mean(),
            "losses/beta": agent.beta.clone(),
            "losses/explained_variance": 1 - (returns - values).var(correction=0) / (returns.var(correction=0) + 1e-8),
        }
        if args.adapt_beta:
            agent.beta.copy_(adapted_beta(agent.beta, kl, args.d_targ))
    return {name: value.item() for name, value in metrics.items()}


# ══ The slides end here. Below: running, saving, evaluating, the command line ═════════════════════════════════════

METRICS = (
    "charts/episodic_return", "charts/episodic_length", "charts/learning_rate", "charts/SPS", "losses/policy_loss",
    "losses/value_loss", "losses/entropy", "losses/kl", "losses/beta", "losses/explained_variance",
)
FIXED = ("env_id", "num_envs")  # settings that hold for every use of a checkpoint
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
    continuous = isinstance(acted, gym.spaces.Box) and len(acted.shape) == 1 and acted.dtype.kind == "f"
    if not continuous and not (isinstance(acted, gym.spaces.Discrete) and acted.start == 0):
        raise Failure(f"{args.env_id} takes {acted}: choose an --env-id with a vector of numbers or Discrete actions")
    return envs


def record(env: gym.Env, folder: Path, name: str) -> gym.Env:
    return gym.wrappers.RecordVideo(env, str(folder / "videos"), name_prefix=name, disable_logger=True)


def train(args: Args, checkpoint: dict | None) -> int:
    """Iterates from the start or from a checkpoint; returns the signal that stopped it, or 0."""
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    envs = open_envs(args, args.num_envs)
    agent = Agent(envs[0].observation_space, envs[0].action_space).to(device)
    theta = as_vector(agent.parameters())
    # [DETAIL] eps of 1e-5, as in the paper's own code: gradients near 0, mere noise, move θ less than a full step.
    optimizer = torch.optim.Adam([theta], lr=args.learning_rate, eps=1e-5, fused=True)
    step, batch_size = 0, args.num_envs * args.num_steps
    if checkpoint:
        step = checkpoint["global_step"]
        if step + batch_size > args.total_timesteps:
            raise Failure(f"{args.resume} is complete at step {step}: go on with a larger --total-timesteps")
        agent.load_state_dict(checkpoint["agent"])
        optimizer.load_state_dict(checkpoint["optimizer"])
    kept = checkpoint and all(getattr(args, name) == checkpoint["args"][name] for name in ("beta", "total_timesteps"))
    agent.beta.fill_(agent.beta if kept else args.beta)  # made longer, a run begins anew: its steps are large again
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
            # [DETAIL] Ever smaller steps: the last policies are then good ones, not merely good on average.
            learning_rate = args.learning_rate * (1 - step / args.total_timesteps if args.anneal_lr else 1)
            optimizer.param_groups[0]["lr"] = learning_rate
            rollout = collect(agent, actors, args.num_steps, device)
            losses = update(agent, theta, optimizer, rollout, args)
            for steps, episodic_return, length in rollout.episodes:
                run.log(step + steps, {"charts/episodic_return": episodic_return, "charts/episodic_length": length})
            step += batch_size
            run.log(step, {"charts/learning_rate": learning_rate, "charts/SPS": run.sps(step), **losses})
            over = step + batch_size > args.total_timesteps or run.signal  # what ends the run is saved before
            if over or time.time() > run.due:
                run.save(step, {
                    "agent": agent.state_dict(),
                    "optimizer": optimizer.state_dict(),
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
    batch_size = args.num_envs * args.num_steps
    rules = {
        "--num-envs, --num-steps, --minibatch-size, --update-epochs, --eval-episodes: at least 1": min(
            args.num_envs, args.num_steps, args.minibatch_size, args.update_epochs, args.eval_episodes) >= 1,
        f"--total-timesteps: at least N·T = {batch_size}, one iteration": args.total_timesteps >= batch_size,
        f"--minibatch-size: a divisor of N·T = {batch_size}": batch_size % (args.minibatch_size or 1) == 0,
        "--learning-rate: above 0, and finite": 0 < args.learning_rate < math.inf,
        "--beta: at least 0; --d-targ: above 0": args.beta >= 0 and args.d_targ > 0,
        "--max-grad-norm: above 0": args.max_grad_norm > 0,
        "--gamma, --gae-lambda: from 0 to 1": 0 <= args.gamma <= 1 and 0 <= args.gae_lambda <= 1,
        "--ent-coef: at least 0": args.ent_coef >= 0,
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
