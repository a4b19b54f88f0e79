"""Environments to test with: a script reaches them by PYTHONPATH=tests and --env-id envs:Name-v0."""

import math
import os
import random
import time
import uuid
import warnings
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
from gymnasium.envs.classic_control import PendulumEnv
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


class Keyed(Counter):
    """Looks an action up in a table."""

    def reward(self, action):
        return {0: 0.0, 1: 1.0}[action]


class NanReward(Counter):
    action_space = ONE

    def reward(self, action):
        return np.nan


class NanObservation(Counter):
    action_space = ONE

    def observe(self):
        return np.full(1, np.nan if self.t else 0.0)


class InfiniteReward(NanReward):
    def reward(self, action):
        return np.inf


class InfiniteObservation(Counter):
    action_space = ONE

    def observe(self):
        return np.full(1, np.inf if self.t else 0.0)


class Crash(Counter):
    action_space = ONE

    def reset(self, seed=None, options=None):
        raise RuntimeError("the simulator\nisn't there")


class CrashLater(Counter):
    """Its fourth step raises."""

    action_space = ONE

    def step(self, action):
        if self.t == 3:
            raise ZeroDivisionError("the wheels\ncame off")
        return super().step(action)


class CrashAtReset(CrashLater):
    """Its second reset raises."""

    def reset(self, seed=None, options=None):
        if self.t == 3:
            raise FileNotFoundError("where's the track?")
        return super().reset(seed=seed)

    def step(self, action):
        obs, reward, _, truncated, info = Counter.step(self, action)
        return obs, reward, self.t == 3, truncated, info


class Failing(PendulumEnv):
    """Like Pendulum-v1, but for its 30th step, which raises."""

    steps = 0

    def step(self, action):
        self.steps += 1
        if self.steps == 30:
            raise ConnectionResetError("the plug is out")
        return super().step(action)


class Old(Counter):
    """Answers as Gym did before it told terminated from truncated."""

    action_space = ONE

    def step(self, action):
        return super().step(action)[:4]


class NoReward(Counter):
    action_space = ONE

    def reward(self, action):
        return None


class Misshapen(Counter):
    """Observes two numbers, and says one."""

    action_space = ONE

    def observe(self):
        return np.zeros(2)


class Rich(Counter):
    """Rewards of a million, either way."""

    action_space = ONE

    def reward(self, action):
        return 1e6 * float(np.sign(action[0]))


class Momentary(Counter):
    """Every state is terminal."""

    action_space = ONE

    def __init__(self, render_mode=None):
        super().__init__(length=1)


class Endless(Counter):
    """Only the time limit ends it."""

    action_space = ONE

    def __init__(self, render_mode=None):
        super().__init__(length=math.inf)

    def observe(self):
        return np.full(1, math.sin(self.t))


class Closing(Endless):
    """Leaves a file where it is told to, as it is closed."""

    def close(self):
        Path(os.environ["CLOSED"], uuid.uuid4().hex).touch()


class Warning(Endless):
    """Has something to say that concerns the user."""

    def reset(self, seed=None, options=None):
        warnings.warn("the joints need oil")
        return super().reset(seed=seed)


class Stuck(Counter):
    """Says so in its 300th step, which takes an hour."""

    action_space = ONE
    steps = 0

    def step(self, action):
        self.steps += 1
        if self.steps == 300:
            print("stuck", flush=True)
            time.sleep(3600)
        return super().step(action)


class Held(Counter):
    """Waits in its 200th step until there is the file $RELEASE."""

    action_space = ONE
    steps = 0

    def step(self, action):
        self.steps += 1
        while self.steps == 200 and not os.path.exists(os.environ["RELEASE"]):
            time.sleep(0.01)
        return super().step(action)


class Chance(Counter):
    """Draws from all generators that there are."""

    action_space = Box(np.float32(-1), np.float32(1), (1,))

    def reward(self, action):
        return np.random.random() + random.random() + float(self.action_space.sample()[0]) + self.np_random.random()


class Seeded(Counter):
    """Leaves the seeds of its episodes in a file."""

    action_space = ONE

    def reset(self, seed=None, options=None):
        with open(os.environ["SEEDS"], "a") as file:
            print(seed, file=file)
        return super().reset(seed=seed)


class Reversed(Counter):
    """Observes views that run backwards, in the other byte order or as objects."""

    observation_space, action_space = Box(-np.inf, np.inf, (3,)), ONE

    def observe(self):
        numbers = np.arange(3.0) + self.t
        return [numbers[::-1], numbers.astype(">f4"), numbers.astype(object)][self.t % 3]


class Wide(Counter):
    """Observes as many numbers as it is told to."""

    action_space = ONE

    def __init__(self, render_mode=None):
        super().__init__()
        self.observation_space = Box(-np.inf, np.inf, (int(os.environ["WIDTH"]),))

    def observe(self):
        return np.zeros(self.observation_space.shape)


class NoRenderMode(Counter):
    """Takes no render_mode."""

    action_space = ONE

    def __init__(self):
        super().__init__()


class Drawn(Counter):
    """Has a model like MuJoCo's, but draws it by itself."""

    metadata, action_space, model = {"render_modes": ["rgb_array"], "render_fps": 30}, ONE, SimpleNamespace(ncam=1)

    def __init__(self, render_mode=None):
        super().__init__()
        self.render_mode = render_mode

    def render(self):
        return np.full((8, 8, 3), self.t, np.uint8)


class ArrayReward(Counter):
    action_space = ONE

    def reward(self, action):
        return np.array([1.0])


class Spaces(Counter):
    """Observes and takes whatever the spaces say."""

    metadata = {"render_modes": ["rgb_array"]}

    def __init__(self, observation_space=NUMBER, action_space=Discrete(2), render_mode=None):
        super().__init__()
        self.observation_space, self.action_space = observation_space, action_space

    def observe(self):
        return self.observation_space.sample()


for env in (
    Counter, Blind, Echo, Held, Keyed, Chance, Seeded, Reversed, Wide, NoRenderMode, Drawn, ArrayReward, NanReward,
    NanObservation, InfiniteReward, InfiniteObservation, Crash, CrashLater, CrashAtReset, Failing, Old, NoReward,
    Misshapen, Rich, Momentary, Warning, Stuck,
):
    gym.register(f"{env.__name__}-v0", env)
gym.register("Endless-v0", Endless, max_episode_steps=1_000_000)
gym.register("Closing-v0", Closing, max_episode_steps=100)
for name, spaces in {
    "DictObservation": {"observation_space": Dict(x=NUMBER)},
    "DiscreteObservation": {"observation_space": Discrete(5)},
    "ImageObservation": {"observation_space": Box(0, 255, (8, 8, 3), np.uint8)},
    "MultiDiscreteAction": {"action_space": MultiDiscrete([2, 3])},
    "MatrixAction": {"action_space": Box(-1, 1, (2, 2))},
    "IntegerAction": {"action_space": Box(0, 9, (2,), np.int64)},
    "Undrawn": {"action_space": ONE},
    "UnboundedAction": {"action_space": Box(-np.inf, np.inf, (2,))},
    "DiscreteFromOneAction": {"action_space": Discrete(3, start=1)},
}.items():
    gym.register(f"{name}-v0", Spaces, kwargs=spaces)
