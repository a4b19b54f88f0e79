"""The mathematics of ppo_kl.py against calculations of another kind."""

import copy
import difflib
import math

import pytest
import torch
from gymnasium.spaces import Box, Discrete
from torch.distributions import Categorical, Independent, Normal, kl_divergence
from tqdm import tqdm

import ppo_clip
import ppo_kl
from helpers import ROOT, SCRIPTS, complaints, metrics, only_run
from oracles import Clock, agent_of, assert_acts_alone, assert_equal_to_the_bit, assert_same, frozen, policy, value
from ppo_kl import Actor, Args, Rollout, adapted_beta, as_vector, collect, penalized_surrogate, update

BAR = tqdm(disable=True)
SPACES = pytest.mark.parametrize("space", [Discrete(3), Box(-1, 1, (2,))], ids=["discrete", "continuous"])


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def test_sixty_lines_at_most_make_ppo_kl_of_ppo_clip():
    clip, kl = ((ROOT / name).read_text(encoding="utf-8") for name in ("ppo_clip.py", "ppo_kl.py"))
    added = [line for line in difflib.ndiff(clip.splitlines(), kl.splitlines()) if line.startswith("+ ")]
    assert 0 < len(added) <= 60


# ── KL ──────────────────────────────────────────────────────────────────────────────────────────────────────

def gaussian(mean, log_std):
    return Independent(Normal(mean, log_std.exp()), 1)


def gaussians(A, B=5):
    return torch.randn(B, A), 0.5 * torch.randn(A), torch.randn(B, A), 0.5 * torch.randn(A)


@pytest.mark.parametrize("A", [1, 3, 17])
def test_the_gaussians_kl_is_torchs(A):
    assert_same(ppo_kl.kl_divergence, lambda m, s, n, t: kl_divergence(gaussian(m, s), gaussian(n, t)), *gaussians(A))


@pytest.mark.parametrize("A", [2, 3, 17])
def test_the_softmaxs_kl_is_torchs(A):
    assert_same(lambda f, g: ppo_kl.kl_divergence(f, None, g, None),
                lambda f, g: kl_divergence(Categorical(logits=f), Categorical(logits=g)), *2 * torch.randn(2, 5, A))


@pytest.mark.parametrize("A", [1, 3])
def test_the_gaussians_kl_is_the_mean_log_ratio_of_samples(A):
    p, q = gaussians(A, 1)[:2], gaussians(A, 1)[2:]
    assert_mean_log_ratio(ppo_kl.kl_divergence(*p, *q), gaussian(*p), gaussian(*q))


def test_the_softmaxs_kl_is_the_mean_log_ratio_of_samples():
    p, q = torch.randn(2, 1, 4)
    kl = ppo_kl.kl_divergence(p, None, q, None)
    assert_mean_log_ratio(kl, Categorical(logits=p), Categorical(logits=q))


def assert_mean_log_ratio(kl, p, q, samples=300_000):
    action = p.sample((samples,))
    log_ratio = p.log_prob(action) - q.log_prob(action)
    error = log_ratio.std() / samples**0.5
    assert abs(log_ratio.mean() - kl) < 4 * error < 0.1 * kl


def test_the_kl_of_equals_is_zero_and_flat():
    mean, log_std, scores = torch.randn(5, 3), torch.randn(3), torch.randn(5, 4)
    for p in (mean, log_std), (scores, None):
        q = [x if x is None else x.clone().requires_grad_() for x in p]
        kl = ppo_kl.kl_divergence(*p, *q)
        torch.testing.assert_close(kl, torch.zeros(5))
        for slope in torch.autograd.grad(kl.sum(), [x for x in q if x is not None]):
            torch.testing.assert_close(slope, torch.zeros_like(slope))


@SPACES
def test_the_kl_goes_from_the_first_policy_to_the_second(space):
    old, new, x = agent_of(ppo_kl, space), agent_of(ppo_kl, space), torch.randn(6, 4).double()
    p, q = frozen(old, x), frozen(new, x)
    with torch.no_grad():
        kl = ppo_kl.kl_divergence(old.actor(x), old.log_std, new.actor(x), new.log_std)
    torch.testing.assert_close(kl, kl_divergence(p, q))
    assert ((kl - kl_divergence(q, p)).abs() > 1e-5).all()


# ── L^KLPEN ─────────────────────────────────────────────────────────────────────────────────────────────────

GRID = torch.cartesian_prod(*map(torch.tensor, ([0.01, 0.8, 1.0, 3.0], [-2.0, -0.1, 0.5], [0.0, 0.02, 4.0])))


@pytest.mark.parametrize("beta", [0.25, 1.0, 3.0])
def test_l_klpen_takes_beta_for_each_nat_from_l_cpi(beta):
    ratio, advantage, kl = GRID.T.clone().requires_grad_()
    surrogate = penalized_surrogate(ratio, advantage, kl, beta)
    slopes = torch.autograd.grad(surrogate.sum(), (ratio, kl))
    assert surrogate.tolist() == pytest.approx([r * a - beta * d for r, a, d in GRID.tolist()])
    assert torch.equal(slopes[0], GRID[:, 1]) and torch.equal(slopes[1], torch.full((len(GRID),), -beta))


