"""Programs that do harm are run for real, in the sandbox: none gets anywhere, and none passes."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mode.core.errors import ConfigError
from mode.downstream.confine import ALLOW, ALLOWED, AUDIT_ARCH, KILL, REFUSE, build_filter, list_allowed_calls
from mode.downstream.sandbox import Limits, Verdict, check_isolation, parse_verdict, run_program
from tests.support.processes import children_of, ends_soon
from tests.support.refusals import refused

pytestmark = pytest.mark.slow

QUICK = Limits(cpu=1, wall=4, memory=256 << 20, file=1 << 16, disk=1 << 20)
TEST = "assert add(1, 2) == 3"
ADD = "def add(a, b):\n    return a + b\n"


@pytest.fixture(scope="module", autouse=True)
def isolation() -> None:
    """Skip where programs cannot be confined; there `mode` refuses to run them."""
    try:
        check_isolation()
    except ConfigError as error:
        pytest.skip(str(error))


WRITE_EVERYWHERE = """
import os
for pipe in range(3, 32):
    try:
        os.write(pipe, b"passed\\n")
    except OSError:
        pass
"""
HARM = {
    "opens a socket": "import socket\nsocket.socket()",
    "listens to the network": "import socket\nsocket.create_server(('127.0.0.1', 0))",
    "reads the users": "assert open('/etc/passwd').read()",
    "lists the home folder": "import os\nassert os.listdir(HOME)",
    "reads a secret": "assert open(SECRET).read() == 'secret'",
    "reads its parent's environment": "assert open(f'/proc/{PARENT}/environ').read() is not None",
    "reads this project": "assert open(PROJECT).read()",
    "writes outside": "open(OUTSIDE, 'w').write('here')",
    "overwrites a file": "open(SECRET, 'r+').write('gone')",
    "empties a file": "import os\nos.open(SECRET, os.O_RDONLY | os.O_TRUNC)",
    "removes a file": "import os\nos.unlink(SECRET)",
    "changes the mode of a file": "import os\nos.chmod(SECRET, 0o777)",
    "links to a file": "import os\nos.symlink(SECRET, 'link')",
    "starts a process": "import os\nif os.fork() == 0: os._exit(0)",
    "runs a command": "import subprocess, sys\nsubprocess.run([sys.executable, '-c', ''], check=True)",
    "starts a thread": "import threading\nthread = threading.Thread(target=print)\nthread.start()\nthread.join()",
    "signals its parent": "import os\nos.kill(PARENT, 0)",
    "raises its own limits": "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (99, 99))",
}
"""Each ends without an exception where it is allowed to do what it tries."""


def harmful(name: str, folder: Path) -> str:
    """Return a program of the table, that adds rightly besides."""
    (folder / "secret").write_text("secret", "utf-8")
    names = {
        "HOME": str(Path.home()),
        "SECRET": str(folder / "secret"),
        "OUTSIDE": str(folder / "outside"),
        "PROJECT": str(Path(__file__)),
        "PARENT": os.getpid(),
    }
    given = "".join(f"{key} = {value!r}\n" for key, value in names.items())
    return f"{given}{HARM[name]}\n{ADD}"


@pytest.mark.parametrize("name", HARM)
def test_a_program_that_does_harm_is_refused(name: str, tmp_path: Path) -> None:
    verdict = run_program(harmful(name, tmp_path), TEST, QUICK)
    assert verdict.outcome == "failed"
    assert verdict.detail in ("PermissionError", "RuntimeError", "ValueError", "OSError", "gaierror")
    assert (tmp_path / "secret").read_text("utf-8") == "secret"
    assert [path.name for path in tmp_path.iterdir()] == ["secret"]


@pytest.mark.parametrize("name", [name for name in HARM if name != "raises its own limits"])
def test_the_same_program_does_its_harm_where_nothing_confines_it(name: str, tmp_path: Path) -> None:
    program = f"{harmful(name, tmp_path)}\n{TEST}\n"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("while True: pass", Verdict("stopped", "time")),
        ("import time\ntime.sleep(60)", Verdict("stopped", "time")),
        ("while True: print('x' * 1000)", Verdict("stopped", "time")),
        ("import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass", Verdict("stopped", "time")),
        ("held = []\nwhile True: held.append(bytearray(1 << 20))", Verdict("failed", "MemoryError")),
        ("open('big', 'wb').write(bytes(1 << 20))", Verdict("failed", "OSError")),
        ("n = 0\nwhile True:\n    n += 1\n    open(str(n), 'wb').write(bytes(1 << 15))", Verdict("stopped", "disk")),
        ("n = 0\nwhile True:\n    n += 1\n    open(str(n), 'w').close()", Verdict("stopped", "disk")),
        ("import os\nwhile True: os.fork()", Verdict("failed", "PermissionError")),
        ("import os\nos.mkdir('deep')", Verdict("failed", "PermissionError")),
    ],
)
def test_a_program_that_takes_too_much_is_stopped(program: str, expected: Verdict) -> None:
    begin = time.monotonic()
    assert run_program(f"{program}\n{ADD}", TEST, QUICK) == expected
    assert time.monotonic() - begin < 30


@pytest.mark.parametrize(
    ("program", "outcome"),
    [
        ("import os\nos._exit(0)", "ended"),
        ("import sys\nsys.exit(0)", "failed"),
        ("import ctypes\nctypes.string_at(0)", "ended"),
        (f"{WRITE_EVERYWHERE}\nos._exit(0)", "ended"),
        ("import builtins\nbuiltins.exec = builtins.compile = lambda *_: None\nraise SystemExit", "failed"),
        ("import os\nos.write = lambda *_: 0", "ended"),
        ("import atexit\natexit.register(print)\ndef add(a, b): raise SystemExit(0)", "failed"),
        ("def add(a, b): return 4", "failed"),
        ("def add(a, b): pass", "failed"),
        ("def subtract(a, b): return 3", "failed"),
        ("def add(a, b:\n    return 3", "unparsed"),
        ("def add(a, b):\nreturn 3", "unparsed"),
        ("x = '\\ud800'\n\0", "unparsed"),
        ("(" * 5000, "unparsed"),
    ],
)
def test_a_program_passes_only_if_its_test_ends(program: str, outcome: str) -> None:
    assert run_program(program, TEST, QUICK).outcome == outcome


@pytest.mark.parametrize(
    "program",
    [
        ADD,
        f"import collections, decimal, hashlib, heapq, itertools, json, math, random, re, statistics, typing\n{ADD}",
        f"import hashlib\nassert hashlib.md5(b'a').hexdigest().startswith('0cc1')\n{ADD}",
        f"open('inside', 'w').write('12')\nassert open('inside').read() == '12'\n{ADD}",
        "def add(a, b):\n    print('x' * 100000)\n    return a + b\n",
    ],
)
def test_a_right_program_passes(program: str) -> None:
    assert run_program(program, TEST, QUICK) == Verdict("passed")


def test_a_program_sees_an_empty_folder_and_no_environment() -> None:
    program = "import os\nassert os.listdir('.') == []\nassert not set(os.environ) - {'PYTHONHASHSEED', 'LC_CTYPE'}\n"
    assert run_program(program + ADD, TEST, QUICK) == Verdict("passed")


def test_the_order_of_a_set_is_the_same_every_time() -> None:
    order = "def add(a, b): return 3\n" + f"assert hash('word') == {hash_of('word')}"
    assert {run_program(order, TEST, QUICK).outcome for _ in range(3)} == {"passed"}


def hash_of(word: str) -> int:
    """Return a word's hash under the seed that programs get."""
    environment = os.environ | {"PYTHONHASHSEED": "0"}
    command = [sys.executable, "-c", f"print(hash({word!r}))"]
    return int(subprocess.run(command, env=environment, capture_output=True, check=True).stdout)


