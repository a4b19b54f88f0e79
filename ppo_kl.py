# /// script
# requires-python = ">=3.10"
# dependencies = ["torch==2.13.0", "gymnasium[classic-control,mujoco]==1.4.0", "mujoco==3.2.7; python_version<'3.14'",
#                 "mujoco==3.8.1; python_version>='3.14'", "numpy==2.2.6; python_version<'3.14'",
#                 "numpy==2.4.6; python_version>='3.14'", "tyro==1.0.17", "wandb==0.31.0", "tqdm==4.70.1",
#                 "moviepy==2.2.1"]
# ///
# SPDX-License-Identifier: MIT
"""PPO with the KL penalty: several epochs on the same data, at a price of β for every nat that the policy moves.

    python ppo_kl.py --env-id Hopper-v4                                 # 1M steps, 3 minutes: return 1500 to 2700
    python ppo_kl.py --env-id CartPole-v1 --total-timesteps 200000      # 20 seconds: return about 480

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
    s_t     obs                 (T,N,S)   observation, S numbers; next_obs is s_{t+1}, also where an episode ends
    a_t     actions             (T,N[,A]) continuous: A numbers; discrete: the index of one of A actions
    r_t     rewards             (T,N)     reward. r_t(θ), the probability ratio, is `ratio`
    V       values              (T,N)     critic's estimate of the return from s_t; next_values from s_{t+1}
    Â_t     advantages          (T,N)     how much better a_t was than the policy's average action
    θ       theta               (P,)      parameters of the policy and of the value function, one vector
    β       agent.beta                    price of the KL, adapted so that the KL per iteration stays near d_targ nats
    N, T, K, γ, λ, d_targ                 settings: see Args

Departures from the slides
    PPO-1     The actors step in turn, in one process: messages between processes would take longer than most steps.
    PPO-ADV   is the λ = 1 case of the λ-weighted sum here (GAE, arXiv:1506.02438); a smaller λ has less variance and
              more bias. The deck prints γ^{T−t+1} r_{T−1}, as the paper does; the sum needs γ^{T−1−t}.
    PPO-3     The deck says "mini-batch" and "update θ"; the K epochs are the paper's algorithm 1.
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
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import tyro
from gymnasium.error import Error as Failure  # what the user can mend, told in one line: Gymnasium's errors, and ours
from torch import Tensor, nn
from tqdm import tqdm


# ── Arguments ─────────────────────────────────────────────────────────────────────────────────────────────────────

@dataclass
class Args:
    env_id: str = "Hopper-v4"  # Gymnasium environment: observes a vector; continuous (Box) or discrete actions
    seed: int = 1  # of the networks, the actions, the minibatches and the environments
    total_timesteps: int = 1_000_000  # environment steps, counted over all actors
    num_envs: int = 8  # N: actors, each with an environment of its own
    num_steps: int = 256  # T: steps that each actor collects per iteration
    minibatch_size: int = 64  # steps per gradient
    update_epochs: int = 10  # K: passes over the N·T steps of an iteration
    learning_rate: float = 3e-4  # Adam's step size at the start
    anneal_lr: bool = True  # lower the step size linearly to 0 over the run
    gamma: float = 0.99  # γ: discount per step
    gae_lambda: float = 0.95  # λ of the advantage: 1 is the slide's sum, 0 the one-step TD error
    beta: float = 1.0  # β at the start: price of each nat of KL
    adapt_beta: bool = True  # halve or double β to keep the KL near d_targ
    d_targ: float = 0.01  # KL per iteration, in nats, that β is adapted to
    ent_coef: float = 0.0  # weight of the entropy bonus: above 0 keeps the policy exploring
    max_grad_norm: float = 0.5  # a longer gradient is shortened to this length; inf: never
    compile: bool = False  # compile the gradients: takes some 20 seconds, then saves time; needs a C++ compiler
    cuda: bool = True  # learn on the GPU if there is one; acting stays on the CPU
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
            may_be_0 = name in ("seed", "gamma", "gae_lambda", "ent_coef", "beta")
            most = 1 if name in ("gamma", "gae_lambda") else math.inf
            if type(x) in (int, float) and not (0 < x <= most or x == 0 and may_be_0):
                raise ValueError(f"--{name.replace('_', '-')} can't be {x}")


# ── Environments ──────────────────────────────────────────────────────────────────────────────────────────────────

def make_env(env_id: str, videos: Path | None = None) -> gym.Env:
    """The environment, if the algorithm can serve it; with a folder for videos, recording episodes 0, 1, 8, 27, …"""
    if env_id.startswith("ALE/"):
        raise Failure(f"{env_id} observes pictures: a3c.py and trpo.py learn from these")
    if videos and sys.platform == "linux":  # draw without a screen; MuJoCo and pygame ask when they are imported
        os.environ.setdefault("MUJOCO_GL", "egl")
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
    warnings.filterwarnings("ignore", message=".*is out of date")  # to a user of Hopper-v4, Hopper-v5 is no news
    env = gym.make(env_id, disable_env_checker=True, **({"render_mode": "rgb_array"} if videos else {}))
    if videos and hasattr(env.unwrapped, "mujoco_renderer") and env.unwrapped.model.ncam:
        env.unwrapped.mujoco_renderer.camera_id = 0  # the model's camera follows the body, the default one doesn't
    observed, acted = env.observation_space, env.action_space
    continuous = isinstance(acted, gym.spaces.Box) and len(acted.shape) == 1 and acted.dtype.kind == "f"
    discrete = isinstance(acted, gym.spaces.Discrete) and acted.start == 0
    if not (isinstance(observed, gym.spaces.Box) and len(observed.shape) == 1 and (continuous or discrete)):
        raise Failure(f"{env_id} observes {observed} and takes {acted}: choose one that observes a vector (the wrapper "
                      "FlattenObservation makes one) and takes a vector of floats or Discrete actions from 0")
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

def mlp(inputs: int, outputs: int, gain: float) -> nn.Sequential:
    """[DETAIL] Orthogonal weights keep the signal's size; a `gain` near 0 gives all actions an even start."""
    layers = [nn.Linear(inputs, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, outputs)]
    for layer, layer_gain in zip(layers[::2], (2**0.5, 2**0.5, gain)):
        nn.init.orthogonal_(layer.weight, layer_gain)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


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


