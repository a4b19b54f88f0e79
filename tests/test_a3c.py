"""The mathematics of a3c.py against calculations of another kind, and how its processes begin and end."""

import contextlib
import copy
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from gymnasium.wrappers import TimeLimit
from tqdm import tqdm

import a3c
import envs
from a3c import (
    Actor, Agent, Args, Failure, RunningNorm, Shared, actor_learner, as_vector, log_prob, make_env, n_step_returns,
    rmsprop_, score_loss,
)
from helpers import ENDLESS, ROOT, SERVER, complaints, environment, finish, iterations, metrics, only_run, run, start, wait_for
from oracles import Process, distribution, flat, gradient

KEPT = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
SPACES = pytest.mark.parametrize("space", [Discrete(3), Box(-1, 1, (2,))], ids=["discrete", "continuous"])
LSTM = pytest.mark.parametrize("lstm", [False, True], ids=["feedforward", "lstm"])


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def module():
    """Of which conftest.main runs main()"""
    return a3c


# ── Environments ────────────────────────────────────────────────────────────────────────────────────────────

class Noise(gym.Env):
    """Observes and rewards at random; terminates after `length` steps."""

    observation_space = Box(-np.inf, np.inf, (3,))

    def __init__(self, action_space=Discrete(3), length=8):
        self.action_space, self.length = action_space, length

    def observe(self):
        return self.np_random.normal(1, 2, 3)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.observe(), {}

    def step(self, action):
        self.t += 1
        return self.observe(), self.np_random.normal(1, 3), self.t == self.length, False, {}


class Frames(Noise):
    """As an Atari game observes"""

    observation_space = Box(0, 255, (4, 84, 84), np.uint8)

    def observe(self):
        return self.np_random.integers(256, size=(4, 84, 84), dtype=np.uint8)


class Announced(envs.Counter):
    """Says that a worker's first step has been counted."""

    announced = False

    def step(self, action):
        if self.t and not self.announced:
            self.announced = True
            os.write(1, b"begun\n")  # at one go, as another does too
        return super().step(action)


class Listed(envs.Counter):
    """Each episode leaves its process and its seed in a file."""

    file = None

    def reset(self, seed=None, options=None):
        with open(self.file, "a") as file:
            print(os.getpid(), seed, file=file)
        return super().reset(seed=seed)


class Halting(envs.Counter):
    """Stops its process where it is told to, or exits."""

    where = None

    def halt(self, where):
        if self.where == "exit":
            os._exit(0)
        if self.where == where:
            os.kill(os.getpid(), signal.SIGSTOP)

    def reset(self, seed=None, options=None):
        self.halt("reset")
        return super().reset(seed=seed)

    def step(self, action):
        if self.t == 3:
            self.halt("step")
        return super().step(action)

    def close(self):
        self.halt("close")


class Slow(envs.Counter):
    """Takes two and a half seconds for each reset."""

    def reset(self, seed=None, options=None):
        time.sleep(2.5)
        return super().reset(seed=seed)


class Broken(envs.Counter):
    """Breaks in the third step."""

    def reward(self, action):
        if self.t == 3:
            raise RuntimeError("the simulator\nbroke")
        return 1.0


class Served(envs.Counter):
    """Is served by two programs and a process of Python's, which it ends."""

    def __init__(self):
        super().__init__()
        self.programs = [subprocess.Popen(["sleep", "60"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                         for _ in range(2)]
        self.process = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,))
        self.process.start()

    def close(self):
        self.programs[0].terminate()
        self.programs[1].send_signal(signal.SIGINT)
        self.process.terminate()
        self.process.join()
        for program in self.programs:
            program.wait(timeout=20)


for env in (Announced, Listed, Halting, Slow, Broken, Served):
    gym.register(f"{env.__name__}-v0", env)
gym.register("Swing-v0", "gymnasium.envs.classic_control:PendulumEnv", max_episode_steps=2500)


# ── The advantage ───────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("bootstrap", [0.0, -2.5], ids=["terminal", "bootstrapped"])
@pytest.mark.parametrize("k", range(1, 8))
def test_the_recursion_gives_the_sum_of_discounted_rewards_and_the_last_states_value(k, bootstrap, gamma):
    rewards = torch.randn(k).double()
    given = rewards.clone()
    returns = n_step_returns(rewards, torch.tensor(bootstrap).double(), gamma)
    for t in range(k):
        R = sum(gamma**i * rewards[t + i] for i in range(k - t)) + gamma ** (k - t) * bootstrap
        assert returns[t].item() == pytest.approx(R.item())
    assert torch.equal(rewards, given)


def test_returns_of_integer_rewards_are_not_rounded():
    assert torch.equal(n_step_returns(torch.tensor([1, 1]), torch.zeros(1), 0.5), torch.tensor([1.5, 1.0]))


@pytest.mark.parametrize("seed, gamma", [(0, 0.9), (1, 0.5), (2, 1.0)])
@pytest.mark.parametrize("k", [1, 2, 3, 7])
def test_with_the_true_values_it_is_the_advantage_in_expectation_after_any_number_of_steps(k, seed, gamma):
    process, scores = Process(seed, 4, 3, gamma, ascending=True), torch.randn(4, 3).double()
    V, _ = process.values(scores)
    expected = torch.zeros(4, 3).double()
    for s in range(4):
        for p, states, actions in process.episodes(scores, s):
            bootstrap = V[states[k]] if len(states) > k else torch.zeros(()).double()
            returns = n_step_returns(process.R[states[:k], actions[:k]], bootstrap, gamma)
            expected[s, actions[0]] += p * (returns - V[list(states[:k])])[0]
    torch.testing.assert_close(expected / scores.softmax(-1), process.advantages(scores))


# ── The gradient ────────────────────────────────────────────────────────────────────────────────────────────

