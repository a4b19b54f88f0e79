# /// script
# requires-python = ">=3.10"
# dependencies = ["torch==2.13.0", "gymnasium[classic-control,mujoco]==1.4.0", "mujoco==3.2.7; python_version<'3.14'",
#                 "mujoco==3.8.1; python_version>='3.14'", "numpy==2.2.6; python_version<'3.14'",
#                 "numpy==2.4.6; python_version>='3.14'", "ale-py==0.12.1", "opencv-python-headless==5.0.0.93",
#                 "tyro==1.0.17", "wandb==0.31.0", "tqdm==4.70.1", "moviepy==2.2.1"]
# ///
# SPDX-License-Identifier: MIT
"""TRPO: each update shall stay inside a trust region, an expected KL of at most ε.

    python trpo.py --env-id Hopper-v4                                   # 1M steps, 3 minutes: return about 2800
    python trpo.py --env-id CartPole-v1 --total-timesteps 200000        # 20 seconds: return about 500
    python trpo.py --env-id ALE/Pong-v5 --cg-iters 10 --cg-subsampling 4 --update-epochs 4  # 40 minutes: return 18

Slides 信任区域策略优化 TRPO, "策略梯度的优化目标" to "结果比较" (Schulman et al. 2015, arXiv:1502.05477)

    J-1         J(θ) = E_{τ~pθ(τ)}[ Σ_t γ^t r(s_t,a_t) ]
    J-2         J(θ) = E_{s0}[ V^πθ(s_0) ]
                How much better is θ'? The advantages of θ tell, along the paths of θ':
    J-DIFF      J(θ') − J(θ) = E_{τ~pθ'(τ)}[ Σ_t γ^t A^πθ(s_t,a_t) ]
    J-IS        J(θ') − J(θ) = Σ_t E_{s_t~pθ'}[ E_{a_t~πθ}[ (πθ'(a_t|s_t)/πθ(a_t|s_t)) γ^t A^πθ(s_t,a_t) ] ]
                If πθ' differs from πθ with a probability below ε in each state, both visit nearly the same states:
    J-DIST      pθ'(s_t) = (1−ε)^t pθ(s_t) + (1−(1−ε)^t) p_mistake(s_t), so |pθ'(s_t) − pθ(s_t)| ≤ 2(1−(1−ε)^t) ≤ 2εt
    J-SURR      J(θ') − J(θ) ≈ Σ_t E_{s_t~pθ}[ E_{a_t~πθ}[ (πθ'(a_t|s_t)/πθ(a_t|s_t)) γ^t A^πθ(s_t,a_t) ] ]
    TRPO-OBJ    θ' ← argmax_θ' Σ_t E_{s_t~pθ}[ E_{a_t~πθ}[ (πθ'/πθ) γ^t A^πθ ] ]
    TRPO-KL     such that E_{s_t~pθ}[ D_KL(πθ'(a_t|s_t) ‖ πθ(a_t|s_t)) ] ≤ ε
    TRPO-MONO   J(θ') ≥ L_θ(θ') − C · D_KL^max(θ,θ'),  C = 4εγ/(1−γ)²,  ε = max_{s,a} |A_π(s,a)|,
                L_θ(θ') = J(θ) + Σ_t E_{s_t~pθ}[ E_{a_t~πθ}[ (πθ'/πθ) γ^t A^πθ ] ]: what raises the right side raises J.
                C is far too large to use, and a bound for every state too much to ask: TRPO bounds the mean KL.
                Solved under the constraint (--solver cg; without TRPO-CG-4 it is a natural policy gradient)
    TRPO-CG-1     g = ∇ of the surrogate at θ
    TRPO-CG-2     x ≈ H⁻¹ g by conjugate gradient, H = ∇² of the KL at θ (Fisher), only by products H v
    TRPO-CG-3     β = sqrt( 2ε / xᵀ H x )
    TRPO-CG-4     backtracking line search: θ' = θ + α^i β x, the smallest i ≥ 0 with KL ≤ ε and a better surrogate;
                  none: keep θ
    TRPO-CG-5     fit the value function to the returns
                or with the constraint as a penalty (--solver penalty)
    TRPO-PEN-1    θ' ← argmax_θ' Σ_t E[ E[ (πθ'/πθ) γ^t A^πθ ] ] − λ ( D_KL(πθ' ‖ πθ) − ε )
    TRPO-PEN-2    λ ← λ + α ( D_KL(πθ' ‖ πθ) − ε )

    The deck's table of results names a "TRPO - vine", without pseudocode. These lines follow the paper (5.2). With
    --vine they replace the surrogate of the single path, (πθ'/πθ) A^πθ. They need a simulator that can be set to s_n:
    VINE-1      choose M states s_n from the trajectories: the rollout set
    VINE-2      at each s_n take K actions a_{n,k}: all of them, or samples of πθ(·|s_n)
    VINE-3      after each, follow πθ for a short way, with the same random numbers for all K
    VINE-4      Q̂(s_n,a_{n,k}) = Σ_{i<L} γ^i r_{t+i} + γ^L V(s_{t+L}), with s_t = s_n; no V where the episode ended
    VINE-5      maximise E_n[ Σ_k w_k Q̂(s_n,a_{n,k}) / Σ_k w_k ]; with all actions w_k = πθ'(a_{n,k}|s_n), so that
                Σ_k w_k = 1; with samples w_k = πθ'(a_{n,k}|s_n) / πθ(a_{n,k}|s_n)

Symbols     variable            shape     meaning
    s_t     obs                 (T,N,…)   observation; next_obs is s_{t+1}, also where an episode ends
    a_t     actions             (T,N[,A]) continuous: A numbers; discrete: the index of one of A actions
    r_t     rewards             (T,N)     reward. πθ'/πθ, the probability ratio, is `ratio`
    V       values              (T,N)     critic's estimate of the return from s_t; next_values from s_{t+1}
    A^πθ    advantages          (T,N)     how much better a_t was than the policy's average action
    θ, φ    theta, phi          (P,)      parameters of the policy and of the value function, a vector each
    x       natural             (P,)      H⁻¹ g, the natural gradient. In the update, x is a normalised observation
    β x     step                (P,)      as long as the trust region allows
    α^i     backtrack_coef**i             what the line search multiplies the step by (α of TRPO-PEN-2: dual_lr)
    λ       agent.dual                    price of the KL, in --solver penalty
    s_n     states              (M,…)     where the vine branches. a_{n,k} is `tried` (M,K[,A])
    Q̂       q                   (M,K)     discounted rewards of a branch, and V where it stops
    N, T, M, K, L, γ, ε                   settings: see Args; J-DIST's and TRPO-MONO's ε are others. λ of the advantage
                                          (not on the slides) is gae_lambda

Departures from the slides
    J-SURR      leaves out γ^t, which makes it a plain mean over samples: with γ^t, late steps would hardly count.
    TRPO-KL     is the slide's D_KL(πθ' ‖ πθ); the paper's is D_KL(πθ ‖ πθ'). At θ' = θ both have the Hessian H.
    TRPO-CG-1   to TRPO-CG-5 are the book's (动手学强化学习, chapter 11), and all but the last the paper's too: the deck
                only names the Taylor expansion and the conjugate gradient.
    TRPO-PEN-1  the argmax is some epochs of Adam.
    TRPO-PEN-2  λ stays at 0 or above: below 0 it would reward a large KL.
    VINE-4      adds V, and its bias, after a few steps; the paper has no V, and branches of 50 to 100 steps on MuJoCo.
    VINE-5      comes with the mean KL of all N·T states, the paper's with that of the s_n.
    A^πθ        comes from a λ-weighted sum of TD errors (GAE, arXiv:1506.02438), as in the paper's successors; V is
                fitted to this sum plus V.
    N·T         is 1024 steps; the paper's iterations have 50,000 and more.
    [DETAIL]    marks whatever else the slides don't have, each with its reason.
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
from typing import Literal

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
    env_id: str = "Hopper-v4"  # environment that observes a vector, or an Atari game ALE/…; Box or Discrete actions
    seed: int = 1  # of the networks, the actions, the minibatches and the environments
    total_timesteps: int = 1_000_000  # environment steps, counted over all actors
    num_envs: int = 8  # N: actors, each with an environment of its own
    num_steps: int = 128  # T: steps that each actor collects per iteration
    solver: Literal["cg", "penalty"] = "cg"  # conjugate gradient and line search, or a penalty with a price λ
    kl_constraint: float = 0.01  # ε: expected KL, in nats, that an update may reach; --solver penalty only aims at it
    cg_iters: int = 25  # iterations of the conjugate gradient; the paper has 10
    cg_damping: float = 0.1  # multiple of the identity added to H
    cg_subsampling: int = 1  # n: H is the mean over a random 1/n of the T·N steps: saves time on Atari; paper: 10
    backtrack_coef: float = 0.8  # α: each step that the line search tries is this times the last
    backtrack_iters: int = 10  # steps that the line search tries
    line_search: bool = True  # off: takes β x as it is, a natural policy gradient
    dual_lr: float = 10.0  # α of --solver penalty: step size of λ
    policy_lr: float = 3e-4  # Adam's step size for --solver penalty
    vine: bool = False  # compare K actions in each of M states by short branches, whose steps count, too
    vine_states: int = 128  # M: states per iteration where the vine branches, at most N·T
    vine_actions: int = 4  # K: branches of a state, where actions are continuous; otherwise one for each action
    vine_steps: int = 4  # L: steps of a branch
    value_lr: float = 1e-3  # Adam's step size for the value function
    minibatch_size: int = 128  # steps per gradient of the value function, and of --solver penalty
    update_epochs: int = 20  # passes over the N·T steps, of the value function and of --solver penalty
    gamma: float = 0.99  # γ: discount per step
    gae_lambda: float = 0.95  # λ of the advantage: 1 is the return minus V, 0 the one-step TD error
    compile: bool = False  # compile V's gradient: takes some 20 seconds, then saves time; needs a C++ compiler
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
            may_be_0 = name in ("seed", "gamma", "gae_lambda", "cg_damping")
            above = 1 if name == "vine_actions" else 0
            most = 1 if name in ("gamma", "gae_lambda", "backtrack_coef") else 1e300  # no inf
            if type(x) in (int, float) and not (above < x <= most or x == 0 and may_be_0):
                raise ValueError(f"--{name.replace('_', '-')} can't be {x}")


# ── Environments ──────────────────────────────────────────────────────────────────────────────────────────────────

SCREEN = 42  # width and height of a frame: half of Mnih's, a quarter of the work


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


def copy_state(env: gym.Env, simulator: gym.Env) -> None:
    """The simulator goes on from where the environment stands, to the bit: an Atari game or a MuJoCo environment of
    Gymnasium's own. What others keep outside MuJoCo's data, a counter or a wrapper's memory, isn't copied."""
    if hasattr(env.unwrapped, "ale"):
        simulator.unwrapped.restore_state(env.unwrapped.clone_state())
        simulator.obs_queue = env.get_wrapper_attr("obs_queue").copy()
    elif hasattr(env.unwrapped, "mujoco_renderer"):  # all data, as rewards use more than positions and velocities
        simulator.unwrapped.data = copy.copy(env.unwrapped.data)
    else:
        raise Failure(f"--vine can't copy the state of {env.spec.id}: choose an Atari game or a MuJoCo environment")


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

def network(inputs: tuple[int, ...], outputs: int, gain: float) -> nn.Sequential:
    """[DETAIL] Orthogonal weights keep the signal's size; a `gain` near 0 gives all actions an even start."""
    if len(inputs) == 1:
        layers = [nn.Linear(*inputs, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, outputs)]
    else:  # [DETAIL] The paper's for Atari, but 42×42 pixels for 52×40, and ReLU, which takes less time, for tanh.
        layers = [nn.Conv2d(4, 16, 4, stride=2), nn.ReLU(), nn.Conv2d(16, 16, 4, stride=2), nn.ReLU(), nn.Flatten(),
                  nn.Linear(16 * 9 * 9, 20), nn.ReLU(), nn.Linear(20, outputs)]
    for layer in layers:
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.orthogonal_(layer.weight, gain if layer is layers[-1] else 2**0.5)
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
        S, A = observation_space.shape, action_space.n if self.discrete else action_space.shape[0]
        self.frames = len(S) == 3
        self.obs_norm, self.value_norm = RunningNorm(*S), RunningNorm(1)
        self.register_buffer("dual", torch.tensor(1.0))  # λ. [DETAIL] It begins at 1; a buffer, to be resumed with
        self.actor = network(S, A, gain=0.01)  # continuous: mean of a Gaussian; discrete: scores f_θ(s,a) of a softmax
        self.critic = network(S, 1, gain=1.0)
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
        return output.log_softmax(-1).gather(-1, action.unsqueeze(-1).expand(*output.shape[:-1], 1)).squeeze(-1)
    z = (action - output) * (-log_std).exp()
    return -0.5 * (z * z).sum(-1) - log_std.sum() - 0.5 * math.log(2 * math.pi) * len(log_std)


