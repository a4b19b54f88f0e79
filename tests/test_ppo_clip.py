"""The mathematics of ppo_clip.py against calculations of another kind."""

import copy
import importlib
import math
import shutil
from functools import partial

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from torch import nn
from torch.distributions import Categorical, Independent, Normal
from tqdm import tqdm

import envs
import ppo_clip
from helpers import only_run, run_here
from oracles import Clock, assert_acts_alone, assert_equal_to_the_bit, assert_same, value
from ppo_clip import (
    Actor, Agent, Args, Rollout, RunningNorm, as_vector, clipped_surrogate, collect, entropy, gae, log_prob, make_env,
    update,
)

BAR = tqdm(disable=True)
SPACES = pytest.mark.parametrize("space", [Discrete(3), Box(-1, 1, (2,))], ids=["discrete", "continuous"])
RATIOS = [0.01, 0.5, 0.7, 0.79, 0.81, 0.95, 0.999, 1.0, 1.001, 1.05, 1.19, 1.21, 1.3, 2.0, 7.0]
ADVANTAGES = [-3.0, -1.0, -0.1, 0.1, 1.0, 3.0]
GRID = torch.cartesian_prod(torch.tensor(RATIOS), torch.tensor(ADVANTAGES))
EPSILONS = [0.03, 0.1, 0.2, 0.45]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# ── L^CLIP ──────────────────────────────────────────────────────────────────────────────────────────────────

def surrogate_and_gradient(clip_coef, grid=GRID):
    ratio, advantage = grid.T
    ratio = ratio.clone().requires_grad_()
    surrogate = clipped_surrogate(ratio, advantage, clip_coef)
    return surrogate.detach(), *torch.autograd.grad(surrogate.sum(), ratio)


@pytest.mark.parametrize("eps", EPSILONS)
def test_l_clip_is_the_minimum_of_the_plain_and_the_clipped_term(eps):
    surrogate, _ = surrogate_and_gradient(eps)
    for (r, a), value in zip(GRID.tolist(), surrogate.tolist()):
        assert value == pytest.approx(min(r * a, sorted((1 - eps, r, 1 + eps))[1] * a), rel=1e-6)


@pytest.mark.parametrize("eps", EPSILONS)
def test_the_gradient_is_zero_exactly_where_the_ratio_has_already_gained_enough(eps):
    _, gradient = surrogate_and_gradient(eps)
    for (r, a), slope in zip(GRID.tolist(), gradient.tolist()):
        gained = r > 1 + eps if a > 0 else r < 1 - eps
        assert slope == pytest.approx(0 if gained else a, rel=1e-6)


@pytest.mark.parametrize("eps", EPSILONS)
def test_l_clip_is_a_lower_bound_of_l_cpi(eps):
    surrogate, _ = surrogate_and_gradient(eps)
    assert (surrogate <= GRID.prod(1)).all()
    assert (surrogate < GRID.prod(1)).any()


@pytest.mark.parametrize("eps", EPSILONS)
def test_l_clip_and_l_cpi_are_equal_to_first_order_at_ratio_one(eps):
    surrogate, gradient = surrogate_and_gradient(eps)
    at_one = GRID[:, 0] == 1
    assert at_one.sum() == len(ADVANTAGES)
    assert torch.equal(surrogate[at_one], GRID[at_one, 1])
    assert torch.equal(gradient[at_one], GRID[at_one, 1])


def test_an_infinite_clip_coef_is_l_cpi():
    surrogate, gradient = surrogate_and_gradient(math.inf)
    assert torch.equal(surrogate, GRID.prod(1))
    assert torch.equal(gradient, GRID[:, 1])


# ── Advantages ──────────────────────────────────────────────────────────────────────────────────────────────

def random_rollout(seed, T=12, N=3, ends=0.2):
    """rewards, values, next_values, terminated, truncated with ends of either kind, and of both at once"""
    g = torch.Generator().manual_seed(seed)
    return *torch.randn(3, T, N, generator=g), *(torch.rand(2, T, N, generator=g) < ends)


