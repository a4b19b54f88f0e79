import importlib
import signal
import sys
from functools import partial

import pytest
import torch
from helpers import ROOT, SCRIPTS, handlers_kept, only_run, run, run_here

sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)  # as the scripts do
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would have it ignored


@pytest.fixture(scope="session", params=SCRIPTS, ids=lambda script: script.name)
def script(request):
    """Each of the scripts: how to test it."""
    return request.param


@pytest.fixture(scope="session")
def module(script):
    return importlib.import_module(script.name)


@pytest.fixture
def handlers():
    """Puts the signals' handlers back after the test."""
    with handlers_kept():
        yield


@pytest.fixture
def main(module):
    """Runs the script in this process: flags → exit code, stdout, stderr"""
    return partial(run_here, module)


@pytest.fixture
def launched(script, main):
    """Like main, but for a3c in a process of its own: what its workers say and see is their stderr's and environment's;
    and saving at its end alone, however long a worker takes to start"""
    unhurried = f"import sys; sys.path[0] = {str(ROOT)!r}; import a3c; a3c.CHECKPOINT_SECONDS = 1e9; a3c.main()"
    return partial(run, "-c", unhurried) if script.name == "a3c" else main


@pytest.fixture(scope="session")
def trained(script, module, tmp_path_factory):
    """A complete run's folder, for tests to copy or to leave as it is."""
    runs = tmp_path_factory.mktemp("trained")
    code, _, err = run_here(module, *script.tiny, "--env-id", script.environments[-1], "--runs-dir", runs,
                            "--total-timesteps", script.batch)
    assert code == 0, err
    return only_run(runs)
