"""What every script promises: to repeat itself, to stop and go on, to stand alone, and to be documented."""

import ast
import copy
import csv
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import tracemalloc
from functools import partial
from importlib.metadata import version

import gymnasium as gym
import imageio
import numpy as np
import pytest
import torch
from helpers import (
    ENDLESS, ROOT, SCRIPTS, TRACKING, complaints, contents, environment, finish, iterations, metrics, only_run, run,
    run_here, skip_unless_suited, start, wait_for, wait_for_steps,
)
from tqdm import tqdm

SHARED_FLAGS = (
    "env-id seed total-timesteps cuda no-cuda track wandb-project-name wandb-entity capture-video runs-dir "
    "resume evaluate eval-episodes"
).split()


def train(script, runs_dir, *flags, main=None):
    """A run's folder: of a process, or of `main` in this one, which starts sooner"""
    flags = *script.tiny, "--runs-dir", runs_dir, *flags
    code, _, err = main(*flags) if main else run(script.path, *flags)
    assert (code, complaints(err)) == (0, []), err
    return only_run(runs_dir)


def interrupt(script, runs_dir, *flags, number=signal.SIGINT, **variables):
    """The folder of an endless run after it was asked to stop, and the exit code"""
    process = start(script.path, *script.tiny, *ENDLESS, "--runs-dir", runs_dir, *flags, env=environment(**variables))
    wait_for(lambda: list(runs_dir.glob("*/metrics.csv")), process)
    wait_for(lambda: iterations(only_run(runs_dir)), process)
    process.send_signal(number)
    code, out, err = finish(process)
    assert complaints(err) == [] and "stopped early" in out
    return only_run(runs_dir), code


def is_as_long(script, steps, batches):
    return steps >= batches - script.batch if script.whole_episodes else steps == batches


def load(run_folder):
    return torch.load(run_folder / "checkpoint.pt", weights_only=True)


def column(run_folder, name):
    return [float(row[name]) for row in metrics(run_folder) if row[name]]


@pytest.fixture(scope="session", params=["Hopper-v4", "CartPole-v1"])
def task(script, request):
    skip_unless_suited(script, request.param)
    return "--env-id", request.param


@pytest.fixture(scope="session")
def whole(script, module, task, tmp_path_factory):
    """A run from start to end"""
    flags = *task, "--total-timesteps", script.steps
    return train(script, tmp_path_factory.mktemp("whole"), *flags, main=partial(run_here, module))


@pytest.fixture(scope="session")
def stopped(script, tmp_path_factory):
    """A run that was stopped by Ctrl-C: its folder, exit code"""
    return interrupt(script, tmp_path_factory.mktemp("stopped"), "--env-id", script.environments[-1])


# ── Running ─────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("env_id", ["Hopper-v4", "Hopper-v5", "CartPole-v1", "Pendulum-v1"])
def test_an_environment_of_each_kind_runs_and_leaves_a_checkpoint_and_metrics(script, main, env_id, tmp_path):
    skip_unless_suited(script, env_id)
    folder = train(script, tmp_path, "--env-id", env_id, "--total-timesteps", 3 * script.batch, main=main)
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint.pt", "config.json", "metrics.csv"]
    assert json.loads((folder / "config.json").read_text())["args"]["env_id"] == env_id
    assert is_as_long(script, load(folder)["global_step"], 3 * script.batch)
    header = (folder / "metrics.csv").read_text().partition("\n")[0].split(",")
    assert header[0] == "global_step"
    assert {"charts/episodic_return", "charts/SPS", "losses/policy_loss"} <= set(header)
    assert not script.row_per_batch or len(column(folder, "losses/policy_loss")) == 3


def test_the_same_seed_gives_the_same_metrics_and_another_seed_others(script, main, task, whole, tmp_path):
    flags = *task, "--total-timesteps", script.steps
    again, other = (train(script, tmp_path / seed, *flags, "--seed", seed, main=main) for seed in ("1", "2"))
    assert metrics(again) == metrics(whole) != metrics(other)