def entropy(output: Tensor, log_std: Tensor | None) -> Tensor:
    """Mean entropy of πθ(·|s) in nats: Σ_A (log σ + ½ log 2πe), or −Σ_a π log π;   arguments as of log_prob → ()"""
    if log_std is None:
        log_probs = output.log_softmax(-1)
        return -(log_probs.exp() * log_probs).sum(-1).mean()
    return log_std.sum() + 0.5 * math.log(2 * math.pi * math.e) * len(log_std)


def surrogate(ratio: Tensor, advantage: Tensor) -> Tensor:
    """E[ (πθ'/πθ) A ], what θ' gains to first order (paper, eq. 14, q = πθ, A for Q);   ratio, advantage (B,) → ()"""
    return (ratio * advantage).mean()  # [J-SURR]


def vine_surrogate(log_weight: Tensor, q: Tensor) -> Tensor:
    """E_n[ Σ_k w_k Q̂_k / Σ_k w_k ], w_k = e^log_weight (VINE-5; paper, eq. 15 and 16);   log_weight, q (M,K) → ()"""
    return (log_weight.softmax(-1) * q).sum(-1).mean()


def kl_divergence(p: Tensor, log_std_p: Tensor | None, q: Tensor, log_std_q: Tensor | None) -> Tensor:
    """D_KL(p ‖ q) in nats: Σ_A (log σ_q/σ_p + (σ_p² + (μ_p−μ_q)²) / 2σ_q² − ½), or Σ_a p (log p − log q).

    actor's outputs p, q (…,A), log_stds (A,) or None of a softmax → (…)"""
    if log_std_p is None:
        log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
        return (log_p.exp() * (log_p - log_q)).sum(-1)
    squares = (2 * log_std_p).exp() + (p - q).square()
    return (log_std_q - log_std_p + 0.5 * squares * (-2 * log_std_q).exp() - 0.5).sum(-1)


