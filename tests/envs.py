"""Environments to test with: a script reaches them by PYTHONPATH=tests and --env-id envs:Name-v0."""

import time

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete, MultiDiscrete

NUMBER = Box(-np.inf, np.inf, (1,), np.float64)
ONE = Box(np.float32(-1), np.float32(1), (1,))


class Counter(gym.Env):
    """Observes the steps taken so far; each is rewarded by 1; terminates after `length`."""

    observation_space, action_space = NUMBER, Discrete(2)

    def __init__(self, length=5, render_mode=None):
        self.length, self.t = length, 0

    def observe(self):
        return np.full(1, self.t, np.float64)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.observe(), {}

    def step(self, action):
        self.t += 1
        return self.observe(), self.reward(action), self.t == self.length, False, {}

    def reward(self, action):
        return 1.0


class Blind(Counter):
    """Always observes 0."""

    def observe(self):
        return np.zeros(1)


class Echo(Counter):
    """The reward is the action that arrived."""

    action_space = Box(np.float32(-2), np.float32(4), (1,))

    def reward(self, action):
        return float(action[0])


class Unrepeatable(Counter):
    """No two episodes are the same length, whatever the seed."""

    episodes = 0

    def reset(self, seed=None, options=None):
        self.episodes += 1
        self.length = 100 - 10 * self.episodes
        return super().reset(seed=seed)


class NanReward(Counter):
    action_space = ONE

    def reward(self, action):
        return np.nan


class NanObservation(Counter):
    action_space = ONE

    def observe(self):
        return np.full(1, np.nan if self.t else 0.0)


class Crash(Counter):
    action_space = ONE

    def reset(self, seed=None, options=None):
        raise RuntimeError("the simulator\nisn't there")


class Stuck(Counter):
    """Says so, and then takes a minute for each step."""

    action_space = ONE

    def step(self, action):
        print("stuck", flush=True)
        time.sleep(60)
        return super().step(action)


class Spaces(Counter):
    """Observes and takes whatever the spaces say."""

    def __init__(self, observation_space=NUMBER, action_space=Discrete(2), render_mode=None):
        super().__init__()
        self.observation_space, self.action_space = observation_space, action_space

    def observe(self):
        return self.observation_space.sample()


for env in (Counter, Blind, Echo, Unrepeatable, NanReward, NanObservation, Crash, Stuck):
    gym.register(f"{env.__name__}-v0", env)
for name, spaces in {
    "DictObservation": {"observation_space": Dict(x=NUMBER)},
    "DiscreteObservation": {"observation_space": Discrete(5)},
    "ImageObservation": {"observation_space": Box(0, 255, (8, 8, 3), np.uint8)},
    "MultiDiscreteAction": {"action_space": MultiDiscrete([2, 3])},
    "MatrixAction": {"action_space": Box(-1, 1, (2, 2))},
    "IntegerAction": {"action_space": Box(0, 9, (2,), np.int64)},
    "UnboundedAction": {"action_space": Box(-np.inf, np.inf, (2,))},
    "DiscreteFromOneAction": {"action_space": Discrete(3, start=1)},
}.items():
    gym.register(f"{name}-v0", Spaces, kwargs=spaces)
