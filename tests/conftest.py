import contextlib
import importlib
import io
import multiprocessing
import signal
import sys
import warnings

import pytest
import torch
from helpers import ROOT, SCRIPTS, handlers_kept, only_run

sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)  # as the scripts do
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would have it ignored
SERVER = multiprocessing.get_context("forkserver")  # a3c's workers are its, with all modules imported, if it runs here
SERVER.set_forkserver_preload(["a3c", "envs"])


@pytest.fixture(scope="session", params=SCRIPTS, ids=lambda script: script.name)
def script(request):
    """Each of the scripts: how to test it."""
    return request.param


@pytest.fixture(scope="session")
def module(script):
    return importlib.import_module(script.name)


@pytest.fixture
def handlers():
    """Of signals, as they were afterwards"""
    with handlers_kept():
        yield


@pytest.fixture(scope="session")
def main(module):
    """Runs the script in this process: flags → exit code, stdout, stderr."""

    def show(message, category, *_):  # as a process does, while pytest would keep it for itself
        print(f"{category.__name__}: {message}", file=sys.stderr)

    def run_main(*flags):
        out, err = io.StringIO(), io.StringIO()
        with (handlers_kept(), pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(),
              contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)):
            patch.setattr(sys, "argv", [f"{module.SCRIPT}.py", *map(str, flags)])
            patch.setattr("torch.multiprocessing.get_context", lambda _method: SERVER)
            warnings.resetwarnings()
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.showwarning = show
            try:
                code = module.main() or 0
            except SystemExit as end:
                code = end.code
        return code, out.getvalue(), err.getvalue()

    return run_main


@pytest.fixture(scope="session")
def trained(script, main, tmp_path_factory):
    """A complete run's folder, for tests to copy or to leave as it is."""
    runs = tmp_path_factory.mktemp("trained")
    code, _, err = main(*script.tiny, "--env-id", script.environments[-1], "--runs-dir", runs,
                        "--total-timesteps", script.batch)
    assert code == 0, err
    return only_run(runs)
