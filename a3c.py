# /// script
# requires-python = ">=3.10"
# dependencies = ["torch==2.13.0", "gymnasium[classic-control,mujoco]==1.4.0", "mujoco==3.2.7; python_version<'3.14'",
#                 "mujoco==3.8.1; python_version>='3.14'", "numpy==2.2.6; python_version<'3.14'",
#                 "numpy==2.4.6; python_version>='3.14'", "ale-py==0.12.1", "opencv-python-headless==5.0.0.93",
#                 "tyro==1.0.17", "wandb==0.31.0", "tqdm==4.70.1", "moviepy==2.2.1"]
# ///
# SPDX-License-Identifier: MIT
"""A3C: processes with an environment each push their gradients into shared parameters, without waiting for each other.

    python a3c.py --env-id Hopper-v4 --num-workers 2                               # 90 seconds: return about 1350
    python a3c.py --env-id CartPole-v1 --num-workers 2 --total-timesteps 300000   # 20 seconds: return about 500
    python a3c.py --env-id ALE/Pong-v5 --num-workers 2 --ent-coef 0.01 --learning-rate 3e-3  # 10 minutes: return 17

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

Symbols     variable            shape     meaning, with k steps in a segment (in A3C-ADV: in what is left of it)
    s_t     obs                 (k+1,…)   observations of the segment, up to and with its last s_t
    a_t     actions             (k[,A])   continuous: A numbers; discrete: the index of one of A actions
    r_t     rewards             (k,)      reward
    R       returns             (k,)      what followed s_i: rewards to the segment's end, then V
    V       values              (k+1,)    critic's estimate of the return from s_i, normalised unless s_i is frames
    θ, θ_v  shared.theta        (P,)      parameters of policy and value function, a vector in shared memory
    θ',θ'_v theta               (P,)      the actor-learner's own copy
    dθ,dθ_v gradient            (P,)      −dθ and dθ_v: downhill for both
    T, t    shared.T, t                   steps of all actor-learners so far; number of this one's next step
    T_max   total_timesteps

Departures from the slides
    A3C-4     copies θ and θ_v alone: all normalise by the same running statistics, which may change in a segment.
    A3C-12    A segment ends, too, where a time limit cuts the episode; its s_t isn't terminal, so A3C-13 bootstraps.
    A3C-14    Only R is summed backwards, step by step; the gradients of all i come from one back-propagation.
    A3C-19    is RMSProp whose mean square of the gradient is shared too, as in the paper; nobody locks θ (Hogwild).
    A3C-20    stops at T ≥ T_max, each actor-learner as its segment ends.
    θ, θ_v    have the layers before the last in common, as in the paper's networks for Atari. For continuous actions
              the paper has two networks, each a layer of 200 units and an LSTM of 128, σ² from the network, and an
              update per episode.
    t_max     is 20, with a step size of 1e-3. The paper has 5 on Atari, and draws step sizes from 1e-4 to 1e-2.
    [DETAIL]  marks whatever else the slides don't have, each with its reason.
"""

import contextlib
import copy
import io
import json
import math
import os
import random
import signal
import sys
import time
import traceback
import warnings
import zipfile
from collections import deque, namedtuple
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import torch
import torch.multiprocessing as mp
import tyro
from gymnasium.error import Error as Failure  # what the user can mend, told in one line: Gymnasium's errors, and ours
from torch import Tensor, nn
from tqdm import tqdm


# ── Arguments ─────────────────────────────────────────────────────────────────────────────────────────────────────

