"""The mathematics of ddpg.py, and what it does with its transitions, against calculations of another kind."""

import copy
import signal
from types import SimpleNamespace

import ddpg
import envs
import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box
from stable_baselines3 import DDPG
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.noise import ActionNoise
from torch import nn
from torch.func import functional_call, jacrev
from tqdm import tqdm

from ddpg import (
    Actor, Agent, Args, Failure, Replay, action_gradient, as_vector, collect, critic_loss, make_env, ornstein_uhlenbeck,
    soft_update, td_target, update,
)
from helpers import ROOT, complaints, metrics, only_run, run, run_here
from oracles import assert_same, flat, gradient

CPU, META = torch.device("cpu"), torch.device("meta")  # which refuses to be mixed with the CPU, as a GPU does
BAR = tqdm(disable=True)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def new_agent(S, A):
    return Agent(Box(-np.inf, np.inf, (S,)), Box(-1, 1, (A,)))


def agent_of(S=4, A=2):
    """An Agent in float64 with small networks, smooth and each unlike the others."""
    agent = new_agent(S, A)
    for actor in "actor", "target_actor":
        setattr(agent, actor, nn.Sequential(nn.Linear(S, 5), nn.Tanh(), nn.Linear(5, A), nn.Tanh()))
    for critic in "critic", "target_critic":
        setattr(agent, critic, ddpg.Critic(nn.Linear(S + A, 5), nn.Tanh(), nn.Linear(5, 1)))
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return agent.double()


def theta(network):
    return flat(network.parameters()).detach().clone()


def vectors_of(agent, acting):
    networks = agent.actor, agent.critic, agent.target_actor, agent.target_critic, acting.actor
    return [as_vector([*network.parameters()]) for network in networks]


def slope_of(f, x, h=1e-5):
    """∇f by finite differences"""
    return torch.stack([f(x + step) - f(x - step) for step in h * torch.eye(len(x), dtype=x.dtype)]) / (2 * h)


def assert_uniform(x, low, high):
    """Kolmogorov's test, at one in a thousand"""
    expected = low + (high - low) * (torch.arange(x.numel()) + 0.5) / x.numel()
    assert (x.flatten().sort().values - expected).abs().max() < 1.95 * (high - low) / x.numel() ** 0.5


# ── Pure functions ──────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
def test_a_terminal_state_has_no_future_and_any_other_has_its_value(gamma):
    grid = torch.cartesian_prod(*map(torch.tensor, ([-2.0, 0.0, 3.0], [-5.0, 0.0, 7.0], [0.0, 1.0])))
    expected = [r if terminated else r + gamma * v for r, v, terminated in grid.tolist()]
    assert td_target(*grid.T, gamma).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("B", [1, 7])
def test_the_critics_loss_is_the_mean_squared_error(B):
    assert_same(critic_loss, nn.functional.mse_loss, *torch.randn(2, B))


@pytest.mark.parametrize("B, A", [(1, 1), (6, 3)])
def test_the_action_gradient_of_a_quadratic_is_the_one_on_paper(B, A):
    M, best = torch.randn(A, A, dtype=torch.float64, requires_grad=True), torch.randn(B, A).double()
    action = torch.randn(B, A, dtype=torch.float64, requires_grad=True)
    value = -torch.einsum("bi,ij,bj->b", action - best, M, action - best)
    slope = action_gradient(value, action)
    torch.testing.assert_close(slope, -(action - best) @ (M + M.T) / B)
    assert not slope.requires_grad and M.grad is None and action.grad is None


@pytest.mark.parametrize("tau", [0.0, 0.005, 0.5, 1.0])
def test_the_target_goes_the_share_tau_of_the_way_to_the_network(tau):
    target, source = torch.randn(2, 9).double()
    expected = [t + tau * (s - t) for t, s in zip(target.tolist(), source.tolist())]
    assert soft_update(target, source, tau).tolist() == pytest.approx(expected)
    if tau in (0, 1):
        assert torch.equal(soft_update(target, source, tau), source if tau else target)


@pytest.mark.parametrize("k", [1, 2, 100])
def test_k_steps_to_a_network_that_stands_leave_a_power_of_the_distance(k):
    start, source = torch.randn(2, 9).double()
    target = start
    for _ in range(k):
        target = soft_update(target, source, 0.03)
    torch.testing.assert_close(target - start, (1 - 0.97**k) * (source - start))


def test_a_theta_of_one_forgets_the_noise_before():
    noise, normal = torch.randn(2, 5, 3)
    assert torch.equal(ornstein_uhlenbeck(noise, normal, 1.0, 0.2), 0.2 * normal)


def test_noise_is_the_sum_of_what_remains_of_all_before():
    normals, noise = torch.randn(30, 2, 3).double(), torch.ones(2, 3).double()
    for normal in normals:
        noise = ornstein_uhlenbeck(noise, normal, 0.15, 0.2)
    remains = 0.85 ** torch.arange(29, -1, -1).double()
    torch.testing.assert_close(noise, 0.85**30 + 0.2 * torch.einsum("t,tna->na", remains, normals))


