"""The statistics of the benchmarks' report, against what they are by hand."""

import json
import sys

import numpy as np
import pytest
from helpers import ROOT

sys.path.insert(0, str(ROOT / "tests" / "benchmark"))
import report  # noqa: E402
import returns as returns_  # noqa: E402


def test_interquartile_mean_leaves_out_a_quarter_at_each_end():
    scores = np.array([100.0, 1, 2, 3, 4, -50, 5, 6])
    assert report.interquartile_mean(scores) == pytest.approx((2 + 3 + 4 + 5) / 4)
    assert report.interquartile_mean(np.array([[1.0, 2, 6], [0, 0, 3]])) == pytest.approx([3, 1])  # of 3, none


def test_a_score_of_0_is_the_random_policy_and_of_1_the_best_run():
    scores = {"a": np.array([[10.0, 20], [-5, -3]]), "b": np.array([[0.0, 30], [-1, -2]])}
    found = report.normalized(scores, random=np.array([10.0, -11]))
    assert found["a"] == pytest.approx(np.array([[0, 0.5], [0.6, 0.8]]))
    assert found["b"] == pytest.approx(np.array([[-0.5, 1], [1, 0.9]]))


def test_the_interval_draws_seeds_within_their_environment():
    apart = np.array([[0.0, 0, 0], [1, 1, 1]])  # whoever mixes the environments finds an interval around 0.5
    assert report.interval(apart, lambda x: x.mean(-1)) == (0.5, 0.5)
    low, high = report.interval(np.random.default_rng(1).normal(size=(20, 25)), lambda x: x.mean(-1))
    assert (high - low) / 2 == pytest.approx(1.96 / np.sqrt(500), rel=0.1)
    assert low < 0 < high
    sample = np.random.default_rng(2).normal(size=(20, 25))
    low, high = report.interval(sample, report.interquartile_mean)
    assert low < report.interquartile_mean(sample.ravel()) < high and high - low < 0.3


def test_a_gpus_speed_is_compared_in_the_repeats_that_the_cpu_has_too(monkeypatch):
    measured = {("A-v0", "s --no-cuda"): [(10.0, 0), (99.0, 0)], ("A-v0", "s --cuda"): [(5.0, 0)]}
    monkeypatch.setattr(report, "measurements", lambda _: measured)
    assert report.cuda_table().splitlines()[-1] == "| A-v0 | s | 10 | 5 | 0.50 |"


def test_a_method_has_a_share_of_the_human_once_it_was_run_on_every_game(monkeypatch):
    random, human = np.zeros(7), np.full(7, 4.0)
    whole, part = np.array([0.0, 0, 0, 1, 2, 4, 7]), np.array([np.nan, 1, 1, 1, 1, 1, 1])
    scores = {"random": random, "human": human, "whole": whole, "part": part}
    monkeypatch.setattr(report, "atari_scores", lambda: scores)
    assert report.human_table().splitlines()[-1] == "| whole | 7 | 50.0 | 25.0 |"


def test_the_highest_is_of_the_mean_over_seeds_and_10_episodes():
    def run(returns):
        numbers, _ = returns_.summary("ddpg", "Hopper-v4", steps, returns, steps)
        return report.Run(numbers, None, None)

    steps = np.arange(1000, 1_000_001, 1000)
    early, late = (run(np.where((steps <= 500_000) == first, 10.0, 0)) for first in (True, False))
    assert report.highest([early]) == report.highest([late]) == pytest.approx(10)
    assert report.highest([early, late]) == pytest.approx(5)  # each at its best alone, never both
    assert report.highest([run(np.where(steps == 700_000, 10.0, 0))]) == pytest.approx(1)


def test_a_run_is_solved_by_the_first_100_episodes_of_mean_475_and_the_later_ones_are_averaged(tmp_path, monkeypatch):
    folder = tmp_path / "lapsing" / "CartPole-v1"
    folder.mkdir(parents=True)
    lapsing = [0.0] * 7 + [475.0] * 100 + [100.0, 300.0]  # the mean of 100 is 475 at episode 107 alone
    for seed, found in enumerate((lapsing, [474.0] * 120), 1):
        steps = 10 * np.arange(1, len(found) + 1)
        numbers, text = returns_.summary("ppo_clip", "CartPole-v1", steps, np.array(found), steps)
        (folder / f"{seed}.csv").write_text(f"# {json.dumps({'commit': 'abc', **numbers})}\n{text}")
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    assert "| lapsing | 1070 never | 200 – | `abc` |" in report.solved_table()


def test_a_result_has_a_row_for_every_10000_steps_in_which_an_episode_ended():
    steps = np.array([*range(100, 10_001, 100), 10_500, 35_000])
    found = np.array([*range(100), 200.0, 7.0])
    numbers, text = returns_.summary("ppo_clip", "Hopper-v4", steps, found, np.where(steps > 10_000, 5, 3))
    assert text.splitlines()[1:] == ["10000,49.5,3,100,49.5", "20000,200,5,1,51.5", "40000,7,5,1,51.56"]
    assert numbers == {"episodes": 102, "mean": found.mean(), "last_100": found[2:].mean()}