class Agent(nn.Module):
    """Policy πθ(a|s), value function V(s), and the running statistics of observations and returns."""

    def __init__(self, observation_space: gym.spaces.Box, action_space: gym.spaces.Space):
        super().__init__()
        self.discrete = isinstance(action_space, gym.spaces.Discrete)
        S, A = observation_space.shape[0], action_space.n if self.discrete else action_space.shape[0]
        self.obs_norm, self.value_norm = RunningNorm(S), RunningNorm(1)
        self.register_buffer("beta", torch.tensor(1.0))  # a buffer, so that it is saved with the networks
        self.actor = mlp(S, A, gain=0.01)  # continuous: mean of a Gaussian; discrete: scores f_θ(s,a) of a softmax
        self.critic = mlp(S, 1, gain=1.0)
        # [DETAIL] The slides name no policy for continuous actions: here it is Gaussian. σ, the same in every state,
        # begins at 0.6: with 1 a third of the actions' numbers would be beyond their bounds.
        self.log_std = None if self.discrete else nn.Parameter(torch.full((A,), -0.5))

    def noise(self, *shape: int) -> Tensor:
        """[DETAIL] (…,A): what makes actions random: σ·N(0,1), or Gumbel's, as argmax(f + Gumbel) ~ softmax(f)"""
        shape = (*shape, self.actor[-1].out_features)
        if self.discrete:
            return -torch.empty(shape).exponential_().log()
        return torch.randn(shape) * self.log_std.exp()

    def act(self, obs: Tensor, noise: Tensor | float = 0.0) -> Tensor:
        """(N,S) → (N[,A]): an action drawn from πθ(·|s); without noise the most probable one"""
        output = self.actor(self.obs_norm(obs)) + noise
        return output.argmax(-1) if self.discrete else output


def as_vector(parameters: list[nn.Parameter]) -> Tensor:
    """[DETAIL] θ: one vector, of which the parameters become views. An optimiser is faster on one tensor than many."""
    theta = nn.utils.parameters_to_vector(parameters).detach()
    nn.utils.vector_to_parameters(theta, parameters)
    return theta


# ── Mathematics ───────────────────────────────────────────────────────────────────────────────────────────────────
# Pure functions of tensors, which they leave as they are; shapes that don't broadcast raise torch's RuntimeError.

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