@pytest.mark.parametrize("ou_theta", [0.15, 0.6, 1.0])
def test_lasting_noise_has_the_variance_and_the_correlation_of_an_autoregression(ou_theta):
    T, N, rho, sigma = 4000, 100, 1 - ou_theta, 0.3
    x = sigma * torch.randn(N).double() / (1 - rho**2) ** 0.5  # as in the long run, from the first
    series = [x := ornstein_uhlenbeck(x, torch.randn(N).double(), ou_theta, sigma) for _ in range(T)]
    x = torch.stack(series)
    variance, error = x.square().mean() * (1 - rho**2) / sigma**2, (2 / (T * N) * (1 + rho**2) / (1 - rho**2)) ** 0.5
    correlation = (x[1:] * x[:-1]).mean() / x.square().mean()
    assert abs(variance - 1) < 4 * error < 0.03  # Bartlett's formulas for the errors
    assert abs(correlation - rho) < 4 * ((1 - rho**2) / (T * N)) ** 0.5 < 0.01


PURE = {
    td_target: (torch.ones(5), torch.ones(5), torch.zeros(5), 0.9),
    critic_loss: (torch.zeros(5), torch.ones(5)),
    soft_update: (torch.zeros(5), torch.ones(5), 0.1),
    ornstein_uhlenbeck: (torch.zeros(5), torch.ones(5), 0.1, 0.2),
}


@pytest.mark.parametrize("function", PURE, ids=lambda function: function.__name__)
def test_a_function_leaves_its_tensors_as_they_are_and_refuses_two_lengths(function):
    arguments = copy.deepcopy(PURE[function])
    function(*arguments)
    for one, other in zip(arguments, PURE[function]):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    with pytest.raises(RuntimeError):
        function(torch.zeros(4), *arguments[1:])


@pytest.mark.parametrize("seed", range(4))
def test_the_slope_of_q_in_the_states_visited_is_the_slope_of_the_return(seed):
    """Theorem 1, in a process of 4 states and an end, whose transitions and rewards are smooth in the action"""
    torch.manual_seed(seed)
    gamma, (still, pushed), mu = 0.9, torch.randn(2, 4, 5).double(), torch.randn(4).double()
    start, best = torch.rand(4).double(), torch.randn(4).double()

    def P(a):
        return (still + a[:, None] * pushed).softmax(1)[:, :4]

    def R(a):
        return -((a - best) ** 2)

    def values(a):
        return torch.linalg.solve(torch.eye(4).double() - gamma * P(a), R(a))

    visits = torch.linalg.solve(torch.eye(4).double() - gamma * P(mu).T, start)
    action = mu.clone().requires_grad_()
    Q = R(action) + gamma * P(action) @ values(mu)
    slope = action_gradient(4 * visits * Q, action)
    torch.testing.assert_close(slope, slope_of(lambda a: start @ values(a), mu), rtol=1e-6, atol=1e-8)


# ── Agent ───────────────────────────────────────────────────────────────────────────────────────────────────

def test_the_targets_begin_as_copies_of_their_own():
    agent = new_agent(4, 2)
    for network, target in (agent.actor, agent.target_actor), (agent.critic, agent.target_critic):
        before = theta(target)
        assert torch.equal(theta(network), before)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter += 1
        assert torch.equal(theta(target), before)


def test_without_noise_the_action_is_the_actors_output_every_time():
    agent, obs = new_agent(4, 2), torch.randn(6, 4)
    assert torch.equal(agent.act(obs), agent.actor(obs)) and torch.equal(agent.act(obs), agent.act(obs))
    assert agent.act(obs).shape == (6, 2) and agent.critic(obs, agent.act(obs)).shape == (6,)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3, 1e9])
def test_no_observation_drives_the_actor_out_of_bounds(scale):
    output = new_agent(4, 2).actor(scale * torch.randn(1000, 4))
    assert output.abs().max() <= 1
    assert scale < 1e3 or output.abs().max() == 1


def test_noise_is_added_and_the_sum_kept_within_bounds():
    agent, obs, noise = new_agent(4, 2), torch.randn(100, 4), 2 * torch.randn(100, 2)
    expected = [[min(max(m + n, -1), 1) for m, n in zip(*rows)]
                for rows in zip(agent.actor(obs).tolist(), noise.tolist())]
    torch.testing.assert_close(agent.act(obs, noise), torch.tensor(expected))


# ── Environments ────────────────────────────────────────────────────────────────────────────────────────────

class Witness(envs.Spaces):
    """Remembers the action that arrived."""

    def step(self, action):
        self.arrived = action
        return super().step(action)


BOUNDS = {
    "Shifted": Box(np.float32(-2), np.float32(4), (1,)),
    "Unlike": Box(np.float32([-1, 0, 10, -7]), np.float32([1, 5, 20, -3])),
    "Double": Box(np.array([-0.1, 1e3]), np.array([0.3, 1e6]), dtype=np.float64),
}
for name, bounds in BOUNDS.items():
    gym.register(f"{name}-v0", Witness, kwargs={"action_space": bounds})


