# /// script
# requires-python = ">=3.10"
# dependencies = ["torch==2.13.0", "gymnasium[classic-control,mujoco]==1.4.0", "mujoco==3.2.7; python_version<'3.14'",
#                 "mujoco==3.8.1; python_version>='3.14'", "numpy==2.2.6; python_version<'3.14'",
#                 "numpy==2.4.6; python_version>='3.14'", "tyro==1.0.17", "wandb==0.31.0", "tqdm==4.70.1",
#                 "moviepy==2.2.1"]
# ///
# SPDX-License-Identifier: MIT
"""DDPG: a deterministic policy follows the gradient of the critic's value in the action; both learn off-policy.

    python ddpg.py --env-id Hopper-v4                                   # 1M steps, 35 minutes: return about 1400
    python ddpg.py --env-id Pendulum-v1 --total-timesteps 20000         # 20 seconds: then, with --evaluate, about -150

Slides "策略梯度和Q学习的对比" (Q-TD); 确定性梯度策略, 深度确定性策略梯度: the deck lacks their text. They would derive:

    A stochastic policy gradient tries actions and needs ∂ log πθ(a|s); a deterministic policy a = μ_θ(s) tries none.
    But a critic Q that is differentiable in the action says by itself which way to change a: along ∇_a Q(s,a). The
    chain rule carries this slope on to θ: ∇_θ Q(s, μ_θ(s)) = ∇_θ μ_θ(s) ∇_a Q(s,a)|_{a=μ_θ(s)}. Summed over the states
    that μ_θ visits, that of step t weighted by γ^t (ρ^μ), it is the gradient of the return J, although these states
    change with θ too (Silver et al., theorem 1). As no expectation is over actions, the states may come from a replay
    buffer, explored with any noise: off-policy learning.

Silver et al. 2014 (DPG, theorem 1); Lillicrap et al. 2015 (DDPG, arXiv:1509.02971, algorithm 1)

    DPG-THM   ∇_θ J(μ_θ) = E_{s~ρ^μ}[ ∇_θ μ_θ(s) ∇_a Q^μ(s,a)|_{a=μ_θ(s)} ]
    Q-TD      Q-learning minimises E[ ½ ( r_t + γ max_a' Q_θ'(s_{t+1},a') − Q_θ(s_t,a_t) )² ]; μ' replaces the max

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
    s_t     obs                 (B,S)     observation, S numbers; next_obs is s_{t+1}, also where an episode ends
    a_t     action              (B,A)     action, each number from −1 to 1: the environment's range, rescaled
    r_t     reward              (B,)      reward
    μ, Q    actor, critic                 policy, and its value; μ', Q' target_actor, target_critic
    N_t     noise               (N,A)     exploration noise of N actors; the slide's other N, the minibatch's, is B
    y_i     target              (B,)      what Q(s_i,a_i) should have been
    θ^μ,θ^Q theta_mu, theta_q   (P,)      parameters, a vector each
    γ, τ                                  settings: see Args

Departures from the slides
    DPG-THM   The states are the replay buffer's, which older policies visited with noise, all alike, without γ^t.
    DDPG-1    The paper's networks have 400 and 300 units, batch normalisation, and a in Q's second layer.
    DDPG-6    a_t is clipped to its bounds. Noise is independent by default, as later work (arXiv:1802.09477) found the
              paper's Ornstein-Uhlenbeck process no better.
    DDPG-11   to DDPG-13: the paper has a weight decay of 0.01 on Q, here none; a step size of 1e-4 for μ; τ = 0.001.
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
from collections import deque
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
    env_id: str = "Hopper-v4"  # Gymnasium environment: observes a vector; continuous (Box) actions with bounds
    seed: int = 1  # of the networks, the actions, the minibatches and the environments
    total_timesteps: int = 1_000_000  # environment steps, counted over all actors
    num_envs: int = 1  # N: actors, each with an environment of its own; N gradients follow a step of all
    buffer_size: int = 1_000_000  # transitions that R keeps: Hopper-v4's million take 108 MB, and as much on the disk
    batch_size: int = 64  # B, the slide's N: transitions per gradient
    learning_starts: int = 10_000  # steps of random actions; beyond them the gradients begin
    actor_lr: float = 1e-3  # Adam's step size for μ
    critic_lr: float = 1e-3  # Adam's step size for Q
    tau: float = 0.005  # τ: share of the way that the targets go to the networks at each step
    noise_std: float = 0.1  # σ of what each step adds to the noise N_t; actions range from -1 to 1
    ou_theta: float = 1.0  # share of N_t that decays per step; the paper's Ornstein-Uhlenbeck process: 0.15, σ = 0.2
    gamma: float = 0.99  # γ: discount per step
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
            may_be_0 = name in ("seed", "learning_starts", "tau", "noise_std", "ou_theta", "gamma")
            most = 1 if name in ("tau", "ou_theta", "gamma") else math.inf
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
    if not (isinstance(observed, gym.spaces.Box) and len(observed.shape) == 1 and continuous and acted.is_bounded()):
        raise Failure(f"{env_id} observes {observed} and takes {acted}: choose one that observes a vector (the wrapper "
                      "FlattenObservation makes one) and takes a vector of floats with bounds, or another script: they "
                      "take other actions, too")
    if videos:
        if env.render_mode is None:
            raise Failure(f"{env_id} can't draw pictures: leave out --capture-video")
        env = gym.wrappers.RecordVideo(env, str(videos), disable_logger=False)
    acted.seed(np.random.randint(2**31))  # some environments draw from it
    # [DETAIL] −1 and 1, tanh's limits, become the ends of the environment's range.
    middle, half = acted.high / 2 + acted.low / 2, acted.high / 2 - acted.low / 2
    return gym.wrappers.TransformAction(env, lambda a: (middle + half * a).clip(acted.low, acted.high), acted)


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

def mlp(inputs: int, outputs: int) -> list[nn.Module]:
    """inputs → 256 → 256 → outputs, with ReLU between."""
    return [nn.Linear(inputs, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, outputs)]


class Critic(nn.Sequential):
    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        """(B,S), (B,A) → Q(s,a) (B,), in the rewards' unit"""
        return super().forward(torch.cat([obs, action], -1)).squeeze(-1)