def brute_force_gae(rewards, values, next_values, terminated, truncated, gamma, lmbda):
    """Σ_l (γλ)^l δ_{t+l}, term by term, up to the episode's end or the rollout's"""
    T, N = rewards.shape
    advantages = torch.zeros(T, N)
    for n in range(N):
        for t in range(T):
            for k in range(t, T):
                future = 0.0 if terminated[k, n] else gamma * next_values[k, n].item()
                delta = rewards[k, n].item() + future - values[k, n].item()
                advantages[t, n] += (gamma * lmbda) ** (k - t) * delta
                if terminated[k, n] or truncated[k, n]:
                    break
    return advantages


@pytest.mark.parametrize("seed", range(20))
def test_gae_is_the_double_sum(seed):
    rollout, (gamma, lmbda) = random_rollout(seed), np.random.default_rng(seed).random(2)
    torch.testing.assert_close(gae(*rollout, gamma, lmbda), brute_force_gae(*rollout, gamma, lmbda))


def test_gae_with_lambda_one_is_the_slides_sum():
    rewards, values, _, _, _ = random_rollout(0)
    T, gamma, last, never = 12, 0.9, torch.randn(3), torch.zeros(12, 3, dtype=bool)
    advantages = gae(rewards, values, torch.cat([values[1:], last[None]]), never, never, gamma, 1.0)
    for t in range(T):
        slide = -values[t] + sum(gamma ** (k - t) * rewards[k] for k in range(t, T)) + gamma ** (T - t) * last
        torch.testing.assert_close(advantages[t], slide)


def test_gae_with_lambda_zero_is_the_td_error():
    rewards, values, next_values, _, _ = rollout = random_rollout(1, ends=0.0)
    torch.testing.assert_close(gae(*rollout, 0.9, 0.0), rewards + 0.9 * next_values - values)


def test_a_truncated_episode_keeps_the_value_of_its_future_and_a_terminated_one_has_none():
    one, zero = torch.ones(1, 1), torch.zeros(1, 1)
    yes, no = one.bool(), zero.bool()
    assert gae(one, zero, 8 * one, no, yes, 0.5, 0.9) == 1 + 0.5 * 8
    assert gae(one, zero, 8 * one, yes, no, 0.5, 0.9) == 1
    assert gae(one, zero, 8 * one, yes, yes, 0.5, 0.9) == 1


@pytest.mark.parametrize("end", ["terminated", "truncated"])
def test_nothing_leaks_across_episodes_or_environments(end):
    def advantages(change):
        rewards, values, next_values, _, _ = random_rollout(2, T=6, N=3)
        terminated, truncated = torch.zeros(2, 6, 3, dtype=bool)
        {"terminated": terminated, "truncated": truncated}[end][2, 1] = True
        rewards[3:, 1] += change  # the next episode of environment 1
        return gae(rewards, values, next_values, terminated, truncated, 0.9, 0.9)

    changed = (advantages(100.0) - advantages(0.0)) != 0
    assert changed.nonzero().tolist() == [[3, 1], [4, 1], [5, 1]]


# ── Policy ──────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("A", [1, 3, 17])
def test_the_gaussian_is_torchs(A):
    mean, log_std, action = torch.randn(5, A), 0.5 * torch.randn(A), 2 * torch.randn(5, A)
    assert_same(lambda m, s: log_prob(m, s, action),
                lambda m, s: Independent(Normal(m, s.exp()), 1).log_prob(action), mean, log_std)
    assert_same(lambda s: entropy(mean, s), lambda s: Normal(0.0, s.exp()).entropy().sum(), log_std)


@pytest.mark.parametrize("A", [2, 3, 17])
def test_the_softmax_is_torchs(A):
    scores, action = 3 * torch.randn(5, A), torch.randint(A, (5,))
    assert_same(lambda f: log_prob(f, None, action),
                lambda f: Categorical(logits=f).log_prob(action), scores)
    assert_same(lambda f: entropy(f, None), lambda f: Categorical(logits=f).entropy().mean(), scores)
    assert_same(lambda f: torch.stack([entropy(state[None], None) for state in f]),
                lambda f: Categorical(logits=f).entropy(), scores)