@pytest.mark.filterwarnings("ignore:overflow encountered")  # Gymnasium's of infinite bounds in float64
@pytest.mark.parametrize("name", BOUNDS)
@pytest.mark.parametrize("output, share", [(-1, 0), (0, 0.5), (0.5, 0.75), (1, 1)])
def test_what_the_actor_says_from_minus_one_to_one_arrives_as_from_low_to_high(name, output, share):
    space = BOUNDS[name]
    agent, actors, replay, noise = new_agent(1, len(space.low)), [Actor(make_env(f"{name}-v0"), BAR)], *empty(space)
    with torch.no_grad():
        for parameter in agent.actor[-2].parameters():
            parameter.zero_()
        agent.actor[-2].bias += torch.tensor(output).atanh().clamp(-50, 50)
    collect(agent, actors, replay, noise, 0, Args(learning_starts=0, noise_std=0.0))
    arrived = actors[0].env.unwrapped.arrived
    assert arrived.tolist() == pytest.approx((space.low + share * (space.high - space.low)).tolist(), rel=1e-5)
    assert arrived.shape == space.shape


# ── Replay ──────────────────────────────────────────────────────────────────────────────────────────────────

def add(replay, numbers):
    """Transitions each made of its number, which isn't 0"""
    for i in numbers:
        replay.add(np.array([i, i + 0.25]), np.float32([i + 0.5]), 100.0 + i, np.array([200 + i, 300 + i]), i % 3 == 0)


@pytest.mark.parametrize("count", [1, 3, 4, 5, 6, 8, 11])
def test_a_sample_finds_all_of_the_latest_transitions_and_nothing_else(count):
    replay = Replay(4, 2, 1, CPU)
    add(replay, range(1, count + 1))
    latest = set(range(1, count + 1)[-4:])
    assert len(replay) == len(latest)
    assert {row[0] for row in replay.sample(400)[0].tolist()} == latest


def test_a_sample_is_of_whole_transitions_in_columns():
    replay = Replay(10, 2, 1, CPU)
    add(replay, range(1, 15))
    obs, action, reward, next_obs, terminated = sample = replay.sample(64)
    assert [x.shape for x in sample] == [(64, 2), (64, 1), (64,), (64, 2), (64,)]
    assert {x.dtype for x in sample} == {torch.float32}
    i = obs[:, 0]
    assert torch.equal(obs[:, 1], i + 0.25) and torch.equal(action, i[:, None] + 0.5) and torch.equal(reward, i + 100)
    assert torch.equal(next_obs, torch.stack([i + 200, i + 300], 1)) and torch.equal(terminated, (i % 3 == 0).float())


@pytest.mark.parametrize("capacity", [1, 3, 4, 7])
@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 6, 8, 11])
def test_what_is_saved_comes_back_as_far_as_it_fits_and_is_overwritten_oldest_first(count, capacity):
    def rows_of(numbers):
        replay = Replay(len(numbers) or 1, 2, 1, CPU)
        add(replay, numbers)
        return replay.rows[:len(numbers)]

    one, other = Replay(4, 2, 1, CPU), Replay(capacity, 2, 1, CPU)
    add(one, range(1, count + 1))
    state, numbers = one.state_dict(), [*range(1, count + 1)][-4:]
    add(one, range(20, 24))
    assert torch.equal(state["rows"], rows_of(numbers)) and state["rows"].untyped_storage().nbytes() == state["rows"].nbytes
    other.load_state_dict(state)
    for more in range(30, 31 + 2 * capacity):
        kept = sorted(numbers[-capacity:])
        order = other.rows[:len(other), 0].argsort()
        assert torch.equal(other.rows[order], rows_of(kept))
        add(other, [more])
        numbers.append(more)


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", range(6))
def test_numbers_that_are_not_finite_are_refused(place, number):
    replay, row = Replay(4, 2, 1, CPU), np.arange(6.0)
    add(replay, [1])
    before, row[place] = replay.rows.clone(), number
    with pytest.raises(Failure, match="aren't finite"):
        replay.add(row[:2], row[2:3], row[3], row[4:], False)
    assert len(replay) == 1 and torch.equal(replay.rows, before)


def test_every_transition_is_drawn_as_often():
    replay = Replay(50, 2, 1, CPU)
    add(replay, range(1, 11))
    counts = replay.sample(20_000)[0][:, 0].int().bincount()[1:]
    assert len(counts) == 10 and (counts - 2000).abs().max() < 4 * (20_000 * 0.1 * 0.9) ** 0.5


@pytest.mark.parametrize("number", [float, np.float64, np.float32, int, np.int64])
def test_numbers_of_any_kind_are_kept_in_single_precision(number):
    replay, kind = Replay(1, 1, 1, CPU), number if isinstance(number(), np.generic) else None
    third = np.array([number(4) / number(3)])
    replay.add(third, third, number(7), np.array([5], kind), np.bool_(True))
    assert [x.item() for x in replay.sample(1)] == [np.float32(4 / 3), np.float32(4 / 3), 7, 5, 1]