class Agent(nn.Module):
    """Actor μ(s), critic Q(s,a), and a copy of each that follows slowly, which keeps Q's targets steady."""

    def __init__(self, observation_space: gym.spaces.Box, action_space: gym.spaces.Box):
        super().__init__()
        S, A = observation_space.shape[0], action_space.shape[0]
        # [DDPG-1] initialise critic Q(s,a|θ^Q) and actor μ(s|θ^μ); tanh keeps μ within the actions' bounds
        self.actor, self.critic = nn.Sequential(*mlp(S, A), nn.Tanh()), Critic(*mlp(S + A, 1))
        # [DDPG-2] initialise targets θ^Q' ← θ^Q, θ^μ' ← θ^μ
        self.target_actor, self.target_critic = copy.deepcopy(self.actor), copy.deepcopy(self.critic)

    def act(self, obs: Tensor, noise: Tensor | float = 0.0) -> Tensor:
        """(N,S) → (N,A): μ(s) + N_t, within bounds; without noise the action that the policy thinks best"""
        return (self.actor(obs) + noise).clamp(-1, 1)


def as_vector(parameters: list[nn.Parameter]) -> Tensor:
    """[DETAIL] θ: one vector, of which the parameters become views. An optimiser is faster on one tensor than many."""
    theta = nn.utils.parameters_to_vector(parameters).detach()
    nn.utils.vector_to_parameters(theta, parameters)
    return theta


# ── Mathematics ───────────────────────────────────────────────────────────────────────────────────────────────────
# Pure functions of tensors, which they leave as they are; shapes that don't broadcast raise torch's RuntimeError.

def td_target(reward: Tensor, next_value: Tensor, terminated: Tensor, gamma: float) -> Tensor:
    """y = r + γ Q'(s', μ'(s')), or r if s' is terminal (DDPG-10; paper, eq. 5);   all (B,) → (B,), in the rewards' unit

    A truncated episode's last s' has a future that we don't see, and counts as any other."""
    return reward + gamma * next_value * (1 - terminated)  # [Q-TD] with μ' for the max over a'


def critic_loss(value: Tensor, target: Tensor) -> Tensor:
    """L = 1/N Σ (y − Q(s,a))² (DDPG-11; paper, eq. 4);   value, target (B,) → ()"""
    return (target - value).square().mean()


def action_gradient(value: Tensor, action: Tensor) -> Tensor:
    """1/N ∇_a Q(s,a) of DDPG-12 (paper, eq. 6);   value Q (B,), action (B,A) → (B,A)

    Divided by N already, so that back-propagation's sum over the minibatch is the mean."""
    return torch.autograd.grad(value.mean(), action)[0]  # of the action alone: Q's parameters get none


def soft_update(target: Tensor, source: Tensor, tau: float) -> Tensor:
    """θ' ← τ θ + (1−τ) θ' (DDPG-13);   target θ', source θ (P,) → (P,)"""
    return target.lerp(source, tau)  # θ' + τ (θ − θ')


def ornstein_uhlenbeck(noise: Tensor, normal: Tensor, theta: float, sigma: float) -> Tensor:
    """N_t = (1−θ) N_{t−1} + σ ε, correlated for θ < 1 (paper, section 7);   N_{t−1}, normal ε ~ N(0,1) (N,A) → (N,A)"""
    return (1 - theta) * noise + sigma * normal