def conjugate_gradient(product: Callable[[Tensor], Tensor], g: Tensor, iterations: int) -> Tensor:
    """x ≈ H⁻¹ g for a symmetric positive definite H, of which only products H v are known;   g (P,) → (P,)

    Hestenes & Stiefel 1952 (paper, appendix C). Stops early once the residual is shorter than 1e-10 of g."""
    x, residual, direction = torch.zeros_like(g), g.clone(), g.clone()
    rr = residual @ residual
    for _ in range(iterations):
        if rr <= 1e-20 * (g @ g):
            break
        h_direction = product(direction)
        length = rr / (direction @ h_direction)
        x += length * direction
        residual -= length * h_direction
        rr, old_rr = residual @ residual, rr
        direction = residual + (rr / old_rr) * direction
    return x


def ascended_dual(dual: Tensor, kl: Tensor, kl_constraint: float, dual_lr: float) -> Tensor:
    """TRPO-PEN-2: λ + α ( KL − ε ), and at least 0;   dual, kl () → ()"""
    return (dual + dual_lr * (kl - kl_constraint)).clamp(min=0)


def gae(rewards: Tensor, values: Tensor, next_values: Tensor, terminated: Tensor, truncated: Tensor,
        gamma: float, lmbda: float) -> Tensor:
    """A_t = Σ_l (γλ)^l δ_{t+l}, δ_t = r_t + γ V(s_{t+1}) − V(s_t) (arXiv:1506.02438, eq. 16).

    All (T,N) → (T,N), in the rewards' unit. [DETAIL] At an episode's end: a terminal s_{t+1} is worth 0, a truncated
    one keeps its value."""
    td_delta = rewards + gamma * next_values * ~terminated - values
    carry = gamma * lmbda * ~(terminated | truncated)  # what comes after an episode's end belongs to another episode
    advantages, advantage = torch.zeros_like(td_delta), torch.zeros_like(td_delta[0])
    for t in reversed(range(len(rewards))):
        advantages[t] = advantage = td_delta[t] + carry[t] * advantage
    return advantages


