"""What a user can mend is told in one line or by tyro, with exit code 2, and nothing is lost; what an environment
raises has its traceback."""

import contextlib
import errno
import io
import math
import multiprocessing
import os
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace

import envs  # noqa: F401, registers them
import numpy as np
import pytest
import torch
from helpers import SCRIPTS, TRACKING, complaints, contents, environment, handlers_kept, only_run, run

FLAGS = {
    "an_unknown_environment": (["--env-id", "Nowhere-v0"], "Nowhere"),
    "an_unknown_version": (["--env-id", "CartPole-v99"], "CartPole"),
    "a_missing_package": (["--env-id", "no_such_package:Env-v0"], "no_such_package"),
    "a_dict_observed": (["--env-id", "DictObservation-v0"], "Dict("),
    "a_dict_observed_and_filmed": (["--env-id", "DictObservation-v0", "--capture-video"], "Dict("),
    "a_number_observed": (["--env-id", "DiscreteObservation-v0"], "Discrete(5)"),
    "an_image_observed": (["--env-id", "ImageObservation-v0"], "(8, 8, 3)"),
    "several_choices_to_act_on": (["--env-id", "MultiDiscreteAction-v0"], "MultiDiscrete"),
    "a_matrix_to_act_with": (["--env-id", "MatrixAction-v0"], "(2, 2)"),
    "integers_to_act_with": (["--env-id", "IntegerAction-v0"], "int64"),
    "actions_from_one_on": (["--env-id", "DiscreteFromOneAction-v0"], "start=1"),
    "no_steps": (["--total-timesteps", "0"], "--total-timesteps"),
    "no_episodes": (["--eval-episodes", "0"], "--eval-episodes"),
    "a_negative_seed": (["--seed", "-1"], "--seed"),
    "a_gamma_that_is_no_number": (["--gamma", "nan"], "--gamma"),
    "a_gamma_above_1": (["--gamma", "1.01"], "--gamma"),
    "an_unknown_flag": (["--sede", "1"], "--sede"),
    "a_word_for_a_number": (["--seed", "one"], "--seed"),
    "a_fraction_for_an_integer": (["--total-timesteps", "1e6"], "--total-timesteps"),
    "a_value_missing": (["--seed"], "--seed"),
    "a_value_for_a_switch": (["--cuda", "False"], "False"),
    "nothing_to_resume": (["--resume", "nowhere"], "nowhere"),
    "nothing_to_evaluate": (["--evaluate", "nowhere/checkpoint.pt"], "nowhere/checkpoint.pt"),
    "an_empty_name_to_resume": (["--resume", ""], "checkpoint.pt"),
    "an_empty_name_to_evaluate": (["--evaluate", ""], "checkpoint.pt"),
    "to_resume_and_to_evaluate": (["--resume", "a", "--evaluate", "b"], "--evaluate"),
}
FLAGS_OF_ROLLOUTS = {
    "less_than_an_iteration": (["--total-timesteps", "127"], "--total-timesteps"),
    "empty_minibatches": (["--minibatch-size", "0"], "--minibatch-size"),
    "no_epochs": (["--update-epochs", "0"], "--update-epochs"),
    "a_negative_lambda": (["--gae-lambda", "-0.1"], "--gae-lambda"),
    "a_lambda_above_1": (["--gae-lambda", "9.5"], "--gae-lambda"),
}
FLAGS_OF_GRADIENTS = {
    "no_learning": (["--learning-rate", "0"], "--learning-rate"),
    "a_learning_rate_that_is_no_number": (["--learning-rate", "nan"], "--learning-rate"),
}
NO_ACTORS = {"no_actors": (["--num-envs", "0"], "--num-envs")}
NO_ENVS = NO_ACTORS | {"a_game": (["--env-id", "ALE/Pong-v5"], "a3c.py")}
FLAGS_OF_ONE = {
    "reinforce": NO_ENVS | FLAGS_OF_GRADIENTS | {
        "a_value_lr_of_nothing": (["--value-lr", "0"], "--value-lr"),
        "no_value_epochs": (["--value-epochs", "0"], "--value-epochs"),
    },
    "a3c": FLAGS_OF_GRADIENTS | {
        "no_workers": (["--num-workers", "0"], "--num-workers"),
        "no_steps_before_an_update": (["--t-max", "0"], "--t-max"),
        "no_room_for_a_gradient_of_zero": (["--rms-eps", "0"], "--rms-eps"),
        "a_norm_that_is_no_number": (["--max-grad-norm", "nan"], "--max-grad-norm"),
        "an_entropy_bonus_below_zero": (["--ent-coef", "-1"], "--ent-coef"),
        "an_unknown_game": (["--env-id", "ALE/Nothing-v5"], "Nothing"),
    },
    "ddpg": NO_ENVS | {
        "discrete_actions": (["--env-id", "CartPole-v1"], "another script"),
        "actions_without_bounds": (["--env-id", "UnboundedAction-v0"], "bounds"),
        "no_room_to_remember": (["--buffer-size", "0"], "--buffer-size"),
        "empty_minibatches": (["--batch-size", "0"], "--batch-size"),
        "learning_before_the_start": (["--learning-starts", "-1"], "--learning-starts"),
        "an_actor_lr_of_nothing": (["--actor-lr", "0"], "--actor-lr"),
        "a_critic_lr_that_is_no_number": (["--critic-lr", "nan"], "--critic-lr"),
        "negative_noise": (["--noise-std", "-0.1"], "--noise-std"),
        "noise_that_grows": (["--ou-theta", "15"], "--ou-theta"),
        "targets_that_overshoot": (["--tau", "2"], "--tau"),
    },
    "trpo": NO_ACTORS | FLAGS_OF_ROLLOUTS | {
        "an_unknown_solver": (["--solver", "newton"], "--solver"),
        "no_trust": (["--kl-constraint", "0"], "--kl-constraint"),
        "a_constraint_that_is_no_number": (["--kl-constraint", "nan"], "--kl-constraint"),
        "a_search_that_lengthens": (["--backtrack-coef", "1.5"], "--backtrack-coef"),
        "a_constraint_that_is_none": (["--kl-constraint", "inf"], "--kl-constraint"),
        "no_search": (["--backtrack-iters", "0"], "--backtrack-iters"),
        "negative_damping": (["--cg-damping", "-0.1"], "--cg-damping"),
        "a_vine_of_more_steps_than_there_are": (["--vine", "--vine-actions", "1000000000"], "--total-timesteps"),
        "a_vine_with_nothing_to_compare": (["--vine-actions", "1"], "--vine-actions"),
        "a_vine_without_a_simulator": (["--vine", "--env-id", "CartPole-v1", "--total-timesteps", "9999"], "--vine"),
        "an_unknown_game": (["--env-id", "ALE/Nothing-v5"], "Nothing"),
    },
    "ppo_clip": NO_ENVS | FLAGS_OF_ROLLOUTS | FLAGS_OF_GRADIENTS | {
        "a_clip_coef_of_nothing": (["--clip-coef", "0"], "--clip-coef"),
        "a_clip_coef_that_is_no_number": (["--clip-coef", "nan"], "--clip-coef"),
        "a_norm_that_is_no_number": (["--max-grad-norm", "nan"], "--max-grad-norm"),
        "an_entropy_bonus_below_zero": (["--ent-coef", "-1"], "--ent-coef"),
    },
    "ppo_kl": NO_ENVS | FLAGS_OF_ROLLOUTS | FLAGS_OF_GRADIENTS | {
        "a_negative_beta": (["--beta", "-1"], "--beta"),
        "no_target": (["--d-targ", "0"], "--d-targ"),
        "a_norm_that_is_no_number": (["--max-grad-norm", "nan"], "--max-grad-norm"),
        "an_entropy_bonus_below_zero": (["--ent-coef", "-1"], "--ent-coef"),
    },
}


