# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "torch==2.13.0", "gymnasium[classic-control,mujoco]==1.4.0", "mujoco==3.2.7", "numpy==2.2.6",
#     "ale-py==0.12.1", "tyro==1.0.17", "wandb==0.31.0", "tqdm==4.70.1", "moviepy==2.2.1",
# ]
# ///
# SPDX-License-Identifier: MIT
"""A3C: processes with an environment each push their gradients into shared parameters, without waiting for each other.

    python a3c.py --env-id Hopper-v4 --num-workers 2                                # 2 minutes: return about 1600
    python a3c.py --env-id CartPole-v1 --num-workers 2 --total-timesteps 300000    # 30 seconds: return about 500
    python a3c.py --env-id ALE/Pong-v5 --num-workers 2 --lstm --ent-coef 0.01 --total-timesteps 10000000
                                                                        # from −20 to about 0 in the first hour

Slides "复习A2C：优势Actor-Critic", "A3C: 异步A2C方法", "A3C算法" (Mnih et al. 2016, arXiv:1602.01783, algorithm S3)

    A2C-ADV   A^π(s,a) = Q^π(s,a) − V^π(s)
    A3C-GRAD  ∇_θ' log π(a_t|s_t; θ') A(s_t,a_t; θ_v)
    A3C-ADV   A(s_t,a_t; θ_v) = Σ_{i=0}^{k−1} γ^i r_{t+i} + γ^k V(s_{t+k}; θ_v) − V(s_t; θ_v)

    Of each actor-learner, with global shared θ, θ_v and counter T = 0, and θ', θ'_v of its own:
    A3C-1     initialise own step counter t ← 1
    A3C-2     repeat
    A3C-3         reset gradients dθ ← 0, dθ_v ← 0
    A3C-4         synchronise own parameters θ' = θ, θ'_v = θ_v
    A3C-5         t_start = t
    A3C-6         get state s_t
    A3C-7         repeat
    A3C-8             perform a_t according to π(a_t|s_t; θ')
    A3C-9             receive reward r_t and new state s_{t+1}
    A3C-10            t ← t + 1
    A3C-11            T ← T + 1
    A3C-12        until terminal s_t or t − t_start == t_max
    A3C-13        R = 0 for terminal s_t;  V(s_t, θ'_v) for non-terminal s_t
    A3C-14        for i ∈ {t−1, …, t_start} do
    A3C-15            R ← r_i + γ R
    A3C-16            dθ   ← dθ   + ∇_θ' log π(a_i|s_i; θ') (R − V(s_i; θ'_v))
    A3C-17            dθ_v ← dθ_v + ∂ (R − V(s_i; θ'_v))² / ∂θ'_v
    A3C-18        end for
    A3C-19        asynchronous update of θ using dθ and of θ_v using dθ_v
    A3C-20    until T > T_max

Symbols     variable            shape     meaning, with k = t − t_start steps in a segment
    s_t     obs                 (k+1,…)   observations of the segment, up to and with its last s_t
    a_t     actions             (k[,A])   continuous: A numbers; discrete: the index of one of A actions
    r_t     rewards             (k,)      reward
    R       returns             (k,)      what followed s_i: rewards to the segment's end, then V
    V       values              (k+1,)    critic's estimate of the return from s_i
    θ, θ_v  shared.theta        (P,)      parameters of policy and value function, a vector in shared memory
    θ',θ'_v theta               (P,)      the actor-learner's own copy; its gradient holds −dθ and dθ_v
    T, t    shared.T, t                   steps of all actor-learners, and of one
    T_max   total_timesteps

Departures from the slides
    A3C-14    The segment's sums run backwards only for R; the gradients of all i come from one back-propagation.
    A3C-19    is RMSProp whose mean square of the gradient is shared too, as in the paper; nobody locks θ (Hogwild).
    A3C-20    stops at T ≥ T_max, each actor-learner as its segment ends.
    θ, θ_v    have the layers before the last in common, as the paper's have.
    t_max     is 20 here with a step size of 1e-3; the paper's 5 and 7e-4 suit its 16 actor-learners on Atari.
    [DETAIL]  marks whatever else the slides don't have, each with its reason.
"""

