# /// script
# requires-python = ">=3.10"
# dependencies = ["torch==2.13.0", "gymnasium[classic-control,mujoco]==1.4.0", "mujoco==3.2.7; python_version<'3.14'",
#                 "mujoco==3.8.1; python_version>='3.14'", "numpy==2.2.6; python_version<'3.14'",
#                 "numpy==2.4.6; python_version>='3.14'", "tyro==1.0.17", "wandb==0.31.0", "tqdm==4.70.1",
#                 "moviepy==2.2.1"]
# ///
# SPDX-License-Identifier: MIT
"""REINFORCE: actions become more probable, the higher the return that followed them.

    python reinforce.py --env-id CartPole-v1 --total-timesteps 200000   # 10 seconds: return about 500
    python reinforce.py --env-id Hopper-v4 --baseline                   # 1M steps, 2 minutes: return about 1650

Slides "复习：策略梯度定理", "策略网络的梯度", "策略梯度和Q学习的对比", "策略梯度算法回顾", "复习A2C：优势Actor-Critic"
(Williams 1992; Sutton & Barto, ch. 13)

    PG-SOFTMAX   πθ(a|s) = exp f_θ(s,a) / Σ_a' exp f_θ(s,a')
    PG-LOGGRAD   ∂ log πθ(a|s)/∂θ = ∂f_θ(s,a)/∂θ − E_{a'~πθ}[ ∂f_θ(s,a')/∂θ ]
    PG-THM       ∂J(θ)/∂θ = E_πθ[ ∂ log πθ(a|s)/∂θ · Q^πθ(s,a) ]
    PG-BACKPROP  ∂J/∂θ = E_πθ[ ( ∂f_θ(s,a)/∂θ − E_a'[∂f_θ(s,a')/∂θ] ) Q^πθ(s,a) ], both inner terms by back-propagation
    PG-ADV       θ ← θ + α E_πθ[ ∂ log πθ(a|s)/∂θ · A^πθ(s,a) ]
    A2C-ADV      A^π(s,a) = Q^π(s,a) − V^π(s)                                                        (--baseline)

    RF-1  initialise θ arbitrarily
    RF-2  for each episode {s_1, a_1, r(s_1,a_1), …, s_T, a_T, r(s_T,a_T)} ~ πθ do
    RF-3      for t = 1 to T do
    RF-4          θ ← θ + α ∂/∂θ log πθ(a_t|s_t) G_t
    RF-5      end for
    RF-6  end for
    RF-7  return θ

Symbols     variable            shape     meaning
    s_t     obs                 (B,S)     observation, S numbers; B steps of N episodes, one after the other
    a_t     actions             (B[,A])   continuous: A numbers; discrete: the index of one of A actions
    r_t     rewards             (B,)      reward
    G_t     returns             (B,)      return from t: r_t + γ r_{t+1} + … to the end of the episode
    V       values              (B,)      critic's estimate of G_t, with --baseline
    N, γ, α                               settings: see Args

Departures from the slides
    RF-4      θ moves once for N episodes, by the mean of their gradients, not at each t: the later steps of an episode
              are then still samples of the policy that the gradient is taken at, except for its running statistics.
              Adam makes the step; α is its step size.
    G_t       Flags choose the weight of ∂ log πθ; "scaled" means: with mean 0 and variance 1 over an update's steps:
                  (default)                     G_t, scaled: how much better than the update's average it was
                  --no-norm-returns             G_t, the slide's; with --num-envs 1 after each episode
                  --baseline                    G_t − V(s_t), scaled
                  --baseline --no-norm-returns  G_t − V(s_t), the slide's advantage
              An episode that a time limit ends has ended: G_t is what it earned until then.
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
    seed: int = 1  # of the networks, the actions and the environments
    total_timesteps: int = 1_000_000  # environment steps, counted over all actors
    num_envs: int = 8  # N: actors, each of which plays one episode per update
    learning_rate: float = 1e-3  # α: Adam's step size for the policy
    gamma: float = 0.99  # γ: discount per step
    baseline: bool = False  # subtract a learned V(s) from G_t
    value_lr: float = 1e-3  # Adam's step size for the baseline
    value_epochs: int = 10  # passes over an update's steps that fit the baseline, by minibatches of 64
    norm_returns: bool = True  # shift and scale what weighs the gradient, so that its mean is 0 and its variance 1
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
            may_be_0, most = name in ("seed", "gamma"), 1 if name == "gamma" else math.inf
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
        # [RF-1] initialise θ arbitrarily
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

    def policy_parameters(self) -> list[nn.Parameter]:
        return [*self.actor.parameters()] + ([] if self.discrete else [self.log_std])


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
        # [PG-SOFTMAX] in logarithms. [PG-LOGGRAD] The derivative of log Σ exp f is the expectation of ∂f under πθ.
        return output.log_softmax(-1).gather(-1, action.unsqueeze(-1).expand(*output.shape[:-1], 1)).squeeze(-1)
    z = (action - output) * (-log_std).exp()
    return -0.5 * (z * z).sum(-1) - log_std.sum() - 0.5 * math.log(2 * math.pi) * len(log_std)


def entropy(output: Tensor, log_std: Tensor | None) -> Tensor:
    """Mean entropy of πθ(·|s) in nats: Σ_A (log σ + ½ log 2πe), or −Σ_a π log π;   arguments as of log_prob → ()"""
    if log_std is None:
        log_probs = output.log_softmax(-1)
        return -(log_probs.exp() * log_probs).sum(-1).mean()
    return log_std.sum() + 0.5 * math.log(2 * math.pi * math.e) * len(log_std)


def score_loss(log_probs: Tensor, weight: Tensor, episodes: int) -> Tensor:
    """−1/N Σ_t log πθ(a_t|s_t) · weight_t, whose gradient is −RF-4's;   log_probs, weight (B,) → ()

    The weight is G_t, a sample of Q^πθ(s_t,a_t), or an advantage; no gradient passes through it. As on the slide it has
    no γ^t, which the exact ∂J/∂θ of γ < 1 has."""
    return -(log_probs * weight).sum() / episodes  # [PG-THM] [PG-BACKPROP]


def returns_to_go(rewards: Tensor, gamma: float) -> Tensor:
    """G_t = r_t + γ G_{t+1} of one episode, 0 after its end;   rewards (T,) of floats → (T,), in the rewards' unit"""
    returns, g = [], 0.0
    for reward in reversed(rewards.tolist()):  # as numbers: on tensors it takes over 20 times as long
        g = reward + gamma * g
        returns.append(g)
    return rewards.new_tensor(returns[::-1])