def assert_one_line(code, err, *words):
    assert len(complaints(err)) == 1, err
    (line,) = complaints(err)
    assert code == 2 and line.startswith("error: ") and "Traceback" not in err
    for word in words:
        assert word in line


def assert_traceback(script, code, err, *words):
    """As Python shows it; a3c's parent adds a line"""
    assert "Traceback (most recent call last)" in err and code == (2 if script.name == "a3c" else 1)
    for word in words:
        assert word in err


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """The runs folder, empty, in a folder of its own that is the working directory"""
    monkeypatch.chdir(tmp_path)
    runs = tmp_path / "runs"
    runs.mkdir()
    return runs


@pytest.fixture
def folder(trained, runs):
    """A complete run's"""
    return shutil.copytree(trained, runs / "run")


# ── Flags ───────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("script, flags, word", [
    pytest.param(script, *case, id=f"{script.name}-{name}")
    for script in SCRIPTS for name, case in (FLAGS | FLAGS_OF_ONE[script.name]).items()
], indirect=["script"])
def test_a_wrong_flag_is_named_and_nothing_is_written(script, main, runs, flags, word):
    code, out, err = main(*script.tiny, "--total-timesteps", script.batch, *flags)
    if not err.startswith("╭"):  # which is how tyro begins
        assert_one_line(code, err)
    assert code == 2 and word in err and "Traceback" not in err
    assert out == "" and contents(runs.parent) == {} and list(runs.iterdir()) == []


PROCESS = 2 * [  # each for two scripts; that all of them end so is seen without a process of their own
    (["--total-timesteps", "0"], "--total-timesteps"),
    (["--env-id", "Nowhere-v0"], "Nowhere"),
    (["--env-id", "envs:DictObservation-v0"], "Dict("),
]


