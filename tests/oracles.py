"""What a script's mathematics is compared with: torch's distributions, decision processes solved exactly."""

import ast
import copy
import inspect

import gymnasium as gym
import numpy as np
import torch
from gymnasium.spaces import Box
from torch import nn
from torch.distributions import Categorical, Independent, Normal


def code(definition):
    """A function's or a class's code, without what only people read."""
    tree = ast.parse(inspect.getsource(definition))
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node) is not None:
            del node.body[0]
    return ast.unparse(tree)


# ── Policies ────────────────────────────────────────────────────────────────────────────────────────────────

def agent_of(module, action_space, S=4):
    """A script's Agent in float64 with a small actor, a policy far from uniform and statistics of its own."""
    agent = module.Agent(Box(-np.inf, np.inf, (S,)), action_space)
    agent.actor = nn.Sequential(nn.Linear(S, 3), nn.Tanh(), nn.Linear(3, agent.actor[-1].out_features))
    agent.double()
    agent.obs_norm.update(3 * torch.randn(50, S) + 1)
    agent.value_norm.update(5 * torch.randn(50, 1) - 2)
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return agent


def distribution(agent, output):
    """The actor's output as torch's πθ(·|s)"""
    if agent.discrete:
        return Categorical(logits=output)
    return Independent(Normal(output, agent.log_std.exp()), 1)


def policy(agent, x):
    """πθ(·|s) of normalised observations"""
    return distribution(agent, agent.actor(x))


def frozen(agent, x):
    """πθ(·|s) that stays as it is when θ moves, and has no gradient"""
    with torch.no_grad():
        return policy(copy.deepcopy(agent), x)


def value(agent, x):
    """V(s) of normalised observations, in the rewards' unit"""
    return agent.critic(x)[..., 0] * agent.value_norm.var.sqrt() + agent.value_norm.mean


def flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors])


def gradient(of, parameters, **options):
    return flat(torch.autograd.grad(of, list(parameters), **options))


def values_and_gradients(function, *tensors):
    tensors = [x.clone().requires_grad_() for x in tensors]
    y = function(*tensors)
    return y.detach(), *torch.autograd.grad((y * torch.arange(1.0, 1 + y.numel())).sum(), tensors)


def assert_same(ours, theirs, *tensors):
    torch.testing.assert_close(values_and_gradients(ours, *tensors), values_and_gradients(theirs, *tensors))


# ── The copy that acts ──────────────────────────────────────────────────────────────────────────────────────

class Clock(gym.Env):
    """Observes the steps taken so far, four times; each is rewarded by 1; terminates after 5."""

    observation_space = Box(-np.inf, np.inf, (4,))

    def __init__(self, action_space):
        self.action_space, self.t = action_space, 0

    def reset(self, seed=None, options=None):
        self.t = 0
        return np.zeros(4), {}

    def step(self, action):
        self.t += 1
        return np.full(4, self.t), 1.0, self.t == 5, False, {}


def assert_equal_to_the_bit(one, other):
    """The agents' parameters and statistics"""
    one, other = one.state_dict(), other.state_dict()
    assert one.keys() == other.keys()
    for name, x in one.items():
        assert torch.equal(x, other[name]), name


def passes_of(network, B, learn):
    """The order in which each pass of `learn()` shows the network its B inputs, of which the first number is their own"""
    minibatches = []

    def look(_, inputs):
        if torch.is_grad_enabled():
            minibatches.append(inputs[0][:, 0])

    network.register_forward_pre_hook(look)
    learn()
    return [order.tolist() for order in torch.cat(minibatches).split(B)]


def assert_each_pass_has_all_in_an_order_of_its_own(passes, numbers):
    assert all(sorted(order) == sorted(numbers) for order in passes)
    assert len(passes) == 3 and len({tuple(order) for order in [*passes, numbers]}) == 4


@torch.no_grad()
def assert_acts_alone(old, agent, collected):
    """The tensors of `collected()` are as `old` draws them, whatever the agent becomes, and `old` stays as it is."""
    def drawn():
        torch.manual_seed(5)
        return [x.clone() for x in collected()]

    before, tensors = copy.deepcopy(old), drawn()
    for x in agent.state_dict().values():
        x += 1
    assert all(map(torch.equal, drawn(), tensors))
    assert_equal_to_the_bit(old, before)
    old.actor[-1].bias[0] += 100
    assert not all(map(torch.equal, drawn(), tensors))


# ── Decision processes ──────────────────────────────────────────────────────────────────────────────────────

class Process:
    """A Markov decision process with so few states and actions that each expectation is a sum.

    Any step may be the last. In an ascending process each state is greater than the one before, so that its
    episodes can be listed."""

    def __init__(self, seed, S, A, gamma, ascending=False):
        rng = torch.Generator().manual_seed(seed)
        P = torch.rand(S, A, S + 1, generator=rng, dtype=torch.float64)
        if ascending:
            P *= torch.ones(S, S + 1).triu(1)[:, None]
        P /= P.sum(-1, keepdim=True)
        self.P, self.gamma, self.shape = P[..., :S], gamma, (S, A)  # P[..., S]: the end
        self.R = torch.randn(S, A, generator=rng, dtype=torch.float64)
        self.start = torch.rand(S, generator=rng, dtype=torch.float64)
        self.start /= self.start.sum()

    def values(self, scores):
        """f_θ (S,A) → V (S,), Q (S,A) of its softmax, which solve the Bellman equation"""
        pi = scores.softmax(-1)
        P, R = torch.einsum("sa,sax->sx", pi, self.P), (pi * self.R).sum(-1)
        V = torch.linalg.solve(torch.eye(len(P), dtype=P.dtype) - self.gamma * P, R)
        return V, self.R + self.gamma * self.P @ V

    def advantages(self, scores):
        V, Q = self.values(scores)
        return Q - V[:, None]

    def J(self, scores):
        return self.start @ self.values(scores)[0]

    def gradient_of_J(self, scores, h=1e-5):
        """By finite differences"""
        steps = h * torch.eye(scores.numel(), dtype=scores.dtype).reshape(-1, *scores.shape)
        differences = [self.J(scores + step) - self.J(scores - step) for step in steps]
        return torch.stack(differences).reshape(scores.shape) / (2 * h)

    def visits(self, scores):
        """Σ_t γ^t p(s_t = s, a_t = a), term by term;   (S,A)"""
        pi, p, total = scores.softmax(-1), self.start, 0
        while p.sum() > 1e-17:
            total = total + p[:, None] * pi
            p = self.gamma * torch.einsum("s,sa,sax->x", p, pi, self.P)
        return total

    def episodes(self, scores, state=None):
        """Each that an ascending process can have: probability, (s_0, s_1, …), (a_0, a_1, …)"""
        pi = scores.softmax(-1)
        S, A = self.shape
        for s in range(S) if state is None else [state]:
            for a in range(A):
                p = pi[s, a] * (self.start[s] if state is None else 1)
                yield p * (1 - self.P[s, a].sum()), (s,), (a,)
                for following in range(s + 1, S):
                    for rest, states, actions in self.episodes(scores, following):
                        yield p * self.P[s, a, following] * rest, (s, *states), (a, *actions)