def kl_divergence(p: Tensor, log_std_p: Tensor | None, q: Tensor, log_std_q: Tensor | None) -> Tensor:
    """D_KL(p ‖ q) in nats: Σ_A (log σ_q/σ_p + (σ_p² + (μ_p−μ_q)²) / 2σ_q² − ½), or Σ_a p (log p − log q).

    actor's outputs p, q (…,A), log_stds (A,) or None of a softmax → (…)"""
    if log_std_p is None:
        log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
        return (log_p.exp() * (log_p - log_q)).sum(-1)
    squares = (2 * log_std_p).exp() + (p - q).square()
    return (log_std_q - log_std_p + 0.5 * squares * (-2 * log_std_q).exp() - 0.5).sum(-1)


def penalized_surrogate(ratio: Tensor, advantage: Tensor, kl: Tensor, beta: Tensor | float) -> Tensor:
    """r Â − β KL of every step (paper, eq. 8);   ratio, advantage, kl (B,) → (B,)"""
    return ratio * advantage - beta * kl  # [PPO-KLPEN]


def adapted_beta(beta: Tensor, kl: Tensor, d_targ: float) -> Tensor:
    """β for the next iteration, from the KL (…) of this one's steps (paper, section 4)"""
    d = kl.mean()  # [PPO-BETA-1]
    if d < d_targ / 1.5:  # [PPO-BETA-2]
        beta = beta / 2
    if d > d_targ * 1.5:  # [PPO-BETA-3]
        beta = beta * 2
    return beta.clamp(1e-6, 1e6)  # [DETAIL] from 0 or inf there would be no way back


def gae(rewards: Tensor, values: Tensor, next_values: Tensor, terminated: Tensor, truncated: Tensor,
        gamma: float, lmbda: float) -> Tensor:
    """Â_t = Σ_l (γλ)^l δ_{t+l}, δ_t = r_t + γ V(s_{t+1}) − V(s_t) (paper, eq. 11), for λ = 1 the slide's sum.

    All (T,N) → (T,N), in the rewards' unit. [DETAIL] At an episode's end: a terminal s_{t+1} is worth 0, a truncated
    one keeps its value."""
    td_delta = rewards + gamma * next_values * ~terminated - values
    carry = gamma * lmbda * ~(terminated | truncated)  # what comes after an episode's end belongs to another episode
    advantages, advantage = torch.zeros_like(td_delta), torch.zeros_like(td_delta[0])
    for t in reversed(range(len(rewards))):
        advantages[t] = advantage = td_delta[t] + carry[t] * advantage  # [PPO-ADV]
    return advantages


# ── Collecting ────────────────────────────────────────────────────────────────────────────────────────────────────

# Tensors (T,N,…); and of each episode that ended: steps of all actors up to its end, return, length
Rollout = namedtuple("Rollout", "obs actions rewards next_obs terminated truncated episodes")


@torch.no_grad()
def collect(old: Agent, actors: list[Actor], T: int) -> Rollout:
    """T steps of each of the N actors."""
    N, S = len(actors), len(old.obs_norm.mean)
    obs, next_obs = np.zeros((2, T, N, S), np.float32)
    rewards, (terminated, truncated) = np.zeros((T, N), np.float32), np.zeros((2, T, N), bool)
    noise, actions, episodes = old.noise(T, N), [], []
    # [PPO-1] in each iteration, N actors in parallel collect T steps each with π_θold
    for t in range(T):
        obs[t] = [actor.obs for actor in actors]
        actions.append(old.act(torch.from_numpy(obs[t]), noise[t]))
        for n, (actor, action) in enumerate(zip(actors, actions[t].numpy())):
            next_obs[t, n], rewards[t, n], terminated[t, n], truncated[t, n] = actor.step(action)
            if terminated[t, n] or truncated[t, n]:
                episodes.append(((t + 1) * N, actor.episodic_return, actor.length))
                actor.reset()
    arrays = obs, torch.stack(actions), rewards, next_obs, terminated, truncated
    return Rollout(*map(torch.as_tensor, arrays), episodes)


# ── Update ────────────────────────────────────────────────────────────────────────────────────────────────────────

