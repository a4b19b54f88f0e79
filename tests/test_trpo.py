"""The mathematics of trpo.py against calculations of another kind, and the slides' formulas by themselves."""

import copy
import math
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from torch import nn
from torch.distributions import kl_divergence
from tqdm import tqdm

import ppo_clip
import trpo
from helpers import complaints, metrics, only_run, run_here
from oracles import (
    Clock, Process, agent_of, assert_acts_alone, assert_each_pass_has_all_in_an_order_of_its_own,
    assert_equal_to_the_bit, code, flat, frozen, gradient, passes_of, policy, value,
)
from trpo import (
    Actor, Args, Rollout, as_vector, ascended_dual, branch, collect, conjugate_gradient, copy_state, fit_values, gae,
    log_prob, make_env, solve_cg, solve_penalty, surrogate, update, vine_objective, vine_surrogate,
)

BAR = tqdm(disable=True)
SPACES = pytest.mark.parametrize("space", [Discrete(3), Box(-1, 1, (2,))], ids=["discrete", "continuous"])


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def test_what_is_only_documented_otherwise_than_in_ppo_clip_does_the_same():
    assert code(trpo.gae) == code(ppo_clip.gae)


# ── The surrogate ───────────────────────────────────────────────────────────────────────────────────────────

PROCESSES = pytest.mark.parametrize("seed, gamma", [(0, 0.9), (1, 0.5), (2, 0.99), (3, 0.9)])


def pair(seed, gamma, distance=1.0, ascending=False):
    """A decision process and two policies"""
    process, theta = Process(seed, 4, 3, gamma, ascending), torch.randn(4, 3).double()
    return process, theta, theta + distance * torch.randn(4, 3)


def expected_surrogate(process, old, new, visits):
    """The script's surrogate of all states and actions at once, each weighted by how often it is visited"""
    states, actions = torch.cartesian_prod(*map(torch.arange, process.shape)).T
    ratio = (log_prob(new[states], None, actions) - log_prob(old[states], None, actions)).exp()
    weights = (visits * process.advantages(old)).flatten() * len(states)
    return surrogate(ratio, weights)


# [J-1] [J-2]
@PROCESSES
def test_a_policys_value_is_the_mean_of_its_paths_rewards_and_of_its_starts_values(seed, gamma):
    process, theta, _ = pair(seed, gamma, ascending=True)
    sampled = 0
    for p, *path in process.episodes(theta):
        rewards = process.R[tuple(map(torch.tensor, path))]
        sampled += p * (gamma ** torch.arange(len(rewards)) * rewards).sum()
    torch.testing.assert_close(sampled, process.start @ process.values(theta)[0])
    torch.testing.assert_close(sampled, (process.visits(theta) * process.R).sum())


@PROCESSES
def test_the_surrogates_gradient_is_the_policy_gradient(seed, gamma):
    process, old, _ = pair(seed, gamma)
    new = old.clone().requires_grad_()
    value = expected_surrogate(process, old, new, process.visits(old))
    assert value.item() == pytest.approx(0, abs=1e-12)
    (slope,) = torch.autograd.grad(value, new)
    torch.testing.assert_close(slope, process.gradient_of_J(old), rtol=1e-6, atol=1e-8)


# [J-DIFF]
@PROCESSES
def test_a_policys_gain_is_the_old_ones_advantage_along_its_own_path(seed, gamma):
    process, old, new = pair(seed, gamma, ascending=True)
    gain, (V, _), sampled = process.J(new) - process.J(old), process.values(old), 0
    for p, *path in process.episodes(new):
        states, actions = map(torch.tensor, path)
        t = torch.arange(len(states)).double()
        end = t == t[-1]
        A = gae(process.R[states, actions], V[states], V[states].roll(-1), end, end, gamma, 0.0)
        sampled += p * (gamma**t * A).sum()
    assert abs(gain) > 1e-3
    torch.testing.assert_close((process.visits(new) * process.advantages(old)).sum(), gain)
    torch.testing.assert_close(sampled, gain)


# [J-IS]
@PROCESSES
def test_a_policys_gain_is_the_surrogate_in_the_states_that_it_visits_itself(seed, gamma):
    process, old, new = pair(seed, gamma)
    states = process.visits(new).sum(1, keepdim=True)
    value = expected_surrogate(process, old, new, states * old.softmax(-1))
    torch.testing.assert_close(value, process.J(new) - process.J(old))


def states_at(process, pi, steps):
    """p(s_t) for each t, with the end as the last state;   (t,S+1)"""
    S, _ = process.shape
    P = torch.eye(S + 1, dtype=pi.dtype)
    P[:S, :S] = torch.einsum("sa,sax->sx", pi, process.P)
    P[:S, S] = 1 - P[:S, :S].sum(1)
    return torch.stack([torch.cat([process.start, P.new_zeros(1)]) @ P.matrix_power(t) for t in range(steps)])


# [J-DIST]
@PROCESSES
@pytest.mark.parametrize("epsilon", [0.01, 0.3])
def test_policies_that_seldom_differ_visit_nearly_the_same_states(epsilon, seed, gamma):
    process, old, other = pair(seed, gamma)
    pi, t = old.softmax(-1), torch.arange(20.0)[:, None]
    one_action = torch.nn.functional.one_hot(other.argmin(-1), 3).double()
    p, p_new = states_at(process, pi, 20), states_at(process, (1 - epsilon) * pi + epsilon * one_action, 20)
    same = (1 - epsilon) ** t
    mistake = (p_new - same * p)[1:] / (1 - same)[1:]
    assert mistake.min() > -1e-9 and torch.allclose(mistake.sum(1), torch.ones(19).double())
    distance = (p_new - p).abs().sum(1, keepdim=True)
    assert (distance <= 2 * (1 - same) + 1e-12).all() and (1 - same <= epsilon * t + 1e-6).all()
    assert (distance[1:4] > epsilon / 20).all()