def test_the_policys_gradient_is_by_hand_that_of_a_linear_softmax():
    x, theta, advantage = torch.randn(6, 4).double(), torch.randn(4, 3).double(), torch.randn(6).double()
    theta.requires_grad_()
    action = torch.tensor([0, 1, 2, 2, 0, 1])
    summed = 0
    for i in range(6):
        of_f = torch.stack([x[i].outer(torch.eye(3).double()[a]) for a in range(3)])  # ∇f(s,a), f = (xᵀθ)_a
        pi = (x[i] @ theta).softmax(-1)
        summed = summed + (of_f[action[i]] - torch.einsum("a,asb->sb", pi, of_f)) * advantage[i]
    value = torch.randn(6).double()
    loss = score_loss(log_prob(x @ theta, None, action), value + advantage, value)
    torch.testing.assert_close(gradient(loss, [theta]), -summed.detach().flatten())


@SPACES
def test_step_by_step_the_same_gradient_accumulates_as_of_the_sum(space):
    agent, obs, R = Agent(Noise.observation_space, space).double(), torch.randn(7, 3).double(), torch.randn(7).double()
    parameters = list(agent.parameters())
    output, value = agent.actor(agent.body(obs)), agent.critic(agent.body(obs))[:, 0]
    action, d_policy = distribution(agent, output).sample(), 0
    for i in reversed(range(7)):
        score = gradient(distribution(agent, output[i]).log_prob(action[i]), parameters, **KEPT)
        d_policy = d_policy + score * (R[i] - value[i]).item()
    loss = score_loss(log_prob(output, agent.log_std, action), R, value)
    torch.testing.assert_close(gradient(loss, parameters, **KEPT), -d_policy)
    assert d_policy.abs().max() > 0.1


def test_no_gradient_passes_through_the_advantage():
    value, log_prob = torch.randn(2, 5, requires_grad=True)
    loss = score_loss(log_prob, torch.randn(5), value)
    assert gradient(loss, [value], **KEPT).count_nonzero() == 0
    assert gradient(loss, [log_prob]).count_nonzero() == 5


def test_rmsprop_moves_by_the_gradient_over_the_root_of_the_mean_square_and_epsilon():
    theta, g = np.float64([1, -2, 0.5]), np.float64([0, 4, 0.1])
    ours = torch.tensor(theta), torch.tensor(g)
    for grad in np.random.default_rng(0).normal(0, 3, (6, 3)):
        given = torch.tensor(grad)
        rmsprop_(*ours, given, 0.01, 0.9, 0.1)
        for j in range(3):
            g[j] = 0.9 * g[j] + 0.1 * grad[j] ** 2
            theta[j] -= 0.01 * grad[j] / math.sqrt(g[j] + 0.1)
        np.testing.assert_allclose(ours[0], theta, rtol=1e-12)
        np.testing.assert_allclose(ours[1], g, rtol=1e-12)
        assert given.tolist() == grad.tolist()


# ── An actor-learner ────────────────────────────────────────────────────────────────────────────────────────

class Watched(Actor):
    """Remembers s_t, a_t, s_{t+1}, r_t, terminated, truncated, and lets something happen before each step."""

    def step(self, action):
        self.before_step()
        obs = self.obs
        self.seen.append((obs, action, *super().step(action)))
        return self.seen[-1][2:]


class Told(NamedTuple):
    """By an actor-learner, of a segment"""

    T: int
    episode: tuple | None  # return and length
    learning_rate: float
    losses: list


class Watch(NamedTuple):
    """Of a segment"""

    before: Agent  # in float64: the shared one with θ as the segment began
    seen: list  # by the actor
    noise_seed: int  # of the actions
    gradient: torch.Tensor  # that was applied
    returns: tuple  # what n_step_returns was given
    told: Told


class Trial:
    """The n-th actor-learner of some, run in this process; as an iterator, a Watch of each segment"""

    def __init__(self, monkeypatch, env, n=0, workers=1, T=0, **settings):
        self.args = Args(**{"t_max": 5, "max_grad_norm": math.inf} | settings)
        agent, common = (Agent(env.observation_space, env.action_space, self.args.lstm) for _ in range(2))
        theta = as_vector([*common.parameters()]).data
        theta += 0.1 * torch.randn_like(theta)  # a policy far from uniform
        common.share_memory()
        assert theta.is_shared()
        context, bar = torch.multiprocessing.get_context("spawn"), tqdm(disable=True)
        self.shared = Shared(common, theta, context.RawValue("q", T), context.RawArray("q", workers), context.Lock())
        self.agent, self.actor, self.applied, self.returned, self.seed = agent, Watched(env, bar), [], [], 0
        self.actor.before_step = lambda: None
        self.segments = actor_learner(n, agent, self.actor, self.shared, self.args)
        monkeypatch.setattr(a3c, "rmsprop_", self.rmsprop)
        monkeypatch.setattr(a3c, "n_step_returns", self.n_step_returns)

    def rmsprop(self, theta, square_avg, grad, *settings):
        self.applied.append(grad.clone())
        rmsprop_(theta, square_avg, grad, *settings)

    def n_step_returns(self, *given):
        self.returned.append(given)
        return n_step_returns(*given)

    def __iter__(self):
        return self

    def __next__(self):
        before, self.actor.seen, self.seed = copy.deepcopy(self.shared.agent).double(), [], self.seed + 1
        torch.manual_seed(self.seed)
        told = Told(*next(self.segments))
        (grad,), (returns,) = self.applied, self.returned
        self.applied, self.returned = [], []
        return Watch(before, self.actor.seen, self.seed, grad, returns, told)

    def take(self, count):
        return [watch for _, watch in zip(range(count), self)]


@pytest.fixture
def trial(monkeypatch):
    return lambda *args, **settings: Trial(monkeypatch, *args, **settings)


def deviation(norm):
    return (norm.var + 1e-8).sqrt()


