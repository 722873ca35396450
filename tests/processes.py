"""Python processes that are forked from one with the libraries imported, where a start of its own takes ten seconds.

Nothing of the tests and of the package is in that one: a fork imports the package itself.
"""

import multiprocessing
import os
import runpy
import signal
import sys
import time
from subprocess import CompletedProcess
from threading import Thread


LIBRARIES = [
    "pytest", "torch", "torch.distributed.run", "transformers", "transformers.trainer",
    "transformers.models.auto.modeling_auto", "transformers.models.llama.modeling_llama", "datasets",
    "accelerate.commands.config", "peft", "bitsandbytes", "deepspeed", "trl.trainer.sft_trainer", "matplotlib.figure",
    "optuna", "axolotl.cli.main", "axolotl.cli.train", "axolotl.train",
]  # fmt: skip
_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(LIBRARIES)  # what is not installed is passed over


class Python:
    """`python *arguments`, in a folder and with an environment, and what it has written so far."""

    def __init__(self, *arguments, cwd=None, env=None, text=""):
        stdin, typed = _forks.Pipe(duplex=False)
        (out, stdout), (err, stderr) = _forks.Pipe(duplex=False), _forks.Pipe(duplex=False)
        words = [os.fspath(argument) for argument in arguments]
        environment = dict(os.environ if env is None else env)
        ends = (stdin, stdout, stderr)
        self._process = _forks.Process(target=_become, args=(words, os.fspath(cwd or os.getcwd()), environment, ends))
        self._process.start()
        self.pid = self._process.pid
        for end in ends:
            end.close()
        os.write(typed.fileno(), text.encode())
        typed.close()
        self._written = (bytearray(), bytearray())
        self._readers = [
            Thread(target=_read, args=each, daemon=True) for each in zip((out, err), self._written, strict=True)
        ]
        for reader in self._readers:
            reader.start()

    @property
    def stdout(self) -> str:
        return self._written[0].decode(errors="replace")

    @property
    def stderr(self) -> str:
        return self._written[1].decode(errors="replace")

    def until(self, condition):
        """Returns when a condition holds, and fails if the process has ended before."""
        while not condition():
            assert self._process.is_alive(), self.stderr[-3000:]
            time.sleep(0.005)

    def wait(self, timeout=600) -> int:
        self._process.join(timeout)
        assert not self._process.is_alive(), f"still running after {timeout} s: {self.stderr[-3000:]}"
        for reader in self._readers:
            reader.join(timeout=10)  # what it has started may still hold the other end
        return self._process.exitcode

    def kill(self) -> int:
        os.kill(self.pid, signal.SIGKILL)
        return self.wait()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self._process.is_alive():
            self.kill()


def python(*arguments, **options) -> CompletedProcess:
    """As `subprocess.run([sys.executable, *arguments], capture_output=True, text=True)`."""
    with Python(*arguments, **options) as process:
        return CompletedProcess(arguments, process.wait(), process.stdout, process.stderr)


def _read(end, written):
    while content := os.read(end.fileno(), 65536):
        written += content


def _become(arguments, folder, environment, ends):
    """Runs as `python` does: a module after -m, a program after -c, or a script."""
    for number, end in enumerate(ends):
        os.dup2(end.fileno(), number)
        end.close()
    os.environ.clear()
    os.environ.update(environment)
    encoding = environment.get("PYTHONIOENCODING", "utf-8")
    sys.stdin, sys.stdout, sys.stderr = (
        os.fdopen(number, mode, buffering=1, encoding=encoding, errors=errors, closefd=False)
        for number, (mode, errors) in enumerate((("r", "strict"), ("w", "strict"), ("w", "backslashreplace")))
    )
    os.chdir(folder)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore
    kind, *rest = arguments
    sys.argv = arguments
    if kind == "-m":
        sys.argv = rest
        sys.path.insert(0, folder)
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv = ["-c", *rest[1:]]
        sys.path.insert(0, "")
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.path.insert(0, os.path.dirname(os.path.abspath(kind)))
        runpy.run_path(kind, run_name="__main__")