def policy(agent, obs):
    """πθ(·|s) by torch"""
    output = agent.actor(agent.obs_norm(obs))
    if agent.discrete:
        return Categorical(logits=output)
    return Independent(Normal(output, agent.log_std.exp()), 1)


def agent_of(action_space, S=4):
    """An Agent whose policy isn't near uniform, and whose statistics aren't the identity."""
    agent = Agent(Box(-np.inf, np.inf, (S,)), action_space)
    agent.obs_norm.update(3 * torch.randn(50, S) + 1)
    agent.value_norm.update(5 * torch.randn(50, 1) - 2)
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return agent


@torch.no_grad()
def test_discrete_actions_are_drawn_with_the_softmaxs_probabilities():
    agent, obs, B = agent_of(Discrete(4)), torch.randn(4), 200_000
    probabilities = policy(agent, obs).probs
    actions = agent.act(obs.expand(B, 4), agent.noise(B))
    assert actions.shape == (B,) and probabilities.max() - probabilities.min() > 0.1
    frequencies = actions.bincount(minlength=4) / B
    assert ((frequencies - probabilities).abs() < 4 * (probabilities * (1 - probabilities) / B).sqrt()).all()


@torch.no_grad()
def test_continuous_actions_are_drawn_with_the_gaussians_mean_and_standard_deviation():
    agent, obs, B = agent_of(Box(-1, 1, (3,))), torch.randn(4), 200_000
    actions, std = agent.act(obs.expand(B, 4), agent.noise(B)), agent.log_std.exp()
    assert actions.shape == (B, 3) and (std - 1).abs().min() > 0.05
    assert ((actions.mean(0) - agent.actor(agent.obs_norm(obs))).abs() < 4 * std / B**0.5).all()
    assert ((actions.std(0) - std).abs() < 4 * std / (2 * B) ** 0.5).all()
    assert (torch.corrcoef(actions.T) - torch.eye(3)).abs().max() < 4 / B**0.5


@torch.no_grad()
@SPACES
def test_without_noise_the_action_is_the_most_probable_one(space):
    agent, obs = agent_of(space), torch.randn(6, 4)
    mode, log_probs = agent.act(obs), policy(agent, obs).log_prob
    actions = [torch.full_like(mode, a) for a in range(3)]
    for other in actions if agent.discrete else [mode - 0.1, mode + 0.1]:
        differs = (other != mode).reshape(6, -1).any(-1)
        assert torch.equal(log_probs(mode) > log_probs(other), differs)


# ── Statistics ──────────────────────────────────────────────────────────────────────────────────────────────

def test_pooled_statistics_are_those_of_everything_at_once():
    x = torch.randn(100, 3) * torch.tensor([0.1, 1.0, 30.0]) + torch.tensor([5.0, 0.0, -70.0])
    norm = RunningNorm(3)
    for chunk in x.split([1, 40, 9, 50]):
        norm.update(chunk)
    assert norm.count == 100
    torch.testing.assert_close(norm.mean, x.mean(0))
    torch.testing.assert_close(norm.var, x.var(0, correction=0))
    torch.testing.assert_close(norm(x), ((x - x.mean(0)) / x.std(0, correction=0)).clamp(-10, 10))


def test_statistics_of_nothing_are_the_identity():
    x = torch.linspace(-9, 9, 12).reshape(4, 3)
    assert torch.equal(RunningNorm(3)(x), x) and torch.equal(RunningNorm(3).inverse(x), x)


def test_inverse_inverts():
    norm, x = RunningNorm(3), 4 * torch.randn(20, 3) + 7
    norm.update(x)
    torch.testing.assert_close(norm.inverse(norm(x)), x)


def test_an_outlier_is_ten_standard_deviations_at_most():
    assert RunningNorm(2)(torch.tensor([[99.0, -99.0]])).tolist() == [[10, -10]]


# ── Environments ────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("action, arrives", [(-1, -2), (0, 1), (0.5, 2.5), (1, 4), (7, 4), (-7, -2)])
def test_plus_and_minus_one_are_the_ends_of_the_environments_range(action, arrives):
    env = make_env("Echo-v0")
    env.reset()
    assert env.step(np.float32([action]))[1] == pytest.approx(arrives)