def step_by_step(agent, obs, memory=None):
    """Actor's output and V of each observation, one after the other; the memory after each"""
    outputs, values, memories = [], [], []
    for s in obs:
        s = torch.as_tensor(s, dtype=torch.float32).to(agent.critic.weight.dtype)[None]
        norm = agent.obs_norm
        x = agent.body(((s - norm.mean) / deviation(norm)).clamp(-10, 10))
        if agent.lstm:
            h = memory or (torch.zeros_like(x), torch.zeros_like(x))
            memory = torch.lstm_cell(x, h, *(agent.lstm.get_parameter(f"{name}_l0") for name in (
                "weight_ih", "weight_hh", "bias_ih", "bias_hh")))
            x = memory[0]
        outputs.append(agent.actor(x)[0])
        values.append(agent.critic(x)[0, 0])
        memories.append(memory)
    return outputs, values, memories


def true_gradient(watch, memory, args):
    """Of a segment, accumulated by A3C-13 to A3C-18; the losses; the memory that acting leaves"""
    agent, parameters = watch.before, list(watch.before.parameters())
    mean, std = agent.value_norm.mean, deviation(agent.value_norm)
    obs, actions, next_obs, rewards, terminated, truncated = zip(*watch.seen)
    outputs, values, memories = step_by_step(agent, (*obs, next_obs[-1]), memory)
    if agent.frames:
        rewards = np.sign(rewards)
    R = 0 if terminated[-1] else (mean + std * values[-1]).item()
    grad, losses = 0, np.zeros(3)
    for i in reversed(range(len(actions))):
        R = rewards[i] + args.gamma * R
        target = R if agent.frames else ((R - mean) / std).clamp(-10, 10).item()
        pi = distribution(agent, outputs[i])
        score, advantage = pi.log_prob(torch.as_tensor(actions[i])), target - values[i].item()
        error, entropy = (target - values[i]) ** 2, pi.entropy()
        grad = grad - gradient(score, parameters, **KEPT) * advantage + gradient(error, parameters, **KEPT)
        grad = grad - args.ent_coef * gradient(entropy, parameters, **KEPT)
        losses += [-score.item() * advantage, error.item(), entropy.item()]
    return grad, losses / len(actions), None if terminated[-1] or truncated[-1] else memories[-2]


def assert_close_to(gradient, true):
    assert true.norm() > 0.1
    assert (gradient - true).norm() < 1e-4 * true.norm()


ENDS = pytest.mark.parametrize("end", [lambda env: env, lambda env: TimeLimit(env, 7)], ids=["terminated", "truncated"])


@SPACES
@LSTM
@ENDS
def test_the_gradient_that_is_applied_is_that_of_its_segment_and_of_no_other(space, lstm, end, trial):
    trial, memory = trial(end(Noise(space)), lstm=lstm, ent_coef=0.3, gamma=0.9), None
    for watch in trial.take(20):
        expected, losses, memory = true_gradient(watch, memory, trial.args)
        assert_close_to(watch.gradient, expected)
        np.testing.assert_allclose(watch.told.losses, losses, rtol=1e-3, atol=1e-4)


@SPACES
@LSTM
def test_actions_are_drawn_by_the_policy_that_the_segment_began_with(space, lstm, trial):
    trial, memory = trial(Noise(space), lstm=lstm), None
    trial.actor.before_step = lambda: trial.shared.theta.mul_(1.01)  # as another process might
    for watch in trial.take(20):
        obs, actions, *_ = zip(*watch.seen)
        outputs, _, _ = step_by_step(watch.before, obs, memory)
        torch.manual_seed(watch.noise_seed)
        for output, action in zip(outputs, actions):
            drawn = output + watch.before.noise(1)[0]
            torch.testing.assert_close(torch.as_tensor(action).double(), (
                drawn.argmax() if trial.agent.discrete else drawn.detach()).double(), rtol=1e-4, atol=1e-4)
        memory = true_gradient(watch, memory, trial.args)[2]


def test_the_noise_makes_the_most_probable_action_a_draw_from_the_policy():
    agent, obs = Agent(Noise.observation_space, Discrete(3)), torch.randn(1, 3)
    with torch.no_grad():
        agent.actor.bias.copy_(torch.tensor([0.0, 1.0, -1.0]))
        actions, _ = agent.act(obs.expand(40_000, 3), None, agent.noise(40_000))
        pi = agent.actor(agent.features(obs, None)[0]).softmax(-1)[0]
    torch.testing.assert_close(actions.bincount(minlength=3) / 40_000, pi, rtol=0, atol=0.015)  # 6 deviations


def test_what_other_processes_do_to_theta_is_seen_as_a_segment_begins_and_not_before_and_not_lost(trial):
    trial = trial(Noise(), learning_rate=7e-4, anneal_lr=False)
    theta, begun = trial.shared.theta, []

    def interfere():
        if not trial.actor.seen:  # it has its θ' by now
            begun.append(flat(trial.agent.parameters()).detach().clone())
        theta.add_(0.01)

    trial.actor.before_step = interfere
    for n in range(20):
        theta += 0.05 * torch.randn_like(theta)
        at_start, square_avg = theta.clone(), trial.shared.agent.square_avg.clone()
        watch = next(trial)
        assert torch.equal(begun[n], at_start)
        assert_close_to(watch.gradient, true_gradient(watch, None, trial.args)[0])
        rms = (0.99 * square_avg + 0.01 * watch.gradient**2 + 0.1).sqrt()
        torch.testing.assert_close(theta, at_start + 0.01 * len(watch.seen) - 7e-4 * watch.gradient / rms)
    assert len(begun) == 20