# ── Collecting ────────────────────────────────────────────────────────────────────────────────────────────────────

# Of an episode: tensors (T,…); steps of all actors up to its end; what it earned
Episode = namedtuple("Episode", "obs actions rewards end episodic_return")


@torch.no_grad()
def collect(acting: Agent, actors: list[Actor], limit: int) -> tuple[list[Episode], int]:
    """An episode of each actor → those that ended, and how many steps all took: at most `limit`, where the run ends"""
    taken, running, episodes, steps = [[] for _ in actors], list(range(len(actors))), [], 0
    # [RF-2] for each episode {s_1, a_1, r(s_1,a_1), …} ~ πθ do: N of them at a time
    while running and steps < limit:
        now = running[: limit - steps]
        obs = np.array([actors[n].obs for n in now])
        actions = acting.act(torch.from_numpy(obs), acting.noise(len(now))).numpy()
        for n, s, a in zip(now, obs, actions):
            _, reward, terminated, truncated = actors[n].step(a)
            taken[n].append((s, a, np.float32(reward)))
            steps += 1
            if terminated or truncated:
                tensors = (torch.from_numpy(np.array(x)) for x in zip(*taken[n]))
                episodes.append(Episode(*tensors, steps, actors[n].episodic_return))
                actors[n].reset()
                running.remove(n)
    return episodes, steps


# ── Update ────────────────────────────────────────────────────────────────────────────────────────────────────────