@pytest.mark.filterwarnings("ignore:.*out of date")
def test_hoppers_million_transitions_take_108_megabytes():
    env = make_env("Hopper-v4")
    replay = Replay(Args().buffer_size, env.observation_space.shape[0], env.action_space.shape[0], CPU)
    assert replay.widths == (11, 3, 1, 11, 1) and replay.rows.nbytes == 108_000_000


# ── Collecting ──────────────────────────────────────────────────────────────────────────────────────────────

class Endless(envs.Echo):
    """Always observes 0 and never ends."""

    def __init__(self, length=None, render_mode=None):
        super().__init__(length)

    def observe(self):
        return np.zeros(1)


def empty(space=Endless.action_space, N=1, S=1, capacity=5000):
    """Replay, noise"""
    A = len(space.low)
    return Replay(capacity, S, A, CPU), torch.zeros(N, A)


def stored(replay):
    """What is in it, oldest first: s, a, r, s', terminated"""
    return replay.rows[:len(replay)].split(replay.widths, 1)


def collected(agent, actors, steps, **settings):
    replay, noise = empty(N=len(actors))
    episodes = [collect(agent, actors, replay, noise, n * len(actors), Args(**settings)) for n in range(steps)]
    return *(x.reshape(steps, len(actors)) for x in stored(replay)), episodes


def test_the_first_actions_are_uniform():
    _, actions, *_ = collected(new_agent(1, 1), [Actor(Endless(), BAR) for _ in range(2)], 1000, learning_starts=2000)
    assert actions.abs().max() <= 1
    assert_uniform(actions, -1, 1)
    assert torch.corrcoef(actions.T)[0, 1].abs() < 4 / 1000**0.5
    assert torch.corrcoef(torch.stack([actions[1:, 0], actions[:-1, 0]]))[0, 1].abs() < 4 / 1000**0.5


@pytest.mark.parametrize("learning_starts, random", [(0, 0), (1, 1), (6, 3), (7, 4)])
def test_learning_starts_counts_the_steps_of_all_actors(learning_starts, random):
    agent, actors = new_agent(1, 1), [Actor(Endless(), BAR) for _ in range(2)]
    obs, actions, *_ = collected(agent, actors, 6, learning_starts=learning_starts, noise_std=0.0)
    same = torch.isclose(actions, agent.actor(obs[..., None])[..., 0])
    assert same.tolist() == [[False] * 2] * random + [[True] * 2] * (6 - random)


@pytest.mark.parametrize("settings, rest", [
    ({"noise_std": 0.1}, 0.0), ({"noise_std": 0.8}, 0.0),
    ({"noise_std": 0.05, "ou_theta": 0.15}, 0.85), ({"noise_std": 0.7, "ou_theta": 0.5}, 0.5),
], ids=["gaussian", "wide_gaussian", "ou", "wide_ou"])
def test_then_they_are_the_policys_and_noise_of_its_own_for_each_actor(settings, rest):
    agent, actors, args = new_agent(1, 1), [Actor(Endless(), BAR) for _ in range(2)], Args(learning_starts=0, **settings)
    (replay, noise), series = empty(N=2), [torch.zeros(2, 1)]
    for _ in range(1000):
        collect(agent, actors, replay, noise, 0, args)
        series.append(noise.clone())
    noise = torch.stack(series)[..., 0].double()
    obs, actions, *_ = stored(replay)
    expected = (agent.actor(obs)[:, 0].double() + noise[1:].flatten()).clamp(-1, 1)
    torch.testing.assert_close(actions[:, 0].double(), expected)
    assert (actions.abs().max() == 1) == (args.noise_std > 0.5)
    normal = (noise[1:] - rest * noise[:-1]) / args.noise_std
    assert_uniform(torch.special.ndtr(normal), 0, 1)
    assert torch.corrcoef(normal.T)[0, 1].abs() < 4 / 1000**0.5
    assert torch.corrcoef(torch.stack([normal[:, 0], noise[:-1, 0]]))[0, 1].abs() < 4 / 1000**0.5


def test_lasting_noise_begins_with_the_first_action_of_the_policy():
    agent, actors, (replay, noise) = new_agent(1, 1), [Actor(Endless(), BAR)], empty()
    for step, noisy in enumerate([False, False, True]):
        collect(agent, actors, replay, noise, step, Args(learning_starts=2, ou_theta=0.15))
        assert noise.any() == noisy


def test_an_actors_noise_ends_with_its_episode():
    agent, args = new_agent(1, 1), Args(learning_starts=0, ou_theta=0.15, noise_std=0.1)
    ending = envs.Echo(length=2), envs.Echo(length=9), gym.wrappers.TimeLimit(Endless(), 2)
    actors = [Actor(env, BAR) for env in ending]
    replay, noise = empty(N=3)
    noise.fill_(100)
    for _ in range(2):
        collect(agent, actors, replay, noise, 0, args)
    assert noise[:, 0].tolist() == [0, pytest.approx(100 * 0.85**2, abs=1), 0]
    assert (stored(replay)[1] == 1).all()
    collect(agent, actors, replay, noise, 0, args)
    assert 0 < noise[0].abs() < 0.5 and noise[1] > 50 and 0 < noise[2].abs() < 0.5