@pytest.mark.parametrize("anneal_lr", [True, False])
def test_the_step_size_falls_to_zero_with_the_steps_that_remain(anneal_lr, trial):
    trial = trial(Noise(), workers=2, T=10, total_timesteps=60, learning_rate=0.5, anneal_lr=anneal_lr)
    theta, g = trial.shared.theta, np.zeros(len(trial.shared.theta))
    rates = []
    while len(rates) < 3 or trial.shared.T.value < 60:
        before = theta.numpy().astype(float)
        if len(rates) == 3:
            trial.shared.T.value += 15  # those of the other worker
        watch = next(trial)
        T, grad = trial.shared.T.value, watch.gradient.double().numpy()
        rates.append(0.5 * max(0, 1 - T / 60) if anneal_lr else 0.5)
        g = 0.99 * g + 0.01 * grad**2
        np.testing.assert_allclose(theta, before - rates[-1] * grad / np.sqrt(g + 0.1), rtol=1e-4, atol=1e-5)
        assert watch.told.learning_rate == pytest.approx(rates[-1]) and watch.told.T == T
    np.testing.assert_allclose(trial.shared.agent.square_avg, g, rtol=1e-4, atol=1e-7)
    assert T == 60 + 2 and rates[-1] == (0 if anneal_lr else 0.5)
    assert next(trial.segments, None) is None


def test_a_gradient_longer_than_the_longest_allowed_is_shortened_to_it(trial):
    trial = trial(Noise(), max_grad_norm=12.0)
    shortened = 0
    for watch in trial.take(20):
        expected, _, _ = true_gradient(watch, None, trial.args)
        assert_close_to(watch.gradient, expected * min(1, 12 / expected.norm()))
        shortened += expected.norm() > 12
    assert 0 < shortened < 20


def test_the_bonus_makes_the_policy_less_certain(trial):
    for space in (Discrete(3), Box(-1, 1, (2,))):
        one = trial(Noise(space), learning_rate=1e-4, ent_coef=1000.0)
        watch = next(one)
        obs = [obs for obs, *_ in watch.seen]
        after = copy.deepcopy(one.shared.agent).double()
        after.obs_norm = watch.before.obs_norm
        before, after = (
            sum(distribution(agent, output).entropy() for output in step_by_step(agent, obs)[0])
            for agent in (watch.before, after))
        assert after > before + 1e-4


def test_a_gradient_that_is_not_finite_is_not_applied(trial):
    trial = trial(Noise())
    next(trial)
    before = trial.shared.theta.clone(), copy.deepcopy(trial.shared.agent.state_dict())
    trial.actor.env.step = lambda action: (np.zeros(3), np.nan, False, False, {})
    with pytest.raises(Failure, match="step 10 has a gradient that isn't finite"):
        next(trial)
    assert torch.equal(trial.shared.theta, before[0])
    assert all(torch.equal(x, before[1][name]) for name, x in trial.shared.agent.state_dict().items())


# ── Counting ────────────────────────────────────────────────────────────────────────────────────────────────

def test_each_step_is_counted_for_all_and_for_its_worker_as_it_is_taken(trial):
    trial = trial(Noise(), n=1, workers=3, T=100)
    trial.shared.steps[:] = 70, 0, 0
    counts = []
    trial.actor.before_step = lambda: counts.append((trial.shared.T.value, *trial.shared.steps))
    ends = [watch.told.T for watch in trial.take(6)]
    assert counts == [(100 + i, 70, i, 0) for i in range(24)]
    assert ends == [105, 108, 113, 116, 121, 124]
    assert trial.shared.T.value == 124 and list(trial.shared.steps) == [70, 24, 0]


def test_nobody_comes_between_the_reading_and_the_writing_of_the_count_and_the_statistics(trial):
    class Count:
        held, number, read = False, 0, None

        def __enter__(self):
            self.held, self.read = True, None

        def __exit__(self, *_):
            self.held = False

        @property
        def value(self):
            assert self.held
            self.read = self.number
            return self.number

        @value.setter
        def value(self, number):
            assert self.held and number == self.read + 1 == self.number + 1
            self.number = number

    def update(norm, x):
        assert count.held
        updated.append(len(x))
        return RunningNorm.update(norm, x)

    trial, count, updated = trial(Noise()), Count(), []
    trial.shared = trial.shared._replace(T=count, lock=count)
    for norm in (trial.shared.agent.obs_norm, trial.shared.agent.value_norm):
        norm.update = partial(update, norm)
    trial.segments = actor_learner(0, trial.agent, trial.actor, trial.shared, trial.args)
    trial.take(4)
    assert count.number == 16 and updated == [5, 5, 3, 3] * 2


@pytest.mark.parametrize("length, t_max, segments", [
    (8, 5, [5, 3, 5, 3]), (8, 3, [3, 3, 2, 3]), (5, 5, [5, 5]), (2, 5, [2, 2, 2]), (9, 1, [1] * 12),
])
def test_a_segment_ends_after_t_max_steps_or_with_the_episode(length, t_max, segments, trial):
    watches = trial(Noise(length=length), t_max=t_max).take(len(segments))
    assert [len(watch.seen) for watch in watches] == segments
    ended = [watch.seen[-1][-2] for watch in watches]
    assert ended == [t % length == 0 for t in np.cumsum(segments)]
    for i, watch in enumerate(watches):
        if not ended[i]:
            assert watch.told.episode is None
            continue
        rewards = [reward for watch in watches for _, _, _, reward, _, _ in watch.seen]
        steps = sum(segments[:i + 1])
        episodic_return, episodic_length = watch.told.episode
        assert episodic_length == length
        assert episodic_return == pytest.approx(sum(rewards[steps - length:steps]))


def test_the_actor_learner_ends_with_the_segment_that_completes_the_run(trial):
    trial = trial(Noise(length=99), total_timesteps=12)
    assert [watch.told.T for watch in trial] == [5, 10, 15]


# ── What a segment learns from ──────────────────────────────────────────────────────────────────────────────