class Taking(envs.Counter):
    """Keeps the actions that arrive, and then changes the arrays that they came in."""

    def __init__(self, action_space):
        super().__init__()
        self.action_space, self.arrived = action_space, []

    def reward(self, action):
        self.arrived.append(action.copy())
        action[:] = 99
        return 1.0


@pytest.fixture
def made(monkeypatch):
    """make_env of an environment that has no name"""
    def made(env):
        spec = gym.envs.registration.EnvSpec("Nameless-v0", lambda: env)
        monkeypatch.setitem(gym.registry, spec.id, spec)
        return make_env(spec.id)

    return made


def arrived(env, action):
    env.reset()
    env.step(np.array(action, np.float32))
    (action,) = env.unwrapped.arrived
    assert env.unwrapped.action_space.contains(action)
    return action.tolist()


@pytest.mark.parametrize("low, high, action, expected", [
    (0, np.inf, -3, 0), (0, np.inf, 0.5, 0.5), (0, np.inf, 7, 7),
    (-np.inf, 2, -7, -7), (-np.inf, 2, 0.5, 0.5), (-np.inf, 2, 3, 2),
    (-np.inf, np.inf, -99, -99), (-np.inf, np.inf, 0.5, 0.5),
])
def test_an_action_without_two_bounds_arrives_as_it_is_but_for_the_bound_it_has(low, high, action, expected, made):
    env = made(Taking(Box(np.float32(low), np.float32(high), (1,))))
    assert arrived(env, [action]) == [expected]


@pytest.mark.parametrize("action, expected", [
    ((-3, -1), (0, -2)), ((0.5, 0), (0.5, 1)), ((7, 0.5), (7, 2.5)), ((1, 1), (1, 4)), ((99, 99), (99, 4)),
])
def test_each_dimension_of_an_action_has_the_range_of_its_own_bounds(action, expected, made):
    env = made(Taking(Box(np.float32([0, -2]), np.float32([np.inf, 4]))))
    assert arrived(env, action) == pytest.approx(expected)


LARGEST = np.finfo(np.float32).max


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("low, high", [(-LARGEST, LARGEST), (LARGEST / 2, LARGEST), (-LARGEST, -LARGEST / 2)])
def test_bounds_as_large_as_numbers_get_do_not_overflow(low, high, made):
    space = Box(low, high, (1,))
    for action, expected in (-1, low), (0, low / 2 + high / 2), (1, high):
        assert arrived(made(Taking(space)), [action]) == pytest.approx([expected], rel=1e-6)


@pytest.mark.parametrize("bound, scale", [(2, 2), (np.inf, 1)], ids=["bounded", "unbounded"])
def test_an_environment_that_changes_its_actions_does_not_change_those_of_the_rollout(bound, scale, made):
    env = Taking(Box(-np.float32(bound), np.float32(bound), (1,)))
    rollout = collect(agent_of(env.action_space, S=1), [Actor(made(env), BAR)], 50)
    expected = (scale * rollout.actions[:, 0]).clamp(-bound, bound)
    assert torch.equal(torch.from_numpy(np.array(env.arrived)), expected)


class Reusing(envs.Counter):
    """Observes one array, which it writes over; the reward is an array too."""

    array = np.zeros(1, np.float32)

    def observe(self):
        self.array[:] = self.t
        return self.array

    def reward(self, action):
        return np.ones(1)


def test_an_environment_that_writes_over_its_observations_does_not_change_those_of_the_rollout():
    agent = Agent(Box(-np.inf, np.inf, (1,)), Discrete(2))
    rollout = collect(agent, [Actor(Reusing(length=3), BAR)], 5)
    assert rollout.obs.flatten().tolist() == [0, 1, 2, 0, 1]
    assert rollout.next_obs.flatten().tolist() == [1, 2, 3, 1, 2]


def test_a_reward_that_is_an_array_of_one_number_counts():
    agent = Agent(Box(-np.inf, np.inf, (1,)), Discrete(2))
    rollout = collect(agent, [Actor(Reusing(length=3), BAR)], 5)
    assert rollout.rewards.flatten().tolist() == [1] * 5
    assert rollout.episodes == [(3, 3.0, 3)] and type(rollout.episodes[0][1]) is float