@dataclass
class Args:
    env_id: str = "Hopper-v4"  # environment that observes a vector, or an Atari game ALE/…; Box or Discrete actions
    seed: int = 1  # of the networks, the actions and the environments
    total_timesteps: int = 1_000_000  # environment steps, counted over all actors
    num_workers: int = 4  # actor-learners, each a process with an environment of its own
    t_max: int = 20  # steps between two updates of an actor-learner, fewer where an episode ends
    lstm: bool = False  # an LSTM before π and V: a memory of what was observed
    learning_rate: float = 1e-3  # RMSProp's step size at the start; for Atari choose 3e-3
    anneal_lr: bool = True  # lower the step size linearly to 0 over the run
    rms_alpha: float = 0.99  # how much of RMSProp's mean square of the gradient stays at each update
    rms_eps: float = 0.1  # added to that mean square
    gamma: float = 0.99  # γ: discount per step
    ent_coef: float = 1e-4  # weight of the entropy bonus, the paper's for continuous actions; for Atari choose 0.01
    max_grad_norm: float = 40.0  # a longer gradient is shortened to this length; inf: never
    patience: float = 60.0  # seconds without a step, from its start on, after which a hung actor-learner ends the run
    cuda: bool = False  # put the actor-learners' own networks on the GPU if there is one; these are faster on the CPU
    track: bool = False  # send the metrics to Weights & Biases too
    wandb_project_name: str = "deep-policy-gradients"  # project to track under
    wandb_entity: str | None = None  # user or team to track under
    capture_video: bool = False  # record episodes 0, 1, 8, 27, 64, … of the first actor
    runs_dir: str = "runs"  # where the run's folder is made
    resume: str | None = None  # run's folder or checkpoint to go on with; its settings hold unless given again
    evaluate: str | None = None  # run's folder or checkpoint to evaluate instead of training
    eval_episodes: int = 10  # episodes to evaluate

    def __post_init__(self):
        for name, x in vars(self).items():
            may_be_0 = name in ("seed", "rms_alpha", "gamma", "ent_coef")
            most = 1 if name in ("rms_alpha", "gamma") else math.inf
            if type(x) in (int, float) and not (0 < x <= most or x == 0 and may_be_0):
                raise ValueError(f"--{name.replace('_', '-')} can't be {x}")


# ── Environments ──────────────────────────────────────────────────────────────────────────────────────────────────

SCREEN = 84  # width and height of a frame


def make_env(env_id: str, videos: Path | None = None) -> gym.Env:
    """The environment, if the algorithm can serve it; with a folder for videos, recording episodes 0, 1, 8, 27, …"""
    if videos and sys.platform == "linux":  # draw without a screen; MuJoCo and pygame ask when they are imported
        os.environ.setdefault("MUJOCO_GL", "egl")
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
    settings, atari = {"render_mode": "rgb_array"} if videos else {}, env_id.startswith("ALE/")
    if atari:
        import ale_py
        gym.register_envs(ale_py)
        ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)  # without its banner
        settings |= {"frameskip": 1, "repeat_action_probability": 0.0, "obs_type": "grayscale"}
    warnings.filterwarnings("ignore", message=".*is out of date")  # to a user of Hopper-v4, Hopper-v5 is no news
    env = gym.make(env_id, disable_env_checker=True, **settings)
    if atari:
        # [DETAIL] As Mnih et al. 2015 see a game: the last 4 frames in grey, an action for every 4, up to 30
        # frames without one at first. v5's sticky actions came later, and are off.
        waits = 30 if env.unwrapped.get_action_meanings()[0] == "NOOP" else 0  # two games can't wait
        env = gym.wrappers.AtariPreprocessing(env, noop_max=waits, screen_size=SCREEN)
        env = gym.wrappers.FrameStackObservation(env, 4)
    if videos and hasattr(env.unwrapped, "mujoco_renderer") and env.unwrapped.model.ncam:
        env.unwrapped.mujoco_renderer.camera_id = 0  # the model's camera follows the body, the default one doesn't
    observed, acted = env.observation_space, env.action_space
    continuous = isinstance(acted, gym.spaces.Box) and len(acted.shape) == 1 and acted.dtype.kind == "f"
    discrete = isinstance(acted, gym.spaces.Discrete) and acted.start == 0
    if not (atari or isinstance(observed, gym.spaces.Box) and len(observed.shape) == 1 and (continuous or discrete)):
        raise Failure(f"{env_id} observes {observed} and takes {acted}: choose an Atari game, ALE/…, or one that "
                      "observes a vector (the wrapper FlattenObservation makes one) and takes a vector of floats or "
                      "Discrete actions from 0")
    if videos:
        if env.render_mode is None:
            raise Failure(f"{env_id} can't draw pictures: leave out --capture-video")
        env = gym.wrappers.RecordVideo(env, str(videos), disable_logger=False)
    acted.seed(np.random.randint(2**31))  # some environments draw from it
    if continuous:
        # [DETAIL] −1 and 1 become the ends of the range, where it has two, so that one σ fits all; the rest is clipped.
        bounded = np.isfinite(acted.low) & np.isfinite(acted.high)
        low, high = np.where(bounded, acted.low, -1), np.where(bounded, acted.high, 1)
        middle, half = high / 2 + low / 2, high / 2 - low / 2
        env = gym.wrappers.TransformAction(env, lambda a: (middle + half * a).clip(acted.low, acted.high), acted)
    return env