def bootstraps(trial, memory=None):
    """Of each of some segments: terminated, truncated, V of its last observation, what R began with"""
    for watch in trial.take(12):
        obs, _, next_obs, _, terminated, truncated = zip(*watch.seen)
        _, values, _ = step_by_step(watch.before, (*obs, next_obs[-1]), memory)
        value = watch.before.value_norm.mean + deviation(watch.before.value_norm) * values[-1]
        memory = true_gradient(watch, memory, trial.args)[2]
        assert watch.returns[2] == trial.args.gamma
        yield terminated[-1], truncated[-1], value.item(), watch.returns[1].item()


@LSTM
def test_nothing_follows_a_terminal_state(lstm, trial):
    ends = list(bootstraps(trial(Noise(), lstm=lstm)))
    assert [terminated for terminated, *_ in ends] == [False, True] * 6
    for terminated, _, value, R in ends:
        assert R == (0 if terminated else pytest.approx(value, rel=1e-4, abs=1e-5))
        assert abs(value) > 0.01


@LSTM
def test_the_last_state_before_a_time_limit_is_worth_its_value(lstm, trial):
    trial = trial(TimeLimit(Noise(length=99), 7), lstm=lstm)
    for n, (terminated, truncated, value, R) in enumerate(bootstraps(trial)):
        assert (terminated, truncated) == (False, n % 2 == 1)
        assert R == pytest.approx(value, rel=1e-4, abs=1e-5) and abs(R) > 0.01


def test_an_end_at_the_time_limit_is_an_end_all_the_same(trial):
    ends = list(bootstraps(trial(TimeLimit(Noise(length=7), 7))))
    assert [(terminated, truncated, R == 0) for terminated, truncated, _, R in ends][1::2] == [(True, True, True)] * 6


def test_an_observation_that_the_environment_writes_over_is_remembered_as_it_was(trial):
    class Reused(Noise):
        def observe(self):
            self.buffer = getattr(self, "buffer", np.zeros(3, np.float32))
            self.buffer[:] = super().observe()
            return self.buffer

    env, seen = Reused(), []
    trial = trial(env)
    trial.actor.before_step = lambda: seen.append(env.buffer.copy())
    trial.take(6)
    np.testing.assert_allclose(trial.shared.agent.obs_norm.mean, np.mean(seen, 0), rtol=1e-4)