# ── Collecting ────────────────────────────────────────────────────────────────────────────────────────────────────

# Tensors (T,N,…); of each episode that ended: steps of all actors up to its end, return, length; of the vine: s_n
# (M,…), a_{n,k} (M,K[,A]), Q̂ (M,K); and how many steps were taken, branches included
Rollout = namedtuple("Rollout", "obs actions rewards next_obs terminated truncated episodes vine steps")


@torch.no_grad()
def collect(old: Agent, actors: list[Actor], simulators: list[Actor], args: Args) -> Rollout:
    """T steps of each of the N actors: s_t ~ pθ, a_t ~ πθ. With simulators, the branches of the vine too."""
    T, N, S = args.num_steps, len(actors), old.obs_norm.mean.shape
    obs, next_obs = np.zeros((2, T, N, *S), np.float32)
    rewards, (terminated, truncated) = np.zeros((T, N), np.float32), np.zeros((2, T, N), bool)
    noise, actions, episodes, vine, steps = old.noise(T, N), [], [], [], 0
    # [VINE-1] choose M states s_n from the trajectories
    chosen = set(torch.randperm(T * N)[: args.vine_states].tolist()) if args.vine else ()
    for t in range(T):
        obs[t] = [actor.obs for actor in actors]
        actions.append(old.act(torch.from_numpy(obs[t]), noise[t]))
        for n, (actor, action) in enumerate(zip(actors, actions[t].numpy())):
            if t * N + n in chosen:
                *sample, taken = branch(old, actor, simulators, args)
                vine.append(sample)
                steps += taken
            next_obs[t, n], rewards[t, n], terminated[t, n], truncated[t, n] = actor.step(action)
            if terminated[t, n] or truncated[t, n]:
                episodes.append((steps + (t + 1) * N, actor.episodic_return, actor.length))
                actor.reset()
    arrays = obs, torch.stack(actions), rewards, next_obs, terminated, truncated
    return Rollout(*map(torch.as_tensor, arrays), episodes, [*map(torch.stack, zip(*vine))], steps + T * N)