def test_a_beta_of_zero_is_l_cpi():
    assert torch.equal(penalized_surrogate(*GRID.T, 0.0), GRID[:, :2].prod(1))


# ── β ───────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("d, factor", [
    (0.0, 0.5), (math.nextafter(0.5, 0), 0.5), (0.5, 1), (math.nextafter(0.5, 1), 1), (0.75, 1),
    (math.nextafter(1.125, 0), 1), (1.125, 1), (math.nextafter(1.125, 2), 2), (1e6, 2),
])
@pytest.mark.parametrize("beta", [0.125, 1.0, 3.0])
def test_beta_halves_below_two_thirds_of_the_target_and_doubles_above_three_halves_of_it(beta, d, factor):
    kl = torch.tensor([0.0, 2 * d], dtype=torch.float64)  # of mean d
    assert adapted_beta(torch.tensor(beta), kl, 0.75) == factor * beta


@pytest.mark.parametrize("d, limit, back", [(0.0, 1e-6, 2e-6), (1.0, 1e6, 5e5)], ids=["halved", "doubled"])
def test_beta_ends_at_a_limit_from_which_it_comes_back(d, limit, back):
    beta, limit, back = torch.tensor([1.0, limit, back])
    for _ in range(400):
        beta = adapted_beta(beta, torch.tensor([d]), 0.01)
        assert torch.tensor(1e-6) <= beta <= torch.tensor(1e6)
    assert beta == limit
    assert adapted_beta(beta, torch.tensor([1.0 - d]), 0.01) == back


def rollout_of(agent, T=16, N=4):
    obs, next_obs = torch.randn(2, T, N, 4).double()
    with torch.no_grad():
        actions = policy(agent, agent.obs_norm(obs)).sample()
    return Rollout(obs, actions, torch.randn(T, N).double(), next_obs, *(torch.rand(2, T, N) < 0.2), [])


def updated(agent, rollout, rate, beta, **settings):
    """A copy after the update by plain gradient descent, and the metrics."""
    agent, old = copy.deepcopy(agent), copy.deepcopy(agent)
    agent.beta.fill_(beta)
    theta = as_vector([*agent.parameters()])
    return agent, update(agent, old, theta, torch.optim.SGD([theta], rate), rollout, Args(**settings))


def policy_parameters(agent):
    return [parameter for name, parameter in agent.named_parameters() if not name.startswith("critic")]


def kl_of_update(before, after, rollout):
    x = after.obs_norm(rollout.obs)
    return kl_divergence(frozen(before, x), frozen(after, x)).mean().item()


WHOLE = dict(minibatch_size=64, max_grad_norm=math.inf, gamma=0.9, gae_lambda=0.8)


@SPACES
@pytest.mark.parametrize("beta", [0.0, 2.0])
def test_the_second_step_pays_for_the_first_ones_kl(space, beta):
    old, rate = agent_of(ppo_kl, space), 0.3
    rollout = rollout_of(old)
    new, _ = updated(old, rollout, rate, beta, update_epochs=2, **WHOLE)
    old.obs_norm = new.obs_norm  # an update takes the rollout's in first
    x, actions = old.obs_norm(rollout.obs), rollout.actions
    values, next_values = (value(old, old.obs_norm(y)).detach() for y in (rollout.obs, rollout.next_obs))
    ends = rollout.terminated, rollout.truncated
    advantages = ppo_clip.gae(rollout.rewards, values, next_values, *ends, 0.9, 0.8)
    advantages = (advantages - advantages.mean()) / advantages.std(correction=0)
    agent, pi_old = copy.deepcopy(old), frozen(old, x)
    parameters = policy_parameters(agent)
    for _ in range(2):
        pi = policy(agent, x)
        ratio = pi.log_prob(actions).exp() / pi_old.log_prob(actions).exp()
        objective = (ratio * advantages).mean() - beta * kl_divergence(pi_old, pi).mean()
        for parameter, slope in zip(parameters, torch.autograd.grad(objective, parameters)):
            parameter.data += rate * slope
    for ours, theirs in zip(policy_parameters(new), parameters):
        torch.testing.assert_close(ours, theirs)


@SPACES
def test_without_a_price_an_update_is_that_of_ppo_clip_without_clipping(space):
    old, theirs = agent_of(ppo_kl, space), agent_of(ppo_clip, space)
    theirs.load_state_dict({name: x for name, x in old.state_dict().items() if name != "beta"})
    rollout, settings = rollout_of(old), dict(update_epochs=2, minibatch_size=24, max_grad_norm=0.1, ent_coef=0.3)
    torch.manual_seed(1)
    ours, metrics = updated(old, rollout, 0.1, 0.0, **settings)
    torch.manual_seed(1)
    theta, acting = as_vector([*theirs.parameters()]), copy.deepcopy(theirs)
    others = ppo_clip.update(theirs, acting, theta, torch.optim.SGD([theta], 0.1), rollout,
                             ppo_clip.Args(clip_coef=math.inf, **settings))
    for name, x in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], x, msg=lambda text: f"{name}: {text}")
    shared = "policy_loss", "value_loss", "entropy", "explained_variance"
    assert all(metrics[f"losses/{name}"] == pytest.approx(others[f"losses/{name}"]) for name in shared)


