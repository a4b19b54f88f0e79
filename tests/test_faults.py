"""What befalls long runs: they are killed, moved away, robbed of their disk, and asked for extremes."""

import resource
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch
from faults import SECONDS, hurried, kill, last_save
from helpers import complaints, contents, finish, metrics, only_run, run_here, start, wait_for

LATEST = 30 * SECONDS  # for a checkpoint, however busy the machine


def steps_of(script):
    """Of a run that is long enough to be killed twice"""
    return 900 if script.name == "ddpg" else 2 * script.steps  # a step of ddpg's takes ten times as long


def task_of(script):
    return "--env-id", "Pendulum-v1", "--total-timesteps", steps_of(script)


@pytest.fixture(scope="session")
def whole(script, module, tmp_path_factory):
    """A run that nothing befalls"""
    runs = tmp_path_factory.mktemp("whole")
    code, _, err = run_here(module, *script.tiny, *task_of(script), "--runs-dir", runs)
    assert (code, complaints(err)) == (0, [])
    return only_run(runs)


def assert_goes_on_as(folder, whole, main):
    code, _, err = main("--resume", folder)
    assert (code, complaints(err)) == (0, [])
    assert metrics(folder) == metrics(whole)
    states = [torch.load(path / "checkpoint.pt", weights_only=True)["agent"] for path in (folder, whole)]
    assert all(torch.equal(x, states[1][name]) for name, x in states[0].items())
    assert sorted(contents(folder)) == ["checkpoint.pt", "config.json", "metrics.csv"]


# ── Ends ────────────────────────────────────────────────────────────────────────────────────────────────────

def test_a_run_that_is_killed_twice_goes_on_as_if_it_had_not_been(script, main, whole, tmp_path):
    first = kill(script, tmp_path, *script.tiny, *task_of(script), "--runs-dir", tmp_path, seed=1)
    second = kill(script, tmp_path, "--resume", only_run(tmp_path), seed=2)
    assert 0 < first.step < second.step < steps_of(script)
    assert first.age < LATEST and second.age < LATEST
    assert_goes_on_as(only_run(tmp_path), whole, main)


def begin(script, runs):
    """A run that has saved"""
    process = hurried(script, *script.tiny, *task_of(script), "--runs-dir", runs)
    wait_for(lambda: last_save(runs), process)
    return process


def test_a_disk_that_fills_up_costs_what_came_after_the_last_checkpoint(script, main, whole, tmp_path):
    process = begin(script, tmp_path)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1000, 1000))  # bytes of any file that it writes to
    code, _, err = finish(process)
    (line,) = complaints(err)
    assert code == 2 and line.startswith("error: ") and "File too large" in line and "room" in line
    assert_goes_on_as(only_run(tmp_path), whole, main)


def test_a_run_whose_folder_is_moved_away_ends_in_one_line_and_goes_on_there(script, main, whole, tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    process = begin(script, here)
    shutil.move(here, there)
    code, _, err = finish(process)
    (line,) = complaints(err)
    assert code == 2 and line.startswith("error: ") and str(here) in line and not here.exists()
    assert_goes_on_as(only_run(there), whole, main)


def test_ctrl_c_ends_an_evaluation_without_a_word(script, trained, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "run")
    before = contents(folder)
    process = start(script.path, "--evaluate", folder, "--eval-episodes", 1000)
    assert process.stdout.readline().startswith("episode 0")
    process.send_signal(signal.SIGINT)
    code, _, err = finish(process)
    assert (code, err) == (130, "") and contents(folder) == before


def test_two_runs_that_start_in_the_same_second_have_a_folder_each(module, monkeypatch, tmp_path):
    clock = iter([7.1, 7.2, 7.9, 8.1])
    monkeypatch.setattr(module, "time", SimpleNamespace(time=lambda: next(clock), sleep=lambda _: None))
    first, second = (module.new_folder(module.Args(env_id="a/b", runs_dir=str(tmp_path))) for _ in range(2))
    names = [f"a-b__{module.SCRIPT}__1__{time}" for time in (7, 8)]
    assert [first, second] == [tmp_path / name for name in names] == sorted(tmp_path.iterdir())


def test_a_simulator_that_does_not_repeat_itself_costs_its_running_episodes_and_no_more(script, main, tmp_path):
    flags = *script.tiny, "--env-id", "envs:Whimsical-v0", "--runs-dir", tmp_path
    assert main(*flags, "--total-timesteps", 3 * script.batch)[0] == 0
    (folder,) = tmp_path.iterdir()
    before = metrics(folder)
    code, _, err = main("--resume", folder, "--total-timesteps", 6 * script.batch)
    assert (code, complaints(err)) == (0, [])
    rows = metrics(folder)
    assert rows[:len(before)] == before and len(rows) > len(before)
    lengths = sum(int(row["charts/episodic_length"]) for row in rows if row["charts/episodic_length"])
    actors, longest = 2, 20
    assert 0 <= int(rows[-1]["global_step"]) - lengths <= 2 * actors * longest  # half of which run at the end


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

def test_a_warning_that_a_user_can_do_something_about_is_shown(script, main, tmp_path):
    flags = "--env-id", "envs:Warning-v0", "--total-timesteps", script.batch, "--runs-dir", tmp_path
    code, _, err = main(*script.tiny, *flags)
    assert code == 0 and "UserWarning: the joints need oil" in err


@pytest.mark.parametrize("env_id", ["HalfCheetah-v4", "InvertedDoublePendulum-v4", "Swimmer-v5", "Reacher-v4"])
def test_warnings_that_a_user_can_do_nothing_about_are_not(script, main, tmp_path, env_id):
    flags = "--env-id", env_id, "--total-timesteps", script.batch, "--runs-dir", tmp_path
    code, _, err = main(*script.tiny, *flags)
    assert (code, complaints(err)) == (0, [])
