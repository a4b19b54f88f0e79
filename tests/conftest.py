import importlib
import signal
import sys
import warnings

import pytest
import torch
from helpers import ROOT, SCRIPTS, only_run, run

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


@pytest.fixture(scope="session")
def trained(script, tmp_path_factory):
    """A complete run's folder, for tests to copy or to leave as it is."""
    runs = tmp_path_factory.mktemp("trained")
    code, _, err = run(script.path, *script.tiny, "--env-id", script.environments[-1], "--runs-dir", runs,
                       "--total-timesteps", script.batch)
    assert code == 0, err
    return only_run(runs)


@pytest.fixture
def main(module, monkeypatch, capsys):
    """Runs the script in this process: flags → exit code, stdout, stderr."""
    numbers = signal.SIGINT, signal.SIGTERM
    handlers = [signal.getsignal(number) for number in numbers]

    def show(message, category, *_):  # as a process does, while pytest would keep it for itself
        print(f"{category.__name__}: {message}", file=sys.stderr)

    def run_main(*flags):
        monkeypatch.setattr(sys, "argv", [f"{module.SCRIPT}.py", *map(str, flags)])
        capsys.readouterr()
        with warnings.catch_warnings():
            warnings.resetwarnings()
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.showwarning = show
            try:
                code = module.main() or 0
            except SystemExit as end:
                code = end.code
        return code, *capsys.readouterr()

    yield run_main
    for number, handler in zip(numbers, handlers):
        signal.signal(number, handler)
