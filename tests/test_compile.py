"""--compile: the same learning, in operations that are put together."""

import importlib
import shutil

import pytest
import torch
from helpers import ROOT, SCRIPTS, complaints, environment, only_run, run, run_here

COMPILED = [script for script in SCRIPTS if "    compile: bool" in script.source]


@pytest.mark.skipif(not shutil.which("g++"), reason="there is no compiler")
@pytest.mark.parametrize("script", COMPILED, ids=lambda script: script.name)
def test_two_iterations_learn_the_same_and_to_the_bit_when_they_are_repeated(script, tmp_path, monkeypatch):
    module, agents, steps = importlib.import_module(script.name), [], 2 * script.batch
    flags = *script.tiny, "--env-id", "Hopper-v4"
    if script.name == "ppo_clip":  # the other kind of policy, the entropy's bonus, and a minibatch that is smaller
        flags = *script.tiny, "--env-id", "CartPole-v1", "--ent-coef", "0.01", "--minibatch-size", "24"
    if script.name == "ddpg":  # 16 gradients
        steps = 80
    calls, make = [], module.compiled

    def counted(function):
        made = make(function)
        return lambda *inputs: calls.append(function.__name__) or made(*inputs)

    monkeypatch.setattr(module, "compiled", counted)
    for number, compiled in enumerate(([], ["--compile"], ["--compile"])):
        folder = tmp_path / f"{number}"
        code, _, err = run_here(module, *flags, *compiled, "--total-timesteps", steps, "--runs-dir", folder)
        assert code == 0 and not complaints(err), err
        assert bool(calls) == bool(number)  # with the flag it is used, without it not
        agents.append(torch.load(only_run(folder) / "checkpoint.pt", weights_only=True)["agent"])
    for name, x in agents[0].items():
        torch.testing.assert_close(agents[1][name], x, rtol=0, atol=1e-5, msg=lambda text: f"{name}: {text}")
        assert torch.equal(agents[1][name], agents[2][name])


def test_without_a_compiler_a_line_says_so_before_anything_is_begun(tmp_path):
    nowhere = environment(CXX="no-such-compiler", TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))
    code, out, err = run(ROOT / "ppo_clip.py", "--compile", "--runs-dir", tmp_path / "runs", env=nowhere)
    assert code == 2 and not out and not (tmp_path / "runs").exists()
    assert "needs a C++ compiler" in complaints(err)[-1], err