import contextlib
import csv
import ctypes
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
from collections.abc import Container, Iterable, Iterator
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import NamedTuple

import gymnasium as gym
import numpy as np
import torch
import torch.multiprocessing as mp
import tyro
from torch import Tensor, nn
from tqdm import tqdm

SCRIPT = "a3c"


# ── Arguments ─────────────────────────────────────────────────────────────────────────────────────────────────────

@dataclass
class Args:
    env_id: str = "Hopper-v4"  # Gymnasium environment: observes a vector, or an Atari game ALE/…; any kind of actions
    seed: int = 1  # of the networks, the actions and the environments
    total_timesteps: int = 1_000_000  # environment steps, counted over all actors
    num_workers: int = 4  # actor-learners, each a process with an environment of its own
    t_max: int = 20  # steps between two updates of an actor-learner, fewer where an episode ends
    lstm: bool = False  # a memory between the observations and the decisions
    learning_rate: float = 1e-3  # RMSProp's step size at the start
    anneal_lr: bool = True  # lower the step size linearly to 0 over the run
    rms_alpha: float = 0.99  # how much of RMSProp's mean square of the gradient stays at each update
    rms_eps: float = 0.1  # added to that mean square
    gamma: float = 0.99  # γ: discount per step
    ent_coef: float = 1e-4  # weight of the entropy bonus, the paper's for continuous actions; for Atari's it is 0.01
    max_grad_norm: float = 40.0  # length that a gradient is shortened to; inf: never
    cuda: bool = False  # put the actor-learners' own networks on the GPU if there is one; these are faster on the CPU
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
    if env_id.startswith("ALE/"):
        return Atari(env_id)
    env = gym.make(env_id, render_mode="rgb_array" if render else None, disable_env_checker=True)
    if render and getattr(getattr(env.unwrapped, "model", None), "ncam", 0):
        env.unwrapped.mujoco_renderer.camera_id = 0  # MuJoCo: the model's camera follows the body, the default one not
    if isinstance(env.action_space, gym.spaces.Box) and env.action_space.is_bounded():
        # [DETAIL] What a policy calls ±1, a Gaussian's first deviation or all of tanh, becomes the environment's range.
        low, high = env.action_space.low, env.action_space.high
        middle, half, unit = (high + low) / 2, (high - low) / 2, gym.spaces.Box(-1, 1, low.shape, low.dtype)
        env = gym.wrappers.TransformAction(env, lambda action: (middle + half * action).clip(low, high), unit)
    return env