@pytest.mark.parametrize("env", [Reusing(), envs.Counter()], ids=["float32", "float64"])
def test_an_actors_observations_are_float32_copies(env):
    actor = Actor(env, BAR)
    seen = [actor.obs, actor.step(0)[0], actor.step(0)[0]]
    assert seen == [0, 1, 2] and seen[-1] is actor.obs
    assert all(obs.dtype == np.float32 for obs in seen)


class Growing(envs.Counter):
    """Observes more numbers than it says, from a step on."""

    def __init__(self, since):
        super().__init__()
        self.since = since

    def observe(self):
        return np.zeros(1 + (self.t >= self.since))


def test_an_observation_of_another_size_than_declared_raises():
    with pytest.raises(ValueError, match="reshape"):
        Actor(Growing(since=0), BAR)
    actor = Actor(Growing(since=2), BAR)
    actor.step(0)
    with pytest.raises(ValueError, match="reshape"):
        actor.step(0)


def test_each_episode_of_an_actor_has_a_seed_of_its_own_that_torchs_seed_decides():
    def seeds():
        torch.manual_seed(3)
        actors = [Actor(gym.make("CartPole-v1"), BAR) for _ in range(2)]
        drawn = [actor.env.unwrapped.np_random_seed for actor in actors]
        for actor in actors * 3:
            actor.reset()
            drawn.append(actor.env.unwrapped.np_random_seed)
        return drawn

    assert len(set(seeds())) == 8 and seeds() == seeds()


# ── Collecting ──────────────────────────────────────────────────────────────────────────────────────────────

@pytest.fixture
def rollout():
    """Actor 0's episodes terminate after 3 steps, actor 1's are cut off after 2."""
    agent = Agent(Box(-np.inf, np.inf, (1,)), Discrete(2))
    ends = {"length": 3}, {"max_episode_steps": 2}
    return collect(agent, [Actor(gym.make("Counter-v0", **end), BAR) for end in ends], 7)


def test_a_rollout_keeps_the_last_observation_of_an_episode_and_the_first_of_the_next(rollout):
    assert rollout.obs[..., 0].T.tolist() == [[0, 1, 2, 0, 1, 2, 0], [0, 1, 0, 1, 0, 1, 0]]
    assert rollout.next_obs[..., 0].T.tolist() == [[1, 2, 3, 1, 2, 3, 1], [1, 2, 1, 2, 1, 2, 1]]


def test_a_rollout_tells_terminated_from_truncated(rollout):
    assert rollout.terminated.nonzero().tolist() == [[2, 0], [5, 0]]
    assert rollout.truncated.nonzero().tolist() == [[1, 1], [3, 1], [5, 1]]


def test_a_rollout_lists_the_episodes_that_ended(rollout):
    assert rollout.episodes == [(4, 2.0, 2), (6, 3.0, 3), (8, 2.0, 2), (12, 3.0, 3), (12, 2.0, 2)]


def test_a_rollout_has_an_iterations_steps_and_goes_on_where_the_last_one_ended():
    agent = Agent(Box(-np.inf, np.inf, (1,)), Discrete(2))
    actors = [Actor(gym.make("Counter-v0", length=9), BAR)]
    first, second = (collect(agent, actors, 5) for _ in range(2))
    assert first.obs.flatten().tolist() == [0, 1, 2, 3, 4]
    assert second.obs.flatten().tolist() == [5, 6, 7, 8, 0]
    assert second.episodes == [(4, 9.0, 9)]


def test_a_rollout_holds_the_actions_that_the_policy_drew_and_their_rewards():
    agent, actors = agent_of(Box(-2, 4, (1,)), S=1), [Actor(make_env("Echo-v0"), BAR) for _ in range(3)]
    before = copy.deepcopy(agent)
    rollout = collect(agent, actors, 50)
    assert rollout.actions.shape == (50, 3, 1) and rollout.rewards.shape == (50, 3)
    torch.testing.assert_close(rollout.rewards, rollout.actions[..., 0].clamp(-1, 1) * 3 + 1)
    assert rollout.actions.abs().max() > 1  # the probability is that of the action before it is clipped
    assert_equal_to_the_bit(agent, before)  # π_θold, its statistics too, stays as it is