def branch(old: Agent, actor: Actor, simulators: list[Actor], args: Args) -> tuple[Tensor, Tensor, Tensor, int]:
    """From s_n, where the actor stands, a short way with each simulator: s_n (…), a_{n,k} (K[,A]), Q̂ (K,), steps"""
    K, L, steps = len(simulators), args.vine_steps, 0
    for simulator in simulators:
        copy_state(actor.env, simulator.env)
    obs, q, terminated = np.array([actor.obs] * K), torch.zeros(K), np.zeros(K, bool)
    # [VINE-2] take K actions: all of them, or samples of πθ(·|s_n)
    tried = torch.arange(K) if old.discrete else old.act(torch.from_numpy(obs), old.noise(K))
    # [VINE-3] after each, follow πθ, with the same random numbers for all K. A time limit ends no branch.
    noise = old.noise(L)
    for i in range(L):
        action = old.act(torch.from_numpy(obs), noise[i]) if i else tried
        for k in np.flatnonzero(~terminated):
            obs[k], reward, terminated[k], _ = simulators[k].step(action[k].numpy())
            q[k] += args.gamma**i * (np.sign(reward) if old.frames else reward)
            steps += 1
    # [VINE-4] Q̂(s_n,a_{n,k}) = Σ_{i<L} γ^i r_{t+i} + γ^L V(s_{t+L}), no V where the episode ended
    values = old.value_norm.inverse(old.critic(old.obs_norm(torch.from_numpy(obs))).squeeze(-1))
    return torch.from_numpy(actor.obs), tried, q + args.gamma**L * values * torch.from_numpy(~terminated), steps


