"""What every script promises: to repeat itself, to stop and go on, to stand alone, and to be documented."""

import ast
import json
import re
import shutil
import signal
import sys
import time
from functools import partial

import gymnasium as gym
import imageio
import numpy as np
import pytest
import torch
from helpers import (
    ROOT, SCRIPTS, TRACKING, complaints, contents, environment, finish, iterations, metrics, only_run, run,
    run_here, skip_unless_suited, start, wait_for,
)

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
    """A run's folder after it was asked to stop in the midst of it, and the exit code"""
    process = start(script.path, *script.tiny, "--runs-dir", runs_dir, *flags, env=environment(**variables))
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
    return "--env-id", request.param, "--total-timesteps", script.steps


@pytest.fixture(scope="session")
def whole(script, module, task, tmp_path_factory):
    """A run from start to end"""
    return train(script, tmp_path_factory.mktemp("whole"), *task, main=partial(run_here, module))


@pytest.fixture(scope="session")
def stopped(script, task, tmp_path_factory):
    """The same run, stopped by Ctrl-C: its folder, exit code"""
    return interrupt(script, tmp_path_factory.mktemp("stopped"), *task)


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
    again, other = (train(script, tmp_path / seed, *task, "--seed", seed, main=main) for seed in ("1", "2"))
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
    folder = train(script, tmp_path, "--env-id", env_id, "--capture-video", "--total-timesteps", script.batch)
    (path,) = folder.glob("videos/*episode-0.mp4")
    with imageio.get_reader(path) as video:
        first, *_, last = video
    assert first.ndim == 3 and min(first.shape) > 2 and first.std() > 1  # a picture, not one colour
    assert not np.array_equal(first, last)  # in which something moves


@pytest.mark.filterwarnings("ignore:.*out of date")
@pytest.mark.parametrize("env_id, camera", [("Hopper-v4", 0), ("Hopper-v5", 0), ("InvertedPendulum-v4", -1)])
def test_the_camera_follows_a_body_that_the_model_has_a_camera_for(script, module, env_id, camera):
    skip_unless_suited(script, "Hopper-v4")
    assert module.make_env(env_id, render=True).unwrapped.mujoco_renderer.camera_id == camera


@TRACKING
def test_tracking_offline_leaves_its_run_in_the_runs_folder(script, tmp_path):
    folders = {f"WANDB_{name}_DIR": str(tmp_path / "wandb") for name in ("CONFIG", "CACHE", "DATA")}
    code, _, err = run(script.path, *script.tiny, "--env-id", script.environments[-1], "--track",
                       "--total-timesteps", script.batch, "--runs-dir", tmp_path / "runs", cwd=tmp_path,
                       env=environment(WANDB_MODE="offline", **folders))
    assert code == 0, err
    assert list(only_run(tmp_path / "runs").glob("wandb/offline-run-*/*.wandb"))


# ── Stopping and going on ───────────────────────────────────────────────────────────────────────────────────

def assert_saved_in_the_midst(script, folder):
    steps = column(folder, "global_step")
    ends = [float(row["global_step"]) for row in metrics(folder) if row["losses/policy_loss"]]
    assert ends[-1] <= steps[-1] <= load(folder)["global_step"] < script.steps - script.batch
    assert not script.row_per_batch or ends[-1] == load(folder)["global_step"]
    assert steps == sorted(steps) and len(set(ends)) == len(ends)


def test_ctrl_c_saves_and_exits_with_130(script, stopped):
    folder, code = stopped
    assert code == 130
    assert_saved_in_the_midst(script, folder)


def test_a_run_that_is_terminated_saves_and_closes_its_environments(script, tmp_path):
    closed = tmp_path / "closed"
    closed.mkdir()
    flags = "--env-id", "envs:Closing-v0", "--total-timesteps", script.steps
    folder, code = interrupt(script, tmp_path / "runs", *flags, number=signal.SIGTERM, CLOSED=str(closed))
    assert code == 128 + signal.SIGTERM
    assert_saved_in_the_midst(script, folder)
    opened = 2  # two actors; or a worker, and the environment that was tried before
    assert len([*closed.iterdir()]) == (1 if script.name == "ddpg" else opened)


def test_a_second_ctrl_c_does_not_wait_for_the_iterations_end(script, tmp_path):
    process = start(script.path, *script.tiny, "--env-id", "envs:Stuck-v0", "--runs-dir", tmp_path)
    assert process.stdout.readline() == "stuck\n"
    began = time.time()
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
    code, _, err = finish(process)
    assert (code, complaints(err)) == (130, []) and time.time() - began < 30


def assert_same_run(one, other):
    assert metrics(one) == metrics(other)
    one, other = load(one), load(other)
    assert one["global_step"] == other["global_step"] and one["returns"] == other["returns"]
    assert one["agent"].keys() == other["agent"].keys()
    assert all(torch.equal(x, other["agent"][name]) for name, x in one["agent"].items())