@pytest.mark.parametrize("script, flags, word", [
    pytest.param(script, *case, id=script.name) for script, case in zip(SCRIPTS, PROCESS, strict=True)
], indirect=["script"])
def test_a_process_too_ends_in_one_line(script, runs, flags, word):
    code, out, err = run(script.path, *script.tiny, *flags, cwd=runs.parent)
    assert code == 2 and word in err and "Traceback" not in err
    assert out == "" and list(runs.iterdir()) == []


# ── Files ───────────────────────────────────────────────────────────────────────────────────────────────────

def test_a_run_whose_metrics_cannot_be_opened_keeps_its_settings(script, main, folder):
    (folder / "metrics.csv").unlink()
    (folder / "metrics.csv").mkdir()
    before = contents(folder)
    code, _, err = main("--resume", folder, "--total-timesteps", 3 * script.batch)
    assert_one_line(code, err, "metrics.csv")
    assert contents(folder) == before


class Malicious:
    """Unpickled, it writes a file."""

    def __reduce__(self):
        return Path.touch, (Path("executed"),)


def edit(path, change):
    checkpoint = torch.load(path, weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, path)


DAMAGE = {
    "half_of_it": lambda path: path.write_bytes(path.read_bytes()[:path.stat().st_size // 2]),
    "nothing": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("global_step,charts/SPS\n1,2\n"),
    "another_dictionary": lambda path: torch.save({"weights": torch.zeros(3)}, path),
    "a_tensor": lambda path: torch.save(torch.zeros(3), path),
    "unknown_settings": lambda path: edit(path, lambda checkpoint: checkpoint["args"].update(unknown=1)),
    "malice": lambda path: torch.save(Malicious(), path),
    "malice_in_a_plain_pickle": lambda path: path.write_bytes(pickle.dumps(Malicious())),
}


@pytest.mark.parametrize("use", ["--resume", "--evaluate"])
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_file_that_is_no_checkpoint_is_neither_used_nor_changed_nor_run(main, folder, damage, use):
    damage(folder / "checkpoint.pt")
    before = contents(folder.parent.parent)
    code, out, err = main(use, folder)
    assert_one_line(code, err, str(folder), "no checkpoint of")
    assert out == "" and contents(folder.parent.parent) == before


def test_a_flipped_bit_is_noticed_wherever_it_changes_what_was_saved(module, main, folder):
    path, random = folder / "checkpoint.pt", np.random.default_rng(1)
    whole, noticed = path.read_bytes(), 0
    before = main("--evaluate", folder, "--eval-episodes", 1)[:2]
    for bit in random.integers(8 * len(whole), size=25):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        code, out, err = main("--evaluate", folder, "--eval-episodes", 1)
        if code == 2:
            assert_one_line(code, err, "damaged")
            noticed += 1
        else:  # it fell between the parts
            assert (code, out) == before
    assert noticed >= 20


@pytest.mark.parametrize("args", [{}, {"a_flag_of_its_own": 1}], ids=["like_ours", "with_flags_of_its_own"])
def test_the_checkpoint_of_another_script_is_refused(script, main, folder, args):
    edit(folder / "checkpoint.pt", lambda checkpoint: (
        checkpoint.update(script="another_script"), checkpoint["args"].update(args)))
    before = contents(folder)
    code, _, err = main("--resume", folder)
    assert_one_line(code, err, f"no checkpoint of {script.name}.py")
    assert contents(folder) == before


@pytest.mark.parametrize("flags, word", [
    ([], "--total-timesteps"),
    (["--sede", "1"], "--sede"),
    (["--total-timesteps", "more"], "--total-timesteps"),
])
def test_a_run_that_cannot_go_on_so_stays_as_it_is(main, folder, flags, word):
    before = contents(folder)
    code, out, err = main("--resume", folder, *flags)
    assert code == 2 and word in err and "Traceback" not in err
    assert out == "" and contents(folder) == before


@pytest.mark.parametrize("use", ["--resume", "--evaluate"])
def test_an_environment_whose_spaces_have_changed_is_told(script, launched, runs, monkeypatch, use):
    monkeypatch.setenv("WIDTH", "3")
    flags = "--env-id", "envs:Wide-v0", "--total-timesteps", script.batch, "--runs-dir", runs
    assert launched(*script.tiny, *flags)[0] == 0
    before = contents(runs)
    monkeypatch.setenv("WIDTH", "4")
    code, _, err = launched(use, only_run(runs), "--total-timesteps", 9 * script.batch)
    assert_one_line(code, err, "fit", "envs:Wide-v0")
    assert contents(runs) == before


def test_a_runs_folder_that_cannot_be_written_to_is_named(script, main, runs):
    (runs / "file").write_text("")
    folder = runs / "file" / "runs"
    code, out, err = main(*script.tiny, "--env-id", script.environments[-1], "--runs-dir", folder)
    assert_one_line(code, err, str(runs / "file"))
    assert contents(runs) == {"file": b""}


def test_a_full_disk_leaves_the_last_checkpoint_whole(script, module, main, folder, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = contents(folder)
    monkeypatch.setattr(module.os, "fsync", full)
    code, _, err = main("--resume", folder, "--total-timesteps", 20 * script.batch)
    assert_one_line(code, err, "No space left")
    assert contents(folder)["checkpoint.pt"] == before["checkpoint.pt"]


@TRACKING
def test_tracking_without_an_account_says_so(script, runs):
    nobody = environment(HOME=str(runs), WANDB_API_KEY=None, WANDB_MODE=None, NETRC=str(runs / "netrc"))
    code, out, err = run(script.path, *script.tiny, "--env-id", script.environments[-1], "--track", cwd=runs.parent,
                         env=nobody)
    assert code == 2 and "Traceback" not in err and out == ""
    assert err.splitlines()[-1].startswith("error: --track") and "wandb login" in err


# ── Environments ────────────────────────────────────────────────────────────────────────────────────────────

NOT_FINITE = "finite", "environment"
ENVIRONMENTS = {
    "NanReward": (assert_one_line, NOT_FINITE),
    "NanObservation": (assert_one_line, NOT_FINITE),
    "InfiniteReward": (assert_one_line, NOT_FINITE),
    "InfiniteObservation": (assert_one_line, NOT_FINITE),
    "Crash": (assert_traceback, ("RuntimeError: the simulator\nisn't there", "envs.py")),
    "CrashLater": (assert_traceback, ("ZeroDivisionError: the wheels\ncame off", "envs.py", "in step")),
    "CrashAtReset": (assert_traceback, ("FileNotFoundError: where's the track?", "envs.py", "in reset")),
    "Old": (assert_traceback, ("not enough values to unpack",)),
    "NoReward": (assert_traceback, ("TypeError",)),
    "Misshapen": (assert_traceback, ("cannot reshape array of size 2 into shape (1,)",)),
}


@pytest.mark.parametrize("env_id", ENVIRONMENTS)
def test_what_an_environment_does_wrong_ends_the_run_before_it_is_saved(script, launched, runs, env_id):
    shown, words = ENVIRONMENTS[env_id]
    code, _, err = launched(*script.tiny, "--env-id", f"envs:{env_id}-v0", "--total-timesteps", 3 * script.batch)
    shown(*[script] * (shown is assert_traceback), code, err, *words)
    assert sorted(path.name for path in only_run(runs).iterdir()) == ["config.json", "metrics.csv"]
    assert multiprocessing.active_children() == []


def test_an_environment_that_draws_nothing_cannot_be_filmed(script, launched, runs):
    code, _, err = launched(*script.tiny, "--env-id", "envs:Undrawn-v0", "--capture-video")
    assert_one_line(code, err, "envs:Undrawn-v0", "--capture-video")
    assert not [*runs.rglob("videos"), *runs.rglob("checkpoint.pt")]


def test_an_error_in_the_users_own_module_has_its_file_and_line(script, runs):
    (runs.parent / "faulty.py").write_text("import gymnasium\n\n1 / 0\n")
    code, _, err = run(script.path, "--env-id", "faulty:Env-v0", env=environment(PYTHONPATH=str(runs.parent)))
    assert code == 1 and "ZeroDivisionError" in err and 'faulty.py", line 3' in err


def test_networks_that_are_not_finite_are_not_saved(module, tmp_path):
    """As the last of all updates can leave them: no later loss tells"""
    theta = torch.ones(3)
    with handlers_kept(), contextlib.redirect_stdout(None), contextlib.redirect_stderr(io.StringIO()):
        agent = SimpleNamespace(state_dict=lambda: {"actor": theta})
        run = module.Run(module.Args(), tmp_path, {}, 100, agent=agent)
        run.save(10)
        saved = (tmp_path / "checkpoint.pt").read_bytes()
        theta[1] = math.inf
        with pytest.raises(module.Failure, match="step 20 .*aren't finite"):
            run.finish(20)
    assert (tmp_path / "checkpoint.pt").read_bytes() == saved


def test_a_run_whose_environment_fails_later_stays_as_last_saved(script, launched, folder):
    saved = (folder / "checkpoint.pt").read_bytes()
    code, _, err = launched("--resume", folder, "--env-id", "envs:Failing-v0", "--total-timesteps", 20 * script.batch)
    assert_traceback(script, code, err, "ConnectionResetError: the plug is out", "envs.py")
    assert (folder / "checkpoint.pt").read_bytes() == saved
