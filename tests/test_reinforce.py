"""The mathematics of reinforce.py against calculations of another kind."""

import copy
import math

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete

import envs  # noqa: F401, registers them
import reinforce
from helpers import complaints
from oracles import Process, agent_of, flat, gradient, policy
from reinforce import (
    TAIL, Actor, Agent, Args, Episode, as_vector, collect, make_env, missing_share, returns_to_go, score_loss,
    softmax_log_prob, update,
)

CPU = torch.device("cpu")
SPACES = pytest.mark.parametrize("space", [Discrete(3), Box(-1, 1, (2,))], ids=["discrete", "continuous"])
GAMMAS = pytest.mark.parametrize("gamma", [0.0, 0.5, 0.9, 0.99, 1.0])


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def module():
    """Of which conftest.main runs main()"""
    return reinforce


# ── Scores ──────────────────────────────────────────────────────────────────────────────────────────────────

@SPACES
def test_the_losss_gradient_is_minus_each_steps_score_times_its_return_per_episode(space):
    agent, x, G = agent_of(reinforce, space), torch.randn(12, 4).double(), torch.randn(12).double()
    actions, parameters = policy(agent, x).sample(), agent.policy_parameters()
    loss = score_loss(agent.log_prob(agent.actor(x), actions), G, 5)
    scores = [gradient(policy(agent, x[t]).log_prob(actions[t]), parameters) for t in range(12)]
    torch.testing.assert_close(gradient(loss, parameters), -sum(map(torch.mul, scores, G)) / 5)


def test_the_score_is_the_actions_own_derivative_less_the_expected_one():
    agent, x = agent_of(reinforce, Discrete(4)), torch.randn(4).double()
    f, parameters = agent.actor(x), agent.policy_parameters()
    jacobian = torch.stack([gradient(y, parameters, retain_graph=True) for y in f])
    pi = f.detach().exp() / f.detach().exp().sum()
    for a in range(4):
        score = gradient(softmax_log_prob(f[None], torch.tensor([a]))[0], parameters, retain_graph=True)
        torch.testing.assert_close(score, jacobian[a] - pi @ jacobian)


# ── Returns ─────────────────────────────────────────────────────────────────────────────────────────────────

@GAMMAS
@pytest.mark.parametrize("last", [0.0, 7.0])
@pytest.mark.parametrize("T", [1, 2, 9])
def test_the_return_is_the_discounted_sum_of_what_follows(gamma, last, T):
    rewards = torch.randn(T, dtype=torch.float64)
    follow = [*rewards.tolist(), last]
    expected = [sum(gamma ** (k - t) * follow[k] for k in range(t, T + 1)) for t in range(T)]
    assert returns_to_go(rewards, gamma, last).tolist() == pytest.approx(expected)


@GAMMAS
@pytest.mark.parametrize("T", [1, 2, 9])
def test_the_missing_share_is_that_of_the_weights_after_the_cut(gamma, T):
    """Of 3000 weights, of which all but T−t were cut off; for γ = 1 the limit"""
    weights = gamma ** torch.arange(3000, dtype=torch.float64)
    expected = [(weights[T - t:].sum() / weights.sum()).item() for t in range(T)] if gamma < 1 else [1.0] * T
    assert missing_share(T, True, gamma).tolist() == pytest.approx(expected, abs=1e-6)
    assert missing_share(T, False, gamma).tolist() == [0.0] * T


# ── The policy gradient ─────────────────────────────────────────────────────────────────────────────────────

PROCESSES = pytest.mark.parametrize("seed, gamma", [(0, 1.0), (1, 1.0), (2, 0.9), (3, 0.5)])


def listed(seed, gamma, bonus=0.0):
    """A decision process, a policy, its episodes: probability, states, actions, γ^t, G_t by the script"""
    process, theta = Process(seed, 4, 3, gamma, ascending=True), torch.randn(4, 3).double()
    process.R += bonus
    episodes = []
    for p, *path in process.episodes(theta):
        states, actions = map(torch.tensor, path)
        discounts = gamma ** torch.arange(len(states)).double()
        episodes.append((p, states, actions, discounts, returns_to_go(process.R[states, actions], gamma)))
    return process, theta, episodes


def estimates(theta, episodes, baseline):
    """Of each episode: its probability, the gradient that the script's loss has there"""
    theta = theta.clone().requires_grad_()
    for p, states, actions, discounts, G in episodes:
        loss = score_loss(softmax_log_prob(theta[states], actions), discounts * (G - baseline[states]), 1)
        yield p, -gradient(loss, [theta])