# ── Update ────────────────────────────────────────────────────────────────────────────────────────────────────────

def compiled(function: Callable) -> Callable:
    """[DETAIL] --compile: one call for a function and its gradient. In networks this small, many calls cost much."""
    torch._dynamo.config.trace_autograd_ops = True  # or it can't see the gradient
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(1))
    except RuntimeError:
        raise Failure("--compile needs a C++ compiler, say g++, and Python's headers: install them, or leave it out")
    return torch.compile(function, fullgraph=True)


def vine_objective(agent: Agent, states: Tensor, actions: Tensor, q: Tensor) -> Callable[[], Tensor]:
    """Returns a function: the vine's objective of the agent when it is called, πθ'; πθ is the agent now"""
    def log_probs() -> Tensor:
        outputs = agent.actor(states).unsqueeze(1).expand(-1, q.shape[1], -1)
        return log_prob(outputs, agent.log_std, actions)

    drawn = 0.0 if agent.discrete else log_probs().detach()  # every discrete action is there once, none was drawn
    # [VINE-5] maximise E_n[ Σ_k w_k Q̂(s_n,a_{n,k}) / Σ_k w_k ]
    return lambda: vine_surrogate(log_probs() - drawn, q)


def comparison(agent: Agent, x: Tensor, action: Tensor, advantage: Tensor, vine: list | None = None) -> Callable:
    """Returns a function: objective and KL of the agent when it is called, πθ', against the agent now, πθ; on all
    steps or a minibatch. The vine's objective needs no action or advantage, and is always on all its branches."""
    with torch.no_grad():
        old_output, old_log_std = agent.actor(x), copy.deepcopy(agent.log_std)
        old_log_prob = log_prob(old_output, old_log_std, action)
    of_vine = vine_objective(agent, *vine) if vine else None

    def objective_and_kl(mb: slice | Tensor = slice(None)) -> tuple[Tensor, Tensor]:
        output = agent.actor(x[mb])
        # [TRPO-OBJ] what θ' shall maximise
        if vine:
            objective = of_vine()
        else:
            ratio = (log_prob(output, agent.log_std, action[mb]) - old_log_prob[mb]).exp()
            objective = surrogate(ratio, advantage[mb])
        # [TRPO-KL] what shall be at most ε
        return objective, kl_divergence(output, agent.log_std, old_output[mb], old_log_std).mean()

    return objective_and_kl


def solve_cg(agent: Agent, theta: Tensor, x: Tensor, action: Tensor, advantage: Tensor, args: Args,
             vine: list | None = None) -> dict:
    """The best step by the surrogate's slope and the KL's curvature, shortened until the true ones agree"""
    parameters, objective_and_kl = agent.policy_parameters(), comparison(agent, x, action, advantage, vine)

    def gradient(of: Tensor, **kwargs: bool) -> Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(of, parameters, **kwargs)])

    # [TRPO-CG-1] g = ∇ of the surrogate at θ
    objective, _ = objective_and_kl()
    g = gradient(objective)
    # [TRPO-CG-2] x ≈ H⁻¹ g. ∇KL, which is 0 here, is built once; its derivative along v is H v.
    _, kl = objective_and_kl(torch.randperm(len(x))[:: args.cg_subsampling])
    kl_gradient = gradient(kl, create_graph=True)

    def fisher(v: Tensor) -> Tensor:  # [DETAIL] The damping keeps H positive definite where the KL is flat.
        return gradient(kl_gradient @ v, retain_graph=True) + args.cg_damping * v

    natural = conjugate_gradient(fisher, g, args.cg_iters)
    # [TRPO-CG-3] β = sqrt( 2ε / xᵀ H x ). H has its damping here too, which makes the step shorter.
    step = natural * (2 * args.kl_constraint / (natural @ fisher(natural)).clamp(min=1e-20)).sqrt()  # 0 where g is 0
    # [TRPO-CG-4] backtracking line search; without it the first step, i = 0, is taken as it is
    old_theta = theta.clone()
    with torch.no_grad():
        for i in range(args.backtrack_iters):
            theta.copy_(old_theta + args.backtrack_coef**i * step)
            new_objective, new_kl = objective_and_kl()
            if not args.line_search or (new_kl <= args.kl_constraint and new_objective > objective):
                return {"losses/policy_loss": -new_objective, "losses/kl": new_kl, "losses/backtracks": i}
        theta.copy_(old_theta)
    return {"losses/policy_loss": -objective.detach(), "losses/kl": 0.0, "losses/backtracks": args.backtrack_iters}