# ── Update ──────────────────────────────────────────────────────────────────────────────────────────────────

def rollout_of(agent, T=16, N=4):
    rewards, _, _, terminated, truncated = random_rollout(3, T, N)
    obs, next_obs = torch.randn(2, T, N, 4)
    with torch.no_grad():
        actions = agent.act(obs, agent.noise(T, N))
    return Rollout(obs, actions, rewards, next_obs, terminated, truncated, [])


def updated(agent, rollout, rate, **settings):
    """A copy after the update by plain gradient descent, and the metrics."""
    agent, old = copy.deepcopy(agent), copy.deepcopy(agent)
    torch.manual_seed(1)
    theta = as_vector([*agent.parameters()])
    return agent, update(agent, old, theta, torch.optim.SGD([theta], rate), rollout, Args(**settings))


@SPACES
def test_the_parameters_are_views_of_one_vector(space):
    agent = agent_of(space)
    one = copy.deepcopy(agent)
    theta = as_vector([*one.parameters()])
    assert torch.equal(theta, nn.utils.parameters_to_vector(agent.parameters()))
    theta.copy_(torch.arange(len(theta)))
    assert torch.equal(nn.utils.parameters_to_vector(one.parameters()), theta)


ONE_STEP = dict(update_epochs=1, minibatch_size=64, max_grad_norm=math.inf, gamma=0.9, gae_lambda=0.8)


@SPACES
def test_the_first_step_follows_the_policy_gradient_and_the_values_error(space):
    agent = agent_of(space)
    rollout = rollout_of(agent)
    after, metrics = updated(agent, rollout, 0.1, ent_coef=0.3, **ONE_STEP)
    agent.obs_norm = after.obs_norm  # an update takes the rollout's in first

    norms = copy.deepcopy([agent.obs_norm, agent.value_norm])
    x, next_x = ((y - norms[0].mean) / norms[0].var.sqrt() for y in (rollout.obs, rollout.next_obs))
    with torch.no_grad():
        values, next_values = (value(agent, y) for y in (x, next_x))
    ends = rollout.terminated, rollout.truncated
    advantages = brute_force_gae(rollout.rewards, values, next_values, *ends, 0.9, 0.8)
    targets = advantages + values
    norms[1].update(targets.reshape(-1, 1))
    weights = (advantages - advantages.mean()) / advantages.std(correction=0)
    pi = policy(agent, rollout.obs)
    policy_objective = (weights * pi.log_prob(rollout.actions)).mean() + 0.3 * pi.entropy().mean()
    errors = agent.critic(x)[..., 0] - (targets - norms[1].mean) / norms[1].var.sqrt()
    (-policy_objective + 0.25 * (errors**2).mean()).backward()
    assert metrics["losses/value_loss"] == pytest.approx(0.5 * (errors**2).mean().item(), rel=1e-4)
    for (name, new), old in zip(after.named_parameters(), agent.parameters()):
        torch.testing.assert_close(new, old - 0.1 * old.grad, msg=lambda text: f"{name}: {text}")


@SPACES
def test_an_update_that_changes_nothing_has_the_metrics_of_ratio_one(space):
    agent = agent_of(space)
    rollout = rollout_of(agent)
    after, metrics = updated(agent, rollout, 0.0, **ONE_STEP)
    agent.obs_norm = after.obs_norm  # an update takes the rollout's in first
    values, next_values = (value(agent, agent.obs_norm(y)) for y in (rollout.obs, rollout.next_obs))
    ends = rollout.terminated, rollout.truncated
    error = brute_force_gae(rollout.rewards, values, next_values, *ends, 0.9, 0.8)
    assert metrics["losses/approx_kl"] == pytest.approx(0, abs=1e-6) and metrics["losses/clipfrac"] == 0
    assert metrics["losses/policy_loss"] == pytest.approx(0, abs=1e-6)  # −mean Â, and Â has mean 0
    assert metrics["losses/entropy"] == pytest.approx(policy(agent, rollout.obs).entropy().mean().item())
    assert metrics["losses/explained_variance"] == pytest.approx(
        (1 - error.var() / (error + values).var()).item(), rel=1e-4)