def mean_and_variance(estimates):
    p, g = map(torch.stack, zip(*estimates))
    mean = p @ g
    return mean, p @ (g - mean).square().sum(1)


@PROCESSES
def test_the_expectation_over_all_episodes_is_the_policy_gradient(seed, gamma):
    process, theta, episodes = listed(seed, gamma)
    probabilities, _, _, _, returns = zip(*episodes)
    assert sum(probabilities).item() == pytest.approx(1)
    expected = sum(p * G[0] for p, G in zip(probabilities, returns))
    assert expected.item() == pytest.approx(process.J(theta).item())
    mean, _ = mean_and_variance(estimates(theta, episodes, torch.zeros(4)))
    torch.testing.assert_close(mean, process.gradient_of_J(theta).flatten(), rtol=1e-6, atol=1e-8)


@PROCESSES
def test_a_baseline_leaves_the_expectation_and_the_value_lowers_the_variance(seed, gamma):
    process, theta, episodes = listed(seed, gamma, bonus=2.0)  # returns of one sign, as most tasks have
    mean, variance = mean_and_variance(estimates(theta, episodes, torch.zeros(4)))
    for baseline in torch.randn(4).double(), process.values(theta)[0]:
        with_baseline, lower = mean_and_variance(estimates(theta, episodes, baseline))
        torch.testing.assert_close(with_baseline, mean)
    assert 2 * lower < variance


@PROCESSES
def test_the_return_less_the_value_is_on_average_the_advantage(seed, gamma):
    process, theta, episodes = listed(seed, gamma)
    (V, _), total, visits = process.values(theta), torch.zeros(4, 3).double(), torch.zeros(4, 3).double()
    for p, states, actions, _, G in episodes:
        total.index_put_((states, actions), p * (G - V[states]), accumulate=True)
        visits.index_put_((states, actions), p.expand(len(states)), accumulate=True)
    torch.testing.assert_close(total / visits, process.advantages(theta))


# ── Collecting ──────────────────────────────────────────────────────────────────────────────────────────────

@pytest.fixture
def actors():
    """Their episodes terminate after 3 steps, are cut off after 2, and after 4 are both at once."""
    return [Actor(gym.make("Counter-v0", **end)) for end in (
        {"length": 3}, {"max_episode_steps": 2}, {"length": 4, "max_episode_steps": 4})]


def test_each_actor_plays_one_whole_episode_and_no_step_more(actors):
    for _ in range(2):
        episodes = collect(Agent(Box(-np.inf, np.inf, (1,)), Discrete(2)), actors, CPU)
        assert [episode.obs[:, 0].tolist() for episode in episodes] == [[0, 1, 2], [0, 1], [0, 1, 2, 3]]
        assert [episode.rewards.tolist() for episode in episodes] == [[1] * 3, [1] * 2, [1] * 4]
        assert [len(episode.actions) for episode in episodes] == [3, 2, 4]
        assert [episode.last_obs.tolist() for episode in episodes] == [[3], [2], [4]]
        assert [episode.result for episode in episodes] == [(3, 3), (2, 2), (4, 4)]
        assert [actor.actions for actor in actors] == [[], [], []]  # each is at the start of its next


def test_episodes_are_cut_at_the_limit_and_go_on_from_there(actors):
    agent = Agent(Box(-np.inf, np.inf, (1,)), Discrete(2))
    first = collect(agent, actors, CPU, limit=7)  # which the third round reaches
    assert [episode.obs[:, 0].tolist() for episode in first] == [[0, 1, 2], [0, 1], [0, 1, 2]]
    assert [episode.result for episode in first] == [(3, 3), (2, 2), None]
    assert [episode.truncated for episode in first] == [False, True, True] and first[2].last_obs.tolist() == [3]
    second = collect(agent, actors, CPU)
    assert [episode.obs[:, 0].tolist() for episode in second] == [[0, 1, 2], [0, 1], [3]]
    assert [episode.result for episode in second] == [(3, 3), (2, 2), (4, 4)]


def test_an_episode_that_was_cut_is_told_from_one_that_is_over(actors):
    episodes = collect(Agent(Box(-np.inf, np.inf, (1,)), Discrete(2)), actors, CPU)
    assert [episode.truncated for episode in episodes] == [False, True, False]