def update(agent: Agent, acting: Agent, theta: Tensor, phi: Tensor, policy_optimizer: torch.optim.Optimizer,
           value_optimizer: torch.optim.Optimizer, episodes: list[Episode], args: Args) -> dict[str, float]:
    """What is learned from N episodes."""
    obs, actions = (torch.cat([episode[i] for episode in episodes]).to(theta.device) for i in (0, 1))
    # [DETAIL] Statistics first, then θ: the policy that is optimised here is exactly the one that acts next. But
    # πθ below uses these statistics too, and the actors used older ones (at first none).
    agent.obs_norm.update(obs)
    with torch.no_grad():
        x = agent.obs_norm(obs)
        returns = torch.cat([returns_to_go(episode.rewards, args.gamma) for episode in episodes]).to(theta.device)
        weights = returns
        if args.baseline:
            values = agent.value_norm.inverse(agent.critic(x).squeeze(-1))
            weights = returns - values  # [A2C-ADV]
        if args.norm_returns:
            # [DETAIL] Returns of one sign would push all actions one way: now the better half goes up, the other down.
            weights = (weights - weights.mean()) / (weights.std(correction=0) + 1e-8)
    # [RF-3] for t = 1 to T do: all t of all episodes at once
    # [RF-4] θ ← θ + α ∂/∂θ log πθ(a_t|s_t) G_t; with the baseline [PG-ADV] θ ← θ + α E[ ∂ log πθ(a|s)/∂θ · A ]
    output = agent.actor(x)
    policy_loss = score_loss(log_prob(output, agent.log_std, actions), weights, len(episodes))
    theta.grad = nn.utils.parameters_to_vector(torch.autograd.grad(policy_loss, agent.policy_parameters()))
    metrics = {"losses/policy_loss": policy_loss, "losses/entropy": entropy(output, agent.log_std)}
    policy_optimizer.step()
    # [RF-5] end for
    if args.baseline:
        agent.value_norm.update(returns[:, None])
        targets, losses = agent.value_norm(returns), []
        # [DETAIL] V is fitted by many small steps: one could not follow the policy.
        for _ in range(args.value_epochs):
            for mb in torch.randperm(len(x)).split(64):
                value_loss = 0.5 * (agent.critic(x[mb]).squeeze(-1) - targets[mb]).square().mean()
                phi.grad = nn.utils.parameters_to_vector(torch.autograd.grad(value_loss, [*agent.critic.parameters()]))
                value_optimizer.step()
                losses.append(value_loss.detach())
        explained = 1 - (returns - values).var(correction=0) / (returns.var(correction=0) + 1e-8)
        metrics |= {"losses/value_loss": torch.stack(losses).mean(), "losses/explained_variance": explained}
    acting.load_state_dict(agent.state_dict())  # the next episodes are ~ πθ with the new θ
    return {name: value.item() for name, value in metrics.items()}


# ══ The slides end here. Below: repeating it all, saving, evaluating, the command line ════════════════════════════

SCRIPT = "reinforce"
METRICS = (
    "charts/episodic_return", "charts/episodic_length", "charts/SPS", "losses/policy_loss", "losses/value_loss",
    "losses/entropy", "losses/explained_variance",
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
    step = checkpoint.get("global_step", 0)
    if step >= args.total_timesteps:
        raise Failure(f"--total-timesteps: go beyond step {step}")
    acting = copy.deepcopy(agent)  # πθ, which acts, stays on the CPU: no step waits for a GPU
    agent.to("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    theta, phi = as_vector(agent.policy_parameters()), as_vector([*agent.critic.parameters()])
    policy_optimizer = torch.optim.Adam([theta], fused=True)
    value_optimizer = torch.optim.Adam([phi], fused=True)
    if checkpoint:
        policy_optimizer.load_state_dict(checkpoint["policy_optimizer"])
        value_optimizer.load_state_dict(checkpoint["value_optimizer"])
    policy_optimizer.param_groups[0]["lr"], value_optimizer.param_groups[0]["lr"] = args.learning_rate, args.value_lr
    optimizers = {"policy_optimizer": policy_optimizer, "value_optimizer": value_optimizer}
    run = Run(args, folder, checkpoint, args.total_timesteps, agent=agent, **optimizers)
    with run.bar:
        with contextlib.suppress(KeyboardInterrupt):
            actors = [Actor(env, run.bar) for env in envs]
            while step < args.total_timesteps and not run.signal:
                run.collecting = True
                episodes, steps = collect(acting, actors, args.total_timesteps - step)
                run.collecting = False
                losses = {}
                if len(episodes) == args.num_envs:  # fewer as the run ends: the longest are missing
                    losses = update(agent, acting, theta, phi, policy_optimizer, value_optimizer, episodes, args)
                for episode in episodes:
                    run.log(step + episode.end, dict(zip(METRICS, (episode.episodic_return, len(episode.rewards)))))
                step += steps
                run.log(step, losses)
                if time.time() > run.due:
                    run.save(step)
            # [RF-6] end for
            # [RF-7] return θ: it is in the checkpoint
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