def test_a_task_is_learned(script, main, tmp_path):
    env_id, threshold, flags = script.learns
    code, _, err = main("--env-id", env_id, "--runs-dir", tmp_path, *flags)
    assert code == 0, err
    returns = column(only_run(tmp_path), "charts/episodic_return")
    assert len(returns) >= script.last and np.mean(returns[-script.last:]) >= threshold


def test_a_copy_alone_in_an_empty_folder_runs(script, tmp_path):
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(script.path, alone)
    code, _, err = run(alone / script.path.name, *script.tiny, "--total-timesteps", script.batch,
                       "--env-id", script.environments[-1], "--runs-dir", "here", cwd=alone,
                       env=environment(PYTHONPATH=None))
    assert (code, complaints(err)) == (0, [])
    assert sorted(path.name for path in alone.iterdir()) == sorted(["here", script.path.name])
    assert (only_run(alone / "here") / "checkpoint.pt").is_file()


def test_captured_video_plays_and_needs_no_screen(script, tmp_path):
    env_id = script.environments[-2]
    steps = 40 if env_id == "Hopper-v5" else script.batch  # whose pictures take long
    folder = train(script, tmp_path, "--env-id", env_id, "--capture-video", "--total-timesteps", steps)
    (path,) = folder.glob("videos/*/*episode-0.mp4")
    with imageio.get_reader(path) as video:
        first, *_, last = video
    assert first.ndim == 3 and min(first.shape) > 2 and first.std() > 1  # a picture, not one colour
    assert not np.array_equal(first, last)  # in which something moves


@pytest.mark.filterwarnings("ignore:.*out of date")
@pytest.mark.parametrize("env_id, camera", [("Hopper-v4", 0), ("Hopper-v5", 0), ("InvertedPendulum-v4", -1)])
def test_the_camera_follows_a_body_that_the_model_has_a_camera_for(script, module, env_id, camera, tmp_path):
    skip_unless_suited(script, "Hopper-v4")
    assert module.make_env(env_id, tmp_path / "videos").unwrapped.mujoco_renderer.camera_id == camera


def test_an_environment_that_draws_a_model_by_itself_is_filmed(module, tmp_path):
    env = module.make_env("envs:Drawn-v0", tmp_path / "videos")
    env.reset(seed=1)
    env.step(np.zeros(1))
    env.close()
    assert [*tmp_path.glob("videos/*.mp4")]


def tracked(run_folder, kind):
    """The records of a kind that a run has left for Weights & Biases, whose files are a LevelDB log"""
    from wandb.proto import wandb_internal_pb2

    found = []
    for path in sorted(run_folder.glob("wandb/offline-run-*/*.wandb")):
        data, at, part = path.read_bytes(), 7, b""
        while at + 7 <= len(data):
            if (left := 32768 - at % 32768) < 7:  # of a block: no room for another header
                at += left
                continue
            _, size, piece = struct.unpack("<IHB", data[at:at + 7])
            part += data[at + 7:at + 7 + size]
            at += 7 + size
            if piece in (1, 4):  # whole, or the last
                record, part = wandb_internal_pb2.Record.FromString(part), b""
                if record.WhichOneof("record_type") == kind:
                    found.append(getattr(record, kind))
    return found


def track(script, tmp_path, *flags):
    folders = {f"WANDB_{name}_DIR": str(tmp_path / "wandb") for name in ("CONFIG", "CACHE", "DATA")}
    return start(script.path, *flags, "--track", cwd=tmp_path, env=environment(WANDB_MODE="offline", **folders))


def sent(run_folder):
    """Each row that was sent: its numbers, but for the speed"""
    rows = [{"/".join(item.nested_key) or item.key: item.value_json for item in history.item}
            for history in tracked(run_folder, "history")]
    return [{name: float(x) for name, x in row.items() if name[0] != "_" and name != "charts/SPS"} for row in rows]