def test_an_episode_holds_the_actions_that_the_policy_drew_and_their_rewards():
    agent = Agent(Box(-np.inf, np.inf, (1,)), Box(-2, 4, (1,)))
    count = agent.obs_norm.count.clone()
    episodes = collect(agent, [Actor(make_env("Echo-v0")) for _ in range(200)], CPU)
    actions = torch.stack([episode.actions for episode in episodes])
    assert actions.shape == (200, 5, 1) and abs(actions.mean()) < 4 / 1000**0.5
    assert abs(actions.std() / math.exp(-0.5) - 1) < 4 / 2000**0.5
    rewards = torch.stack([episode.rewards for episode in episodes])
    torch.testing.assert_close(rewards, actions[..., 0].clamp(-1, 1) * 3 + 1)
    assert agent.obs_norm.count == count  # πθ, its statistics too, stays as it is


# ── The update ──────────────────────────────────────────────────────────────────────────────────────────────

def episode_of(agent, T, truncated):
    obs = torch.randn(T + 1, 4).double()
    actions = policy(agent, agent.obs_norm(obs[:-1])).sample()
    return Episode(obs[:-1], actions, torch.randn(T).double() + 1, obs[-1], truncated, 0.0)


def updated(agent, episodes, **settings):
    """A copy after the update by plain gradient ascent, and the metrics"""
    agent = copy.deepcopy(agent)
    theta, phi = as_vector(agent.policy_parameters()), as_vector(agent.critic.parameters())
    optimizers = torch.optim.SGD([theta], 0.1), torch.optim.SGD([phi], 0.1)
    args = Args(**{"gamma": 0.75, "value_epochs": 2} | settings)
    return agent, update(agent, theta, phi, *optimizers, episodes, args)


def theta_of(agent):
    return flat(agent.policy_parameters()).detach().clone()


def known_steps(agent, episodes, baseline, gamma=0.75):
    """Step by step: s_t, a_t, G_t of the steps that count"""
    for obs, actions, rewards, last_obs, truncated, _ in episodes:
        for t in range(len(rewards)):
            G = sum(gamma ** (k - t) * rewards[k] for k in range(t, len(rewards)))
            if truncated and baseline:
                G += gamma ** (len(rewards) - t) * agent.value(agent.obs_norm(last_obs[None]))[0].detach()
            elif truncated and gamma ** (len(rewards) - t) > 0.05:
                continue
            yield agent.obs_norm(obs[t]), actions[t], G


@SPACES
@pytest.mark.parametrize("norm_returns", [False, True], ids=["raw", "normalised"])
@pytest.mark.parametrize("baseline", [False, True], ids=["plain", "baseline"])
def test_the_policy_climbs_by_each_known_steps_score_and_weight(space, norm_returns, baseline):
    agent = agent_of(reinforce, space)
    episodes = [episode_of(agent, *end) for end in ((6, False), (15, True), (5, True), (9, False))]
    new, metrics = updated(agent, episodes, baseline=baseline, norm_returns=norm_returns)
    agent.obs_norm = new.obs_norm  # an update takes the rollout's in first
    steps = list(known_steps(agent, episodes, baseline))
    assert len(steps) == (35 if baseline else 20)  # of 15 cut steps the first five know 95% of their return
    weights = torch.stack([G - (agent.value(x[None])[0].detach() if baseline else 0) for x, _, G in steps])
    if norm_returns:
        weights = (weights - weights.mean()) / weights.var(correction=0).sqrt()
    scores = [gradient(policy(agent, x).log_prob(a), agent.policy_parameters()) for x, a, _ in steps]
    ascent = sum(map(torch.mul, scores, weights)) / 4
    torch.testing.assert_close(theta_of(new), theta_of(agent) + 0.1 * ascent)
    loss = -sum(policy(agent, x).log_prob(a) * w for (x, a, _), w in zip(steps, weights)) / 4
    assert metrics["losses/policy_loss"] == pytest.approx(loss.item())