@SPACES
def test_the_policys_loss_is_the_mean_over_the_minibatches(space, monkeypatch):
    agent, found = agent_of(space), []
    look = ppo_clip.clipped_surrogate
    monkeypatch.setattr(ppo_clip, "clipped_surrogate", lambda *args: found.append(look(*args)) or found[-1])
    _, metrics = updated(agent, rollout_of(agent), 0.3, **ONE_STEP | {"update_epochs": 3})
    means = [objective.mean().item() for objective in found]
    assert len(means) == 3 and means[0] == pytest.approx(0, abs=1e-6) and abs(sum(means)) > 0.01
    assert metrics["losses/policy_loss"] == pytest.approx(-sum(means) / 3, rel=1e-4)


@SPACES
def test_approx_kl_and_clipfrac_compare_the_policy_with_that_of_the_rollout(space):
    agent = agent_of(space)
    rollout = rollout_of(agent)
    after, metrics = updated(agent, rollout, 0.05, clip_coef=0.3, **ONE_STEP)
    agent.obs_norm = after.obs_norm  # an update takes the rollout's in first
    new, old = (policy(a, rollout.obs).log_prob(rollout.actions).flatten() for a in (after, agent))
    log_ratio = (new - old).tolist()
    kl = sum(math.exp(y) - 1 - y for y in log_ratio) / len(log_ratio)
    clipped = sum(abs(math.exp(y) - 1) > 0.3 for y in log_ratio) / len(log_ratio)
    assert metrics["losses/approx_kl"] == pytest.approx(kl, rel=1e-3) and kl > 1e-3
    assert metrics["losses/clipfrac"] == pytest.approx(clipped) and 0 < clipped < 1


@SPACES
def test_the_policy_stays_nearer_when_the_ratio_is_clipped(space):
    agent = agent_of(space)
    rollout = rollout_of(agent)
    clipped, free = (updated(agent, rollout, 0.1, update_epochs=40, minibatch_size=32, clip_coef=eps)[1]
                     for eps in (0.1, math.inf))
    assert 0 < 3 * clipped["losses/approx_kl"] < free["losses/approx_kl"]


def test_a_gradient_is_shortened_to_max_grad_norm():
    agent = agent_of(Discrete(3))
    rollout = rollout_of(agent)
    after, _ = updated(agent, rollout, 1.0, **ONE_STEP | {"max_grad_norm": 1e-3})
    moved = sum((new - old).square().sum() for new, old in zip(after.parameters(), agent.parameters())) ** 0.5
    assert moved.item() == pytest.approx(1e-3, rel=1e-2)


@SPACES
def test_each_step_has_a_gradient_of_its_own(space):
    agent = agent_of(space)
    rollout, found = rollout_of(agent), []
    for K in 1, 3:
        new, old = copy.deepcopy(agent), copy.deepcopy(agent)
        theta = as_vector([*new.parameters()])
        args = Args(**ONE_STEP | {"update_epochs": K})
        update(new, old, theta, torch.optim.SGD([theta], 0.0), rollout, args)
        found.append(theta.grad)
    torch.testing.assert_close(*found)
    assert found[0].any()


@pytest.mark.parametrize("size, sizes", [(16, [16] * 4), (24, [24, 24, 16])], ids=["whole", "remainder"])
def test_an_epoch_uses_every_step_once_in_an_order_of_its_own(size, sizes):
    agent, minibatches = Agent(Box(-np.inf, np.inf, (4,)), Discrete(3)), []
    rollout, old = rollout_of(agent), copy.deepcopy(agent)
    rollout.obs[:] = torch.arange(64.0).reshape(16, 4, 1) / 10  # an observation is its own number

    def look(_, inputs):
        if torch.is_grad_enabled():
            minibatches.append((inputs[0][:, 0] * 10).round())

    agent.actor.register_forward_pre_hook(look)
    agent.obs_norm.update = lambda _: None  # nor is it normalised
    theta = as_vector([*agent.parameters()])
    update(agent, old, theta, torch.optim.SGD([theta], 0.1), rollout, Args(update_epochs=3, minibatch_size=size))
    epochs = [epoch.tolist() for epoch in torch.cat(minibatches).split(64)]
    assert [len(y) for y in minibatches] == sizes * 3
    assert all(sorted(epoch) == list(range(64)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in [*epochs, range(64)]}) == 4


