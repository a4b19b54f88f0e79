"""The mathematics of reinforce.py against calculations of another kind."""

import copy
import math
import signal

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from tqdm import tqdm

import envs
import reinforce
from helpers import ENDLESS, ROOT, complaints, finish, metrics, only_run, run_here, start, wait_for_steps
from oracles import (
    Clock, Process, agent_of, assert_acts_alone, assert_each_pass_has_all_in_an_order_of_its_own,
    assert_equal_to_the_bit, flat, gradient, passes_of, policy, value,
)
from reinforce import (
    Actor, Agent, Args, Episode, as_vector, collect, log_prob, make_env, returns_to_go, score_loss, update,
)

BAR = tqdm(disable=True)
SPACES = pytest.mark.parametrize("space", [Discrete(3), Box(-1, 1, (2,))], ids=["discrete", "continuous"])
GAMMAS = pytest.mark.parametrize("gamma", [0.0, 0.5, 0.9, 0.99, 1.0])


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# ── Scores ──────────────────────────────────────────────────────────────────────────────────────────────────

@SPACES
def test_the_losss_gradient_is_minus_each_steps_score_times_its_return_per_episode(space):
    agent, x, G = agent_of(reinforce, space), torch.randn(12, 4).double(), torch.randn(12).double()
    actions, parameters = policy(agent, x).sample(), agent.policy_parameters()
    loss = score_loss(log_prob(agent.actor(x), agent.log_std, actions), G, 5)
    scores = [gradient(policy(agent, x[t]).log_prob(actions[t]), parameters) for t in range(12)]
    torch.testing.assert_close(gradient(loss, parameters), -sum(map(torch.mul, scores, G)) / 5)


def test_the_score_is_the_actions_own_derivative_less_the_expected_one():
    agent, x = agent_of(reinforce, Discrete(4)), torch.randn(4).double()
    f, parameters = agent.actor(x), agent.policy_parameters()
    jacobian = torch.stack([gradient(y, parameters, retain_graph=True) for y in f])
    pi = f.detach().exp() / f.detach().exp().sum()
    for a in range(4):
        score = gradient(log_prob(f[None], None, torch.tensor([a]))[0], parameters, retain_graph=True)
        torch.testing.assert_close(score, jacobian[a] - pi @ jacobian)


# ── Returns ─────────────────────────────────────────────────────────────────────────────────────────────────

@GAMMAS
@pytest.mark.parametrize("T", [1, 2, 9])
def test_the_return_is_the_discounted_sum_of_what_follows(gamma, T):
    rewards = torch.randn(T, dtype=torch.float64)
    expected = [sum(gamma ** (k - t) * rewards[k].item() for k in range(t, T)) for t in range(T)]
    assert returns_to_go(rewards, gamma).tolist() == pytest.approx(expected)


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
        loss = score_loss(log_prob(theta[states], None, actions), discounts * (G - baseline[states]), 1)
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
    return [Actor(gym.make("Counter-v0", **end), BAR) for end in (
        {"length": 3}, {"max_episode_steps": 2}, {"length": 4, "max_episode_steps": 4})]


def agent_of_counters():
    return Agent(Box(-np.inf, np.inf, (1,)), Discrete(2))


def test_each_actor_plays_one_whole_episode_and_no_step_more(actors):
    for _ in range(2):
        episodes, _ = collect(agent_of_counters(), actors, 1000)
        assert [episode.obs[:, 0].tolist() for episode in episodes] == [[0, 1], [0, 1, 2], [0, 1, 2, 3]]
        assert [episode.rewards.tolist() for episode in episodes] == [[1] * 2, [1] * 3, [1] * 4]
        assert [len(episode.actions) for episode in episodes] == [2, 3, 4]
        assert [episode.episodic_return for episode in episodes] == [2, 3, 4]
        assert [(actor.obs, actor.length) for actor in actors] == [(0, 0)] * 3  # each is at the start of its next


def test_an_episodes_end_counts_the_steps_that_all_actors_took_up_to_it(actors):
    episodes, steps = collect(agent_of_counters(), actors, 1000)
    assert [episode.end for episode in episodes] == [5, 7, 9] and steps == 9


@pytest.mark.parametrize("limit", range(1, 12))
def test_no_step_is_taken_beyond_the_limit_and_what_is_unfinished_there_is_dropped(actors, limit):
    episodes, steps = collect(agent_of_counters(), actors, limit)
    finished = [(end, length) for end, length in ((5, 2), (7, 3), (9, 4)) if end <= limit]
    assert [(episode.end, len(episode.rewards)) for episode in episodes] == finished
    unfinished = sum(actor.length for actor in actors)
    assert sum(len(episode.rewards) for episode in episodes) + unfinished == steps == min(limit, 9)


class Reusing(envs.Counter):
    """Observes one array, which it writes over."""

    array = np.zeros(1, np.float32)

    def observe(self):
        self.array[:] = self.t
        return self.array


def test_an_environment_that_writes_over_its_observations_does_not_change_those_of_an_episode():
    ((episode,), _) = collect(agent_of_counters(), [Actor(Reusing(length=4), BAR)], 1000)
    assert episode.obs[:, 0].tolist() == [0, 1, 2, 3]