def value_gradient(critic: nn.Module, parameters: list[nn.Parameter], x: Tensor, target: Tensor,
                   ) -> tuple[Tensor, Tensor]:
    """∇_φ of a minibatch's loss (P,), and the loss"""
    loss = 0.5 * (critic(x).squeeze(-1) - target).square().mean()
    return torch.cat([slope.flatten() for slope in torch.autograd.grad(loss, parameters)]), loss.detach()


def fit_values(agent: Agent, phi: Tensor, optimizer: torch.optim.Optimizer, x: Tensor, target: Tensor,
               args: Args, gradient: Callable = value_gradient) -> dict:
    """Several passes over the iteration's steps; returns the mean loss."""
    parameters, losses = [*agent.critic.parameters()], []
    # [TRPO-CG-5] fit the value function to the returns. [DETAIL] By many small steps: one would leave V behind.
    for _ in range(args.update_epochs):
        for mb in torch.randperm(len(x)).split(args.minibatch_size):
            phi.grad, loss = gradient(agent.critic, parameters, x[mb], target[mb])
            optimizer.step()
            losses.append(loss)
    return {"losses/value_loss": torch.stack(losses).mean()}


def solve_penalty(agent: Agent, theta: Tensor, optimizer: torch.optim.Optimizer, x: Tensor, action: Tensor,
                  advantage: Tensor, args: Args, vine: list | None = None) -> dict:
    """The trust region as a penalty: θ climbs while λ is fixed, then λ grows if the KL is above ε, else it shrinks."""
    parameters, objective_and_kl = agent.policy_parameters(), comparison(agent, x, action, advantage, vine)
    # [TRPO-PEN-1] θ' ← argmax_θ' of the surrogate − λ ( KL − ε ); the constant λ ε has no gradient
    for _ in range(args.update_epochs):
        for mb in torch.randperm(len(x)).split(args.minibatch_size):
            objective, kl = objective_and_kl(mb)
            slopes = torch.autograd.grad(agent.dual * kl - objective, parameters)
            theta.grad = torch.cat([slope.flatten() for slope in slopes])
            optimizer.step()
    # [TRPO-PEN-2] λ ← λ + α ( KL − ε )
    with torch.no_grad():
        objective, kl = objective_and_kl()
        agent.dual.copy_(ascended_dual(agent.dual, kl, args.kl_constraint, args.dual_lr))
    return {"losses/policy_loss": -objective, "losses/kl": kl, "losses/dual": agent.dual}