@pytest.mark.parametrize("learning_starts", [0, 10_000])
def test_the_stored_action_is_the_one_that_was_rewarded(learning_starts):
    actors = [Actor(make_env("Echo-v0"), BAR) for _ in range(3)]
    _, actions, rewards, *_ = collected(
        new_agent(1, 1), actors, 50, learning_starts=learning_starts, noise_std=1.0)
    torch.testing.assert_close(rewards, 3 * actions + 1)
    assert learning_starts or (actions.abs() == 1).any()


@pytest.fixture
def transitions():
    """Actor 0's episodes terminate after 3 steps, actor 1's are cut off after 2, actor 2's are both."""
    actors = [
        Actor(gym.make("Echo-v0", length=3), BAR),
        Actor(gym.make("Echo-v0", length=None, max_episode_steps=2), BAR),
        Actor(gym.wrappers.TimeLimit(envs.Echo(length=2), 2), BAR),
    ]
    return collected(new_agent(1, 1), actors, 7, learning_starts=0, noise_std=0.0)


def test_a_transition_ends_where_the_step_did_also_when_the_episode_ended(transitions):
    obs, _, _, next_obs, _, _ = transitions
    assert obs.T.tolist() == [[0, 1, 2, 0, 1, 2, 0], [0, 1, 0, 1, 0, 1, 0], [0, 1, 0, 1, 0, 1, 0]]
    assert next_obs.T.tolist() == [[1, 2, 3, 1, 2, 3, 1], [1, 2, 1, 2, 1, 2, 1], [1, 2, 1, 2, 1, 2, 1]]


def test_a_transition_tells_a_terminal_state_from_a_time_limit(transitions):
    terminated = transitions[4]
    assert terminated.T.tolist() == [[0, 0, 1, 0, 0, 1, 0], [0] * 7, [0, 1, 0, 1, 0, 1, 0]]


def test_collecting_lists_the_episodes_that_ended(transitions):
    _, _, rewards, _, _, episodes = transitions
    assert [len(ended) for ended in episodes] == [0, 2, 1, 2, 0, 3, 0]
    first, both = episodes[2], episodes[5]
    assert first == [(pytest.approx(rewards[:3, 0].sum().item()), 3)]
    assert both[1:] == [(pytest.approx(rewards[4:6, n].sum().item()), 2) for n in (1, 2)]


def test_collecting_acts_on_the_cpu_and_stores_on_the_device():
    actors, replay = [Actor(Endless(), BAR) for _ in range(2)], Replay(10, 1, 1, META)
    for step in 0, 2:
        collect(new_agent(1, 1), actors, replay, torch.zeros(2, 1), step, Args(learning_starts=1))
    assert len(replay) == 4 and replay.rows.device == META


# ── Update ──────────────────────────────────────────────────────────────────────────────────────────────────

def replay_of(size=20, S=4, A=2):
    """Random transitions in float64, every third terminal"""
    replay = Replay(50, S, A, CPU)
    for i in range(size):
        (obs, next_obs), action = 2 * torch.randn(2, S), 2 * torch.rand(A) - 1
        replay.add(obs.numpy(), action.numpy(), torch.randn(()).item(), next_obs.numpy(), i % 3 == 0)
    replay.rows = replay.rows.double()
    return replay


def updated(agent, replay, actor_rate=0.1, critic_rate=0.3, times=1, **settings):
    """A copy after the update by plain gradient descent: agent, losses, the minibatch, its vectors' gradients"""
    agent, args = copy.deepcopy(agent), Args(**dict(gamma=0.7, tau=0.2, batch_size=32) | settings)
    vectors = vectors_of(agent, copy.deepcopy(agent))
    optimizers = torch.optim.SGD([vectors[0]], actor_rate), torch.optim.SGD([vectors[1]], critic_rate)
    torch.manual_seed(1)
    minibatch = replay.sample(args.batch_size)
    for _ in range(times):
        torch.manual_seed(1)
        losses = update(agent, vectors, *optimizers, replay, args)
    return SimpleNamespace(
        agent=agent, losses=losses, minibatch=minibatch, obs=minibatch[0], gradients=[x.grad for x in vectors])


def by_hand(agent, minibatch, gamma):
    """y_i, row by row"""
    targets = []
    for _, _, reward, next_obs, terminated in zip(*minibatch):
        y = reward.item()
        if not terminated:
            future = nn.Sequential.forward(agent.target_critic, torch.cat([next_obs, agent.target_actor(next_obs)]))
            y += gamma * future.item()
        targets.append(y)
    return torch.tensor(targets).to(next_obs)