# ── Collecting ────────────────────────────────────────────────────────────────────────────────────────────────────

class Replay:
    """R: the latest transitions, a row of numbers each, oldest overwritten first."""

    def __init__(self, capacity: int, S: int, A: int, device: torch.device):
        self.widths = S, A, 1, S, 1  # s, a, r, s', terminated
        # [DDPG-3] initialise replay buffer R
        self.rows, self.added = torch.zeros(capacity, sum(self.widths), device=device), 0

    def __len__(self) -> int:
        return min(self.added, len(self.rows))

    def add(self, obs: np.ndarray, action: np.ndarray, reward: float, next_obs: np.ndarray, terminated: bool) -> None:
        row = np.concatenate([obs, action, (reward,), next_obs, (terminated,)], dtype=np.float32)
        if not np.isfinite(row).all():
            raise Failure("numbers that aren't finite: lower learning rates, or mend the environment")
        self.rows[self.added % len(self.rows)] = torch.from_numpy(row)
        self.added += 1

    def sample(self, size: int) -> tuple[Tensor, ...]:
        """(B,S), (B,A), (B,), (B,S), (B,)"""
        obs, action, reward, next_obs, terminated = self.rows[torch.randint(len(self), (size,))].split(self.widths, 1)
        return obs, action, reward.squeeze(1), next_obs, terminated.squeeze(1)

    def state_dict(self) -> dict[str, Tensor]:
        return {"rows": self.rows[: len(self)].cpu().roll(-self.added, 0)}  # oldest first

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        rows = state["rows"][-len(self.rows) :]  # as many as the buffer holds now
        self.rows[: len(rows)], self.added = rows, len(rows)


@torch.no_grad()
def collect(acting: Agent, actors: list[Actor], replay: Replay, noise: Tensor, step: int,
            args: Args) -> list[tuple[float, int]]:
    """A step of each of the N actors; returns (return, length) of the episodes that ended."""
    episodes = []
    # [DDPG-4] for each episode: receive initial state s_1: an actor resets as its episode ends
    obs = np.array([actor.obs for actor in actors], np.float32)
    # [DDPG-5] for t = 1 to T do: train's loop, a step of all actors at a time
    if step < args.learning_starts:
        # [DETAIL] At first actions are uniform: a policy that knows nothing would fill R with one kind of failure.
        actions = torch.rand(noise.shape) * 2 - 1
    else:
        # [DDPG-6] a_t = μ(s_t|θ^μ) + N_t
        noise.copy_(ornstein_uhlenbeck(noise, torch.randn(noise.shape), args.ou_theta, args.noise_std))
        actions = acting.act(torch.from_numpy(obs), noise)
    for n, (actor, s, a) in enumerate(zip(actors, obs, actions.numpy())):
        # [DDPG-7] execute a_t, observe r_t and s_{t+1}
        next_obs, reward, terminated, truncated = actor.step(a)
        # [DDPG-8] store (s_t, a_t, r_t, s_{t+1}) in R
        replay.add(s, a, reward, next_obs, terminated)
        if terminated or truncated:
            episodes.append((actor.episodic_return, actor.length))
            actor.reset()
            noise[n] = 0  # [DETAIL] as in the paper: each episode begins with new noise
    return episodes


# ── Update ────────────────────────────────────────────────────────────────────────────────────────────────────────

def compiled(function: Callable) -> Callable:
    """[DETAIL] --compile: one call for a function and its gradient. In networks this small, many calls cost much."""
    torch._dynamo.config.trace_autograd_ops = True  # or it can't see the gradient
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(1))
    except RuntimeError:
        raise Failure("--compile needs a C++ compiler, say g++, and Python's headers: install them, or leave it out")
    return torch.compile(function, fullgraph=True)