def update(agent: Agent, old: Agent, theta: Tensor, phi: Tensor, policy_optimizer: torch.optim.Optimizer,
           value_optimizer: torch.optim.Optimizer, rollout: Rollout, args: Args,
           gradient: Callable = value_gradient) -> dict[str, float]:
    """One iteration's learning, from a rollout to its losses."""
    obs, actions, rewards, next_obs, terminated, truncated = (x.to(theta.device) for x in rollout[:6])
    # [DETAIL] Statistics first, then θ: the policy that is optimised here is exactly the one that acts next. But
    # πθ below uses these statistics too, and the actors used older ones (at first none).
    agent.obs_norm.update(obs.flatten(0, 1))
    if agent.frames:
        rewards = rewards.sign()  # [DETAIL] A gain counts 1, a loss −1: the rare big ones don't drown the others.
    with torch.no_grad():
        x, next_x = agent.obs_norm(obs.flatten(0, 1)), agent.obs_norm(next_obs.flatten(0, 1))
        values, next_values = (agent.value_norm.inverse(agent.critic(y)).view_as(rewards) for y in (x, next_x))
        advantages = gae(rewards, values, next_values, terminated, truncated, args.gamma, args.gae_lambda)
        returns = advantages + values  # the λ-return: what V(s_t) should have been
        agent.value_norm.update(returns.reshape(-1, 1))
        # [DETAIL] A of mean 0 varies the gradient less; with a variance of 1 one price λ fits any size of reward.
        advantages = (advantages - advantages.mean()) / (advantages.std(correction=0) + 1e-8)
    if agent.frames:  # [DETAIL] In this layout a convolution's gradient takes a third less time.
        x = x.contiguous(memory_format=torch.channels_last)
    action, advantage, target = (y.flatten(0, 1) for y in (actions, advantages, agent.value_norm(returns)))
    vine = None
    if args.vine:
        states, tried, q = (y.to(theta.device) for y in rollout.vine)
        # [DETAIL] Scaled like A. Equal Q̂ of a state first become exactly 0, or rounding errors would be enlarged.
        q = q - q[:, :1]
        q = q - q.mean(-1, keepdim=True)
        vine = [agent.obs_norm(states), tried, q / (q.std(correction=0) + 1e-8)]
    if args.solver == "cg":
        metrics = solve_cg(agent, theta, x, action, advantage, args, vine)
    else:
        metrics = solve_penalty(agent, theta, policy_optimizer, x, action, advantage, args, vine)
    metrics |= fit_values(agent, phi, value_optimizer, x, target, args, gradient)
    old.load_state_dict(agent.state_dict())  # θ ← θ'
    with torch.no_grad():
        metrics["losses/entropy"] = entropy(agent.actor(x), agent.log_std)
    explained = 1 - (returns - values).var(correction=0) / (returns.var(correction=0) + 1e-8)
    metrics["losses/explained_variance"] = explained
    return {name: float(value) for name, value in metrics.items()}


# ══ The slides end here. Below: repeating it all, saving, evaluating, the command line ════════════════════════════

SCRIPT = "trpo"
METRICS = (
    "charts/episodic_return", "charts/episodic_length", "charts/SPS", "losses/policy_loss", "losses/value_loss",
    "losses/entropy", "losses/kl", "losses/backtracks", "losses/dual", "losses/explained_variance",
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
    K = (agent.actor[-1].out_features if agent.discrete else args.vine_actions) if args.vine else 0
    batch_size += min(args.vine_states, batch_size) * K * args.vine_steps  # at most: a branch may end early
    end = args.total_timesteps - (0 if args.vine else (args.total_timesteps - step) % batch_size)
    if step + batch_size > end:
        raise Failure(f"--total-timesteps: go beyond step {step} by an iteration, {batch_size} steps")
    copies = [make_env(args.env_id) for _ in range(K)]
    if args.vine:
        copy_state(envs[0], copies[0])  # fails now if it can't
    old = copy.deepcopy(agent)  # πθ, which acts, stays on the CPU: no step waits for a GPU
    agent.to("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    theta, phi = as_vector(agent.policy_parameters()), as_vector([*agent.critic.parameters()])
    policy_optimizer = torch.optim.Adam([theta], fused=True)
    value_optimizer = torch.optim.Adam([phi], fused=True)
    if checkpoint:
        policy_optimizer.load_state_dict(checkpoint["policy_optimizer"])
        value_optimizer.load_state_dict(checkpoint["value_optimizer"])
    policy_optimizer.param_groups[0]["lr"], value_optimizer.param_groups[0]["lr"] = args.policy_lr, args.value_lr
    optimizers = {"policy_optimizer": policy_optimizer, "value_optimizer": value_optimizer}
    gradient = compiled(value_gradient) if args.compile else value_gradient
    run = Run(args, folder, checkpoint, end, agent=agent, **optimizers)
    with run.bar:
        with contextlib.suppress(KeyboardInterrupt):
            actors = [Actor(env, run.bar) for env in envs]
            simulators = [Actor(env, run.bar) for env in copies]
            while step + batch_size <= end and not run.signal:
                run.collecting = True
                rollout = collect(old, actors, simulators, args)
                run.collecting = False
                losses = update(agent, old, theta, phi, policy_optimizer, value_optimizer, rollout, args, gradient)
                for steps, episodic_return, length in rollout.episodes:
                    run.log(step + steps, {"charts/episodic_return": episodic_return, "charts/episodic_length": length})
                step += rollout.steps
                run.log(step, losses)
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