class Actor:
    """An environment and its running episode."""

    def __init__(self, env: gym.Env, bar: tqdm):
        self.env, self.bar, self.shape = env, bar, env.observation_space.shape
        self.reset()

    def reset(self) -> None:
        obs, _ = self.env.reset(seed=torch.randint(2**31, ()).item())
        self.obs = np.array(obs, np.float32).reshape(self.shape)
        self.episodic_return, self.length = 0.0, 0

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool]:
        """a_t → s_{t+1}, r_t, terminated (s_{t+1} has no future), truncated (it has one that we don't see)"""
        obs, reward, terminated, truncated, _ = self.env.step(action)
        self.obs = np.array(obs, np.float32).reshape(self.shape)  # a copy: some environments write over their array
        reward = np.asarray(reward).item()  # some return an array of one number
        self.episodic_return += reward
        self.length += 1
        self.bar.update()
        return self.obs, reward, bool(terminated), bool(truncated)


# ── Networks ──────────────────────────────────────────────────────────────────────────────────────────────────────

def orthogonal(layer: nn.Module, gain: float = 2**0.5) -> nn.Module:
    """[DETAIL] Orthogonal weights keep the signal's size; a `gain` near 0 gives all actions an even start."""
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


class RunningNorm(nn.Module):
    """[DETAIL] Subtracts the mean and divides by the standard deviation of all data so far: a network learns best from
    numbers around ±1. The statistics are buffers, so they are saved with the networks."""

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
        var, delta = (x - mean).square_().mean(0), mean - self.mean
        self.mean += weight * delta
        self.var += weight * (var - self.var) + weight * (1 - weight) * delta**2
        self.std.copy_((self.var + 1e-8).sqrt())

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean).div_(self.std).clamp_(-10, 10)  # what has hardly moved so far has a std of almost 0

    def inverse(self, y: Tensor) -> Tensor:
        return y * self.std + self.mean


Memory = tuple[Tensor, Tensor] | None  # of an LSTM, (h, c) of (1,H) each; None without one, or as an episode begins


