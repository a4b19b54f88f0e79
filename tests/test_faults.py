"""What befalls long runs: they are killed, moved away, robbed of their disk, and asked for extremes."""

import resource
import shutil
import signal

import pytest
import torch
from faults import hurried, kill, last_save
from helpers import ENDLESS, complaints, contents, finish, metrics, only_run, start, wait_for

TASK = "--env-id", "Pendulum-v1", *ENDLESS


def assert_goes_on(script, folder, main):
    """To an end, and no row of its metrics is missing, or there twice"""
    total = torch.load(folder / "checkpoint.pt", weights_only=True)["global_step"] + 5 * script.batch
    code, _, err = main("--resume", folder, "--total-timesteps", total)
    assert (code, complaints(err)) == (0, [])
    rows = metrics(folder)
    steps, ends = [int(row["global_step"]) for row in rows], [int(x["global_step"]) for x in rows if x["losses/policy_loss"]]
    assert steps == sorted(steps) and len(set(ends)) == len(ends)
    if script.row_per_batch:
        assert ends == list(range(script.batch, total + 1, script.batch))
    lengths = sum(int(row["charts/episodic_length"]) for row in rows if row["charts/episodic_length"])
    assert total - 2 * 2 * 200 <= lengths <= steps[-1]  # two times two actors begin new episodes of 200 steps
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["global_step"] == steps[-1]
    assert sorted(contents(folder)) == ["checkpoint.pt", "config.json", "metrics.csv"]


# ── Ends ────────────────────────────────────────────────────────────────────────────────────────────────────

def test_a_run_that_is_killed_goes_on_without_a_gap(script, main, tmp_path):
    assert kill(script, tmp_path, *script.tiny, *TASK, "--runs-dir", tmp_path, seed=1).step > 0
    assert_goes_on(script, only_run(tmp_path), main)


def begin(script, runs):
    """A run that has saved"""
    process = hurried(script, *script.tiny, *TASK, "--runs-dir", runs)
    wait_for(lambda: last_save(runs), process)
    return process


def test_a_disk_that_fills_up_costs_what_came_after_the_last_checkpoint(script, main, tmp_path):
    process = begin(script, tmp_path)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1000, 1000))  # bytes of any file that it writes to
    code, _, err = finish(process)
    (line,) = complaints(err)
    assert code == 2 and line.startswith("error: ") and "File too large" in line
    assert_goes_on(script, only_run(tmp_path), main)


def test_a_run_whose_folder_is_moved_away_ends_in_one_line_and_goes_on_there(script, main, tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    process = begin(script, here)
    shutil.move(here, there)
    code, _, err = finish(process)
    (line,) = complaints(err)
    assert code == 2 and line.startswith("error: ") and str(here) in line and not here.exists()
    assert_goes_on(script, only_run(there), main)


def test_ctrl_c_ends_an_evaluation_without_a_word(script, trained, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "run")
    before = contents(folder)
    process = start(script.path, "--evaluate", folder, "--eval-episodes", 1000)
    assert process.stdout.readline().startswith("episode 0")
    process.send_signal(signal.SIGINT)
    code, _, err = finish(process)
    assert (code, complaints(err)) == (130, []) and contents(folder) == before


# ── Extremes ────────────────────────────────────────────────────────────────────────────────────────────────

ONE_STEP = {"a3c": ["--t-max", "1"], "reinforce": ["--num-envs", "1"], "ddpg": []}
ONE_STEP |= dict.fromkeys(("trpo", "ppo_clip", "ppo_kl"), ["--num-envs", "1", "--num-steps", "1", "--minibatch-size", "1"])
ONE_SAMPLE = {"a3c": ["--t-max", "1"], "reinforce": ["--baseline"], "ddpg": ["--batch-size", "1"]}
ONE_SAMPLE |= dict.fromkeys(("trpo", "ppo_clip", "ppo_kl"), ["--minibatch-size", "1"])
MANY = {"a3c": ["--num-workers", "4"], "reinforce": ["--num-envs", "256"], "ddpg": ["--num-envs", "256"]}
MANY |= dict.fromkeys(("trpo", "ppo_clip", "ppo_kl"), ["--num-envs", "256", "--num-steps", "1"])
EXTREMES = {
    "one_actor": ("envs:Endless-v0", lambda script: [f"--{script.actors}", "1"]),
    "many_actors": ("envs:Momentary-v0", lambda script: MANY[script.name]),
    "an_iteration_of_one_step": ("envs:Momentary-v0", lambda script: ONE_STEP[script.name]),
    "a_minibatch_of_one": ("envs:Endless-v0", lambda script: ONE_SAMPLE[script.name]),
    "one_number_to_act_with": ("Pendulum-v1", lambda script: []),
    "seventeen_numbers_to_act_with": ("Humanoid-v4", lambda script: []),
    "a_time_limit_of_a_million_steps": ("envs:Endless-v0", lambda script: []),
    "rewards_of_a_million": ("envs:Rich-v0", lambda script: []),
    "no_discount": ("envs:Rich-v0", lambda script: ["--gamma", "1"]),
    "every_state_is_terminal": ("envs:Momentary-v0", lambda script: []),
}


@pytest.mark.filterwarnings("ignore:.*out of date")
@pytest.mark.parametrize("env_id, flags", EXTREMES.values(), ids=EXTREMES)
def test_an_extreme_that_is_allowed_works(script, main, tmp_path, env_id, flags):
    steps = 3 * 256
    late = ["--learning-starts", str(steps - 128)] if script.name == "ddpg" else []  # its gradients take long
    code, _, err = main(*script.tiny, "--env-id", env_id, "--total-timesteps", steps, "--runs-dir", tmp_path,
                        *late, *flags(script))
    assert (code, complaints(err)) == (0, [])
    checkpoint = torch.load(only_run(tmp_path) / "checkpoint.pt", weights_only=True)
    assert steps - 256 < checkpoint["global_step"] <= steps + 256
    assert all(x.isfinite().all() for x in checkpoint["agent"].values())


# ── Warnings ────────────────────────────────────────────────────────────────────────────────────────────────

def test_a_warning_that_a_user_can_do_something_about_is_shown(script, launched, tmp_path):
    flags = "--env-id", "envs:Warning-v0", "--total-timesteps", script.batch, "--runs-dir", tmp_path
    code, _, err = launched(*script.tiny, *flags)
    assert code == 0 and "UserWarning: the joints need oil" in err


@pytest.mark.parametrize("env_id", ["HalfCheetah-v4", "InvertedDoublePendulum-v4", "Swimmer-v5", "Reacher-v4"])
def test_warnings_that_a_user_can_do_nothing_about_are_not(script, main, tmp_path, env_id):
    flags = "--env-id", env_id, "--total-timesteps", script.batch, "--runs-dir", tmp_path
    code, _, err = main(*script.tiny, *flags)
    assert (code, complaints(err)) == (0, [])