def compiled(function: Callable) -> Callable:
    """[DETAIL] --compile: one call for a function and its gradient. In networks this small, many calls cost much."""
    torch._dynamo.config.trace_autograd_ops = True  # or it can't see the gradient
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(1))
    except RuntimeError:
        raise Failure("--compile needs a C++ compiler, say g++, and Python's headers: install them, or leave it out")
    return torch.compile(function, fullgraph=True)


def minibatch_gradient(agent: Agent, parameters: list[nn.Parameter], args: Args, old_log_std: Tensor | None, x: Tensor,
                       action: Tensor, old_log_prob: Tensor, old_output: Tensor, advantage: Tensor, target: Tensor,
                       ) -> tuple[Tensor, Tensor]:
    """∇_θ of a minibatch's loss, at most max_grad_norm long (P,); the losses of policy and value function (2,)"""
    output = agent.actor(x)
    ratio = (log_prob(output, agent.log_std, action) - old_log_prob).exp()  # r_t(θ)
    kl = kl_divergence(old_output, old_log_std, output, agent.log_std)
    policy_loss = -penalized_surrogate(ratio, advantage, kl, agent.beta).mean()  # −L of PPO-2
    value_loss = 0.5 * (agent.critic(x).squeeze(-1) - target).square().mean()
    # [DETAIL] One step for both networks; the bonus for entropy keeps π exploring (paper, eq. 9 with c1 = ¼).
    loss = policy_loss + 0.5 * value_loss
    if args.ent_coef:
        loss = loss - args.ent_coef * entropy(output, agent.log_std)
    gradient = torch.cat([slope.flatten() for slope in torch.autograd.grad(loss, parameters)])
    gradient = gradient * (args.max_grad_norm / gradient.norm()).clamp(max=1)  # [DETAIL] no minibatch can leap far
    return gradient, torch.stack([policy_loss, value_loss]).detach()


def update(agent: Agent, old: Agent, theta: Tensor, optimizer: torch.optim.Optimizer, rollout: Rollout,
           args: Args, gradient: Callable = minibatch_gradient) -> dict[str, float]:
    """One iteration's learning, from a rollout to its metrics."""
    obs, actions, rewards, next_obs, terminated, truncated = (x.to(theta.device) for x in rollout[:6])
    # [DETAIL] Statistics first, then θ: the policy that is optimised here is exactly the one that acts next. But
    # π_θold below uses these statistics too, and the actors used older ones (at first none).
    agent.obs_norm.update(obs.flatten(0, 1))
    with torch.no_grad():
        x, next_x = agent.obs_norm(obs), agent.obs_norm(next_obs)
        values, next_values = (agent.value_norm.inverse(agent.critic(y).squeeze(-1)) for y in (x, next_x))
        # [PPO-2] compute Â_t for every step
        advantages = gae(rewards, values, next_values, terminated, truncated, args.gamma, args.gae_lambda)
        returns = advantages + values  # the λ-return: what V(s_t) should have been
        agent.value_norm.update(returns.reshape(-1, 1))
        # [DETAIL] Â of mean 0 and variance 1: the same settings then fit rewards of any size.
        advantages = (advantages - advantages.mean()) / (advantages.std(correction=0) + 1e-8)
        old_output, old_log_std = agent.actor(x), copy.deepcopy(agent.log_std)  # of π_θold, before θ moves
        old_log_probs = log_prob(old_output, old_log_std, actions)
    batch = [y.flatten(0, 1) for y in (x, actions, old_log_probs, old_output, advantages, agent.value_norm(returns))]

    # [PPO-3] for K epochs over minibatches: update θ by L^KLPEN
    parameters, losses = [*agent.parameters()], []
    for _ in range(args.update_epochs):
        shuffled = torch.randperm(len(batch[0]))
        for minibatch in zip(*(y[shuffled].split(args.minibatch_size) for y in batch)):
            theta.grad, loss = gradient(agent, parameters, args, old_log_std, *minibatch)
            optimizer.step()
            losses.append(loss)

    with torch.no_grad():
        output = agent.actor(x)
        kl = kl_divergence(old_output, old_log_std, output, agent.log_std)
        policy_loss, value_loss = torch.stack(losses).mean(0)
        metrics = {
            "losses/policy_loss": policy_loss,
            "losses/value_loss": value_loss,
            "losses/entropy": entropy(output, agent.log_std),
            "losses/kl": kl.mean(),
            "losses/beta": agent.beta.clone(),
            "losses/explained_variance": 1 - (returns - values).var(correction=0) / (returns.var(correction=0) + 1e-8),
        }
        if args.adapt_beta:
            agent.beta.copy_(adapted_beta(agent.beta, kl, args.d_targ))
    # [PPO-4] θ_old ← θ
    old.load_state_dict(agent.state_dict())
    return {name: value.item() for name, value in metrics.items()}


