"""The scripts under test, and how to run one."""

import ast
import contextlib
import csv
import io
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
SERVER = multiprocessing.get_context("forkserver")  # a3c's workers are its, with all modules imported, if it runs here
SERVER.set_forkserver_preload(["a3c", "envs"])


ENDLESS = "--total-timesteps", str(10**9)  # of a run that a test ends when it has seen what it waits for


@dataclass(frozen=True)
class Script:
    name: str
    tiny: tuple[str, ...]  # flags of an iteration of `batch` steps that takes a moment
    batch: int
    learns: tuple[str, float, tuple[str, ...]]  # environment, mean of the last returns, by which flags
    last: int = 100  # how many returns that is a mean of
    steps: int = 1300  # of a whole run
    actors: str = "num-envs"  # the flag that counts actors
    whole_episodes: bool = False  # an iteration ends with its episodes rather than after `batch` steps
    row_per_batch: bool = True  # of losses
    environments: tuple[str, ...] = ("Hopper-v4", "Hopper-v5", "CartPole-v1", "Pendulum-v1")

    @property
    def path(self) -> Path:
        return ROOT / f"{self.name}.py"

    @property
    def source(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @property
    def syntax(self) -> ast.Module:
        return ast.parse(self.source)


def skip_unless_suited(script: Script, env_id: str) -> None:
    if env_id not in script.environments:
        pytest.skip(f"{script.name} isn't for {env_id}")


SCRIPTS = [
    Script(
        "reinforce",
        tiny=("--num-envs", "2"),
        batch=128,
        learns=("CartPole-v1", 475, ("--total-timesteps", "200000")),
        whole_episodes=True,
        row_per_batch=False,
    ),
    Script(
        "a3c",
        tiny=("--num-workers", "1", "--t-max", "16"),
        batch=128,
        learns=("CartPole-v1", 475, ("--total-timesteps", "150000", "--num-workers", "2")),
        actors="num-workers",
        whole_episodes=True,
        row_per_batch=False,
    ),
    Script(
        "ddpg",
        tiny=("--learning-starts", "64", "--batch-size", "16"),
        batch=128,
        learns=("Pendulum-v1", -300, ("--total-timesteps", "8000", "--learning-starts", "500")),
        last=20,
        row_per_batch=False,
        environments=("Hopper-v4", "Hopper-v5", "Pendulum-v1"),
    ),
    Script(
        "trpo",
        tiny=("--num-envs", "2", "--num-steps", "64", "--minibatch-size", "32", "--update-epochs", "2"),
        batch=128,
        learns=("CartPole-v1", 475, ("--total-timesteps", "100000", "--num-steps", "512")),  # with 128 it lapses at times
    ),
    Script(
        "ppo_clip",
        tiny=("--num-envs", "2", "--num-steps", "64", "--minibatch-size", "32", "--update-epochs", "2"),
        batch=128,
        learns=("CartPole-v1", 475, ("--total-timesteps", "80000")),
    ),
    Script(
        "ppo_kl",
        tiny=("--num-envs", "2", "--num-steps", "64", "--minibatch-size", "32", "--update-epochs", "2"),
        batch=128,
        learns=("CartPole-v1", 475, ("--total-timesteps", "100000")),
    ),
]
# It takes seconds, and is the same text in every script.
TRACKING = pytest.mark.parametrize("script", [script for script in SCRIPTS if script.name == "ppo_clip"],
                                   ids=lambda script: script.name, indirect=True)


def environment(**changes: str | None) -> dict[str, str]:
    """This process's variables for a script's: no screen, one thread, the test environments within reach."""
    screen = {"DISPLAY": None, "WAYLAND_DISPLAY": None, "XDG_RUNTIME_DIR": None}
    variables = os.environ | screen | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "tests")} | changes
    return {name: value for name, value in variables.items() if value is not None}


def start(*flags: str | Path, **options) -> subprocess.Popen:
    options = {"env": environment(), **options}
    command = [sys.executable, *map(str, flags)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    """Exit code, stdout, stderr"""
    try:
        out, err = process.communicate(timeout=300)
    finally:
        process.kill()
    return process.returncode, out, err


def run(*flags: str | Path, **options) -> tuple[int, str, str]:
    return finish(start(*flags, **options))


def wait_for(condition, process: subprocess.Popen) -> None:
    """Until it holds; a process that ends before has failed the test."""
    while not condition():
        assert process.poll() is None, finish(process)
        time.sleep(0.002)


def wait_for_steps(process: subprocess.Popen) -> None:
    """Until its bar shows some"""
    shown = b""
    while not re.search(rb"[1-9]\d*(/\d+ \[| steps)", shown):
        shown += os.read(process.stderr.fileno(), 100) or pytest.fail(shown.decode())


@contextlib.contextmanager
def handlers_kept():
    """Puts the signals' handlers back."""
    numbers = signal.SIGINT, signal.SIGTERM
    handlers = [signal.getsignal(number) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, handlers):
            signal.signal(number, handler)


def run_here(module: ModuleType, *flags: str | Path) -> tuple[int, str, str]:
    """Of a script's main() in this process: exit code, stdout, stderr"""

    def show(message, category, *_):  # as a process does, while pytest would keep it for itself
        print(f"{category.__name__}: {message}", file=sys.stderr)

    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
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
            code = end.code or 0
        except Exception:
            traceback.print_exc(file=err)
            code = 1
    return code, *(stream.buffer.getvalue().decode() for stream in (out, err))


def complaints(err: str) -> list[str]:
    """The lines of stderr without the progress bars, a video's among them."""
    lines = re.split(r"[\r\n]+", re.sub(r"\x1b\[A|(frame_index:)? *\d+(%\||/| steps \[)[^]\r\n]*]", "", err))
    return [line for line in lines if line.strip()]


def only_run(folder: Path) -> Path:
    (run_folder,) = folder.iterdir()
    return run_folder


def metrics(run_folder: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv, each as long as the header, but for the one column that time decides."""
    text = (run_folder / "metrics.csv").read_text()
    assert text.endswith("\n")
    header, *rows = csv.reader(text.splitlines())
    assert all(len(row) == len(header) for row in rows)
    return [{name: value for name, value in zip(header, row) if name != "charts/SPS"} for row in rows]


def iterations(run_folder: Path) -> int:
    """How many the run has logged so far, perhaps while it is writing"""
    lines = (run_folder / "metrics.csv").read_text().splitlines()  # in one read: the header may come at any moment
    return sum(bool(row["losses/policy_loss"]) for row in csv.DictReader(lines))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