@TRACKING
def test_what_is_tracked_are_the_rows_of_the_metrics_none_twice_even_after_a_kill(script, tmp_path):
    flags = *script.tiny, "--env-id", script.environments[-1], "--runs-dir", tmp_path / "runs"
    process = track(script, tmp_path, *flags, *ENDLESS)
    wait_for(lambda: list(tmp_path.glob("runs/*/checkpoint.pt")), process)
    folder = only_run(tmp_path / "runs")
    seen = iterations(folder)
    wait_for(lambda: iterations(folder) > seen + 1, process)
    process.kill()
    finish(process)
    process = track(script, tmp_path, "--resume", folder, "--total-timesteps", load(folder)["global_step"] + 2 * script.batch)
    assert finish(process)[0] == 0
    rows, logged = sent(folder), [{name: float(x) for name, x in row.items() if x} for row in metrics(folder)]
    assert len(rows) > 1 and rows[-1] == logged[-1]
    assert rows == [row for row in logged if row in rows]  # the last of those before the kill may have died with it
    assert [end.exit_code for end in tracked(folder, "exit")] == [0]


@TRACKING
def test_a_run_that_fails_is_tracked_as_failed(script, tmp_path):
    flags = *script.tiny, "--env-id", "envs:NanReward-v0", "--runs-dir", tmp_path / "runs"
    assert finish(track(script, tmp_path, *flags))[0] == 2
    assert [end.exit_code for end in tracked(only_run(tmp_path / "runs"), "exit")] == [2]


# ── The same again ──────────────────────────────────────────────────────────────────────────────────────────

def test_an_environment_that_draws_from_other_generators_repeats_itself_too(main, script, tmp_path):
    flags = "--env-id", "envs:Chance-v0", "--total-timesteps", 2 * script.batch
    one, again, other = (train(script, tmp_path / name, *flags, "--seed", name[0], main=main) for name in ("1", "1b", "2"))
    assert metrics(one) == metrics(again) != metrics(other)


def test_an_evaluation_plays_no_episode_that_training_began_with(launched, script, monkeypatch, tmp_path):
    monkeypatch.setenv("SEEDS", str(tmp_path / "seeds"))
    folder = train(script, tmp_path / "runs", "--env-id", "envs:Seeded-v0", "--total-timesteps", 4 * script.batch, main=launched)
    seen = (tmp_path / "seeds").read_text().split()
    assert launched("--evaluate", folder, "--eval-episodes", 20)[0] == 0
    evaluated = (tmp_path / "seeds").read_text().split()[len(seen):]
    assert len(set(evaluated)) == 20 <= len(set(seen)) and not {*evaluated} & {*seen}


# ── What a run shows ────────────────────────────────────────────────────────────────────────────────────────

def test_in_the_midst_of_an_iteration_the_bar_moves_and_a_run_is_left_at_once_even_in_a_step_and_saves(script, tmp_path):
    flags = "--env-id", "envs:Stuck-v0", "--runs-dir", tmp_path
    process = start(script.path, *flags, *ENDLESS, *("--num-workers 1".split() * (script.name == "a3c")))
    assert process.stdout.readline() == f"run: {only_run(tmp_path)}\n"
    assert process.stdout.readline() == "stuck\n"
    if script.name == "a3c":  # whose bar is another process's
        wait_for_steps(process)
    process.send_signal(signal.SIGTERM)
    code, out, err = finish(process)
    assert code == 128 + signal.SIGTERM and "stopped early" in out and "Traceback" not in err
    assert 0 <= load(only_run(tmp_path))["global_step"] <= 8 * 300
    assert any(int(steps) % 2048 for steps in re.findall(r"(\d+)/\d+ \[", err))


def test_the_bar_ends_at_100_percent_whatever_the_total(script, main, tmp_path):
    code, _, err = main(*script.tiny, "--env-id", script.environments[-1], "--total-timesteps", 3 * script.batch + 5,
                        "--runs-dir", tmp_path)
    assert code == 0 and re.split(r"[\r\n]+", err.strip())[-1].startswith("100%"), err