# [TRPO-MONO]
def test_the_surrogate_less_a_multiple_of_the_largest_kl_is_a_lower_bound_of_the_gain():
    overestimated = 0
    for seed in range(300):
        gamma = [0.05, 0.3, 0.9][seed % 3]
        process, old, new = pair(seed, gamma, distance=[0.01, 0.3, 3.0][seed // 3 % 3])
        gain = process.J(new) - process.J(old)
        value = expected_surrogate(process, old, new, process.visits(old))
        C = 4 * process.advantages(old).abs().max() * gamma / (1 - gamma) ** 2
        of_paper, of_slide = (trpo.kl_divergence(p, None, q, None).max() for p, q in ((old, new), (new, old)))
        assert gain >= value - C * min(of_paper, of_slide)
        overestimated += gain < value
    assert overestimated > 30  # so that it does take a penalty


# ── Conjugate gradient ──────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("P", [1, 2, 7, 40])
@pytest.mark.parametrize("seed", range(5))
def test_conjugate_gradient_solves_a_symmetric_positive_definite_system(seed, P):
    torch.manual_seed(seed)
    root, g = torch.randn(P, P).double(), torch.randn(P).double()
    H = root @ root.T + 0.1 * torch.eye(P)
    x = conjugate_gradient(lambda v: H @ v, g, 10 * P)
    torch.testing.assert_close(x, torch.linalg.solve(H, g), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("iterations", [1, 2, 3, 5])
def test_k_iterations_find_the_best_point_that_k_products_span(iterations):
    root, g = torch.randn(8, 8).double(), torch.randn(8).double()
    H = root @ root.T + torch.eye(8)
    krylov = torch.stack([torch.linalg.matrix_power(H, k) @ g for k in range(iterations)], 1)
    best = krylov @ torch.linalg.solve(krylov.T @ H @ krylov, krylov.T @ g)
    torch.testing.assert_close(conjugate_gradient(lambda v: H @ v, g, iterations), best)


@pytest.mark.parametrize("g, products", [(torch.zeros(3), 0), (torch.tensor([0.0, 4.0, 0.0]), 1)])
def test_conjugate_gradient_takes_no_product_more_than_it_needs(g, products):
    calls = []
    H = torch.tensor([2.0, 4.0, 8.0]).diag()
    x = conjugate_gradient(lambda v: calls.append(v) or H @ v, g, 25)
    assert torch.equal(x, g / 4) and len(calls) == products


# ── The step ────────────────────────────────────────────────────────────────────────────────────────────────

def problem(space, B=40):
    """An agent, and what solve_cg is told of a rollout"""
    agent, x = agent_of(trpo, space), torch.randn(B, 4).double()
    return agent, x, policy(agent, x).sample(), torch.randn(B).double()


def theta_of(agent):
    return flat(agent.policy_parameters()).detach().clone()


def at(agent, theta):
    """A copy whose policy has the parameters θ"""
    agent = copy.deepcopy(agent)
    nn.utils.vector_to_parameters(theta, agent.policy_parameters())
    return agent


def solved(agent, *samples, **settings):
    """A copy after solve_cg, and its metrics"""
    agent = copy.deepcopy(agent)
    theta = as_vector(agent.policy_parameters())
    return agent, solve_cg(agent, theta, *samples, args_of(**settings))


def args_of(**settings):
    """Also of numbers that a command line can't give"""
    args = Args()
    vars(args).update(settings)
    return args


def gain_and_kl(old, new, x, action, advantage):
    """By torch: the surrogate, E[D_KL(πθ' ‖ πθ)]"""
    pi_old, pi = frozen(old, x), policy(new, x)
    ratio = pi.log_prob(action).exp() / pi_old.log_prob(action).exp()
    return (ratio * advantage).mean(), kl_divergence(pi, pi_old).mean()


def hessian(of, parameters):
    slopes = gradient(of, parameters, create_graph=True)
    return torch.stack([gradient(slope, parameters, retain_graph=True) for slope in slopes])


def hessian_of_kl(agent, x):
    return hessian(kl_divergence(policy(agent, x), frozen(agent, x)).mean(), agent.policy_parameters())


@pytest.fixture
def spied(monkeypatch):
    """What solve_cg asked of conjugate_gradient: H as a matrix, g, iterations, the answer x"""
    asked = []

    def spy(product, g, iterations):
        H = torch.stack([product(column) for column in torch.eye(len(g), dtype=g.dtype)], 1)
        asked.append((H, g.clone(), iterations, conjugate_gradient(product, g, iterations)))
        return asked[-1][-1]

    monkeypatch.setattr(trpo, "conjugate_gradient", spy)
    return asked


@SPACES
@pytest.mark.parametrize("damping", [0.0, 0.1, 3.0])
def test_the_product_is_with_the_hessian_of_the_kl_and_the_damping(space, damping, spied):
    agent, x, *samples = problem(space)
    solved(agent, x, *samples, cg_damping=damping)
    expected = hessian_of_kl(agent, x)
    torch.testing.assert_close(spied[0][0], expected + damping * torch.eye(len(expected)))
    assert expected.abs().max() > 0.1


@SPACES
def test_both_directions_of_the_kl_have_that_hessian(space):
    agent, x, _, _ = problem(space)
    output, log_std = agent.actor(x), agent.log_std
    old, old_log_std = output.detach(), copy.deepcopy(log_std)
    other = hessian(trpo.kl_divergence(old, old_log_std, output, log_std).mean(), agent.policy_parameters())
    torch.testing.assert_close(other, hessian_of_kl(agent, x))


def test_that_hessian_is_the_fisher_information(spied):
    agent, x, *samples = problem(Discrete(3))
    solved(agent, x, *samples, cg_damping=0.0)
    fisher = 0
    for pi in (policy(agent, row) for row in x):
        for action in range(3):
            score = gradient(pi.log_prob(torch.tensor(action)), agent.policy_parameters(), retain_graph=True)
            fisher = fisher + pi.probs[action].detach() * score.outer(score) / len(x)
    torch.testing.assert_close(spied[0][0], fisher)


@SPACES
def test_g_is_the_policy_gradient_and_cg_iters_limits_the_iterations(space, spied):
    agent, x, action, advantage = problem(space)
    solved(agent, x, action, advantage, cg_iters=7)
    score = (policy(agent, x).log_prob(action) * advantage).mean()
    torch.testing.assert_close(spied[0][1], gradient(score, agent.policy_parameters()))
    assert spied[0][2] == 7


@SPACES
@pytest.mark.parametrize("cg_iters", [2, 200])
@pytest.mark.parametrize("eps", [1e-4, 0.01])
def test_the_first_step_tried_is_as_long_as_the_quadratic_trust_region_allows(space, cg_iters, eps, spied):
    agent, *samples = problem(space)
    new, metrics = solved(agent, *samples, kl_constraint=eps, cg_iters=cg_iters, cg_damping=0.2)
    step, H = theta_of(new) - theta_of(agent), spied[0][0]
    assert metrics["losses/backtracks"] == 0
    assert (0.5 * step @ H @ step).item() == pytest.approx(eps, rel=1e-6)
    direction = spied[0][3]
    assert torch.cosine_similarity(step, direction, 0).item() == pytest.approx(1)
    if cg_iters == 200:
        torch.testing.assert_close(direction, torch.linalg.solve(H, spied[0][1]), rtol=1e-5, atol=1e-8)


@SPACES
def test_the_first_acceptable_step_is_taken(space, spied):
    taken = []
    for _ in range(12):
        agent, *samples = problem(space)
        new, metrics = solved(agent, *samples, kl_constraint=1.0, cg_damping=0.01, backtrack_coef=0.7)
        H, _, _, x = spied[-1]
        old_objective = samples[-1].mean()
        for i in range(10):
            theta = theta_of(agent) + 0.7**i * x * (2 / (x @ H @ x)).sqrt()
            objective, kl = gain_and_kl(agent, at(agent, theta), *samples)
            if kl <= 1.0 and objective > old_objective:
                break
        assert metrics["losses/backtracks"] == i
        torch.testing.assert_close(theta_of(new), theta)
        assert metrics["losses/kl"].item() == pytest.approx(kl.item())
        assert metrics["losses/policy_loss"].item() == pytest.approx(-objective.item())
        taken.append(i)
    assert len(set(taken)) >= 3 and max(taken) < 9


FAILURES = {  # settings, and what takes the place of a part of trpo
    "no_tries": ({"backtrack_iters": 0}, {}),
    "downhill": ({}, {"conjugate_gradient": lambda *args: -conjugate_gradient(*args)}),
    "level": ({}, {"surrogate": lambda *args: surrogate(*args) - surrogate(*args).detach()}),
    "too_far": ({}, {"kl_divergence": lambda *args, kl=trpo.kl_divergence: kl(*args) + 1}),
}


@SPACES
@pytest.mark.parametrize("settings, parts", FAILURES.values(), ids=FAILURES)
def test_a_failed_search_leaves_the_policy_as_it_was_to_the_bit(space, settings, parts, monkeypatch):
    for name, part in parts.items():
        monkeypatch.setattr(trpo, name, part)
    assert_unmoved(*problem(space), **settings)


@SPACES
@pytest.mark.parametrize("advantage", [0.0, math.nan])
def test_advantages_that_tell_nothing_leave_the_policy_as_it_was_to_the_bit(space, advantage):
    agent, x, action, _ = problem(space)
    assert_unmoved(agent, x, action, torch.full((len(x),), advantage).double())


def assert_unmoved(agent, *samples, **settings):
    new, metrics = solved(agent, *samples, **settings)
    assert torch.equal(theta_of(new), theta_of(agent))
    assert metrics["losses/backtracks"] == args_of(**settings).backtrack_iters


@SPACES
def test_without_a_line_search_the_whole_step_is_taken_also_where_it_would_be_shortened(space, spied):
    shortened = 0
    for _ in range(12):
        agent, *samples = problem(space)
        settings = {"kl_constraint": 1.0, "cg_damping": 0.01}
        shortened += solved(agent, *samples, **settings)[1]["losses/backtracks"] > 0
        new, metrics = solved(agent, *samples, **settings, line_search=False)
        H, _, _, x = spied[-1]
        torch.testing.assert_close(theta_of(new), theta_of(agent) + x * (2 / (x @ H @ x)).sqrt())
        assert metrics["losses/backtracks"] == 0
    assert shortened


@pytest.mark.parametrize("eps, tries", [(0.01, 0), (-0.01, 10)], ids=["taken", "failed"])
def test_no_metric_of_a_search_needs_a_gradient_of_which_torch_would_warn(eps, tries):
    _, metrics = solved(*problem(Discrete(3)), kl_constraint=eps)
    assert metrics.pop("losses/backtracks") == tries
    assert not any(getattr(value, "requires_grad", False) for value in metrics.values())


@pytest.mark.filterwarnings("ignore:.*out of date")
@pytest.mark.parametrize("env_id", ["Hopper-v4", "CartPole-v1"])
def test_each_update_of_a_run_stays_in_the_trust_region_and_gains(env_id, monkeypatch):
    actors = [Actor(make_env(env_id), BAR) for _ in range(2)]
    env = actors[0].env
    agent, moved = trpo.Agent(env.observation_space, env.action_space), []
    old = copy.deepcopy(agent)
    theta, phi = as_vector(agent.policy_parameters()), as_vector([*agent.critic.parameters()])
    optimizer, args = torch.optim.Adam([phi], 1e-3), Args(update_epochs=2)

    def watched(agent, theta, *samples):
        old = copy.deepcopy(agent)
        metrics = solve_cg(agent, theta, *samples)
        x, action, advantage = (y.double() if y.is_floating_point() else y for y in samples[:3])
        gain, kl = gain_and_kl(old.double(), copy.deepcopy(agent).double(), x, action, advantage)
        assert kl <= args.kl_constraint and gain >= advantage.mean()
        moved.append(kl > args.kl_constraint / 10)
        return metrics

    monkeypatch.setattr(trpo, "solve_cg", watched)
    for _ in range(10):
        update(agent, old, theta, phi, None, optimizer, collect(old, actors, [], args), args)
    assert len(moved) == 10 and sum(moved) >= 9


# ── The penalty ─────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("dual, kl, after", [
    (1.0, 0.03, 1.2), (1.0, 0.01, 1.0), (1.0, 0.0, 0.9), (0.0, 0.02, 0.1), (0.05, 0.0, 0.0), (0.0, 0.0, 0.0),
])
def test_the_price_rises_by_alpha_for_each_nat_too_many_and_falls_no_lower_than_zero(dual, kl, after):
    dual, kl = torch.tensor([dual, kl], dtype=torch.float64)
    assert ascended_dual(dual, kl, 0.01, 10.0).item() == pytest.approx(after)


def penalized(agent, x, action, advantage, dual, rate, **settings):
    """A copy after solve_penalty by plain gradient descent, and its metrics"""
    agent = copy.deepcopy(agent)
    agent.dual.fill_(dual)
    theta = as_vector(agent.policy_parameters())
    args = Args(solver="penalty", **{"minibatch_size": len(x)} | settings)
    return agent, solve_penalty(agent, theta, torch.optim.SGD([theta], rate), x, action, advantage, args)


@SPACES
@pytest.mark.parametrize("dual, eps, dual_lr", [(2.0, 0.01, 3.0), (0.5, 1e-5, 10.0), (5.0, 0.4, 10.0)])
@pytest.mark.parametrize("size", [40, 15])
def test_the_price_moves_by_alpha_times_the_kl_of_all_steps_beyond_epsilon(space, dual, eps, dual_lr, size):
    agent, *samples = problem(space)
    settings = {"kl_constraint": eps, "dual_lr": dual_lr, "update_epochs": 3, "minibatch_size": size}
    new, metrics = penalized(agent, *samples, dual, 0.3, **settings)
    gain, kl = gain_and_kl(agent, new, *samples)
    assert new.dual.item() == pytest.approx(dual + dual_lr * (kl.item() - eps), rel=1e-9) and kl > 1e-4
    assert new.state_dict()["dual"] == new.dual  # so that a resumed run goes on with it
    assert metrics["losses/dual"] == new.dual
    assert metrics["losses/kl"].item() == pytest.approx(kl.item())
    assert metrics["losses/policy_loss"].item() == pytest.approx(-gain.item())


@SPACES
@pytest.mark.parametrize("dual", [0.0, 2.0])
def test_the_policy_climbs_the_surrogate_less_the_price_of_its_kl(space, dual):
    agent, *samples = problem(space)
    new, _ = penalized(agent, *samples, dual, 0.2, update_epochs=3)
    theta = theta_of(agent)
    for _ in range(3):
        step = at(agent, theta)
        objective, kl = gain_and_kl(agent, step, *samples)
        theta += 0.2 * gradient(objective - dual * kl, step.policy_parameters())
    torch.testing.assert_close(theta_of(new), theta)
    assert gain_and_kl(agent, new, *samples)[0] > samples[-1].mean() + 0.01


@SPACES
def test_the_policy_stays_the_nearer_the_higher_the_price(space):
    agent, *samples = problem(space)
    kls = [gain_and_kl(agent, penalized(agent, *samples, dual, 0.01, update_epochs=99)[0], *samples)[1].item()
           for dual in (0.0, 1.0, 4.0, 16.0)]
    assert 0 < 2 * kls[3] < kls[2] < kls[1] < kls[0]


# ── The update ──────────────────────────────────────────────────────────────────────────────────────────────

def rollout_of(agent, T=16, N=4):
    obs = torch.randn(T + 1, N, 4).double()
    actions = policy(agent, agent.obs_norm(obs[:-1])).sample()
    return Rollout(obs[:-1], actions, torch.randn(T, N).double(), obs[1:], *(torch.rand(2, T, N) < 0.2), [], [], T * N)


def updated(agent, rollout, **settings):
    """A copy after the update by plain gradient descent, and the metrics"""
    agent = copy.deepcopy(agent)
    return agent, update_with(agent, copy.deepcopy(agent), rollout, **settings)


def update_with(agent, old, rollout, **settings):
    theta, phi = as_vector(agent.policy_parameters()), as_vector([*agent.critic.parameters()])
    optimizers = torch.optim.SGD([theta], 0.1), torch.optim.SGD([phi], 0.1)
    return update(agent, old, theta, phi, *optimizers, rollout, Args(**settings))


def moved(old, new):
    return {name for (name, p), q in zip(old.named_parameters(), new.parameters()) if not torch.equal(p, q)}


@SPACES
@pytest.mark.parametrize("solver", ["cg", "penalty"])
def test_the_solver_alone_moves_the_policy_and_fit_values_alone_the_critic(space, solver, monkeypatch):
    agent = agent_of(trpo, space)
    rollout = rollout_of(agent)
    names = {name for name, _ in agent.named_parameters()}
    values = {name for name in names if name.startswith("critic")}
    settings = dict(solver=solver, minibatch_size=64, update_epochs=2)
    assert moved(agent, updated(agent, rollout, **settings)[0]) == names
    with monkeypatch.context() as without:
        without.setattr(trpo, "fit_values", lambda *_: {})
        assert moved(agent, updated(agent, rollout, **settings)[0]) == names - values
    monkeypatch.setattr(trpo, {"cg": "solve_cg", "penalty": "solve_penalty"}[solver], lambda *_: {})
    assert moved(agent, updated(agent, rollout, **settings)[0]) == values


@SPACES
def test_the_solver_and_the_critic_see_the_rollouts_advantages_and_returns(space, monkeypatch):
    agent, seen = agent_of(trpo, space), {}
    rollout, fit = rollout_of(agent), fit_values

    def solver(agent, theta, x, action, advantage, args, vine):
        seen.update(x=x, action=action, advantage=advantage)
        return {}

    def critic(agent, phi, optimizer, x, target, *rest):
        seen.update(target=agent.value_norm.inverse(target))
        return fit(agent, phi, optimizer, x, target, *rest)

    monkeypatch.setattr(trpo, "solve_cg", solver)
    monkeypatch.setattr(trpo, "fit_values", critic)
    count = agent.obs_norm.count.clone()
    new, metrics = updated(agent, rollout, gamma=0.75, gae_lambda=1.0, minibatch_size=64)
    agent.obs_norm = new.obs_norm  # an update takes the rollout's in first
    values, next_values = (value(agent, agent.obs_norm(y)).detach() for y in (rollout.obs, rollout.next_obs))
    returns = torch.zeros(16, 4).double()
    for t, n in np.ndindex(16, 4):
        for k in range(t, 16):  # to the end of the episode or of the rollout
            returns[t, n] += 0.75 ** (k - t) * rollout.rewards[k, n]
            if rollout.terminated[k, n]:
                break
            if rollout.truncated[k, n] or k == 15:
                returns[t, n] += 0.75 ** (k - t + 1) * next_values[k, n]
                break
    advantages = (returns - values).flatten()
    torch.testing.assert_close(seen["target"], returns.flatten())
    standard = (advantages - advantages.mean()) / advantages.std(correction=0)
    torch.testing.assert_close(seen["advantage"], standard)
    torch.testing.assert_close(seen["x"], agent.obs_norm(rollout.obs.reshape(64, 4)))
    assert torch.equal(seen["action"], rollout.actions.flatten(0, 1))
    explained = 1 - (returns - values).var() / returns.var()
    assert metrics["losses/explained_variance"] == pytest.approx(explained.item())
    assert metrics["losses/entropy"] == pytest.approx(policy(new, seen["x"]).entropy().mean().item())
    assert new.obs_norm.count == count + 64


def test_the_value_functions_loss_is_the_mean_over_the_minibatches():
    agent, losses = agent_of(trpo, Discrete(3)), iter(torch.arange(9.0))
    phi = as_vector([*agent.critic.parameters()])
    args = Args(update_epochs=3, minibatch_size=4)
    found = fit_values(agent, phi, torch.optim.SGD([phi], 0.1), torch.randn(10, 4).double(), torch.randn(10).double(),
                       args, lambda *_: (torch.zeros_like(phi), next(losses)))
    assert found == {"losses/value_loss": 4.0} and next(losses, None) is None


@SPACES
@pytest.mark.parametrize("solver", ["cg", "penalty"])
def test_the_policy_that_acts_becomes_the_one_that_learned_to_the_bit_and_nothing_else_moves_it(space, solver):
    agent = agent_of(trpo, space)
    old = copy.deepcopy(agent)
    update_with(agent, old, rollout_of(agent), solver=solver, update_epochs=2)
    assert_equal_to_the_bit(old, agent)
    assert_acts_alone(old, agent, lambda: collect(old, [Actor(Clock(space), BAR)], [], Args(num_steps=20))[:6])


def test_each_pass_shows_the_critic_every_step_in_an_order_of_its_own():
    agent, x, _, target = problem(Discrete(3))
    phi = as_vector([*agent.critic.parameters()])
    args, optimizer = Args(minibatch_size=15, update_epochs=3), torch.optim.SGD([phi], 0.1)
    passes = passes_of(agent.critic, len(x), lambda: fit_values(agent, phi, optimizer, x, target, args))
    assert_each_pass_has_all_in_an_order_of_its_own(passes, x[:, 0].tolist())


@SPACES
def test_each_pass_shows_the_policy_every_step_in_an_order_of_its_own(space):
    agent, *samples = problem(space)
    theta = as_vector(agent.policy_parameters())
    args, optimizer = Args(solver="penalty", minibatch_size=15, update_epochs=3), torch.optim.SGD([theta], 0.1)
    passes = passes_of(agent.actor, 40, lambda: solve_penalty(agent, theta, optimizer, *samples, args))
    assert_each_pass_has_all_in_an_order_of_its_own(passes, samples[0][:, 0].tolist())


def test_the_critic_descends_its_squared_error():
    agent, x, _, target = problem(Discrete(3))
    new = copy.deepcopy(agent)
    phi = as_vector([*new.critic.parameters()])
    args = Args(minibatch_size=40, update_epochs=2)
    fit_values(new, phi, torch.optim.SGD([phi], 0.1), x, target, args)
    for _ in range(2):
        loss = nn.functional.mse_loss(agent.critic(x)[:, 0], target) / 2
        parameters = list(agent.critic.parameters())
        for parameter, slope in zip(parameters, torch.autograd.grad(loss, parameters)):
            parameter.data -= 0.1 * slope
    torch.testing.assert_close(phi.detach(), flat(parameters).detach())


# ── The vine ────────────────────────────────────────────────────────────────────────────────────────────────

class Tabular(gym.Env):
    """A decision process to step through, observed as one number out of S; its state can be copied as MuJoCo's can."""

    def __init__(self, process):
        self.process, self.data, self.mujoco_renderer = process, SimpleNamespace(state=0), None
        self.observation_space, self.action_space = Box(0, 1, process.shape[:1]), Discrete(process.shape[1])

    def observe(self):
        return np.eye(self.process.shape[0] + 1, self.process.shape[0])[self.data.state]

    def reset(self, seed=None, options=None):
        self.data.state = 0
        return self.observe(), {}

    def step(self, action):
        P = self.process.P[self.data.state, action].numpy()
        reward = self.process.R[self.data.state, action].item()
        self.data.state = np.random.choice(len(P) + 1, p=[*P, 1 - P.sum()])
        return self.observe(), reward, self.data.state == len(P), True, {}  # past its time limit, as simulators are


def tabular_agent(process, theta):
    """π of the scores θ, V exact, both of observations in halves, V in units of 3"""
    S, A = process.shape
    agent = trpo.Agent(Box(0, 1, (S,)), Discrete(A)).double()
    agent.actor, agent.critic = (nn.Sequential(nn.Linear(S, n, bias=n == 1).double()) for n in (A, 1))
    agent.obs_norm.std[:], agent.value_norm.mean[:], agent.value_norm.std[:] = 0.5, 2, 3
    values = (process.values(theta)[0] - agent.value_norm.mean) / 3
    agent.actor[0].weight.data, agent.critic[0].weight.data = 0.5 * theta.T, 0.5 * (values[None] - 5)
    agent.critic[0].bias.data[:] = 5  # the end, which is observed as zeros, is worth 0 all the same
    return agent


@pytest.mark.parametrize("steps", [1, 3, 20])
def test_a_branchs_return_is_in_the_mean_the_exact_q_of_its_action(steps, monkeypatch):
    process, theta, _ = pair(3, 0.9)
    monkeypatch.setattr(np, "array", lambda x, dtype=None: np.asarray(x, float).copy())  # not float32
    agent, Q = tabular_agent(process, theta), process.values(theta)[1]
    actor, *simulators = (Actor(Tabular(process), BAR) for _ in range(4))
    np.random.seed(0)
    for state in (0, 2):
        actor.env.data.state = state
        actor.obs = actor.env.observe()
        with torch.no_grad():
            found = [branch(agent, actor, simulators, Args(gamma=0.9, vine_steps=steps)) for _ in range(2000)]
        states, actions, q, taken = zip(*found)
        assert all(x.tolist() == actor.obs.tolist() for x in states)
        assert all(a.tolist() == [0, 1, 2] for a in actions)
        q = torch.stack(q).double()
        assert (abs(q.mean(0) - Q[state]) < 4 * q.std(0) / len(q) ** 0.5 + 1e-6).all()
        assert max(taken) <= 3 * steps and min(taken) >= 3 and (steps == 1 or len(set(taken)) > 1)
        assert actor.env.data.state == state


def test_of_frames_a_branch_counts_the_rewards_signs():
    process, theta, _ = pair(3, 0.9)
    agent = tabular_agent(process, theta).float()
    agent.frames, agent.critic[0].weight.data[:], agent.critic[0].bias.data[:] = True, 0, 0
    agent.value_norm.mean[:] = 0
    process.R[0] = torch.tensor([7.0, -0.5, 0.0])
    actor, *simulators = (Actor(Tabular(process), BAR) for _ in range(4))
    _, _, q, _ = branch(agent, actor, simulators, Args(vine_steps=1))
    assert q.tolist() == [1, -1, 0]


@pytest.mark.parametrize("line_search", [True, False])
def test_where_all_branches_earn_the_same_the_policy_stays(line_search):
    agent = agent_of(trpo, Discrete(7))  # the mean of 7 equal numbers is often another
    rollout = rollout_of(agent)
    rollout = rollout._replace(**{name: getattr(rollout, name).float() for name in ("obs", "rewards", "next_obs")}, vine=[
        torch.randn(60, 4), torch.arange(7).expand(60, 7), 100 * torch.randn(60, 1).expand(60, 7)])
    new, _ = updated(agent.float(), rollout, vine=True, line_search=line_search)
    assert torch.equal(theta_of(new), theta_of(agent))


@pytest.mark.parametrize("solver", ["cg", "penalty"])
def test_the_solver_sees_the_branches_states_as_the_networks_do_and_how_much_better_each_is(solver, monkeypatch):
    agent, seen = agent_of(trpo, Discrete(3)), []
    states, actions, q = torch.randn(60, 4).double(), torch.arange(3).expand(60, 3), 5 * torch.randn(60, 3).double() + 7
    monkeypatch.setattr(trpo, f"solve_{solver}", lambda *args: seen.extend(args[-1]) or {})
    new, _ = updated(agent, rollout_of(agent)._replace(vine=[states, actions, q]), vine=True, solver=solver)
    better = q - q.mean(1, keepdim=True)
    torch.testing.assert_close(seen[0], new.obs_norm(states))
    assert torch.equal(seen[1], actions)
    torch.testing.assert_close(seen[2], better / better.square().mean().sqrt())


@PROCESSES
def test_the_gradient_of_the_vine_with_all_actions_is_the_policy_gradient(seed, gamma):
    process, theta, _ = pair(seed, gamma)
    agent, Q = tabular_agent(process, theta), process.values(theta)[1]
    visits, slope = process.visits(theta).sum(1), 0
    for s, state in enumerate(torch.eye(4).double()):
        objective = vine_objective(agent, agent.obs_norm(state[None]), torch.arange(3)[None], Q[s : s + 1])
        slope = slope + visits[s] * torch.autograd.grad(objective(), agent.actor[0].weight)[0].T / 2  # θ is twice these
    torch.testing.assert_close(slope, process.gradient_of_J(theta), rtol=1e-6, atol=1e-8)


def test_the_gradient_of_the_vine_with_k_samples_is_in_the_mean_k_less_1_kths_of_the_policy_gradient():
    """Self-normalised: the mean of the samples' own Q̂ is the baseline, and a part of each."""
    process, theta, _ = pair(0, 0.9)
    scores, Q = theta[0].clone().requires_grad_(), process.values(theta)[1][0]
    log_pi = scores.log_softmax(-1)
    (exact,) = torch.autograd.grad((log_pi.exp() * Q).sum(), scores, retain_graph=True)
    for K in (2, 3):
        mean = 0
        for drawn in torch.cartesian_prod(*[torch.arange(3)] * K):
            log_weight = log_pi[drawn] - log_pi[drawn].detach()
            value = vine_surrogate(log_weight[None], Q[drawn][None])
            mean = mean + log_pi[drawn].sum().exp().detach() * torch.autograd.grad(value, scores, retain_graph=True)[0]
        torch.testing.assert_close(mean, (K - 1) / K * exact)


def test_the_vine_weighs_samples_by_the_ratio_of_the_policies():
    agent, states = agent_of(trpo, Box(-1, 1, (2,))), torch.randn(5, 4).double()
    actions, q = torch.randn(5, 3, 2).double(), torch.randn(5, 3).double()
    objective, before = vine_objective(agent, states, actions, q), frozen(agent, states)
    torch.testing.assert_close(objective(), q.mean())
    with torch.no_grad():
        agent.actor[0].weight += 0.3 * torch.randn_like(agent.actor[0].weight)
        agent.log_std += 0.2
    now, of_each = policy(agent, states), actions.transpose(0, 1)
    w = (now.log_prob(of_each) - before.log_prob(of_each)).exp().T
    torch.testing.assert_close(objective(), ((w * q).sum(1) / w.sum(1)).mean())


def moving(env_id):
    """An agent, an actor some steps into an episode, and four simulators"""
    if env_id.startswith("ALE/"):
        pytest.importorskip("ale_py")
    actor, *simulators = (Actor(make_env(env_id), BAR) for _ in range(5))
    agent = trpo.Agent(actor.env.observation_space, actor.env.action_space)
    for _ in range(20):
        actor.step(agent.act(torch.from_numpy(actor.obs)[None], agent.noise(1)).detach().numpy()[0])
    return agent, actor, simulators


@pytest.mark.parametrize("env_id", ["Hopper-v4", "Reacher-v5", "Humanoid-v5", "ALE/Breakout-v5", "ALE/Seaquest-v5"])
def test_a_simulator_goes_on_from_an_environments_state_to_the_bit(env_id):
    _, actor, simulators = moving(env_id)
    for simulator in simulators[:2]:
        copy_state(actor.env, simulator.env)
    actor.env.action_space.seed(0)
    for _ in range(30):
        action = actor.env.action_space.sample()
        there, *rest = actor.step(action)
        for simulator in simulators[:2]:
            seen, *others = simulator.step(action)
            assert np.array_equal(seen, there) and others[:2] == rest[:2]  # its time limit is its own
        if any(rest[1:]):
            break


def test_what_only_has_the_methods_of_a_game_is_not_copied_as_one():
    own = SimpleNamespace(unwrapped=SimpleNamespace(clone_state=int, restore_state=int), spec=SimpleNamespace(id="Own-v0"))
    with pytest.raises(trpo.Failure, match="Own-v0"):
        copy_state(own, own)


def test_a_filmed_game_is_copied_too_and_its_film_has_a_picture_for_each_action(tmp_path):
    pytest.importorskip("ale_py")
    env, simulator = make_env("ALE/Breakout-v5", tmp_path / "videos"), make_env("ALE/Breakout-v5")
    for each in (env, simulator):
        each.reset(seed=1)
    for action in (1, 2, 3, 2):
        env.step(action)
    copy_state(env, simulator)
    assert all(np.array_equal(env.step(3)[0], simulator.step(3)[0]) for _ in range(5))
    assert len(env.recorded_frames) == 1 + 4 + 5
    env.close()


@pytest.mark.parametrize("env_id", ["Hopper-v4", "ALE/Breakout-v5"])
@torch.no_grad()
def test_the_same_random_numbers_make_the_same_branch_and_leave_the_actor_where_it_is(env_id):
    agent, actor, simulators = moving(env_id)
    obs, length = actor.obs.copy(), actor.length
    torch.manual_seed(3)
    states, actions, q, steps = branch(agent, actor, simulators, Args(vine_steps=10))
    torch.manual_seed(3)
    again = branch(agent, actor, simulators, Args(vine_steps=10))
    assert torch.equal(again[1], actions) and torch.equal(again[2], q) and again[3] == steps
    assert actor.length == length and np.array_equal(actor.obs, obs) and torch.equal(states, torch.from_numpy(obs))
    if not agent.discrete:  # of one first action all branches are one
        agent.log_std -= 100
        _, actions, q, _ = branch(agent, actor, simulators, Args(vine_steps=10))
        assert (actions == actions[0]).all() and (q == q[0]).all()


@torch.no_grad()
def test_the_branches_of_a_state_share_what_is_random_after_their_first_action(monkeypatch):
    agent, actor, simulators = moving("Hopper-v4")
    taken, act = [], agent.act
    monkeypatch.setattr(agent, "act", lambda obs, noise: taken.append((act(obs), act(obs, noise))) or taken[-1][1])
    branch(agent, actor, simulators, Args(vine_steps=6))
    (mean, first), *later = taken
    assert len(later) == 5 and (first - mean).std(0).min() > 0.01
    for mean, action in later:
        torch.testing.assert_close((action - mean), (action - mean)[:1].expand(4, -1))


class Timed(Clock):
    """Observes the steps taken so far in this and all earlier episodes; its state can be copied as MuJoCo's can."""

    def __init__(self):
        super().__init__(Discrete(2))
        self.data, self.mujoco_renderer = SimpleNamespace(t=0), None

    def reset(self, seed=None, options=None):
        return np.full(4, self.data.t), {}

    def step(self, action):
        self.data.t += 1
        return np.full(4, self.data.t), 1.0, self.data.t % 5 == 0, False, {}


def test_the_vine_branches_at_states_of_the_trajectories_chosen_evenly_and_before_their_actions_are_taken():
    agent = trpo.Agent(Box(-np.inf, np.inf, (4,)), Discrete(2))
    args = Args(num_steps=10, vine=True, vine_states=6, vine_steps=2)
    found = np.zeros(10, int)
    for _ in range(200):
        actors, simulators = ([Actor(Timed(), BAR) for _ in range(2)] for _ in range(2))
        rollout = collect(agent, actors, simulators, args)
        states, actions, q = rollout.vine
        assert states.shape == (6, 4) and actions.tolist() == [[0, 1]] * 6 and q.shape == (6, 2)
        times = states[:, 0].int().bincount(minlength=10)
        assert times.max() <= 2  # actors
        found += times.numpy()
        branched = sum(simulator.length for simulator in simulators)
        assert rollout.steps == 20 + branched <= 20 + 6 * 2 * 2
        assert rollout.episodes[-1][0] == rollout.steps  # each actor's last episode ends at the last step
    assert abs(found / 200 - 2 * 6 / 20).max() < 0.2


@pytest.mark.parametrize("solver", ["cg", "penalty"])
def test_a_run_with_a_vine_counts_every_step_and_learns_from_its_branches(solver, tmp_path, monkeypatch):
    steps, step, seen = [], Actor.step, []
    monkeypatch.setattr(Actor, "step", lambda *args: steps.append(1) or step(*args))
    monkeypatch.setattr(trpo, "vine_surrogate", lambda *args: seen.append(args[1].shape) or vine_surrogate(*args))
    flags = ("--vine", "--vine-states", 3, "--vine-actions", 5, "--vine-steps", 7, "--num-envs", 2, "--num-steps", 64,
             "--env-id", "Hopper-v4", "--solver", solver, "--runs-dir", tmp_path)
    assert run_here(trpo, *flags, "--total-timesteps", 128 + 104)[0] == 2 and not steps  # an iteration may take 233
    code, _, err = run_here(trpo, *flags, "--total-timesteps", 500)
    assert (code, complaints(err)) == (0, [])
    total = int(metrics(only_run(tmp_path))[-1]["global_step"])
    assert total == len(steps) and 256 < total <= 500 and {*seen} == {(3, 5)}
    code, _, err = run_here(trpo, "--resume", only_run(tmp_path), "--total-timesteps", 800)
    assert (code, complaints(err)) == (0, [])
    assert int(metrics(only_run(tmp_path))[-1]["global_step"]) == len(steps)


def test_a_vine_goes_on_as_long_as_its_largest_iteration_fits(tmp_path, monkeypatch):
    flags = "--vine", "--vine-actions", 5, "--vine-steps", 7, "--num-envs", 2, "--env-id", "Hopper-v4"
    code, _, _ = run_here(trpo, *flags, "--vine-states", 100, "--num-steps", 4, "--total-timesteps", 8 + 8 * 5 * 7,
                          "--runs-dir", tmp_path / "more states than there are")
    assert code == 0
    monkeypatch.setattr(trpo, "branch", lambda *args: (*branch(*args)[:3], 1))  # as if all had ended early
    code, _, _ = run_here(trpo, *flags, "--vine-states", 3, "--num-steps", 64, "--total-timesteps", 500,
                          "--runs-dir", tmp_path / "early")
    assert code == 0 and int(metrics(only_run(tmp_path / "early"))[-1]["global_step"]) == 3 * 131


def test_a_film_shows_the_first_actor_also_beside_a_vine(tmp_path, monkeypatch):
    films = []
    monkeypatch.setattr(gym.wrappers.RecordVideo, "stop_recording", lambda self: films.append(self.recorded_frames))
    flags = "--vine", "--vine-states", 1, "--vine-actions", 2, "--num-envs", 1, "--num-steps", 20, "--capture-video"
    assert run_here(trpo, *flags, "--total-timesteps", 28, "--runs-dir", tmp_path)[0] == 0
    first, *_, last = films[0]
    assert not np.array_equal(first, last)  # something moves


# ── Atari ───────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("solver", ["cg", "penalty"])
@pytest.mark.parametrize("flags", [("--cg-subsampling", 5), ("--vine", "--vine-states", 2, "--vine-steps", 3)],
                         ids=["single path", "vine"])
def test_a_game_is_learned_from(flags, solver, tmp_path):
    pytest.importorskip("ale_py")
    code, _, err = run_here(trpo, "--env-id", "ALE/Breakout-v5", "--num-envs", 2, "--num-steps", 20, "--update-epochs", 1,
                            "--total-timesteps", 90, "--runs-dir", tmp_path, "--solver", solver, *flags)
    assert (code, complaints(err)) == (0, [])
    row = [row for row in metrics(only_run(tmp_path)) if row["losses/kl"]][-1]
    assert 0 < float(row["losses/kl"]) <= 0.01


def test_of_frames_the_rewards_signs_are_learned_from():
    agent = trpo.Agent(Box(0, 255, (4, 42, 42), np.uint8), Discrete(3))
    T, N = 3, 2
    obs, rewards, flags = 255 * torch.rand(T, N, 4, 42, 42), 100 * torch.randn(T, N), torch.ones(2, T, N, dtype=bool)
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trpo, "gae", lambda rewards, *rest: seen.append(rewards) or gae(rewards, *rest))
        update_with(agent, copy.deepcopy(agent), Rollout(obs, torch.zeros(T, N).long(), rewards, obs, *flags, [], [], 6))
    assert torch.equal(seen[0], rewards.sign())


def test_the_curvature_is_of_a_share_of_the_steps_and_of_all_actors(monkeypatch):
    """Every 8th row of 8 actors' would be one actor's alone"""
    agent, x, *rest = problem(Discrete(3))
    seen, kl = [], trpo.kl_divergence
    monkeypatch.setattr(trpo, "kl_divergence", lambda p, *others: seen.append(p) or kl(p, *others))
    solved(agent, x, *rest, cg_subsampling=8)
    (share,) = [p for p in seen if len(p) < len(x)]
    rows = torch.cdist(share, agent.actor(x)).argmin(-1)
    assert len(rows.unique()) == 5 and len((rows % 8).unique()) > 1