@pytest.mark.parametrize("gamma", [0.0, 0.7, 1.0])
def test_the_losses_are_those_of_the_networks_before_the_update(gamma):
    agent, replay = agent_of(), replay_of()
    new = updated(agent, replay, gamma=gamma)
    obs, action, *_, terminated = new.minibatch
    value = torch.tensor([nn.Sequential.forward(agent.critic, torch.cat(row)).item() for row in zip(obs, action)]).double()
    errors = by_hand(agent, new.minibatch, gamma) - value
    assert 0 < terminated.sum() < len(terminated) and obs.shape == (32, 4)
    assert new.losses[1].item() == pytest.approx((errors**2).mean().item(), rel=1e-6)
    assert new.losses[2].item() == pytest.approx(value.mean().item(), rel=1e-6)


@pytest.mark.parametrize("terminated", [True, False])
def test_a_target_depends_on_the_next_observation_unless_that_is_terminal(terminated):
    agent, losses, rows = agent_of(), [], torch.randn(3, 4)
    for next_obs in rows[1], rows[2]:
        replay = Replay(5, 4, 2, CPU)
        replay.add(rows[0].numpy(), np.zeros(2), 3.0, next_obs.numpy(), terminated)
        replay.rows = replay.rows.double()
        losses.append(updated(agent, replay).losses[1].item())
        value = agent.critic(rows[:1].double(), torch.zeros(1, 2).double()).item()
        future = 0 if terminated else agent.target_critic(*(
            x[None] for x in (next_obs.double(), agent.target_actor(next_obs.double())))).item()
        assert losses[-1] == pytest.approx((3 + 0.7 * future - value) ** 2)
    assert (losses[0] == losses[1]) == terminated


def test_the_critic_steps_down_its_squared_error_as_if_the_targets_were_data():
    agent, replay = agent_of(), replay_of()
    new = updated(agent, replay, critic_rate=0.3)
    obs, action, *_ = new.minibatch
    error = nn.functional.mse_loss(agent.critic(obs, action), by_hand(agent, new.minibatch, 0.7))
    slope = gradient(error, agent.critic.parameters())
    torch.testing.assert_close(theta(new.agent.critic), theta(agent.critic) - 0.3 * slope, rtol=1e-6, atol=1e-8)


def test_the_actors_part_leaves_the_critic_and_its_gradient_as_the_critics_part_made_them():
    agent, replay = agent_of(), replay_of()
    new, without = updated(agent, replay, actor_rate=0.5), updated(agent, replay, actor_rate=0.0)
    obs, action, *_ = new.minibatch
    error = nn.functional.mse_loss(agent.critic(obs, action), by_hand(agent, new.minibatch, 0.7))
    slope = gradient(error, agent.critic.parameters())
    torch.testing.assert_close(new.gradients[1], slope, rtol=1e-6, atol=1e-8)
    assert torch.equal(theta(new.agent.critic), theta(without.agent.critic))
    assert not torch.equal(theta(new.agent.actor), theta(without.agent.actor))


def actors_step(agent, new, rate=0.1):
    return (theta(new.agent.actor) - theta(agent.actor)) / rate


@pytest.mark.parametrize("critic_rate", [0.0, 0.3])
def test_the_actor_steps_up_its_mean_value_by_the_critic_that_has_just_learned(critic_rate):
    agent = agent_of()
    new = updated(agent, replay_of(), critic_rate=critic_rate)
    after, before = (-critic(new.obs, agent.actor(new.obs)).mean() for critic in (new.agent.critic, agent.critic))
    slope, other = (gradient(-loss, agent.actor.parameters()) for loss in (after, before))
    torch.testing.assert_close(actors_step(agent, new), slope)
    torch.testing.assert_close(new.gradients[0], -slope)
    assert torch.allclose(slope, other) == (critic_rate == 0) and slope.abs().max() > 1e-2
    assert new.losses[0].item() == pytest.approx(after.item())