class Atari(gym.Env):
    """[DETAIL] An Atari game as the paper sees it: the last 4 frames in 84×84 grey points, an action for every 4.

    But for v5's sticky actions: with a probability of ¼ the game takes the last action again."""

    metadata, render_mode = {"render_modes": ["rgb_array"], "render_fps": 15}, "rgb_array"

    def __init__(self, env_id: str):
        import ale_py

        gym.register_envs(ale_py)
        self.games = gym.make_vec(env_id, num_envs=1, reward_clipping=False)
        self.observation_space, self.action_space = self.games.single_observation_space, self.games.single_action_space

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        (self.frames,), _ = self.games.reset(seed=seed)
        return self.frames, {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        (self.frames,), (reward,), (terminated,), (truncated,), _ = self.games.step(np.array([action]))
        return self.frames, float(reward), bool(terminated), bool(truncated), {}

    def render(self) -> np.ndarray:
        return np.repeat(self.frames[-1][..., None], 3, axis=-1)

    def close(self) -> None:
        self.games.close()


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

def orthogonal(layer: nn.Module, gain: float = 2**0.5) -> nn.Module:
    """[DETAIL] Orthogonal weights keep the signal's size; a last layer near 0 gives all actions an even start."""
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


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


Memory = tuple[Tensor, Tensor] | None  # of an LSTM, (h, c) of (1,H) each; None without one, or as an episode begins


class Agent(nn.Module):
    """Policy π(a|s;θ) and value function V(s;θ_v) on a common body, and the running statistics of what they see."""

    def __init__(self, observation_space: gym.spaces.Box, action_space: gym.spaces.Space, lstm: bool = False):
        super().__init__()
        self.discrete = isinstance(action_space, gym.spaces.Discrete)
        self.frames = len(observation_space.shape) == 3
        S, A = observation_space.shape[0], action_space.n if self.discrete else action_space.shape[0]
        H = 256 if self.frames else 64  # width of the last layer in common
        self.obs_norm, self.value_norm = RunningNorm(*observation_space.shape), RunningNorm(1)
        if self.frames:  # the paper's: two convolutions and a layer
            self.body = nn.Sequential(
                orthogonal(nn.Conv2d(S, 16, 8, stride=4)), nn.ReLU(),
                orthogonal(nn.Conv2d(16, 32, 4, stride=2)), nn.ReLU(), nn.Flatten(),
                orthogonal(nn.Linear(32 * 9 * 9, H)), nn.ReLU())
        else:
            self.body = nn.Sequential(orthogonal(nn.Linear(S, H)), nn.Tanh(), orthogonal(nn.Linear(H, H)), nn.Tanh())
        self.lstm = nn.LSTM(H, H) if lstm else None
        self.actor = orthogonal(nn.Linear(H, A), 0.01)  # continuous: mean of a Gaussian; discrete: scores of a softmax
        self.critic = orthogonal(nn.Linear(H, 1), 1.0)
        self.log_std = None if self.discrete else nn.Parameter(torch.zeros(A))  # the same in every state

    def features(self, obs: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """obs (k,…) of k steps in a row, the memory before them → what the heads see of each (k,H), the memory after"""
        features = self.body(self.obs_norm(obs).to(self.critic.weight.device))
        return self.lstm(features, memory) if self.lstm else (features, None)

    def noise(self, *shape: int) -> Tensor:
        """(…,A): what makes actions random. Gaussian: σ·N(0,1). Softmax: Gumbel, as argmax(f + Gumbel) ~ softmax(f)."""
        shape = (*shape, self.actor.out_features)
        if self.discrete:
            return -torch.empty(shape).exponential_().log()
        return torch.randn(shape) * self.log_std.cpu().exp()  # drawn on the CPU: the same numbers on every device

    def act(self, obs: Tensor, memory: Memory = None, noise: Tensor | float = 0.0) -> tuple[Tensor, Memory]:
        """obs (1,…) → (1[,A]): an action drawn from π(·|s), without noise the most probable one; the memory after it"""
        features, memory = self.features(obs, memory)
        output = self.actor(features) + noise
        return output.argmax(-1) if self.discrete else output, memory

    def log_prob(self, output: Tensor, action: Tensor) -> Tensor:
        """actor's output (B,A), action (B[,A]) → log πθ(a|s) (B,)"""
        if self.discrete:
            return softmax_log_prob(output, action)
        return gaussian_log_prob(output, self.log_std, action)

    def entropy(self, output: Tensor) -> Tensor:
        """actor's output (B,A) → mean entropy of πθ(·|s), in nats"""
        return softmax_entropy(output).mean() if self.discrete else gaussian_entropy(self.log_std)


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
# Pure functions of tensors, which only rmsprop_ changes; shapes that don't broadcast raise torch's RuntimeError.

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


def score_loss(log_prob: Tensor, advantage: Tensor) -> Tensor:
    """−Σ_i log π(a_i|s_i; θ') A_i, whose gradient is −dθ of A3C-16;   log_prob, advantage (k,) → ()"""
    return -(log_prob * advantage).sum()  # [A3C-GRAD]


def n_step_returns(rewards: Tensor, bootstrap: Tensor, gamma: float) -> Tensor:
    """R ← r_i + γ R, backwards from R = bootstrap (A3C-15);   rewards (k,), bootstrap () → (k,) in the rewards' unit"""
    returns, R = [], bootstrap.item()
    for reward in reversed(rewards.tolist()):  # plain numbers: a tensor's takes 20 times as long
        R = reward + gamma * R
        returns.append(R)
    return rewards.new_tensor(returns[::-1])


def n_step_advantage(returns: Tensor, value: Tensor) -> Tensor:
    """[A3C-ADV] A_i = R_i − V(s_i): R_i, a sample of Q^π(s_i,a_i), for Q in [A2C-ADV];   returns, value (k,) → (k,)

    No gradient passes: an advantage weighs the policy's gradient, and V learns by a loss of its own."""
    return returns - value.detach()


def squared_error(value: Tensor, target: Tensor) -> Tensor:
    """Σ_i (R_i − V(s_i; θ'_v))² (A3C-17);   value, target (k,) → ()"""
    return (target - value).square().sum()


def rmsprop_(theta: Tensor, square_avg: Tensor, grad: Tensor, learning_rate: float, alpha: float, eps: float) -> None:
    """g ← α g + (1−α) Δθ²;  θ ← θ − η Δθ / sqrt(g + ε) (paper, eq. 1), both in place;   all (P,)"""
    square_avg.mul_(alpha).addcmul_(grad, grad, value=1 - alpha)
    theta.addcdiv_(grad, (square_avg + eps).sqrt_(), value=-learning_rate)


# ── Collecting ────────────────────────────────────────────────────────────────────────────────────────────────────

class Shared(NamedTuple):
    """What all actor-learners read and write, in shared memory."""

    agent: Agent  # with θ and θ_v, and the running statistics
    theta: Tensor  # all of the agent's parameters as one vector
    square_avg: Tensor  # RMSProp's g
    T: Synchronized  # steps that all have taken, with a lock
    steps: ctypes.Array  # of as many numbers as actor-learners: steps that each has taken
    pause: ctypes.c_byte  # 1 while the actor-learners are to meet as their segments end, for a checkpoint


class Segment(NamedTuple):
    """What an actor-learner tells of t_max steps, or of the fewer to an episode's end."""

    T: int
    memory: Memory  # that the next segment starts with
    episode: tuple[float, int] | None  # return and length of the episode that ended
    learning_rate: float
    losses: list[float]  # per step: of the policy, of the value function; entropy


# ── Update ────────────────────────────────────────────────────────────────────────────────────────────────────────

def actor_learner(n: int, agent: Agent, actor: Actor, memory: Memory, shared: Shared, args: Args) -> Iterator[Segment]:
    """Algorithm S3 from top to bottom, as the n-th process runs it."""
    device, theta = agent.critic.weight.device, as_vector(agent.parameters())
    agent.obs_norm, agent.value_norm = shared.agent.obs_norm, shared.agent.value_norm
    # [A3C-1] initialise own step counter t ← 1
    t = 1 + shared.steps[n]
    # [A3C-2] repeat
    while True:
        # [A3C-3] reset gradients dθ ← 0, dθ_v ← 0
        theta.grad.zero_()
        # [A3C-4] synchronise own parameters θ' = θ, θ'_v = θ_v
        theta.data.copy_(shared.theta)
        # [A3C-5] t_start = t
        t_start, start_memory, actions, rewards = t, memory, [], []
        with torch.no_grad():  # [DETAIL] Drawn for the whole segment: as many draws of one step take longer.
            noise = agent.noise(args.t_max, 1).to(device)
        # [A3C-6] get state s_t
        obs = [torch.from_numpy(np.array(actor.obs, np.float32))]
        # [A3C-7] repeat
        terminated = truncated = False
        while not (terminated or truncated or t - t_start == args.t_max):
            # [A3C-8] perform a_t according to π(a_t|s_t; θ')
            with torch.no_grad():
                action, memory = agent.act(obs[-1].unsqueeze(0), memory, noise[t - t_start])
            # [A3C-9] receive reward r_t and new state s_{t+1}
            next_obs, reward, terminated, truncated = actor.step(action.cpu().numpy()[0])
            obs.append(torch.from_numpy(np.array(next_obs, np.float32)))
            actions.append(action)
            rewards.append(reward)
            # [A3C-10] t ← t + 1
            t += 1
            shared.steps[n] = t - 1
            # [A3C-11] T ← T + 1
            with shared.T.get_lock():
                shared.T.value += 1
                T = shared.T.value
            # [A3C-12] until terminal s_t or t − t_start == t_max: this loop's condition
        episode = None
        if terminated or truncated:
            episode, memory = (actor.episodic_return, len(actor.actions)), None
            actor.reset()
        obs = torch.stack(obs)
        features, _ = agent.features(obs, start_memory)
        values = agent.critic(features).squeeze(-1)  # V(s_i; θ'_v), in units of value_norm
        # [A3C-13] R = 0 for terminal s_t;  V(s_t, θ'_v) for non-terminal s_t
        bootstrap = agent.value_norm.inverse(values[-1].detach().cpu()) * (not terminated)
        # [A3C-14] for i ∈ {t−1, …, t_start} do
        rewards = torch.tensor(rewards, dtype=torch.float32)
        if agent.frames:
            rewards = rewards.sign()  # [DETAIL] One step size then fits all games, whatever their points are worth.
        # [A3C-15] R ← r_i + γ R
        returns = n_step_returns(rewards, bootstrap, args.gamma)
        # [DETAIL] R and V in units of the returns' deviation: one step size then fits rewards of any size.
        target = agent.value_norm(returns.unsqueeze(1)).squeeze(1).to(device)
        output, advantage = agent.actor(features[:-1]), n_step_advantage(target, values[:-1])
        # [A3C-16] dθ ← dθ + ∇_θ' log π(a_i|s_i; θ') (R − V(s_i; θ'_v))
        policy_loss = score_loss(agent.log_prob(output, torch.cat(actions)), advantage)
        # [A3C-17] dθ_v ← dθ_v + ∂ (R − V(s_i; θ'_v))² / ∂θ'_v
        value_loss = squared_error(values[:-1], target)
        # [DETAIL] The paper's bonus for entropy keeps the policy from settling too early.
        entropy = agent.entropy(output)
        (policy_loss + value_loss - args.ent_coef * len(actions) * entropy).backward()
        # [A3C-18] end for
        norm = theta.grad.norm()
        theta.grad *= (args.max_grad_norm / norm).clamp(max=1)  # [DETAIL] no leap on an odd segment
        if not norm.isfinite():
            raise FloatingPointError("its gradient isn't finite: lower --learning-rate, or look for NaN in the "
                                     "environment's observations and rewards")
        # [A3C-19] asynchronous update of θ using dθ and of θ_v using dθ_v
        learning_rate = args.learning_rate * (max(0, 1 - T / args.total_timesteps) if args.anneal_lr else 1)
        rmsprop_(shared.theta, shared.square_avg, theta.grad.cpu(), learning_rate, args.rms_alpha, args.rms_eps)
        with shared.T.get_lock():  # units of what all networks see from now on; others' updates too come at any time
            agent.value_norm.update(returns.unsqueeze(1))
            agent.obs_norm.update(obs[:-1])
        losses = [policy_loss.item() / len(actions), value_loss.item() / len(actions), entropy.item()]
        yield Segment(T, memory, episode, learning_rate, losses)
        # [A3C-20] until T > T_max
        if T >= args.total_timesteps:
            return


# ══ The slides end here. Below: running, saving, evaluating, the command line ═════════════════════════════════════

METRICS = (
    "charts/episodic_return", "charts/episodic_length", "charts/learning_rate", "charts/SPS", "losses/policy_loss",
    "losses/value_loss", "losses/entropy",
)
LOG_STEPS = 1000  # of an actor-learner, over which the losses of a row are averaged
HANG_SECONDS = 7  # without a step, by which an actor-learner counts as hung
VIDEO_SECONDS = 60  # the same for the one that now and then has a video to write
FIXED = ("env_id", "num_workers", "lstm")  # settings that hold for every use of a checkpoint
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
    if not (isinstance(observed, gym.spaces.Box) and len(observed.shape) == 1 or isinstance(envs[0], Atari)):
        raise Failure(f"{args.env_id} observes {observed}: choose an --env-id that observes a vector, or an Atari game")
    if np.shape(obs) != observed.shape:
        raise Failure(f"{args.env_id} says that it observes {observed}, but observes {np.shape(obs)}: mend it")
    continuous = isinstance(acted, gym.spaces.Box) and len(acted.shape) == 1 and acted.dtype.kind == "f"
    if not continuous and not (isinstance(acted, gym.spaces.Discrete) and acted.start == 0):
        raise Failure(f"{args.env_id} takes {acted}: choose an --env-id with a vector of numbers or Discrete actions")
    return envs


def record(env: gym.Env, folder: Path, name: str) -> gym.Env:
    return gym.wrappers.RecordVideo(env, str(folder / "videos"), name_prefix=name, disable_logger=True)


def work(n: int, args: Args, shared: Shared, pipe: Connection, seed: int, state: dict, folder: Path) -> None:
    """The n-th process. Sends the rows of metrics.csv, and its state where the parent asks all to pause."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the parent is told, and tells
    warnings.filterwarnings("ignore", message=".*is out of date")
    torch.set_num_threads(1)  # a core of its own is all that an actor-learner has
    with contextlib.suppress(ConnectionError, EOFError):  # of a parent that is no more
        try:
            env = make_env(args.env_id, args.capture_video and n == 0)
            if args.capture_video and n == 0:
                env = record(env, folder, f"step-{shared.T.value}")
            device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
            agent = Agent(env.observation_space, env.action_space, args.lstm).to(device)
            torch.manual_seed(seed)
            actor, memory, losses = Actor(env), None, state.get("losses", [])
            if state:
                actor.reset(state["seed"], state["actions"].numpy())
                if state["memory"] and len(actor.actions) == len(state["actions"]):  # or a new episode has begun
                    memory = tuple(part.to(device) for part in state["memory"])
                torch.set_rng_state(state["rng_state"])

            def meet() -> bool:
                """Sends what the checkpoint needs, waits until it is written; whether to go on"""
                actions = torch.from_numpy(np.array(actor.actions))
                parts = memory and tuple(part.cpu() for part in memory)
                pipe.send(("state", {"memory": parts, "losses": losses, "seed": actor.seed, "actions": actions,
                                     "rng_state": torch.get_rng_state()}))
                return pipe.recv()

            for T, memory, episode, learning_rate, loss in actor_learner(n, agent, actor, memory, shared, args):
                losses.append(loss)
                ended = T >= args.total_timesteps
                if episode:
                    pipe.send(("row", (T, dict(zip(METRICS, episode)))))
                if len(losses) * args.t_max >= LOG_STEPS or ended:
                    means = np.mean(losses, axis=0).tolist()
                    pipe.send(("row", (T, {"charts/learning_rate": learning_rate, **dict(zip(METRICS[4:], means))})))
                    losses = []
                if (ended or shared.pause.value) and not meet():
                    break
            env.close()
        except Exception as error:  # an environment may raise whatever it likes
            pipe.send(("error", " ".join(str(error).split()) or repr(error)))


class Workers:
    """The actor-learners' processes, and a pipe to each."""

    def __init__(self, args: Args, shared: Shared, states: list[dict], folder: Path):
        self.shared, self.processes, self.pipes = shared, [], []
        self.seen = list(shared.steps)
        self.idle = [-math.inf] * args.num_workers  # seconds without a step, counted from its first one on
        self.patience = [HANG_SECONDS] * args.num_workers
        if args.capture_video:
            self.patience[0] = VIDEO_SECONDS
        handlers = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
        for n, seed in enumerate(torch.randint(2**62, (args.num_workers,)).tolist()):
            ours, theirs = mp.get_context("spawn").Pipe()
            process = mp.get_context("spawn").Process(
                target=work, args=(n, args, shared, theirs, seed, states[n], folder), daemon=True)
            process.start()  # with Ctrl-C ignored, or it would end in a traceback of the child's
            theirs.close()
            self.processes.append(process)
            self.pipes.append(ours)
        for number, handler in handlers.items():
            signal.signal(number, handler)

    def messages(self, paused: Container[int]) -> Iterator[tuple[int, str, object]]:
        """(n, kind, content) of all that has come in, at the latest after a second"""
        begun = time.monotonic()
        wait([*self.pipes, *(process.sentinel for process in self.processes)], timeout=1)
        for n, (process, pipe) in enumerate(zip(self.processes, self.pipes)):
            alive = process.is_alive()
            with contextlib.suppress(EOFError, OSError):  # of a process that is no more
                while pipe.poll():
                    yield n, *pipe.recv()
            if not alive:
                self.fail(n, f"died (exit code {process.exitcode})")
            steps = self.shared.steps[n]
            if steps != self.seen[n] or n in paused:
                self.seen[n], self.idle[n] = steps, 0
            self.idle[n] += min(time.monotonic() - begun, 1)  # time that all were stopped for (Ctrl-Z) doesn't count
            if self.idle[n] > self.patience[n]:
                self.fail(n, f"has taken no step for {self.patience[n]} seconds")

    def fail(self, n: int, what: str) -> None:
        raise Failure(f"worker {n} {what}")

    def tell(self, go_on: bool) -> None:
        for n, pipe in enumerate(self.pipes):
            try:
                pipe.send(go_on)
            except OSError:
                self.fail(n, "died")

    def join(self) -> None:
        """Lets all end by themselves, which takes a while where there is a video to write."""
        for process in self.processes:
            process.join(VIDEO_SECONDS)

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def train(args: Args, checkpoint: dict | None) -> int:
    """Trains from the start or from a checkpoint; returns the signal that stopped it, or 0."""
    (env,) = open_envs(args, 1)
    agent = Agent(env.observation_space, env.action_space, args.lstm)
    env.close()
    theta, step, states = as_vector(agent.parameters()).data, 0, [{}] * args.num_workers
    square_avg, steps = torch.zeros_like(theta), mp.get_context("spawn").RawArray("q", args.num_workers)
    if checkpoint:
        step, states = checkpoint["global_step"], checkpoint["workers"]
        if step >= args.total_timesteps:
            raise Failure(f"{args.resume} is complete at step {step}: go on with a larger --total-timesteps")
        agent.load_state_dict(checkpoint["agent"])
        square_avg.copy_(checkpoint["square_avg"])
        steps[:] = checkpoint["steps"]
    agent.share_memory()
    counter, pause = mp.get_context("spawn").Value("q", step), mp.get_context("spawn").RawValue("b", 0)
    shared = Shared(agent, theta, square_avg.share_memory_(), counter, steps, pause)
    with (Run(args, checkpoint) as run,
          contextlib.closing(Workers(args, shared, states, run.folder)) as workers):
        over, states = False, {}
        while not over:
            for n, kind, content in workers.messages(paused=states):
                if kind == "row":
                    T, metrics = content
                    step = max(T, run.bar.n)  # those of several processes come in almost, not quite, in order
                    sps = {"charts/SPS": run.sps(step)} if "losses/policy_loss" in metrics else {}
                    run.log(step, metrics | sps)
                elif kind == "state":
                    states[n] = content
                else:
                    workers.fail(n, f"failed: {content}")
            if states or run.signal or time.time() > run.due:
                pause.value = 1
            if len(states) == args.num_workers:
                step = counter.value
                over = step >= args.total_timesteps or run.signal  # what ends the run is saved before
                run.save(step, {
                    "agent": agent.state_dict(),
                    "square_avg": square_avg,
                    "steps": list(steps),
                    "workers": [states[n] for n in range(args.num_workers)],
                })
                pause.value, states = 0, {}
                workers.tell(not over)
        workers.join()
    run.summarize(step)
    return run.signal


def evaluate(agent: Agent, env: gym.Env, episodes: int) -> list[tuple[float, int]]:
    """(return, length) of episodes without exploration, while nothing learns"""
    results = []
    for episode in range(episodes):
        actor, memory, over = Actor(env), None, False
        while not over:
            with torch.no_grad():
                action, memory = agent.act(torch.as_tensor(actor.obs, dtype=torch.float32)[None], memory)
            over = any(actor.step(action.numpy()[0])[2:])
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
        "--num-workers, --total-timesteps, --t-max, --eval-episodes: at least 1": min(
            args.num_workers, args.total_timesteps, args.t_max, args.eval_episodes) >= 1,
        "--learning-rate, --rms-eps: above 0, and finite": all(
            0 < x < math.inf for x in (args.learning_rate, args.rms_eps)),
        "--max-grad-norm: above 0": args.max_grad_norm > 0,
        "--gamma, --rms-alpha: from 0 to 1": 0 <= args.gamma <= 1 and 0 <= args.rms_alpha <= 1,
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
            agent = Agent(env.observation_space, env.action_space, args.lstm)
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