def critic_gradient(agent: Agent, args: Args, obs: Tensor, action: Tensor, reward: Tensor, next_obs: Tensor,
                    terminated: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """∇ of a minibatch's L by θ^Q (P,); L; the mean of Q"""
    with torch.no_grad():  # y_i
        target = td_target(reward, agent.target_critic(next_obs, agent.target_actor(next_obs)), terminated, args.gamma)
    value = agent.critic(obs, action)
    loss = critic_loss(value, target)
    gradients = torch.autograd.grad(loss, [*agent.critic.parameters()])
    return torch.cat([slope.flatten() for slope in gradients]), loss.detach(), value.detach().mean()


def actor_gradient(agent: Agent, obs: Tensor) -> tuple[Tensor, Tensor]:
    """−∇ of a minibatch's J by θ^μ (P,), as Adam descends; the mean of −Q(s,μ(s))"""
    best = agent.actor(obs)
    value = agent.critic(obs, best)
    # [DPG-THM] ∇_θ μ_θ(s) ∇_a Q(s,a): the chain rule
    gradients = torch.autograd.grad(best, [*agent.actor.parameters()], -action_gradient(value, best))
    return torch.cat([slope.flatten() for slope in gradients]), -value.detach().mean()


def update(agent: Agent, vectors: tuple[Tensor, ...], actor_optimizer: torch.optim.Optimizer,
           critic_optimizer: torch.optim.Optimizer, replay: Replay, args: Args,
           of_critic: Callable = critic_gradient, of_actor: Callable = actor_gradient) -> Tensor:
    """One gradient step of critic and actor; returns the actor's loss, the critic's, and the mean of Q."""
    theta_mu, theta_q, target_mu, target_q, acting_mu = vectors
    # [DDPG-9] sample a minibatch of N transitions from R
    obs, *others = replay.sample(args.batch_size)
    # [DDPG-10] y_i = r_i + γ Q'(s_{i+1}, μ'(s_{i+1}|θ^μ')|θ^Q'), as critic_gradient begins
    # [DDPG-11] critic: minimise L = 1/N Σ_i (y_i − Q(s_i,a_i|θ^Q))²
    theta_q.grad, loss, value = of_critic(agent, args, obs, *others)
    critic_optimizer.step()
    # [DDPG-12] actor: ∇_θ^μ J ≈ 1/N Σ_i ∇_a Q(s,a|θ^Q)|_{s_i, μ(s_i)} ∇_θ^μ μ(s|θ^μ)|_{s_i}
    theta_mu.grad, policy_loss = of_actor(agent, obs)
    actor_optimizer.step()
    # [DDPG-13] θ^Q' ← τ θ^Q + (1−τ) θ^Q';  θ^μ' ← τ θ^μ + (1−τ) θ^μ'
    target_q.copy_(soft_update(target_q, theta_q, args.tau))
    target_mu.copy_(soft_update(target_mu, theta_mu, args.tau))
    acting_mu.copy_(theta_mu)
    # [DDPG-14] end for: train goes on with the next step
    return torch.stack([policy_loss, loss, value])


# ══ The slides end here. Below: repeating it all, saving, evaluating, the command line ════════════════════════════

SCRIPT = "ddpg"
METRICS = (
    "charts/episodic_return", "charts/episodic_length", "charts/SPS", "losses/policy_loss", "losses/qf_loss",
    "losses/qf_values",
)
LOG_STEPS = 1000  # over which the losses of a row are averaged
CHECKPOINT_SECONDS = 60  # and up to LOG_STEPS steps: what a crash costs; the replay buffer takes a while to write


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
    step, N = checkpoint.get("global_step", 0), args.num_envs
    end = args.total_timesteps - (args.total_timesteps - step) % N
    if end <= step:
        raise Failure(f"--total-timesteps: go beyond step {step} by an iteration, {N} steps")
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    acting = copy.deepcopy(agent)  # stays on the CPU
    agent.to(device)
    networks = agent.actor, agent.critic, agent.target_actor, agent.target_critic, acting.actor
    vectors = tuple(as_vector([*network.parameters()]) for network in networks)
    actor_optimizer = torch.optim.Adam([vectors[0]], fused=True)
    critic_optimizer = torch.optim.Adam([vectors[1]], fused=True)
    S, A = envs[0].observation_space.shape[0], envs[0].action_space.shape[0]
    replay, noise, losses = Replay(args.buffer_size, S, A, device), torch.zeros(N, A), []
    parts = {"actor_optimizer": actor_optimizer, "critic_optimizer": critic_optimizer, "replay": replay}
    for name, part in parts.items():
        if checkpoint:
            part.load_state_dict(checkpoint[name])
    actor_optimizer.param_groups[0]["lr"], critic_optimizer.param_groups[0]["lr"] = args.actor_lr, args.critic_lr
    gradients = [compiled(f) if args.compile else f for f in (critic_gradient, actor_gradient)]
    run = Run(args, folder, checkpoint, end, agent=agent, **parts)
    with run.bar:
        with contextlib.suppress(KeyboardInterrupt):
            actors = [Actor(env, run.bar) for env in envs]
            while step < end and not run.signal:
                run.collecting = True
                episodes = collect(acting, actors, replay, noise, step, args)
                run.collecting = False
                step += N
                for episodic_return, length in episodes:
                    run.log(step, {"charts/episodic_return": episodic_return, "charts/episodic_length": length})
                if step > args.learning_starts:
                    losses += [update(agent, vectors, actor_optimizer, critic_optimizer, replay, args, *gradients)
                               for _ in actors]
                if losses and (step % LOG_STEPS < N or step == end):
                    run.log(step, dict(zip(METRICS[3:], torch.stack(losses).mean(0).tolist())))
                    losses.clear()
                if step % LOG_STEPS < N and time.time() > run.due:
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