def test_a_run_can_do_without_its_bar(script, module, main, monkeypatch, tmp_path):
    monkeypatch.setattr(module, "tqdm", partial(tqdm, disable=True))  # as TQDM_DISABLE=1 has it
    flags = "--env-id", script.environments[-1], "--total-timesteps", script.steps
    folder = train(script, tmp_path, *flags, main=main)
    with open(folder / "metrics.csv") as file:
        speeds = [float(row["charts/SPS"]) for row in csv.DictReader(file) if row["losses/policy_loss"]]
    assert min(speeds) > 0


def test_the_configuration_names_the_versions_of_what_is_used(script, main, tmp_path):
    folder = train(script, tmp_path, "--env-id", script.environments[0], "--total-timesteps", script.batch, main=main)
    config = json.loads((folder / "config.json").read_text())
    used = ["torch", "gymnasium", "numpy", "mujoco"]
    assert {name: config["versions"][name] for name in used} == {name: version(name) for name in used}


def test_the_help_is_printed_where_there_are_no_greek_letters(script):
    code, out, err = run(script.path, "--help", env=environment(PYTHONIOENCODING="ascii"))
    assert (code, err) == (0, "") and "--total-timesteps" in out and out.isascii()


# ── Stopping and going on ───────────────────────────────────────────────────────────────────────────────────

def assert_saved_in_the_midst(script, folder):
    steps = column(folder, "global_step")
    ends = [float(row["global_step"]) for row in metrics(folder) if row["losses/policy_loss"]]
    assert ends[-1] <= steps[-1] <= load(folder)["global_step"]
    assert not script.row_per_batch or ends[-1] == load(folder)["global_step"]
    assert steps == sorted(steps) and len(set(ends)) == len(ends)


def test_ctrl_c_saves_and_exits_with_130(script, stopped):
    folder, code = stopped
    assert code == 130
    assert_saved_in_the_midst(script, folder)


def test_a_run_that_is_terminated_saves_and_closes_its_environments(script, tmp_path):
    closed = tmp_path / "closed"
    closed.mkdir()
    flags = "--env-id", "envs:Closing-v0"
    folder, code = interrupt(script, tmp_path / "runs", *flags, number=signal.SIGTERM, CLOSED=str(closed))
    assert code == 128 + signal.SIGTERM
    assert_saved_in_the_midst(script, folder)
    assert len([*closed.iterdir()]) == {"ddpg": 1, "a3c": 1}.get(script.name, 2)  # a3c: that which was tried before


def test_ctrl_c_saves_also_when_it_ends_what_the_output_goes_to(script, tmp_path):
    out, into = os.pipe()
    command = [sys.executable, script.path, *script.tiny, *ENDLESS, "--env-id", "Pendulum-v1", "--runs-dir", tmp_path]
    process = subprocess.Popen(command, stdout=into, stderr=into, env=environment())
    os.close(into)
    wait_for(lambda: list(tmp_path.glob("*/metrics.csv")) and iterations(only_run(tmp_path)), process)
    process.send_signal(signal.SIGSTOP)  # so that it doesn't write between the two
    os.close(out)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGCONT)
    assert process.wait(300) != 0
    assert load(only_run(tmp_path))["global_step"] >= column(only_run(tmp_path), "global_step")[-1]


def test_an_actor_keeps_nothing_of_the_steps_that_it_took(module):
    actor = module.Actor(module.make_env("envs:Endless-v0"), tqdm(disable=True))
    action = np.zeros(1, np.float32)
    for _ in range(100):
        actor.step(action)
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    for _ in range(2000):
        actor.step(action)
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert after - before < 20_000  # bytes, ten for a step