def test_the_baseline_descends_its_squared_error_and_nothing_else_moves_it():
    agent = agent_of(reinforce, Discrete(3))
    episodes = [episode_of(agent, *end) for end in ((6, False), (15, True), (5, True))]
    assert torch.equal(flat(updated(agent, episodes)[0].critic.parameters()), flat(agent.critic.parameters()))
    new, _ = updated(agent, episodes, baseline=True)
    agent.obs_norm = new.obs_norm  # an update takes the rollout's in first
    xs, _, Gs = zip(*known_steps(agent, episodes, True))
    norm, x, G = copy.deepcopy(agent.value_norm), torch.stack(xs), torch.stack(Gs)
    norm.update(G[:, None])
    for _ in range(2):
        loss = (agent.critic(x)[:, 0] - (G - norm.mean) / norm.std).square().mean() / 2
        parameters = list(agent.critic.parameters())
        for parameter, slope in zip(parameters, torch.autograd.grad(loss, parameters)):
            parameter.data -= 0.1 * slope
    torch.testing.assert_close(flat(new.critic.parameters()), flat(parameters))


def changed(episodes, n, field, since=0):
    """The n-th episode has other actions, or rewards, from a step on."""
    values = getattr(episodes[n], field).clone()
    values[since:] = (values[since:] + 1) % 3
    return [*episodes[:n], episodes[n]._replace(**{field: values}), *episodes[n + 1:]]


@pytest.mark.parametrize("norm_returns", [False, True], ids=["raw", "normalised"])
def test_steps_of_unknown_return_teach_nothing_without_a_baseline(norm_returns):
    agent = agent_of(reinforce, Discrete(3))
    episodes = [episode_of(agent, *end) for end in ((6, False), (15, True), (5, True))]

    def learned(episodes):
        return theta_of(updated(agent, episodes, norm_returns=norm_returns)[0])

    theta = learned(episodes)
    for ignored in (2, "rewards"), (2, "actions"), (1, "actions", 5):
        assert torch.equal(learned(changed(episodes, *ignored)), theta)
    for heeded in (0, "actions", 5), (1, "actions", 4), (1, "rewards", 5):  # a part of early returns
        assert not torch.equal(learned(changed(episodes, *heeded)), theta)


def test_a_step_may_miss_tail_of_its_return_and_no_more():
    agent = agent_of(reinforce, Discrete(3))
    short = [episode_of(agent, 1, True)]
    for gamma, counts in (TAIL, True), (TAIL + 1e-6, False), (0.0, True), (1.0, False):
        new, _ = updated(agent, short, gamma=gamma, norm_returns=False)
        assert torch.equal(theta_of(new), theta_of(agent)) is not counts


@pytest.mark.parametrize("norm_returns", [False, True], ids=["raw", "normalised"])
def test_an_update_of_unknown_returns_alone_leaves_the_policy_without_a_warning(norm_returns, recwarn):
    agent = agent_of(reinforce, Box(-1, 1, (2,)))
    new, metrics = updated(agent, [episode_of(agent, 30, True)], gamma=1.0, norm_returns=norm_returns)
    assert torch.equal(theta_of(new), theta_of(agent))
    assert all(np.isfinite(list(metrics.values()))) and recwarn.list == []


def test_nor_does_the_momentum_of_earlier_updates_move_it_then():
    agent, args = agent_of(reinforce, Box(-1, 1, (2,))), Args(gamma=1.0)
    theta, phi = as_vector(agent.policy_parameters()), as_vector(agent.critic.parameters())
    optimizers = torch.optim.Adam([theta]), torch.optim.Adam([phi])
    thetas = [theta.detach().clone()]
    for truncated in (False, True):
        update(agent, theta, phi, *optimizers, [episode_of(agent, 30, truncated)], args)
        thetas.append(theta.detach().clone())
    assert not torch.equal(thetas[0], thetas[1]) and torch.equal(thetas[1], thetas[2])


def test_a_time_limit_that_leaves_nothing_to_learn_from_is_told(main, tmp_path):
    flags = "--env-id", "Pendulum-v1", "--total-timesteps", 5000, "--runs-dir", tmp_path
    code, _, err = main(*flags)
    (line,) = complaints(err)
    assert code == 2 and line.startswith("error: ") and "--baseline" in line and "--gamma" in line
    assert main(*flags, "--baseline")[0] == 0 and main(*flags, "--gamma", 0.97)[0] == 0


def test_an_update_adds_the_observations_to_the_statistics():
    agent = agent_of(reinforce, Discrete(3))
    episodes = [episode_of(agent, 6, False), episode_of(agent, 15, True)]
    new, _ = updated(agent, episodes)
    agent.obs_norm.update(torch.cat([episode.obs for episode in episodes]))
    assert torch.equal(new.obs_norm.mean, agent.obs_norm.mean) and new.obs_norm.count == 50 + 21
