"""On a GPU, where there is one: learning, going on, and a checkpoint that needs none."""

import numpy as np
import pytest
import torch
from helpers import metrics, only_run

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU here")


def allocations() -> int:
    return torch.cuda.memory_stats().get("allocation.all.allocated", 0)


def test_a_task_is_learned_on_the_gpu(script, main, tmp_path):
    env_id, threshold, flags = script.learns
    before = allocations()
    code, _, err = main("--env-id", env_id, "--runs-dir", tmp_path, *flags, "--cuda")
    assert code == 0, err
    assert script.name == "a3c" or allocations() > before  # a3c's are made by its workers
    found = (row["charts/episodic_return"] for row in metrics(only_run(tmp_path)))
    returns = [float(text) for text in found if text]
    assert len(returns) >= script.last and np.mean(returns[-script.last:]) >= threshold


def test_a_run_goes_on_on_another_device_and_is_evaluated_there(script, main, tmp_path):
    flags = *script.tiny, "--env-id", script.environments[-1], "--runs-dir", tmp_path
    for n, device in enumerate(("--cuda", "--no-cuda", "--cuda"), start=1):
        resume = ["--resume", only_run(tmp_path)] if n > 1 else []
        code, _, err = main(*flags, *resume, "--total-timesteps", n * script.batch, device)
        assert code == 0, err
        code, out, err = main("--evaluate", only_run(tmp_path), "--eval-episodes", 1)
        assert code == 0 and "episode" in out, err
    checkpoint = torch.load(only_run(tmp_path) / "checkpoint.pt", weights_only=True)
    assert checkpoint["global_step"] >= 2 * script.batch