@SPACES
def test_an_update_ends_with_the_kl_it_reports(space):
    old = agent_of(ppo_kl, space)
    rollout = rollout_of(old)
    new, losses = updated(old, rollout, 1.0, 0.5, minibatch_size=16, update_epochs=4)
    kl = kl_of_update(old, new, rollout)
    assert losses["losses/kl"] == pytest.approx(kl) and kl > 1e-3


@SPACES
def test_the_policy_stays_the_nearer_the_larger_beta_is(space):
    old = agent_of(ppo_kl, space)
    rollout = rollout_of(old)
    kls = [kl_of_update(old, updated(old, rollout, 0.01, beta, update_epochs=40, **WHOLE)[0], rollout)
           for beta in (0.0, 1.0, 4.0, 16.0)]
    assert 0 < 2 * kls[3] < kls[2] < kls[1] < kls[0]


@SPACES
@pytest.mark.parametrize("d_targ, adapt_beta, factor", [
    (2.0, True, 0.5), (1.0, True, 1), (0.5, True, 2), (2.0, False, 1), (0.5, False, 1),
])
def test_an_update_adapts_beta_to_its_kl_unless_told_not_to(space, d_targ, adapt_beta, factor):
    old, settings = agent_of(ppo_kl, space), dict(update_epochs=3, **WHOLE)
    rollout = rollout_of(old)
    kl = kl_of_update(old, updated(old, rollout, 0.1, 0.5, adapt_beta=False, **settings)[0], rollout)
    new, losses = updated(old, rollout, 0.1, 0.5, adapt_beta=adapt_beta, d_targ=d_targ * kl, **settings)
    assert new.beta == factor * 0.5
    assert losses["losses/beta"] == 0.5  # the one that held during the update


@SPACES
def test_an_update_makes_a_beta_of_zero_positive_unless_told_not_to_adapt_it(space):
    old = agent_of(ppo_kl, space)
    rollout = rollout_of(old)
    for d_targ in 1e-9, 1e9:
        assert updated(old, rollout, 0.1, 0.0, d_targ=d_targ, **WHOLE)[0].beta > 0
        assert updated(old, rollout, 0.1, 0.0, d_targ=d_targ, adapt_beta=False, **WHOLE)[0].beta == 0


@SPACES
def test_the_policy_that_acts_becomes_the_one_that_learned_to_the_bit_and_nothing_else_moves_it(space):
    agent = agent_of(ppo_kl, space)
    old, theta = copy.deepcopy(agent), as_vector([*agent.parameters()])
    args = Args(update_epochs=2, **WHOLE)
    update(agent, old, theta, torch.optim.SGD([theta], 0.1), rollout_of(agent), args)
    assert_equal_to_the_bit(old, agent)
    assert_acts_alone(old, agent, lambda: collect(old, [Actor(Clock(space), BAR)], 20)[:6])


@pytest.mark.parametrize("script", [script for script in SCRIPTS if script.name == "ppo_kl"], indirect=True)
def test_a_resumed_run_goes_on_with_its_own_beta_unless_told_another_or_its_steps_grow_again(script, main, tmp_path):
    def saved_beta(*flags):
        code, _, err = main(*flags)
        assert (code, complaints(err)) == (0, []), err
        return torch.load(only_run(tmp_path) / "checkpoint.pt", weights_only=True)["agent"]["beta"].item()

    def stop_early(iterations):
        """As if Ctrl-C had ended a run of so many iterations where this one ends"""
        path = only_run(tmp_path) / "checkpoint.pt"
        checkpoint = torch.load(path, weights_only=True)
        checkpoint["args"]["total_timesteps"] = iterations * 128
        torch.save(checkpoint, path)

    tiny = "--num-envs", 2, "--num-steps", 64, "--minibatch-size", 32, "--update-epochs", 1
    flags = "--env-id", "CartPole-v1", "--beta", 4, "--d-targ", 1e3, "--runs-dir", tmp_path
    assert saved_beta(*tiny, *flags, "--total-timesteps", 3 * 128) == 4 / 2**3
    stop_early(5)
    assert saved_beta("--resume", only_run(tmp_path)) == 4 / 2**5
    assert saved_beta("--resume", only_run(tmp_path), "--total-timesteps", 7 * 128) == 4 / 2**2
    stop_early(8)
    assert saved_beta("--resume", only_run(tmp_path), "--beta", 8) == 8 / 2
    assert saved_beta("--resume", only_run(tmp_path), "--total-timesteps", 9 * 128, "--no-anneal-lr") == 4 / 2
    rows = metrics(only_run(tmp_path))
    assert [float(row["losses/beta"]) for row in rows if row["losses/beta"]] == [4, 2, 1, 0.5, 0.25, 4, 2, 8, 4]