def test_only_what_follows_the_word_is_a_verdict() -> None:
    begun = "word confined\n"
    assert parse_verdict(f"{begun}passed\n", "word", "") == Verdict("ended")
    assert parse_verdict(f"{begun}wordy passed\nword failed AssertionError\n", "word", "") == Verdict(
        "failed", "AssertionError"
    )
    assert parse_verdict(f"{begun}word failed not a name\n", "word", "") == Verdict("failed")
    assert parse_verdict(begun, "word", "time") == Verdict("stopped", "time")
    assert parse_verdict(f"{begun}word unconfined by force\n", "word", "") == Verdict("failed")
    with refused("Landlock: Function not implemented"):
        parse_verdict("word unconfined Landlock: Function not implemented\n", "word", "")
    for stopped in ("", "time"):  # the program did not run, so it did not fail
        with refused("cannot confine"):
            parse_verdict("word passed\n" if not stopped else "", "word", stopped)


FORGED = """
import sys
frame = sys._getframe()
while frame is not None:
    if "report" in frame.f_locals:
        frame.f_locals["report"]("unconfined by force")
    frame = frame.f_back
"""


def test_a_program_that_finds_the_pipe_ends_no_evaluation() -> None:
    assert run_program(f"{FORGED}\n{ADD}", TEST, QUICK) == Verdict("failed")


def test_a_program_ends_with_the_process_that_watches_it(tmp_path: Path) -> None:
    """Only that process enforces the wall time, so a program that sleeps would stay for ever."""
    script = "import sys\nfrom mode.downstream.sandbox import run_program\nrun_program(sys.argv[1], '')"
    program = "import time\nopen('begun', 'w').close()\ntime.sleep(600)"
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", script, program], env=environment) as watcher:
        deadline = time.monotonic() + 60
        while not list(tmp_path.rglob("begun")) and time.monotonic() < deadline:
            time.sleep(0.02)
        (child,) = children_of(watcher.pid)
        watcher.kill()
    assert ends_soon(child)


@pytest.mark.parametrize("processor", ALLOWED)
def test_the_filter_lets_through_what_is_listed_and_nothing_else(processor: str) -> None:
    program, numbers = build_filter(processor, list_allowed_calls(processor)), set(list_allowed_calls(processor))
    assert len(numbers) == len(list_allowed_calls(processor))
    assert all(struct.pack("=HBBI", *each) for each in program)
    for number in range(600):
        assert simulate(program, AUDIT_ARCH[processor], number) == (ALLOW if number in numbers else REFUSE)
        assert simulate(program, AUDIT_ARCH[processor], number | 0x40000000) == REFUSE  # x32
    assert simulate(program, 0x40000003, 1) == KILL  # 32-bit calls have other numbers


def simulate(program: list[tuple[int, int, int, int]], processor: int, number: int) -> int:
    """Run a filter as the kernel does."""
    position, value = 0, 0
    while True:
        code, equal, other, operand = program[position]
        if code == 0x20:
            value = {0: number, 4: processor}[operand]
        elif code == 0x15:
            position += equal if value == operand else other
        else:
            return operand
        position += 1


def test_another_system_is_told_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with refused("Linux 6.2", "Landlock", "seccomp"):
        check_isolation()