def test_an_episode_holds_the_actions_that_the_policy_drew_and_their_rewards():
    agent = Agent(Box(-np.inf, np.inf, (1,)), Box(-2, 4, (1,)))
    before = copy.deepcopy(agent)
    episodes, _ = collect(agent, [Actor(make_env("Echo-v0"), BAR) for _ in range(200)], 1000)
    actions = torch.stack([episode.actions for episode in episodes])
    assert actions.shape == (200, 5, 1) and abs(actions.mean()) < 4 / 1000**0.5
    assert abs(actions.std() / math.exp(-0.5) - 1) < 4 / 2000**0.5
    rewards = torch.stack([episode.rewards for episode in episodes])
    torch.testing.assert_close(rewards, actions[..., 0].clamp(-1, 1) * 3 + 1)
    assert_equal_to_the_bit(agent, before)  # πθ, its statistics too, stays as it is


# ── The update ──────────────────────────────────────────────────────────────────────────────────────────────

def episode_of(agent, T):
    obs = torch.randn(T, 4).double()
    actions = policy(agent, agent.obs_norm(obs)).sample()
    return Episode(obs, actions, torch.randn(T).double() + 1, 0, 0.0)


def updated(agent, episodes, **settings):
    """A copy after the update by plain gradient ascent, and the metrics"""
    agent = copy.deepcopy(agent)
    return agent, update_with(agent, copy.deepcopy(agent), episodes, **settings)


def update_with(agent, acting, episodes, **settings):
    theta, phi = as_vector(agent.policy_parameters()), as_vector([*agent.critic.parameters()])
    optimizers = torch.optim.SGD([theta], 0.1), torch.optim.SGD([phi], 0.1)
    args = Args(**{"gamma": 0.75, "value_epochs": 2} | settings)
    return update(agent, acting, theta, phi, *optimizers, episodes, args)


def theta_of(agent):
    return flat(agent.policy_parameters()).detach().clone()


def steps_of(agent, episodes, gamma=0.75):
    """Step by step: s_t, a_t, G_t"""
    for obs, actions, rewards, *_ in episodes:
        for t in range(len(rewards)):
            G = sum(gamma ** (k - t) * rewards[k] for k in range(t, len(rewards)))
            yield agent.obs_norm(obs[t]), actions[t], G


@SPACES
@pytest.mark.parametrize("norm_returns", [False, True], ids=["raw", "normalised"])
@pytest.mark.parametrize("baseline", [False, True], ids=["plain", "baseline"])
def test_the_policy_climbs_by_each_steps_score_and_weight(space, norm_returns, baseline):
    agent = agent_of(reinforce, space)
    episodes = [episode_of(agent, T) for T in (6, 15, 5, 9)]
    new, metrics = updated(agent, episodes, baseline=baseline, norm_returns=norm_returns)
    agent.obs_norm = new.obs_norm  # an update takes the rollout's in first
    steps = list(steps_of(agent, episodes))
    assert len(steps) == 35
    weights = torch.stack([G - (value(agent, x).detach() if baseline else 0) for x, _, G in steps])
    if norm_returns:
        weights = (weights - weights.mean()) / weights.var(correction=0).sqrt()
    scores = [gradient(policy(agent, x).log_prob(a), agent.policy_parameters()) for x, a, _ in steps]
    ascent = sum(map(torch.mul, scores, weights)) / 4
    torch.testing.assert_close(theta_of(new), theta_of(agent) + 0.1 * ascent)
    loss = -sum(policy(agent, x).log_prob(a) * w for (x, a, _), w in zip(steps, weights)) / 4
    assert metrics["losses/policy_loss"] == pytest.approx(loss.item())
    if baseline:
        G, errors = (torch.stack(y) for y in zip(*((G, G - value(agent, x).detach()) for x, _, G in steps)))
        assert metrics["losses/explained_variance"] == pytest.approx((1 - errors.var() / G.var()).item())


def test_each_pass_shows_the_baseline_every_step_in_an_order_of_its_own():
    agent = agent_of(reinforce, Discrete(3))
    episodes = [episode_of(agent, T) for T in (60, 15, 95)]
    old, x = copy.deepcopy(agent), []
    agent.obs_norm.register_forward_hook(lambda _, inputs, output: x.append(output[:, 0].tolist()))
    sizes = []
    agent.critic.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    passes = passes_of(agent.critic, 170, lambda: update_with(agent, old, episodes, baseline=True, value_epochs=3))
    assert sizes == [170] + 3 * [64, 64, 42]
    assert_each_pass_has_all_in_an_order_of_its_own(passes, x[0])