class Agent(nn.Module):
    """Policy π(a|s;θ) and value function V(s;θ_v) on a common body; running statistics of observations and returns."""

    def __init__(self, observation_space: gym.spaces.Box, action_space: gym.spaces.Space, lstm: bool = False):
        super().__init__()
        self.discrete = isinstance(action_space, gym.spaces.Discrete)
        self.frames = len(observation_space.shape) == 3
        S, A = observation_space.shape[0], action_space.n if self.discrete else action_space.shape[0]
        H = 256 if self.frames else 64  # width of the last layer in common
        self.obs_norm, self.value_norm = RunningNorm(*observation_space.shape), RunningNorm(1)
        if self.frames:  # [DETAIL] the paper's: two convolutions and a layer
            self.body = nn.Sequential(
                orthogonal(nn.Conv2d(S, 16, 8, stride=4)), nn.ReLU(),
                orthogonal(nn.Conv2d(16, 32, 4, stride=2)), nn.ReLU(), nn.Flatten(),
                orthogonal(nn.Linear(32 * 9 * 9, H)), nn.ReLU())
        else:
            self.body = nn.Sequential(orthogonal(nn.Linear(S, H)), nn.Tanh(), orthogonal(nn.Linear(H, H)), nn.Tanh())
        self.lstm = nn.LSTM(H, H) if lstm else None
        self.actor = orthogonal(nn.Linear(H, A), 0.01)  # continuous: mean of a Gaussian; discrete: scores of a softmax
        self.critic = orthogonal(nn.Linear(H, 1), 1.0)
        # [DETAIL] The slides name no policy for continuous actions: here it is Gaussian. σ, the same in every state,
        # begins at 0.6: with 1 a third of the actions' numbers would be beyond their bounds.
        self.log_std = None if self.discrete else nn.Parameter(torch.full((A,), -0.5))
        # RMSProp's g, the mean square of the gradient: a buffer, to be shared and saved with the rest
        self.register_buffer("square_avg", torch.zeros(sum(parameter.numel() for parameter in self.parameters())))

    def features(self, obs: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """obs (k,…) of k steps in a row, the memory before them → what the heads see of each (k,H), the memory after"""
        features = self.body(self.obs_norm(obs).to(self.critic.weight.device))
        return self.lstm(features, memory) if self.lstm else (features, None)

    def noise(self, *shape: int) -> Tensor:
        """[DETAIL] (…,A): what makes actions random: σ·N(0,1), or Gumbel's, as argmax(f + Gumbel) ~ softmax(f)"""
        shape = (*shape, self.actor.out_features)
        if self.discrete:
            return -torch.empty(shape).exponential_().log()
        return torch.randn(shape) * self.log_std.detach().cpu().exp()  # drawn on the CPU: the same on every device

    def act(self, obs: Tensor, memory: Memory = None, noise: Tensor | float = 0.0) -> tuple[Tensor, Memory]:
        """obs (1,…) → (1[,A]): an action drawn from π(·|s), without noise the most probable one; the memory after it"""
        features, memory = self.features(obs, memory)
        output = self.actor(features) + noise
        return output.argmax(-1) if self.discrete else output, memory


def as_vector(parameters: list[nn.Parameter]) -> Tensor:
    """[DETAIL] θ: one vector, of which the parameters become views. An optimiser is faster on one tensor than many."""
    theta = nn.utils.parameters_to_vector(parameters).detach()
    nn.utils.vector_to_parameters(theta, parameters)
    return theta


# ── Mathematics ───────────────────────────────────────────────────────────────────────────────────────────────────
# Pure functions of tensors, which only rmsprop_ changes; shapes that don't broadcast raise torch's RuntimeError.

def log_prob(output: Tensor, log_std: Tensor | None, action: Tensor) -> Tensor:
    """log πθ(a|s) of a Gaussian, −Σ_A (½ ((a−μ)/σ)² + log σ + ½ log 2π), or a softmax, f_θ(s,a) − log Σ_a' e^f_θ(s,a').

    actor's output (μ or f) (…,A), log_std (A,) or None of a softmax, action (…[,A]) → (…)"""
    if log_std is None:
        return output.log_softmax(-1).gather(-1, action.unsqueeze(-1).expand(*output.shape[:-1], 1)).squeeze(-1)
    z = (action - output) * (-log_std).exp()
    return -0.5 * (z * z).sum(-1) - log_std.sum() - 0.5 * math.log(2 * math.pi) * len(log_std)


def entropy(output: Tensor, log_std: Tensor | None) -> Tensor:
    """Mean entropy of πθ(·|s) in nats: Σ_A (log σ + ½ log 2πe), or −Σ_a π log π;   arguments as of log_prob → ()"""
    if log_std is None:
        log_probs = output.log_softmax(-1)
        return -(log_probs.exp() * log_probs).sum(-1).mean()
    return log_std.sum() + 0.5 * math.log(2 * math.pi * math.e) * len(log_std)


def score_loss(log_probs: Tensor, returns: Tensor, value: Tensor) -> Tensor:
    """−Σ_i log π(a_i|s_i; θ') (R_i − V(s_i)), whose gradient is −dθ of A3C-16;   all (k,) → ()"""
    # [A3C-GRAD] with A = R − V: [A2C-ADV] R estimates Q^π(s,a); [A3C-ADV] it is the rewards, then V where they end.
    return -(log_probs * (returns - value.detach())).sum()


def n_step_returns(rewards: Tensor, bootstrap: Tensor, gamma: float) -> Tensor:
    """R ← r_i + γ R, backwards from R = bootstrap (A3C-15);   rewards (k,), bootstrap (1,) → (k,), in their unit"""
    returns, R = [], bootstrap.item()
    for reward in reversed(rewards.tolist()):  # as numbers: on tensors it takes over 20 times as long
        R = reward + gamma * R
        returns.append(R)
    return bootstrap.new_tensor(returns[::-1])


def rmsprop_(theta: Tensor, square_avg: Tensor, grad: Tensor, learning_rate: float, alpha: float, eps: float) -> None:
    """g ← α g + (1−α) Δθ²;  θ ← θ − η Δθ / sqrt(g + ε) (paper, eq. 1), both in place;   all (P,)"""
    square_avg.mul_(alpha).addcmul_(grad, grad, value=1 - alpha)
    theta.addcdiv_(grad, (square_avg + eps).sqrt_(), value=-learning_rate)


# ── Collecting ────────────────────────────────────────────────────────────────────────────────────────────────────

# What all actor-learners read and write, in shared memory: the agent, with θ and θ_v as one vector, theta; T, the steps
# of all; the steps of each; and a lock for whoever changes T or the running statistics. Lines A3C-6 to 12 collect.
Shared = namedtuple("Shared", "agent theta T steps lock")


# ── Update ────────────────────────────────────────────────────────────────────────────────────────────────────────

def actor_learner(n: int, agent: Agent, actor: Actor, shared: Shared, args: Args) -> Iterator[tuple]:
    """Algorithm S3 from top to bottom, as the n-th process runs it. After each segment, yields T, (return, length) of
    an ended episode or None, the step size, and per step the losses of policy and value function and the entropy."""
    device, parameters, memory = agent.critic.weight.device, [*agent.parameters()], None
    theta = as_vector(parameters)
    agent.obs_norm, agent.value_norm = shared.agent.obs_norm, shared.agent.value_norm
    # [A3C-1] initialise own step counter t ← 1
    t = 1
    # [A3C-2] repeat
    while True:
        # [A3C-3] reset gradients dθ ← 0, dθ_v ← 0
        gradient = torch.zeros_like(theta)
        # [A3C-4] synchronise own parameters θ' = θ, θ'_v = θ_v
        theta.copy_(shared.theta)
        # [A3C-5] t_start = t
        t_start, start_memory, actions, rewards = t, memory, [], []
        noise = agent.noise(args.t_max, 1).to(device)  # [DETAIL] For the whole segment: faster than step by step.
        # [A3C-6] get state s_t
        obs = [torch.from_numpy(actor.obs)]
        # [A3C-7] repeat
        terminated = truncated = False
        while not (terminated or truncated or t - t_start == args.t_max):
            # [A3C-8] perform a_t according to π(a_t|s_t; θ')
            with torch.no_grad():
                action, memory = agent.act(obs[-1].unsqueeze(0), memory, noise[t - t_start])
            # [A3C-9] receive reward r_t and new state s_{t+1}
            next_obs, reward, terminated, truncated = actor.step(action.cpu().numpy()[0])
            obs.append(torch.from_numpy(next_obs))
            actions.append(action)
            rewards.append(reward)
            # [A3C-10] t ← t + 1
            t += 1
            shared.steps[n] = t - 1
            # [A3C-11] T ← T + 1
            with shared.lock:
                shared.T.value += 1
                T = shared.T.value
            # [A3C-12] until terminal s_t or t − t_start == t_max: this loop's condition
        episode = None
        if terminated or truncated:
            episode, memory = (actor.episodic_return, actor.length), None
            actor.reset()
        obs = torch.stack(obs)
        features, _ = agent.features(obs, start_memory)
        values = agent.critic(features).squeeze(-1)  # V(s_i; θ'_v), in units of value_norm
        # [A3C-13] R = 0 for terminal s_t;  V(s_t, θ'_v) for non-terminal s_t
        bootstrap = agent.value_norm.inverse(values[-1].detach().cpu()) * (not terminated)
        # [A3C-14] for i ∈ {t−1, …, t_start} do
        # [DETAIL] In a game a gain counts 1, a loss −1: the rare big ones don't drown the others.
        rewards = torch.tensor(np.sign(rewards) if agent.frames else rewards, dtype=torch.float32)
        # [A3C-15] R ← r_i + γ R
        returns = n_step_returns(rewards, bootstrap, args.gamma)
        # [DETAIL] R and V normalised by the returns so far: one step size then fits rewards of any size. Not on frames:
        # signs need no scale, and V of the first frames, which is far off, would set it.
        target = (returns if agent.frames else agent.value_norm(returns.unsqueeze(1)).squeeze(1)).to(device)
        output = agent.actor(features[:-1])
        # [A3C-16] dθ ← dθ + ∇_θ' log π(a_i|s_i; θ') (R − V(s_i; θ'_v))
        policy_loss = score_loss(log_prob(output, agent.log_std, torch.cat(actions)), target, values[:-1])
        # [A3C-17] dθ_v ← dθ_v + ∂ (R − V(s_i; θ'_v))² / ∂θ'_v
        value_loss = (target - values[:-1]).square().sum()
        # [DETAIL] The paper's bonus for entropy keeps the policy from settling too early.
        bonus = entropy(output, agent.log_std)
        loss = policy_loss + value_loss - args.ent_coef * len(actions) * bonus
        gradient += torch.cat([slope.flatten() for slope in torch.autograd.grad(loss, parameters)])
        # [A3C-18] end for
        norm = gradient.norm()
        gradient *= (args.max_grad_norm / norm).clamp(max=1)  # [DETAIL] no segment can leap far
        if not norm.isfinite():
            raise Failure(f"step {T} has a gradient that isn't finite: lower learning rates, or mend the environment")
        # [A3C-19] asynchronous update of θ using dθ and of θ_v using dθ_v
        # [DETAIL] Ever smaller steps, as in the paper: the last policies are then good ones, not only good on average.
        learning_rate = args.learning_rate * (max(0, 1 - T / args.total_timesteps) if args.anneal_lr else 1)
        rmsprop_(shared.theta, shared.agent.square_avg, gradient.cpu(), learning_rate, args.rms_alpha, args.rms_eps)
        with shared.lock:  # the statistics that all actor-learners normalise by, from now on
            if not agent.frames:
                agent.value_norm.update(returns.unsqueeze(1))
            agent.obs_norm.update(obs[:-1])
        losses = [policy_loss.item() / len(actions), value_loss.item() / len(actions), bonus.item()]
        yield T, episode, learning_rate, losses
        # [A3C-20] until T > T_max
        if T >= args.total_timesteps:
            return


# ══ The slides end here. Below: repeating it all, saving, evaluating, the command line ════════════════════════════

SCRIPT = "a3c"
METRICS = (
    "charts/episodic_return", "charts/episodic_length", "charts/learning_rate", "charts/SPS", "losses/policy_loss",
    "losses/value_loss", "losses/entropy",
)
LOG_STEPS = 1000  # of an actor-learner, fewer where episodes are short, over which a row's losses are averaged
CHECKPOINT_SECONDS = 10  # between two checkpoints: what a crash costs


class Run:
    """A run's folder with its metrics and checkpoint, its progress bar, and the signal that stops it."""

    def __init__(self, args: Args, folder: Path, checkpoint: dict, end: int, **parts):
        self.args, self.folder, self.parts, self.signal, self.collecting = args, folder, parts, 0, True
        self.returns, self.unsent, self.due = deque(maxlen=100), [], time.time() + CHECKPOINT_SECONDS
        folder.mkdir(parents=True, exist_ok=True)
        used = [name for name in ("torch", "gymnasium", "numpy", "mujoco", "ale_py") if name in sys.modules]
        config = {"script": SCRIPT, "args": asdict(args), "versions": {x: sys.modules[x].__version__ for x in used}}
        self.metrics = open(folder / "metrics.csv", "a", buffering=1)
        (folder / "config.json").write_text(json.dumps(config, indent=2))
        self.metrics.truncate(min(self.metrics.tell(), checkpoint.get("metrics_size", 0)))  # later rows are made again
        if self.metrics.seek(0, os.SEEK_END) == 0:
            print("global_step", *METRICS, sep=",", file=self.metrics)
        if args.track:
            import wandb
            try:
                self.wandb = wandb.init(project=args.wandb_project_name, entity=args.wandb_entity, config=asdict(args),
                                        id=folder.name, name=folder.name, dir=folder, resume="allow")
            except wandb.Error as error:
                raise Failure(f"--track: {error}")
            self.wandb.define_metric("*", step_metric="global_step")
        print(f"run: {folder}", flush=True)
        self.first, self.begun = checkpoint.get("global_step", 0), time.perf_counter()
        self.bar = tqdm(total=end, initial=self.first, unit=" steps", dynamic_ncols=True)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.stop)

    def stop(self, number: int, _frame) -> None:
        """Stops at once while it waits for actors; what it is learning or writing itself is finished first."""
        self.signal = number
        if self.collecting:
            self.collecting = False
            raise KeyboardInterrupt

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """One row: an episode that ended at this step, or what was learned up to it."""
        if not all(map(math.isfinite, metrics.values())):
            raise Failure(f"step {step} has numbers that aren't finite: lower learning rates, or mend the environment")
        if "charts/episodic_return" in metrics:
            self.returns.append(metrics["charts/episodic_return"])
            self.bar.set_postfix_str(f"return {np.mean(self.returns):.1f}", refresh=False)
        else:
            metrics["charts/SPS"] = round((step - self.first) / (time.perf_counter() - self.begun))
        print(step, *(metrics.get(name, "") for name in METRICS), sep=",", file=self.metrics)
        if self.args.track:
            self.unsent.append({"global_step": step, **metrics})

    def save(self, step: int) -> None:
        """A crash or a full disk leaves the old checkpoint or the new one, never half of one."""
        state = {"script": SCRIPT, "args": asdict(self.args), "global_step": step, "metrics_size": self.metrics.tell()}
        state |= {name: part.state_dict() for name, part in self.parts.items()}
        if not all(numbers.isfinite().all() for numbers in state["agent"].values()):
            raise Failure(f"step {step} has networks that aren't finite: lower learning rates, or mend the environment")
        buffer = io.BytesIO()  # as torch would hide a disk's errors
        torch.save(state, buffer)
        with open(self.folder / "checkpoint.partial", "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(file.name, self.folder / "checkpoint.pt")
        while self.unsent:  # only now, or a run that is killed and resumed would send these rows twice
            self.wandb.log(self.unsent.pop(0))
        self.due = time.time() + CHECKPOINT_SECONDS

    def finish(self, step: int) -> int:
        self.save(step)
        end, mean = ", stopped early" if self.signal else "", np.mean(self.returns or [math.nan])
        with contextlib.suppress(OSError):  # Ctrl-C ends what this is piped to as well
            self.bar.close()
            print(f"{step} steps{end}; return {mean:.1f} over the last {len(self.returns)} episodes")
            print(f"saved in {self.folder}: go on with --resume, look at it with --evaluate", flush=True)
        return 128 + self.signal if self.signal else 0


def work(n: int, args: Args, shared: Shared, pipe: Connection, seed: int, videos: Path | None) -> None:
    """The n-th process. Sends (T, numbers) for each row of metrics.csv, or in one line what the user can mend."""
    signal.signal(signal.SIGINT, lambda *_: None)  # the parent ends this; what environments start would inherit SIG_IGN
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    torch.set_num_threads(1)  # a core of its own is all that an actor-learner has
    random.seed(seed), np.random.seed(seed % 2**32), torch.manual_seed(seed)
    try:
        env = make_env(args.env_id, videos if n == 0 else None)
        agent = copy.deepcopy(shared.agent).to("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
        actor, losses = Actor(env, SimpleNamespace(update=lambda: None)), []  # the bar is the parent's
        for T, episode, learning_rate, loss in actor_learner(n, agent, actor, shared, args):
            losses.append(loss)
            if episode:
                pipe.send((T, dict(zip(METRICS, episode))))
            if len(losses) * args.t_max >= LOG_STEPS or T >= args.total_timesteps:
                means = np.mean(losses, axis=0).tolist()
                pipe.send((T, {"charts/learning_rate": learning_rate, **dict(zip(METRICS[4:], means))}))
                losses = []
        env.close()
    except Failure as error:
        pipe.send(str(error))
    except ConnectionError:
        if mp.parent_process().is_alive():  # otherwise there is nobody to tell
            raise


def train(args: Args, agent: Agent, folder: Path, videos: Path | None, checkpoint: dict) -> int:
    """Trains from the start or from a checkpoint; returns the exit code."""
    step = checkpoint.get("global_step", 0)
    if step >= args.total_timesteps:
        raise Failure(f"--total-timesteps: go beyond step {step}")
    theta, context, N = as_vector([*agent.parameters()]), mp.get_context("spawn"), args.num_workers
    shared = Shared(agent.share_memory(), theta, context.RawValue("q", step), context.RawArray("q", N), context.Lock())
    snapshot = SimpleNamespace(state_dict=lambda: copy.deepcopy(agent.state_dict()))  # others write while it is saved
    run = Run(args, folder, checkpoint, args.total_timesteps, agent=snapshot)
    workers, started, seen, idle = {}, [], [0] * N, [0.0] * N
    run.collecting = False  # so that a signal waits until all have started
    if masks := hasattr(signal, "pthread_sigmask"):  # a terminal sends Ctrl-C to the workers, too: not before `work`
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        for n, seed in enumerate(torch.randint(2**62, (N,)).tolist()):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=work, args=(n, args, shared, theirs, seed, videos))
            process.start()
            started.append(process)
            theirs.close()
            workers[ours] = n, process
        with run.bar:
            with contextlib.suppress(KeyboardInterrupt):
                if masks:
                    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
                while workers and not run.signal:
                    run.collecting, begun = True, time.monotonic()
                    ready = wait(workers, timeout=1)
                    run.collecting, passed = False, min(time.monotonic() - begun, 1)  # what Ctrl-Z takes doesn't count
                    for pipe in ready:
                        try:
                            message = pipe.recv()
                        except (EOFError, OSError):  # closed as the process ended
                            n, process = workers.pop(pipe)
                            process.join(min(args.patience, 1e6))
                            early = not run.signal and (process.exitcode != 0 or shared.T.value < args.total_timesteps)
                            message = f"worker {n} ended early, with exit code {process.exitcode}" if early else None
                        if isinstance(message, str):
                            raise Failure(message)
                        if message:
                            step = max(step, message[0])  # several processes' rows come in almost in order
                            run.log(step, message[1])
                    for n, _ in workers.values():
                        idle[n] = idle[n] + passed if shared.steps[n] == seen[n] else 0
                        seen[n] = shared.steps[n]
                        if idle[n] > args.patience:
                            raise Failure(f"worker {n} has taken no step for --patience {args.patience} seconds")
                    run.bar.update(min(shared.T.value, args.total_timesteps) - run.bar.n)
                    if time.time() > run.due:
                        run.save(shared.T.value)
            return run.finish(shared.T.value)
    finally:
        for process in started:
            process.kill()
            process.join()


def evaluate(agent: Agent, env: gym.Env, episodes: int) -> None:
    """Episodes without exploration, while nothing learns"""
    returns = []
    with tqdm(unit=" steps", leave=False) as bar, torch.no_grad():
        for episode in range(episodes):
            actor, memory, over = Actor(env, bar), None, False
            while not over:
                action, memory = agent.act(torch.from_numpy(actor.obs)[None], memory)
                over = any(actor.step(action.numpy()[0])[2:])
            returns.append(actor.episodic_return)
            bar.write(f"episode {episode}: return {actor.episodic_return:.1f}, length {actor.length}")
    print(f"return {np.mean(returns):.1f} ± {np.std(returns):.1f} over {episodes} episodes")


def load(path: str) -> tuple[Args, Path, dict]:
    """A run's folder or checkpoint → its settings, if not given again; the checkpoint's file; the checkpoint"""
    file = Path(path, "checkpoint.pt" if Path(path).is_dir() else "").resolve()
    try:
        damaged = zipfile.ZipFile(file).testzip()  # torch passes over the checksums
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        if damaged or checkpoint.get("script") != SCRIPT:
            raise ValueError
        saved = Args(**checkpoint["args"])
    except Exception:  # torch.load raises whatever its parts do
        raise Failure(f"{file} is no checkpoint of {SCRIPT}.py, or a damaged one: name another, or a run's folder")
    return tyro.cli(Args, default=saved), file, checkpoint


def main() -> None:
    sys.stdout.reconfigure(errors="replace")  # "?" for what a console can't show
    torch.set_num_threads(1)  # split among threads, small matrices take longer
    try:
        args, file, checkpoint = tyro.cli(Args, description=__doc__.partition("\n")[0]), Path(), {}
        training = args.evaluate is None
        if None not in (args.resume, args.evaluate):
            raise Failure("--resume and --evaluate: choose one")
        if (path := args.resume if training else args.evaluate) is not None:
            args, file, checkpoint = load(path)
        step, name = checkpoint.get("global_step", 0), f"{args.env_id}__{SCRIPT}__{args.seed}__{time.time():.3f}"
        folder = Path(args.runs_dir, name.replace("/", "-").replace(":", "-"))
        if file.name == "checkpoint.pt" and args.env_id == checkpoint["args"]["env_id"]:
            folder = file.parent  # a copy under another name, or another environment, goes on in a new folder
        for seed in (random.seed, np.random.seed, torch.manual_seed):  # an environment may draw from any of these
            seed((args.seed + step if training else -1 - args.seed) % 2**32)  # resumed or evaluated: other ones
        videos = folder / "videos" / f"{time.time():.0f}" if args.capture_video else None
        env = make_env(args.env_id, None if training else videos)  # each actor-learner makes its own
        agent = Agent(env.observation_space, env.action_space, args.lstm)
        if checkpoint:
            try:
                agent.load_state_dict(checkpoint["agent"])
            except RuntimeError:
                raise Failure(f"the checkpoint doesn't fit {args.env_id}, or --lstm: its networks have other shapes")
        if not training:
            evaluate(agent, env, args.eval_episodes)
        env.close()
        sys.exit(train(args, agent, folder, videos, checkpoint) if training else 0)
    except (Failure, ImportError, OSError) as error:
        called = {frame.name for frame in traceback.extract_tb(error.__traceback__)}
        if isinstance(error, OSError) and called & {"make_env", "reset", "step"} and "makedirs" not in called:
            raise  # the environment's own; where no folder can be made for its videos, a line tells it
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