@pytest.mark.parametrize("left_behind", ["", "99999,1.0,"], ids=["interrupted", "crashed_later"])
def test_a_resumed_run_goes_on_without_a_gap_or_a_row_twice_and_repeats_itself(script, main, stopped, left_behind, tmp_path):
    before, total, resumed = metrics(stopped[0]), load(stopped[0])["global_step"] + 5 * script.batch, []
    for name in "ab":
        folder = shutil.copytree(stopped[0], tmp_path / name)
        with open(folder / "metrics.csv", "a") as file:
            file.write(left_behind)
        code, _, err = main("--resume", folder, "--total-timesteps", total)
        assert (code, complaints(err)) == (0, [])
        resumed.append(folder)
    one, other = map(metrics, resumed)
    assert one == other and one[:len(before)] == before and len(one) > len(before)
    steps = [int(row["global_step"]) for row in one]
    ends = [int(row["global_step"]) for row in one if row["losses/policy_loss"]]
    assert steps == sorted(steps) and len(set(ends)) == len(ends) and sorted(contents(resumed[0])) == [
        "checkpoint.pt", "config.json", "metrics.csv"]
    if script.row_per_batch:
        assert ends == list(range(script.batch, ends[-1] + 1, script.batch))
    one, other = map(load, resumed)
    assert is_as_long(script, one["global_step"], total)
    assert all(torch.equal(x, other["agent"][name]) for name, x in one["agent"].items())


def test_a_resumed_run_begins_with_all_that_was_learned(script, module, main, monkeypatch, trained, tmp_path):
    folder, begun = shutil.copytree(trained, tmp_path / "moved"), []

    class Spy(module.Run):
        def __init__(self, *args, **parts):
            begun.append({name: copy.deepcopy(part.state_dict()) for name, part in parts.items()})
            super().__init__(*args, **parts)

    monkeypatch.setattr(module, "Run", Spy)
    assert main("--resume", folder, "--total-timesteps", 3 * script.batch)[0] == 0
    (parts,) = begun
    saved = load(trained)
    assert parts.keys() == saved.keys() - {"script", "args", "global_step", "metrics_size"}
    for name, part in parts.items():
        if script.name == "ppo_kl" and name == "agent":  # a longer run begins with the β that is given
            part["beta"] = saved["agent"]["beta"]
        for group in part.get("param_groups", ()):  # whose learning rate is set anew
            group["lr"] = saved[name]["param_groups"][0]["lr"]
        torch.testing.assert_close(part, saved[name], rtol=0, atol=0)


RATES = {
    "reinforce": {"--learning-rate": "policy_optimizer", "--value-lr": "value_optimizer"},
    "trpo": {"--policy-lr": "policy_optimizer", "--value-lr": "value_optimizer"},
    "ddpg": {"--actor-lr": "actor_optimizer", "--critic-lr": "critic_optimizer"},
}


@pytest.mark.parametrize("script", [script for script in SCRIPTS if script.name in RATES], indirect=True,
                         ids=lambda script: script.name)
def test_each_optimiser_has_the_step_size_of_its_flag_also_when_resumed(script, main, tmp_path):
    def rates():
        state = load(only_run(tmp_path))
        return [state[name]["param_groups"][0]["lr"] for name in RATES[script.name].values()]

    first, second = RATES[script.name]
    flags = "--env-id", script.environments[-1], "--total-timesteps", script.steps, first, 0.002, second, 0.004
    folder = train(script, tmp_path, *flags, main=main)
    assert rates() == [0.002, 0.004]
    assert main("--resume", folder, "--total-timesteps", 2 * script.steps, second, 0.003)[0] == 0
    assert rates() == [0.002, 0.003]


def test_a_resumed_run_plays_other_episodes_than_its_beginning(script, launched, monkeypatch, tmp_path):
    monkeypatch.setenv("SEEDS", str(tmp_path / "seeds"))
    flags = "--env-id", "envs:Seeded-v0", "--total-timesteps", script.batch
    folder = train(script, tmp_path / "runs", *flags, main=launched)
    seen = (tmp_path / "seeds").read_text().split()
    assert launched("--resume", folder, "--total-timesteps", 3 * script.batch)[0] == 0
    later = (tmp_path / "seeds").read_text().split()[len(seen):]
    assert len(later) > 5 and not {*later} & {*seen}