def test_the_actors_step_is_the_slope_that_finite_differences_find():
    agent = agent_of()
    new = updated(agent, replay_of(), critic_rate=0.0)
    moved = copy.deepcopy(agent.actor)

    def mean_value(at):
        nn.utils.vector_to_parameters(at, moved.parameters())
        return agent.critic(new.obs, moved(new.obs)).mean().detach()

    slope = slope_of(mean_value, theta(agent.actor))
    torch.testing.assert_close(actors_step(agent, new), slope, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("A", [1, 3])
def test_the_actors_step_is_the_mean_of_slopes_in_the_action_times_jacobians_of_the_policy(A):
    agent = agent_of(A=A)
    new = updated(agent, replay_of(A=A), critic_rate=0.0)
    parameters, total = dict(agent.actor.named_parameters()), 0
    for s in new.obs:
        in_action = slope_of(lambda a: agent.critic(s, a).detach(), agent.actor(s).detach())
        jacobian = jacrev(lambda theta: functional_call(agent.actor, theta, s))(parameters)
        total = total + in_action @ torch.cat([block.flatten(1) for block in jacobian.values()], 1)
    torch.testing.assert_close(actors_step(agent, new), total / len(new.obs), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("seed", range(3))
def test_a_step_of_the_actor_raises_the_mean_value_of_its_actions(seed):
    torch.manual_seed(seed)
    agent, replay = new_agent(4, 2), replay_of()
    replay.rows = replay.rows.float()
    new = updated(agent, replay, actor_rate=1.0, critic_rate=0.0)
    before, after = (agent.critic(new.obs, actor(new.obs)).mean() for actor in (agent.actor, new.agent.actor))
    assert after > before + 1e-5


@pytest.mark.parametrize("tau", [0.0, 0.005, 0.5, 1.0])
def test_the_targets_go_the_share_tau_of_the_way_to_the_new_networks(tau):
    agent = agent_of()
    new = updated(agent, replay_of(), tau=tau)
    for name in "actor", "critic":
        network, old, target = (theta(getattr(x, y)) for x, y in (
            (new.agent, name), (agent, f"target_{name}"), (new.agent, f"target_{name}")))
        torch.testing.assert_close(target, tau * network + (1 - tau) * old)
        assert not torch.equal(network, theta(getattr(agent, name)))
    assert new.gradients[2:] == [None] * 3


def test_each_update_has_gradients_of_its_own():
    agent, replay = agent_of(), replay_of()
    one, three = (updated(agent, replay, 0.0, 0.0, times, tau=0.0).gradients for times in (1, 3))
    for first, third in zip(one[:2], three):
        assert first.any() and torch.equal(first, third)


def test_an_update_mixes_no_tensors_of_two_devices():
    replay = replay_of()
    replay.rows = replay.rows.to(META)
    assert updated(agent_of().to(META), replay).losses.device == META


def test_the_copy_that_acts_is_the_actor_that_learned_to_the_bit_also_in_a_run_that_goes_on(monkeypatch, tmp_path):
    def watched_collect(acting, actors, replay, noise, step, args):
        seen.append((step, len(learned), theta(acting.actor)))
        assert learning is None or acting.actor is not learning.actor
        return collect(acting, actors, replay, noise, step, args)

    def watched_update(agent, *others):
        nonlocal learning
        learning, losses = agent, update(agent, *others)
        learned.append(theta(agent.actor))
        return losses

    seen, learned, learning = [], [], None
    monkeypatch.setattr(ddpg, "collect", watched_collect)
    monkeypatch.setattr(ddpg, "update", watched_update)
    flags = "--env-id", "envs:Echo-v0", "--num-envs", 2, "--learning-starts", 20, "--batch-size", 8, "--runs-dir", tmp_path
    assert run_here(ddpg, *flags, "--total-timesteps", 40)[0] == 0
    assert run_here(ddpg, "--resume", only_run(tmp_path), "--total-timesteps", 60)[0] == 0
    assert len(seen) == 30 and len(learned) == 40
    for i, (step, updates, mu) in enumerate(seen):
        assert step == 2 * i and updates == 2 * max(0, i - 10)  # two of each, after the 20th step of both
        assert torch.equal(mu, learned[updates - 1] if updates else seen[0][2])
    assert not any(map(torch.equal, learned, learned[1:]))


@pytest.mark.filterwarnings("ignore:.*out of date")
@pytest.mark.parametrize("env_id", ["Hopper-v4", "Pendulum-v1"])  # episodes that fall, bounds other than ±1
def test_a_whole_run_is_that_of_stable_baselines3(env_id, tmp_path):
    """Driven by the same random numbers, in the order in which the script draws them, it meets the same transitions and
    comes to the same networks, but for rounding."""
    starts, steps, seed = 300, 360, 1
    settings = {"env-id": env_id, "seed": seed, "total-timesteps": steps, "learning-starts": starts, "runs-dir": tmp_path}
    code, _, err = run(ROOT / "ddpg.py", *(f"--{name}={value}" for name, value in settings.items()))
    assert code == 0, err
    ours = torch.load(only_run(tmp_path) / "checkpoint.pt", weights_only=True)

    class Seeded(gym.Wrapper):
        def reset(self, **_):
            return self.env.reset(seed=torch.randint(2**31, (), generator=numbers).item())

    class Buffer(ReplayBuffer):
        def sample(self, batch_size, env=None):
            return self._get_samples(torch.randint(self.size(), (batch_size,), generator=numbers).numpy())

    class Noise(ActionNoise):
        def __call__(self):  # stable-baselines3 asks for it when it acts at random, too
            return 0.1 * torch.randn(1, A, generator=numbers).numpy() if peer.num_timesteps >= starts else np.zeros((1, A))

    peer = DDPG("MlpPolicy", Seeded(gym.make(env_id)), 1e-3, 1000, starts, 64, 0.005, train_freq=1, action_noise=Noise(),
                replay_buffer_class=Buffer, policy_kwargs={"net_arch": [256, 256]}, device="cpu")
    A, half = peer.action_space.shape[0], peer.action_space.high
    peer.action_space.sample = lambda: (torch.rand(A, generator=numbers) * 2 - 1).numpy() * half
    torch.manual_seed(seed)
    agent = new_agent(peer.observation_space.shape[0], A)
    numbers = torch.Generator().set_state(torch.get_rng_state())  # its own, as stable-baselines3 draws some that it wastes
    networks = agent.actor, agent.critic, agent.target_actor, agent.target_critic
    ends = peer.actor.mu, peer.critic, peer.actor_target.mu, peer.critic_target
    begun = [theta(network) for network in networks]
    for end, start in zip(ends, begun):
        as_vector([*end.parameters()]).data.copy_(start)
    peer.learn(steps)

    met, terminated = peer.replay_buffer, peer.replay_buffer.dones * (1 - peer.replay_buffer.timeouts)
    columns = met.observations, met.actions, met.rewards[..., None], met.next_observations, terminated[..., None]
    assert ours["replay"]["rows"].numpy() == pytest.approx(np.concatenate(columns, -1)[:steps, 0], abs=1e-4)
    agent.load_state_dict(ours["agent"])
    for network, end, start in zip(networks, ends, begun):
        assert (theta(network) - theta(end)).norm() < 1e-3 * (theta(end) - start).norm()


# ── Learning ────────────────────────────────────────────────────────────────────────────────────────────────

class Steady(Endless):
    """Every step is rewarded by 1."""

    def reward(self, action):
        return 1.0


class Peak(Endless):
    """The reward is the greater the nearer the action comes to a half."""

    def reward(self, action):
        return -float(action[0] - 0.5) ** 2


def learned(env, updates, **settings):
    """An agent after 1000 random steps and so many updates"""
    agent, (replay, noise), args = new_agent(1, 1), empty(), Args(batch_size=128, tau=0.2, **settings)
    actors = [Actor(env, BAR)]
    for step in range(1000):
        collect(agent, actors, replay, noise, step, args)
    vectors = vectors_of(agent, copy.deepcopy(agent))
    optimizers = torch.optim.Adam([vectors[0]], 1e-4), torch.optim.Adam([vectors[1]], 3e-3)
    for _ in range(updates):
        update(agent, vectors, *optimizers, replay, args)
    return agent


@pytest.mark.parametrize("env, value", [
    (Steady(5), 1 / (1 - 0.6 * 4 / 5)),  # a step in five has no future
    (gym.wrappers.TimeLimit(Steady(), 5), 1 / (1 - 0.6)),
], ids=["terminated", "truncated"])
def test_a_time_limit_takes_nothing_from_the_value_and_a_termination_does(env, value):
    agent, actions = learned(env, 200, gamma=0.6), torch.linspace(-0.9, 0.9, 7)[:, None]
    assert agent.critic(torch.zeros(7, 1), actions).mean().item() == pytest.approx(value, rel=0.1)


def test_the_actor_finds_the_best_action_of_a_critic_that_saw_random_ones():
    assert learned(Peak(), 200, gamma=0.0).act(torch.zeros(1, 1)).item() == pytest.approx(0.5, abs=0.1)


def test_a_row_of_losses_has_the_means_over_the_updates_since_the_last(monkeypatch, tmp_path):
    numbers = iter(range(1, 9999))
    monkeypatch.setattr(ddpg, "update", lambda *args: next(numbers) * torch.tensor([1.0, 10, 100]))
    code, _, err = run_here(ddpg, "--env-id", "Pendulum-v1", "--learning-starts", 64, "--total-timesteps", 1064,
                            "--runs-dir", tmp_path)
    assert (code, complaints(err)) == (0, [])
    rows = [row for row in metrics(only_run(tmp_path)) if row["losses/policy_loss"]]
    for row, step, mean in zip(rows, (1000, 1064), (468.5, 968.5), strict=True):  # of 1 … 936 and 937 … 1000
        found = row["global_step"], row["losses/policy_loss"], row["losses/qf_loss"], row["losses/qf_values"]
        assert [*map(float, found)] == [step, mean, 10 * mean, 100 * mean]


def test_a_stop_makes_no_row_of_fewer_steps(monkeypatch, tmp_path):
    updates = iter(range(1, 9999))

    def update(*args):
        if next(updates) == 1200:
            signal.raise_signal(signal.SIGINT)
        return torch.ones(3)

    monkeypatch.setattr(ddpg, "update", update)
    code, _, _ = run_here(ddpg, "--env-id", "Pendulum-v1", "--learning-starts", 64, "--runs-dir", tmp_path)
    assert code == 130
    assert [row["global_step"] for row in metrics(only_run(tmp_path)) if row["losses/policy_loss"]] == ["1000"]


def test_nan_from_the_environment_is_not_saved_even_before_anything_is_learned_from_it(tmp_path):
    flags = "--env-id", "envs:NanReward-v0", "--total-timesteps", 3, "--runs-dir", tmp_path
    code, _, err = run(ROOT / "ddpg.py", *flags)
    assert code == 2 and "aren't finite" in err and not list(tmp_path.glob("*/checkpoint.pt"))