def test_what_the_networks_see_is_in_units_of_all_observations_and_returns_so_far(trial):
    trial = trial(Noise())
    watches = trial.take(20)
    obs = np.concatenate([[obs for obs, *_ in watch.seen] for watch in watches])
    returns = np.concatenate([n_step_returns(*watch.returns) for watch in watches])[:, None]
    for norm, data in ((trial.shared.agent.obs_norm, obs), (trial.shared.agent.value_norm, returns)):
        assert norm.count == len(data) == trial.shared.T.value
        np.testing.assert_allclose(norm.mean, data.mean(0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(deviation(norm), data.std(0), rtol=1e-4)


def test_a_reward_counts_by_its_sign_in_a_game_of_frames_only(trial):
    for env in (Noise(length=3), Frames(length=3)):
        for watch in trial(env).take(3):
            rewards = np.array([reward for _, _, _, reward, _, _ in watch.seen])
            np.testing.assert_allclose(watch.returns[0], np.sign(rewards) if isinstance(env, Frames) else rewards)
            assert (np.abs(rewards) != 1).all() and watch.told.episode[0] == pytest.approx(rewards.sum())


@LSTM
def test_frames_are_learned_from_as_vectors_are(lstm, trial):
    trial, memory = trial(Frames(length=4), t_max=3, lstm=lstm), None
    trial.shared.theta.mul_(0.5)  # or the gates saturate, and float32 keeps few digits of their slope, σ (1 − σ)
    for watch in trial.take(4):
        expected, _, memory = true_gradient(watch, memory, trial.args)
        assert_close_to(watch.gradient, expected)


def test_many_gains_in_a_row_of_a_game_all_count(trial):
    class Gains(Frames):
        def step(self, action):
            obs, _, *ends = super().step(action)
            return obs, 1.0, *ends

    trial = trial(Gains(length=30), t_max=30)
    for watch in trial.take(2):
        assert n_step_returns(*watch.returns)[0] > 20
        assert_close_to(watch.gradient, true_gradient(watch, None, trial.args)[0])


# ── The memory ──────────────────────────────────────────────────────────────────────────────────────────────

@SPACES
def test_the_features_of_a_sequence_are_those_of_acting_step_by_step(space):
    agent, obs = Agent(Noise.observation_space, space, lstm=True), torch.randn(9, 3)
    for memory in (None, (torch.randn(1, 64), torch.randn(1, 64))):
        with torch.no_grad():
            features, last = agent.features(obs, memory)
            outputs, values, memories = step_by_step(agent, obs, memory)
            acted, left = [], memory
            for row in obs:
                action, left = agent.act(row[None], left)
                acted.append(action[0])
            torch.testing.assert_close(agent.actor(features), torch.stack(outputs))
            torch.testing.assert_close(agent.critic(features)[:, 0], torch.stack(values))
            torch.testing.assert_close(last, memories[-1])
            torch.testing.assert_close(left, memories[-1])
        best = torch.stack(outputs)
        torch.testing.assert_close(torch.stack(acted), best.argmax(-1) if agent.discrete else best)
        assert (features[1:] - features[:-1]).abs().max() > 0.01


@ENDS
def test_the_memory_lasts_as_long_as_the_episode(end, trial, monkeypatch):
    trial, left, episode, calls = trial(end(Noise()), lstm=True, t_max=3), None, 0, []

    def features(obs, memory):
        result = Agent.features(trial.agent, obs, memory)
        calls.append((len(obs), memory, result[1]))
        return result

    monkeypatch.setattr(trial.agent, "features", features)
    for _, watch in zip(range(9), trial):
        *acting, (length, learning_from, _) = calls
        assert length == len(acting) + 1 == len(watch.seen) + 1
        assert learning_from is left
        for _, memory, after in acting:
            assert memory is left
            left = after
        if watch.told.episode:
            left, episode = None, episode + 1
        calls.clear()
    assert episode == 3


# ── Processes ───────────────────────────────────────────────────────────────────────────────────────────────

PROC = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks for processes in /proc")


def processes(session):
    """pid → command line of those of a session that live"""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            state, _, _, of_session, *_ = (path / "stat").read_text().rpartition(")")[2].split()
            if int(of_session) == session and state != "Z":
                found[int(path.name)] = (path / "cmdline").read_text()
    return found


def workers_of(process):
    return sorted(pid for pid, command in processes(process.pid).items() if "spawn_main" in command)


@pytest.fixture(scope="module")
def launch():
    """Starts a run in a session of its own, of which nothing stays"""
    launched = []

    def launch(runs_dir, *flags, script=(ROOT / "a3c.py",)):
        within_reach = environment(PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}")
        launched.append(start(*script, "--runs-dir", runs_dir, *flags, start_new_session=True, env=within_reach))
        return launched[-1]

    yield launch
    for process in launched:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture
def begun(launch, tmp_path):
    """A run of two workers that have taken a step, and the workers' pids"""
    process = launch(tmp_path, "--num-workers", 2, "--env-id", "test_a3c:Announced-v0", *ENDLESS, "--patience", 10**6)
    assert process.stdout.readline().startswith("run: ")
    assert [process.stdout.readline() for _ in range(2)] == ["begun\n"] * 2
    return process, workers_of(process)


def end_of(process):
    """Exit code, complaints; the whole session ends"""
    code, _, err = finish(process)  # waits for all who hold stdout or stderr
    deadline = time.monotonic() + 60
    while processes(process.pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert processes(process.pid) == {}
    return code, complaints(err)


def load(run_folder):
    return torch.load(run_folder / "checkpoint.pt", weights_only=True)


def told(env, name, values, n, *others):
    """The n-th process, where an environment is told the n-th value"""
    setattr(env, name, values[n])
    a3c.work(n, *others)


@PROC
@pytest.mark.parametrize("where", ["reset", "step", "close"])
def test_a_worker_that_stops_ends_the_run_in_one_line_and_what_it_has_saved_stays(where, main, monkeypatch, tmp_path):
    monkeypatch.setattr(a3c, "work", partial(told, Halting, "where", [None, where]))
    monkeypatch.setattr(a3c, "CHECKPOINT_SECONDS", 0.5)
    total = 500 if where == "close" else 10**9
    code, _, err = main("--env-id", "test_a3c:Halting-v0", "--num-workers", 2, "--total-timesteps", total,
                        "--patience", 8, "--runs-dir", tmp_path)
    assert (code, complaints(err)) == (2, ["error: worker 1 has taken no step for --patience 8.0 seconds"])
    assert multiprocessing.active_children() == []
    assert load(only_run(tmp_path))["global_step"] >= 500  # the other went on; complete, if the end is all that hangs


@PROC
def test_a_worker_that_goes_early_without_a_word_ends_the_run(main, monkeypatch, tmp_path):
    monkeypatch.setattr(a3c, "work", partial(told, Halting, "where", [None, "exit"]))
    code, _, err = main("--env-id", "test_a3c:Halting-v0", "--num-workers", 2, "--total-timesteps", 20000, "--runs-dir",
                        tmp_path)
    assert (code, complaints(err)) == (2, ["error: worker 1 ended early, with exit code 0"])
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("patience", [10, math.inf])
def test_a_reset_that_takes_longer_than_a_step_is_no_hang(patience, main, tmp_path):
    code, _, err = main("--env-id", "test_a3c:Slow-v0", "--num-workers", 1, "--total-timesteps", 5, "--patience", patience,
                        "--runs-dir", tmp_path)
    assert (code, complaints(err)) == (0, [])


def test_where_not_all_workers_can_start_those_that_did_are_ended(main, monkeypatch, tmp_path):
    start = SERVER.Process.start

    def start_one(process):
        if multiprocessing.active_children():
            raise BlockingIOError("no process more")  # as where a user may have no more of them
        start(process)

    monkeypatch.setattr(SERVER.Process, "start", start_one)
    code, _, err = main("--env-id", "envs:Counter-v0", "--num-workers", 2, *ENDLESS, "--runs-dir", tmp_path)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM))
    assert (code, complaints(err)) == (2, ["error: no process more"])
    assert multiprocessing.active_children() == []


def test_a_row_of_losses_has_the_means_over_the_segments_since_the_last(handlers, monkeypatch):
    segments = [(20 * k, None, 0.1, [k, 10 * k, 100 * k]) for k in range(1, 76)]
    monkeypatch.setattr(a3c, "actor_learner", lambda *args: iter(segments))
    shared, sent = Shared(Agent(Box(-1, 1, (4,)), Discrete(2)), None, None, None, None), []
    args = Args(env_id="CartPole-v1", t_max=20, total_timesteps=1500)
    a3c.work(0, args, shared, SimpleNamespace(send=sent.append), 1, None)
    for (T, row), step, mean in zip(sent, (1000, 1500), (25.5, 63), strict=True):  # of 1 … 50 and 51 … 75
        assert T == step and row == {"charts/learning_rate": 0.1, "losses/policy_loss": mean,
                                     "losses/value_loss": 10 * mean, "losses/entropy": 100 * mean}


@PROC
def test_a_worker_that_dies_ends_the_run_in_one_line(begun):
    process, workers = begun
    os.kill(workers[1], signal.SIGKILL)
    assert end_of(process) == (2, ["error: worker 1 ended early, with exit code -9"])


@PROC
def test_what_terminates_a_run_and_its_workers_at_once_stops_it_and_it_saves(begun, tmp_path):
    process, _ = begun
    os.killpg(process.pid, signal.SIGTERM)  # as `timeout` and cluster schedulers do
    assert end_of(process) == (143, [])
    assert load(only_run(tmp_path))["global_step"] > 0


@PROC
def test_workers_that_are_terminated_just_before_their_run_sees_it_are_no_failure(launch, tmp_path):
    late = ("import a3c, itertools, os, signal; from time import *; from types import SimpleNamespace as NS; calls = "
            "itertools.count(); a3c.time = NS(time=time, perf_counter=perf_counter, monotonic=lambda: (next(calls) == 20 "
            "and os.killpg(0, signal.SIGTERM)) or monotonic()); a3c.main()")  # between two waits, when collecting is off
    process = launch(tmp_path, "--num-workers", 2, "--env-id", "envs:Counter-v0", *ENDLESS, script=("-c", late))
    assert end_of(process) == (143, [])
    assert "agent" in load(only_run(tmp_path))


@PROC
def test_a_worker_can_end_what_its_environment_has_started(launch, tmp_path):
    process = launch(tmp_path, "--num-workers", 2, "--env-id", "test_a3c:Served-v0", "--total-timesteps", 20)
    assert end_of(process) == (0, [])


@PROC
def test_a_run_of_which_a_worker_is_stopped_can_be_terminated_at_once_and_saves(begun, tmp_path):
    process, workers = begun
    os.kill(workers[0], signal.SIGSTOP)
    process.terminate()
    assert end_of(process) == (143, [])
    assert load(only_run(tmp_path))["global_step"] > 0


@PROC
def test_a_run_that_is_killed_has_saved_while_its_workers_ran_and_none_outlives_it(launch, main, tmp_path):
    hurried = "-c", "import a3c; a3c.CHECKPOINT_SECONDS = 0.1; a3c.main()"
    process = launch(tmp_path, "--num-workers", 2, "--env-id", "envs:Counter-v0", *ENDLESS, script=hurried)
    steps = {0}

    def three_saves():
        for path in tmp_path.glob("*/checkpoint.pt"):
            steps.add(load(path.parent)["global_step"])
        return len(steps) > 3

    wait_for(three_saves, process)
    process.kill()
    code, lines = end_of(process)
    assert code == -signal.SIGKILL and "Traceback (most recent call last):" not in lines
    folder = only_run(tmp_path)
    code, _, err = main("--resume", folder, "--total-timesteps", load(folder)["global_step"] + 1000)
    assert (code, complaints(err)) == (0, [])
    rows = [int(row["global_step"]) for row in metrics(folder)]
    assert rows == sorted(rows) and rows[-1] == load(folder)["global_step"] > max(steps)


@pytest.mark.parametrize("error", [BrokenPipeError, ConnectionResetError])
@pytest.mark.parametrize("alive", [False, True])
def test_a_worker_ends_without_a_word_where_its_run_is_no_more_and_only_there(
        alive, error, trial, handlers, monkeypatch, tmp_path, capfd):
    def send(message):
        raise error

    monkeypatch.setattr(a3c.mp, "parent_process", lambda: SimpleNamespace(is_alive=lambda: alive))
    shared = trial(make_env("envs:Counter-v0")).shared
    with pytest.raises(error) if alive else contextlib.nullcontext():
        a3c.work(0, Args("envs:Counter-v0", num_workers=1), shared, SimpleNamespace(send=send), 1, None)
    assert shared.T.value == 5 and capfd.readouterr() == ("", "")


@PROC
def test_what_an_environment_raises_in_a_worker_is_shown_as_a_traceback_and_ends_the_run_in_a_line(launch, tmp_path):
    process = launch(tmp_path, "--num-workers", 2, "--env-id", "test_a3c:Broken-v0")
    code, (*lines, last) = end_of(process)
    assert code == 2 and last in [f"error: worker {n} ended early, with exit code 1" for n in range(2)]
    assert "Traceback (most recent call last):" in lines and "RuntimeError: the simulator" in lines


def test_what_the_user_can_mend_is_sent_in_a_line(trial, handlers, tmp_path):
    sent, shared = [], trial(make_env("envs:NanReward-v0")).shared
    a3c.work(0, Args("envs:NanReward-v0", num_workers=1), shared, SimpleNamespace(send=sent.append), 1, None)
    assert sent == ["step 5 has a gradient that isn't finite: lower learning rates, or mend the environment"]


@PROC
@pytest.mark.parametrize("workers, seconds", [(0, 0), (1, 0), (2, 0), (2, 0.5), (2, 2)])
def test_ctrl_c_while_the_workers_start_saves_and_leaves_no_process(workers, seconds, launch, main, tmp_path):
    process = launch(tmp_path, "--num-workers", 2, "--env-id", "envs:Counter-v0", *ENDLESS)
    assert process.stdout.readline().startswith("run: ")
    wait_for(lambda: len(workers_of(process)) >= workers, process)
    time.sleep(seconds)
    os.killpg(process.pid, signal.SIGINT)
    assert end_of(process) == (130, [])
    if workers:  # before there is one, there is nothing to save
        folder = only_run(tmp_path)
        code, _, err = main("--resume", folder, "--total-timesteps", load(folder)["global_step"] + 100)
        assert (code, complaints(err)) == (0, [])


def test_two_workers_have_seeds_of_their_own_count_all_their_steps_and_end_with_the_last(main, monkeypatch, tmp_path):
    file, runs = tmp_path / "list", tmp_path / "runs"
    monkeypatch.setattr(a3c, "work", partial(told, Listed, "file", [file] * 2))
    code, _, err = main("--env-id", "test_a3c:Listed-v0", "--num-workers", 2, "--total-timesteps", 3000, "--t-max", 4,
                        "--runs-dir", runs)
    assert (code, complaints(err)) == (0, [])
    T, steps = load(only_run(runs))["global_step"], [int(row["global_step"]) for row in metrics(only_run(runs))]
    assert 3000 <= T < 3000 + 2 * 4 and steps == sorted(steps) and steps[-1] == T
    workers, seeds = zip(*map(str.split, file.read_text().splitlines()))
    assert len(set(seeds)) == len(seeds)
    assert len(set(workers)) == 2 and min(Counter(workers).values()) > 60
    assert 0 <= T - 5 * (len(seeds) - 2) <= 2 * 4  # of the last episode of each, 4 steps or none


# ── One worker ──────────────────────────────────────────────────────────────────────────────────────────────

@pytest.fixture(scope="module", params=[("CartPole-v1",), ("test_a3c:Swing-v0", "--lstm"), ("envs:Chance-v0",)],
                ids=["feedforward", "lstm", "chance"])
def alone(request):
    return "--num-workers", 1, "--t-max", 7, "--env-id", *request.param


@pytest.fixture(scope="module")
def stopped(alone, launch, tmp_path_factory):
    """The folder of a run of one worker that Ctrl-C has stopped"""
    runs = tmp_path_factory.mktemp("stopped")
    process = launch(runs, *alone, *ENDLESS)
    wait_for(lambda: list(runs.glob("*/metrics.csv")) and iterations(only_run(runs)), process)
    os.killpg(process.pid, signal.SIGINT)
    assert end_of(process) == (130, [])
    return only_run(runs)


def test_what_is_saved_is_a_copy_that_no_worker_changes_meanwhile(alone, main, tmp_path, monkeypatch):
    saved, save = [], torch.save  # else the file's checksums were of other numbers than it holds, now and then
    monkeypatch.setattr("torch.save", lambda state, to: saved.append(state) or save(state, to))
    assert main(*alone, "--total-timesteps", 200, "--runs-dir", tmp_path)[0] == 0
    assert saved and not any(x.is_shared() for state in saved for x in state["agent"].values())


def assert_same_run(one, other):
    assert metrics(one) == metrics(other)
    one, other = ({name: x for name, x in load(folder).items() if name in ("agent", "global_step")}
                  for folder in (one, other))
    assert len(one) == 2
    torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_alone_a_worker_repeats_itself_under_the_same_seed(alone, main, tmp_path):
    in_a_process = partial(run, ROOT / "a3c.py")  # whose worker inherits no generators, as that of `main` does
    for name, start_run in {"one": main, "other": in_a_process}.items():
        code, _, err = start_run(*alone, "--total-timesteps", 3000, "--runs-dir", tmp_path / name)
        assert (code, complaints(err)) == (0, [])
    assert_same_run(only_run(tmp_path / "one"), only_run(tmp_path / "other"))


@PROC
def test_alone_a_worker_that_goes_on_from_the_same_checkpoint_repeats_itself(stopped, main, tmp_path):
    folders = [shutil.copytree(stopped, tmp_path / name) for name in ("one", "other")]
    for folder in folders:
        code, _, err = main("--resume", folder, "--total-timesteps", load(stopped)["global_step"] + 2000)
        assert (code, complaints(err)) == (0, [])
    assert_same_run(*folders)
    before = metrics(stopped)
    assert metrics(folders[0])[:len(before)] == before


# ── Atari ───────────────────────────────────────────────────────────────────────────────────────────────────

def test_a_game_is_observed_in_four_grey_frames_and_repeats_itself_under_the_same_seed():
    pytest.importorskip("ale_py")

    def play(env, seed, steps=60):
        obs, _ = env.reset(seed=seed)
        seen = [(obs, 0.0, False, False)]
        for action in np.random.default_rng(0).integers(env.action_space.n, size=steps):
            obs, *others, _ = env.step(action)
            seen.append((obs, *others))
        for obs, *_ in seen:
            assert obs.shape == (4, 84, 84) == env.observation_space.shape and obs.dtype == np.uint8
        frames, *others = zip(*seen)
        return np.stack(frames), others

    env = make_env("ALE/Pong-v5")
    frames, others = play(env, 7)
    for again in (env, make_env("ALE/Pong-v5")):
        same_frames, same_others = play(again, 7)
        assert np.array_equal(frames, same_frames) and others == same_others
    assert not np.array_equal(frames, play(env, 8)[0])
    assert all(np.array_equal(frames[t, 1:], frames[t + 1, :-1]) for t in range(60))
    assert frames.std(0).max() > 1  # something moves


@pytest.mark.parametrize("game", ["Backgammon", "VideoCheckers"])
def test_a_game_in_which_nobody_can_wait_is_played_from_its_first_frame(game):
    pytest.importorskip("ale_py")
    env = make_env(f"ALE/{game}-v5")
    assert env.reset(seed=1)[0].shape == env.step(0)[0].shape == (4, 84, 84)


@pytest.mark.parametrize("flags", [(), ("--lstm",)], ids=["feedforward", "lstm"])
def test_a_game_is_learned_from(flags, main, tmp_path):
    pytest.importorskip("ale_py")
    code, _, err = main("--env-id", "ALE/Pong-v5", "--num-workers", 1, "--total-timesteps", 200, "--runs-dir", tmp_path,
                        *flags)
    assert (code, complaints(err)) == (0, [])
    checkpoint = load(only_run(tmp_path))
    assert checkpoint["global_step"] == 200 and checkpoint["agent"]["square_avg"].count_nonzero() > 1000


def test_v_of_a_game_does_not_feed_on_itself(trial):
    """Enduro's first steps have no reward, so R is made of V alone; a scale made of R would make both grow"""
    pytest.importorskip("ale_py")
    env = make_env("ALE/Enduro-v5")
    torch.manual_seed(1)
    trial = trial(env, t_max=20, ent_coef=0.01, max_grad_norm=40)
    theta = torch.nn.utils.parameters_to_vector(Agent(env.observation_space, env.action_space).parameters())
    trial.shared.theta.copy_(theta.detach())  # as a run begins
    watches = trial.take(60)
    assert not any(watch.returns[0].any() for watch in watches)
    assert max(watch.returns[1].abs().item() for watch in watches) < 100