@pytest.mark.parametrize("left_behind", ["", "99999,1.0,"], ids=["interrupted", "crashed_later"])
def test_a_resumed_run_equals_an_uninterrupted_one(main, whole, stopped, tmp_path, left_behind):
    folder = shutil.copytree(stopped[0], tmp_path / "moved")
    with open(folder / "metrics.csv", "a") as file:
        file.write(left_behind)
    code, _, err = main("--resume", folder)
    assert (code, complaints(err)) == (0, [])
    assert_same_run(folder, whole)
    assert sorted(contents(folder)) == sorted(contents(whole))


def test_a_save_before_the_next_row_counts_no_row_that_was_cut(handlers, module, trained, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "moved")
    size = (folder / "metrics.csv").stat().st_size
    with open(folder / "metrics.csv", "a") as file:
        file.write("99999,1.0,")
    checkpoint = module.load_checkpoint(str(folder))
    with module.Run(module.Args(**checkpoint["args"] | {"resume": str(folder)}), checkpoint) as again:
        again.save(checkpoint["global_step"], {})
    assert load(folder)["metrics_size"] == (folder / "metrics.csv").stat().st_size == size


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
def test_a_saved_agent_plays_as_before_it_was_saved(script, module, main, monkeypatch, tmp_path, env_id):
    skip_unless_suited(script, env_id)
    saved = []
    save = module.Run.save

    def spy(run, step, state):
        saved.append({name: x.clone() for name, x in state["agent"].items()})
        save(run, step, state)

    monkeypatch.setattr(module.Run, "save", spy)
    flags = "--env-id", env_id, "--total-timesteps", 3 * script.batch, "--runs-dir", tmp_path
    assert main(*script.tiny, *flags)[0] == 0

    def play(state):
        env = Watched(module.make_env(env_id))
        agent = module.Agent(env.observation_space, env.action_space)
        agent.load_state_dict(state)
        torch.manual_seed(7)
        results = module.evaluate(agent, env, 4)
        assert all(torch.equal(x, state[name]) for name, x in agent.state_dict().items())  # it only played
        for obs, action in env.seen:  # by the most probable actions
            mode = agent.act(torch.as_tensor(obs, dtype=torch.float32)[None])
            (mode,) = mode[0] if isinstance(mode, tuple) else mode  # one that remembers tells what
            assert np.array_equal(mode.detach(), action)
        assert len(env.seen) == sum(length for _, length in results) and len(results) == 4
        return results

    assert play(saved[-1]) == play(module.load_checkpoint(str(only_run(tmp_path)))["agent"])


def test_evaluating_prints_each_episode_and_the_mean_and_changes_nothing(module, main, monkeypatch, trained):
    def spy(agent, *others, evaluate=module.evaluate):
        evaluated.append(agent.state_dict())
        return evaluate(agent, *others)

    evaluated, before = [], contents(trained)
    monkeypatch.setattr(module, "evaluate", spy)
    code, out, err = main("--evaluate", trained, "--eval-episodes", 3)
    assert (code, err) == (0, "")
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


def test_a_discrete_action_is_a_number_that_a_table_can_be_asked_for(script, main, tmp_path):
    skip_unless_suited(script, "CartPole-v1")
    folder = train(script, tmp_path, "--env-id", "envs:Keyed-v0", "--total-timesteps", 2 * script.batch, main=main)
    code, _, err = main("--evaluate", folder, "--eval-episodes", 1)
    assert (code, err) == (0, "")


def test_an_evaluation_may_draw_other_episodes_by_another_seed(main, trained):
    outputs = {main("--evaluate", trained, "--eval-episodes", 2, "--seed", seed) for seed in (1, 2)}
    assert len(outputs) == 2 and all((code, err) == (0, "") for code, _, err in outputs)


# ── The source ──────────────────────────────────────────────────────────────────────────────────────────────

IDENTIFIER = r"[A-Z][A-Z0-9]*(?:-[A-Z0-9]+)+"


def arguments(script):
    (args,) = [node for node in script.syntax.body if isinstance(node, ast.ClassDef) and node.name == "Args"]
    return {field.target.id: field for field in args.body}


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
        if getattr(part, "name", None) in ("Args", "check"):  # to name or to validate a flag isn't to heed it
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
    assert len(defined) >= 3 and families(cited) == families(defined)


def test_a_detail_beyond_the_slides_gives_its_reason(script):
    details = re.findall(r"\[DETAIL\]([^\n]*)", script.source.partition('"""\n\nimport')[2])
    assert details and all(len(reason.split()) >= 3 for reason in details)


def test_the_metadata_names_what_requirements_txt_does(script):
    requirements = set((ROOT / "requirements.txt").read_text().split())
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