def test_a_checkpoint_alone_is_gone_on_with_in_its_own_folder(script, main, trained, tmp_path):
    shutil.copy(trained / "checkpoint.pt", tmp_path)
    code, _, err = main("--resume", tmp_path / "checkpoint.pt", "--total-timesteps", 3 * script.batch)
    assert (code, complaints(err)) == (0, [])
    assert len(metrics(tmp_path)) > 0 and load(tmp_path)["global_step"] > load(trained)["global_step"]


def test_a_checkpoint_under_another_name_is_gone_on_with_in_a_new_folder(main, trained, script, tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    for name in ("config.json", "metrics.csv", "checkpoint.pt"):
        (mine / name).write_text("mine")
    shutil.copy(trained / "checkpoint.pt", mine / "best.pt")
    before = contents(mine)
    flags = "--total-timesteps", 3 * script.batch, "--runs-dir", tmp_path / "runs"
    code, _, err = main("--resume", mine / "best.pt", *flags)
    assert (code, complaints(err)) == (0, []) and contents(mine) == before
    assert only_run(tmp_path / "runs").name.startswith(f"{script.environments[-1]}__{script.name}__1__")
    assert load(only_run(tmp_path / "runs"))["global_step"] > load(trained)["global_step"]


def test_another_environment_is_gone_on_with_in_a_new_folder(main, trained, script, tmp_path):
    other, before = f"gymnasium:{script.environments[-1]}", contents(trained)
    flags = "--env-id", other, "--total-timesteps", 3 * script.batch, "--runs-dir", tmp_path
    code, _, err = main("--resume", trained, *flags)
    assert (code, complaints(err)) == (0, []) and contents(trained) == before
    assert load(only_run(tmp_path))["args"]["env_id"] == other
    assert load(only_run(tmp_path))["global_step"] > load(trained)["global_step"]


def test_a_complete_run_goes_on_with_a_larger_total(script, main, whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "moved")
    more = script.steps + 2 * script.batch
    code, _, err = main("--resume", folder / "checkpoint.pt", "--total-timesteps", more)
    assert (code, complaints(err)) == (0, [])
    before, after = metrics(whole), metrics(folder)
    assert after[:len(before)] == before
    assert is_as_long(script, load(folder)["global_step"], load(whole)["global_step"] + 2 * script.batch)


# ── Evaluating ──────────────────────────────────────────────────────────────────────────────────────────────

class Watched(gym.Wrapper):
    """Remembers each observation and what was done about it."""

    def reset(self, **options):
        self.seen = getattr(self, "seen", [])
        self.obs, info = super().reset(**options)
        return self.obs, info

    def step(self, action):
        self.seen.append((self.obs, action))
        self.obs, *others = super().step(action)
        return self.obs, *others


@pytest.mark.filterwarnings("ignore:.*out of date")
@pytest.mark.parametrize("env_id", ["Hopper-v4", "CartPole-v1"])
def test_a_saved_agent_plays_as_before_it_was_saved(script, module, main, monkeypatch, tmp_path, env_id, capsys):
    skip_unless_suited(script, env_id)
    saved = []
    save = module.Run.save

    def spy(run, step):
        saved.append({name: x.clone() for name, x in run.parts["agent"].state_dict().items()})
        save(run, step)

    monkeypatch.setattr(module.Run, "save", spy)
    flags = "--env-id", env_id, "--total-timesteps", 3 * script.batch, "--runs-dir", tmp_path
    assert main(*script.tiny, *flags)[0] == 0

    def play(state):
        env = Watched(module.make_env(env_id))
        agent = module.Agent(env.observation_space, env.action_space)
        agent.load_state_dict(state)
        torch.manual_seed(7)
        capsys.readouterr()
        module.evaluate(agent, env, 4)
        assert all(torch.equal(x, state[name]) for name, x in agent.state_dict().items())  # it only played
        for obs, action in env.seen:  # by the most probable actions
            mode = agent.act(torch.as_tensor(obs, dtype=torch.float32)[None])
            (mode,) = mode[0] if isinstance(mode, tuple) else mode  # one that remembers tells what
            assert np.array_equal(mode.detach(), action)
        out, _ = capsys.readouterr()
        lengths = [int(length) for length in re.findall(r"length (\d+)", out)]
        assert len(env.seen) == sum(lengths) and len(lengths) == 4
        return out

    assert play(saved[-1]) == play(load(only_run(tmp_path))["agent"])


def test_evaluating_prints_each_episode_and_the_mean_and_changes_nothing(module, main, monkeypatch, trained):
    def spy(agent, *others, evaluate=module.evaluate):
        evaluated.append(agent.state_dict())
        return evaluate(agent, *others)

    evaluated, before = [], contents(trained)
    monkeypatch.setattr(module, "evaluate", spy)
    code, out, err = main("--evaluate", trained, "--eval-episodes", 3)
    assert (code, complaints(err)) == (0, [])
    assert all(torch.equal(x, evaluated[0][name]) for name, x in load(trained)["agent"].items())
    *lines, summary = out.splitlines()
    line_of_one = r"episode (\d+): return (-?[\d.]+), length \d+"
    episodes = [re.fullmatch(line_of_one, line).groups() for line in lines]
    returns = [float(episodic_return) for _, episodic_return in episodes]
    mean, std, count = re.fullmatch(r"return (-?[\d.]+) ± ([\d.]+) over (\d+) episodes", summary).groups()
    assert [number for number, _ in episodes] == ["0", "1", "2"] and count == "3"
    assert float(mean) == pytest.approx(np.mean(returns), abs=0.11)  # of numbers printed with one decimal
    assert float(std) == pytest.approx(np.std(returns), abs=0.11)
    assert contents(trained) == before


def test_an_evaluation_that_does_not_end_shows_its_steps(script, main, tmp_path):
    flags = "--env-id", "envs:Endless-v0", "--total-timesteps", script.batch
    folder = train(script, tmp_path, *flags, main=main)
    process = start(script.path, "--evaluate", folder)
    wait_for_steps(process)
    process.send_signal(signal.SIGINT)
    assert finish(process)[0] == 130


def test_a_discrete_action_is_a_number_that_a_table_can_be_asked_for(script, main, tmp_path):
    skip_unless_suited(script, "CartPole-v1")
    folder = train(script, tmp_path, "--env-id", "envs:Keyed-v0", "--total-timesteps", 2 * script.batch, main=main)
    code, _, err = main("--evaluate", folder, "--eval-episodes", 1)
    assert (code, complaints(err)) == (0, [])


@pytest.mark.parametrize("env_id", ["Reversed", "NoRenderMode", "ArrayReward"])
def test_an_odd_environment_is_learned_from_and_evaluated(script, main, tmp_path, env_id):
    folder = train(script, tmp_path, "--env-id", f"envs:{env_id}-v0", "--total-timesteps", 2 * script.batch, main=main)
    code, out, err = main("--evaluate", folder, "--eval-episodes", 1)
    assert (code, complaints(err)) == (0, []) and "return 5.0" in out


def test_an_evaluation_may_draw_other_episodes_by_another_seed(main, trained):
    outputs = {main("--evaluate", trained, "--eval-episodes", 2, "--seed", seed)[:2] for seed in (1, 2)}
    assert len(outputs) == 2 and all(code == 0 for code, _ in outputs)


def test_a_run_that_was_resumed_can_be_evaluated(script, main, trained, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "moved")
    assert main("--resume", folder, "--total-timesteps", 3 * script.batch)[0] == 0
    code, out, _ = main("--evaluate", folder, "--eval-episodes", 1)
    assert code == 0 and out.startswith("episode 0")


# ── The source ──────────────────────────────────────────────────────────────────────────────────────────────

IDENTIFIER = r"[A-Z][A-Z0-9]*(?:-[A-Z0-9]+)+"


def arguments(script):
    (args,) = [node for node in script.syntax.body if isinstance(node, ast.ClassDef) and node.name == "Args"]
    return {field.target.id: field for field in args.body if isinstance(field, ast.AnnAssign)}


def families(identifiers):
    """{"RF": ["RF-1", "RF-2", …], …}: formulas stand among the mathematics, pseudocode where it is run"""
    found = {}
    for identifier in identifiers:
        found.setdefault(identifier.rpartition("-")[0], []).append(identifier)
    return found


def metadata(script):
    (block,) = re.findall(r"^# /// script\n((?:#.*\n)+?)# ///$", script.source, re.M)
    text = re.sub(r"^# ?", "", block, flags=re.M)
    found = {}
    exec(text.replace("requires-python", "requires_python"), found)  # this part of TOML is Python
    return {name.replace("_", "-"): value for name, value in found.items()}


def test_every_flag_does_something(script):
    used = set()
    for part in script.syntax.body:
        if getattr(part, "name", None) == "Args":  # to name or to validate a flag isn't to heed it
            continue
        for node in ast.walk(part):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("args", "self.args"):
                used.add(node.attr)
    assert set(arguments(script)) - used == set()


def test_every_flag_is_explained(script):
    lines = script.source.splitlines()
    for name, field in arguments(script).items():
        assert re.search(r"  # \S+ \S+", lines[field.lineno - 1]), f"{name} has no comment"


def test_the_help_shows_the_shared_flags(script, main):
    code, out, err = main("--help")
    assert (code, err) == (0, "")
    shown = set(re.findall(r"--([a-z-]+)", out))
    assert {*SHARED_FLAGS, script.actors} - shown == set()
    assert {name.replace("_", "-") for name in arguments(script)} - shown == set()


def test_each_line_of_the_slides_is_cited_where_the_code_does_it_and_in_their_order(script):
    header = ast.get_docstring(script.syntax, clean=False)
    body = script.source.partition(header)[2]
    defined = list(dict.fromkeys(re.findall(rf"^ +({IDENTIFIER})\s", header, re.M)))
    cited = list(dict.fromkeys(re.findall(rf"\[({IDENTIFIER})\]", body)))
    with (ROOT / "tests/slides.csv").open(encoding="utf-8") as file:  # the way to a formula is tested, not run
        tested = {name for row in csv.DictReader(file) if row["file"][:5] == "tests" for name in row["identifiers"].split()}
    assert families(cited) == families([name for name in defined if name not in tested])


def test_a_detail_beyond_the_slides_gives_its_reason(script):
    details = re.findall(r"\[DETAIL\]([^\n]*)", script.source.partition('"""\n\nimport')[2])
    assert details and all(len(reason.split()) >= 3 for reason in details)


def test_the_metadata_names_what_requirements_txt_does(script):
    requirements = set((ROOT / "requirements.txt").read_text().splitlines())
    needed = {other.name: set(metadata(other)["dependencies"]) for other in SCRIPTS}
    assert needed[script.name] <= requirements == set.union(*needed.values())
    assert re.fullmatch(r">=3\.\d+", metadata(script)["requires-python"])


def test_the_licence_stands_in_the_script(script):
    assert "# SPDX-License-Identifier: MIT\n" in script.source


def test_the_script_imports_nothing_but_the_standard_library_and_its_dependencies(script):
    imported = set()
    for node in ast.walk(script.syntax):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(node.module.partition(".")[0])
    declared = {re.match(r"[\w-]+", dependency)[0].replace("-", "_") for dependency in metadata(script)["dependencies"]}
    assert imported - sys.stdlib_module_names - declared == set()