# ══ The slides end here. Below: repeating it all, saving, evaluating, the command line ════════════════════════════

SCRIPT = "ppo_kl"
METRICS = (
    "charts/episodic_return", "charts/episodic_length", "charts/learning_rate", "charts/SPS", "losses/policy_loss",
    "losses/value_loss", "losses/entropy", "losses/kl", "losses/beta", "losses/explained_variance",
)
CHECKPOINT_SECONDS = 10  # between two checkpoints, up to an iteration's end: what a crash costs


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


def train(args: Args, envs: list[gym.Env], agent: Agent, folder: Path, checkpoint: dict) -> int:
    """Iterates from the start or from a checkpoint; returns the exit code."""
    step, batch_size = checkpoint.get("global_step", 0), args.num_envs * args.num_steps
    end = args.total_timesteps - (args.total_timesteps - step) % batch_size
    if end <= step:
        raise Failure(f"--total-timesteps: go beyond step {step} by an iteration, {batch_size} steps")
    old = copy.deepcopy(agent)  # π_θold, which acts, stays on the CPU: no step waits for a GPU
    agent.to("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    theta = as_vector([*agent.parameters()])
    # [DETAIL] eps of 1e-5, as in the paper's own code: gradients near 0, mere noise, move θ less than a full step.
    optimizer = torch.optim.Adam([theta], lr=args.learning_rate, eps=1e-5, fused=True)
    if checkpoint:
        optimizer.load_state_dict(checkpoint["optimizer"])
    renewing = ("beta", "total_timesteps") if args.anneal_lr else ("beta",)
    if not checkpoint or any(getattr(args, name) != checkpoint["args"][name] for name in renewing):
        agent.beta.fill_(args.beta)  # anew in a longer run too, as annealed step sizes then rise again
    gradient = compiled(minibatch_gradient) if args.compile else minibatch_gradient
    run = Run(args, folder, checkpoint, end, agent=agent, optimizer=optimizer)
    with run.bar:
        with contextlib.suppress(KeyboardInterrupt):
            actors = [Actor(env, run.bar) for env in envs]
            while step < end and not run.signal:
                # [DETAIL] Ever smaller steps: the last policies are then good ones, not only good on average.
                learning_rate = args.learning_rate * (1 - step / args.total_timesteps if args.anneal_lr else 1)
                optimizer.param_groups[0]["lr"] = learning_rate
                run.collecting = True
                rollout = collect(old, actors, args.num_steps)
                run.collecting = False
                losses = update(agent, old, theta, optimizer, rollout, args, gradient)
                for steps, episodic_return, length in rollout.episodes:
                    run.log(step + steps, {"charts/episodic_return": episodic_return, "charts/episodic_length": length})
                step += batch_size
                run.log(step, {"charts/learning_rate": learning_rate, **losses})
                if time.time() > run.due:
                    run.save(step)
        return run.finish(step)


def evaluate(agent: Agent, env: gym.Env, episodes: int) -> None:
    """Episodes without exploration, while nothing learns"""
    returns = []
    with tqdm(unit=" steps", leave=False) as bar, torch.no_grad():
        for episode in range(episodes):
            actor, over = Actor(env, bar), False
            while not over:
                over = any(actor.step(agent.act(torch.from_numpy(actor.obs)[None]).numpy()[0])[2:])
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
        envs = [make_env(args.env_id, None if n else videos) for n in range(args.num_envs if training else 1)]
        agent = Agent(envs[0].observation_space, envs[0].action_space)
        if checkpoint:
            try:
                agent.load_state_dict(checkpoint["agent"])
            except RuntimeError:
                raise Failure(f"the checkpoint doesn't fit {args.env_id}: its networks have other shapes")
        code = train(args, envs, agent, folder, checkpoint) if training else evaluate(agent, *envs, args.eval_episodes)
        for env in envs:
            env.close()
        sys.exit(code)
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