@SPACES
def test_minibatches_of_one_step_are_no_trouble(space):
    agent = agent_of(space)
    after, metrics = updated(agent, rollout_of(agent, T=4, N=2), 0.01, update_epochs=2, minibatch_size=1)
    assert all(map(math.isfinite, metrics.values()))
    assert all(parameter.isfinite().all() for parameter in after.parameters())


def test_an_update_adds_the_rollouts_observations_to_the_statistics():
    agent = agent_of(Discrete(3))
    rollout = rollout_of(agent)
    after, _ = updated(agent, rollout, 0.1, **ONE_STEP)
    agent.obs_norm.update(rollout.obs.reshape(-1, 4))
    assert torch.equal(after.obs_norm.mean, agent.obs_norm.mean) and after.obs_norm.count == 50 + 64


@SPACES
def test_the_policy_that_acts_becomes_the_one_that_learned_to_the_bit_and_nothing_else_moves_it(space):
    agent = agent_of(space)
    old, theta = copy.deepcopy(agent), as_vector([*agent.parameters()])
    update(agent, old, theta, torch.optim.SGD([theta], 0.1), rollout_of(agent), Args(**ONE_STEP))
    assert_equal_to_the_bit(old, agent)
    assert_acts_alone(old, agent, lambda: collect(old, [Actor(Clock(space), BAR)], 20)[:6])


@pytest.mark.parametrize("script, fixed", [("ppo_clip", ()), ("ppo_kl", ("--no-adapt-beta",))])
def test_the_step_size_is_applied_as_it_falls(script, fixed, tmp_path):
    tiny = "--num-envs 2 --num-steps 64 --minibatch-size 32 --update-epochs 2 --env-id CartPole-v1 --runs-dir"
    run_of = partial(run_here, importlib.import_module(script))

    def agent_after(name, *flags):
        folder = shutil.copytree(only_run(tmp_path / "begun"), tmp_path / name)
        assert run_of("--resume", folder, "--total-timesteps", 256, *flags)[0] == 0
        checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
        assert checkpoint["optimizer"]["param_groups"][0]["eps"] == 1e-5  # the paper's own code's
        return checkpoint["agent"]

    assert run_of(*tiny.split(), tmp_path / "begun", "--total-timesteps", 128, "--learning-rate", 0.001, *fixed)[0] == 0
    halfway, half = agent_after("halfway"), agent_after("half", "--no-anneal-lr", "--learning-rate", 0.0005)
    assert all(torch.equal(x, half[name]) for name, x in halfway.items())
    whole = agent_after("whole", "--no-anneal-lr")
    assert not torch.equal(halfway["actor.0.weight"], whole["actor.0.weight"])


# ── Learning ────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("end, expected", [
    ({"length": 5}, sum((1 - 0.9**n) / (1 - 0.9) for n in range(1, 6)) / 5),  # over 5 states that look alike
    ({"length": None, "max_episode_steps": 5}, 1 / (1 - 0.9)),
], ids=["terminated", "truncated"])
def test_a_time_limit_takes_nothing_from_the_value_and_a_termination_does(end, expected):
    agent = Agent(Box(-np.inf, np.inf, (1,)), Discrete(2))
    actors, old = [Actor(gym.make("Blind-v0", **end), BAR) for _ in range(2)], copy.deepcopy(agent)
    theta = as_vector([*agent.parameters()])
    optimizer = torch.optim.Adam([theta], 3e-3)
    args = Args(gamma=0.9, gae_lambda=1.0, minibatch_size=20, update_epochs=4)
    for _ in range(150):
        update(agent, old, theta, optimizer, collect(old, actors, 10), args)
    assert value(agent, agent.obs_norm(torch.zeros(1, 1))).item() == pytest.approx(expected, rel=0.05)