def test_the_baseline_descends_its_squared_error_and_nothing_else_moves_it():
    agent = agent_of(reinforce, Discrete(3))
    episodes = [episode_of(agent, T) for T in (6, 15, 5)]
    assert torch.equal(flat(updated(agent, episodes)[0].critic.parameters()), flat(agent.critic.parameters()))
    new, _ = updated(agent, episodes, baseline=True)
    agent.obs_norm = new.obs_norm  # an update takes the rollout's in first
    xs, _, Gs = zip(*steps_of(agent, episodes))
    norm, x, G = copy.deepcopy(agent.value_norm), torch.stack(xs), torch.stack(Gs)
    norm.update(G[:, None])
    for _ in range(2):
        loss = (agent.critic(x)[:, 0] - (G - norm.mean) / norm.var.sqrt()).square().mean() / 2
        parameters = list(agent.critic.parameters())
        for parameter, slope in zip(parameters, torch.autograd.grad(loss, parameters)):
            parameter.data -= 0.1 * slope
    torch.testing.assert_close(flat(new.critic.parameters()), flat(parameters))


@pytest.mark.parametrize("baseline", [False, True], ids=["plain", "baseline"])
def test_an_episode_that_a_time_limit_ends_is_learned_from_like_any_other(baseline, monkeypatch):
    def learned(**end):
        """From an episode of 3 steps: the returns that weigh its scores, the agent after it"""
        weights = []
        with monkeypatch.context() as spied:
            spied.setattr(reinforce, "score_loss", lambda *args: weights.append(args[1]) or score_loss(*args))
            torch.manual_seed(1)
            agent = agent_of(reinforce, Discrete(2), S=1)
            episodes, _ = collect(agent, [Actor(gym.make("Counter-v0", **end), BAR)], 1000)
            new, _ = updated(agent, episodes, gamma=0.5, norm_returns=False, baseline=baseline)
        if baseline:
            agent.obs_norm = new.obs_norm  # an update takes the rollout's in first
            weights[0] = weights[0] + value(agent, agent.obs_norm(episodes[0].obs)).detach()
        return weights[0], new

    cut, over = learned(length=9, max_episode_steps=3), learned(length=3)
    torch.testing.assert_close(cut[0], torch.tensor([1.75, 1.5, 1.0]), check_dtype=False)
    assert torch.equal(cut[0], over[0])
    assert_equal_to_the_bit(cut[1], over[1])


@pytest.mark.parametrize("baseline", [False, True], ids=["plain", "baseline"])
@pytest.mark.parametrize("norm_returns", [False, True], ids=["raw", "normalised"])
def test_an_update_of_one_step_is_no_trouble_and_gives_no_warning(norm_returns, baseline, recwarn):
    agent = agent_of(reinforce, Box(-1, 1, (2,)))
    new, metrics = updated(agent, [episode_of(agent, 1)], norm_returns=norm_returns, baseline=baseline)
    assert all(parameter.isfinite().all() for parameter in new.parameters())
    assert all(np.isfinite(list(metrics.values()))) and recwarn.list == []
    assert torch.equal(theta_of(new), theta_of(agent)) is norm_returns  # it's as good as the average


@SPACES
def test_the_policy_that_acts_becomes_the_one_that_learned_to_the_bit_and_nothing_else_moves_it(space):
    agent = agent_of(reinforce, space)
    acting = copy.deepcopy(agent)
    update_with(agent, acting, [episode_of(agent, 6)], baseline=True)
    assert_equal_to_the_bit(acting, agent)
    assert_acts_alone(acting, agent, lambda: collect(acting, [Actor(Clock(space), BAR)], 99)[0][0][:3])


@SPACES
def test_the_entropy_told_is_of_the_policy_that_was_learned_from(space):
    agent = agent_of(reinforce, space)
    episodes = [episode_of(agent, 9)]
    new, metrics = updated(agent, episodes)
    x = new.obs_norm(episodes[0].obs)
    assert metrics["losses/entropy"] == pytest.approx(policy(agent, x).entropy().mean().item())


def test_an_update_adds_the_observations_to_the_statistics():
    agent = agent_of(reinforce, Discrete(3))
    episodes = [episode_of(agent, 6), episode_of(agent, 15)]
    new, _ = updated(agent, episodes)
    agent.obs_norm.update(torch.cat([episode.obs for episode in episodes]))
    assert torch.equal(new.obs_norm.mean, agent.obs_norm.mean) and new.obs_norm.count == 50 + 21


def test_nothing_is_learned_from_the_shorter_of_the_episodes_with_which_a_run_ends(monkeypatch, tmp_path):
    updates = []
    monkeypatch.setattr(reinforce, "update", lambda *args: updates.append(args) or {})
    code, _, err = run_here(reinforce, "--env-id", "Pendulum-v1", "--num-envs", 2, "--total-timesteps", 799,  # not 800
                            "--runs-dir", tmp_path)
    assert (code, complaints(err)) == (0, []) and len(updates) == 1
    rows = [row for row in metrics(only_run(tmp_path)) if row["charts/episodic_return"]]
    assert [int(row["global_step"]) for row in rows] == [399, 400, 799]


def test_an_episode_without_an_end_is_left_at_once_and_saved(tmp_path):
    process = start(ROOT / "reinforce.py", "--env-id", "envs:Endless-v0", *ENDLESS, "--runs-dir", tmp_path)
    wait_for_steps(process)
    process.send_signal(signal.SIGINT)
    assert finish(process)[0] == 130 and (only_run(tmp_path) / "checkpoint.pt").is_file()
