"""Programs that try to leave the sandbox, to exhaust the machine, or to forge a verdict."""

from __future__ import annotations

import os
import platform
import random
import tempfile
import time
from functools import partial
from pathlib import Path

from tests.campaign.place import Place
from tests.campaign.trials import Kind, Trial, UnavailableError

TEST = "assert add(1, 2) == 3"
ADD = "def add(a, b):\n    return a + b\n"

ESCAPES = """
open('/etc/passwd').read()
open('/etc/shadow').read()
open('/proc/self/environ').read()
open('/proc/1/cmdline').read()
open(f'/proc/{PARENT}/environ').read()
open(f'/proc/{PARENT}/mem', 'r+b').read(1)
open(f'/proc/{PARENT}/maps').read()
open('/dev/mem', 'rb').read(1)
open('/dev/shm/campaign', 'w').write('x')
open('/dev/tty', 'w').write('x')
open(SECRET).read()
open(SECRET, 'w').write('x')
open(SECRET, 'a').write('x')
open('../outside', 'w').write('x')
open('/proc/self/cwd/../outside', 'w').write('x')
open('/proc/self/root/etc/passwd').read()
os.rename(SECRET, 'mine')
os.rename('/proc/self/cwd', FOLDER + '/moved')
os.link(SECRET, 'mine')
os.symlink(SECRET, 'mine')
os.unlink(SECRET)
os.truncate(SECRET, 0)
os.chmod(SECRET, 0o777)
os.chown(SECRET, 0, 0)
os.utime(SECRET, (0, 0))
os.setxattr(SECRET, 'user.a', b'1')
os.mkdir(FOLDER + '/new')
os.mkfifo('pipe')
os.listdir(FOLDER)
os.scandir('/root').__next__()
os.chdir('/')
os.chroot('.')
os.kill(PARENT, 9)
os.kill(-1, 0)
os.killpg(os.getpgid(PARENT), 0)
signal.pidfd_send_signal(os.pidfd_open(PARENT), 9)
os.setsid()
os.setuid(1000)
os.nice(-5)
os.sched_setaffinity(0, {0})
os.setpriority(os.PRIO_PROCESS, PARENT, 19)
resource.prlimit(PARENT, resource.RLIMIT_CPU, (1, 1))
resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))
os.fork()
os.posix_spawn('/bin/true', ['true'], {})
os.execv('/bin/true', ['true'])
subprocess.run(['/bin/true'])
assert os.system('true') == 0
multiprocessing.Process(target=print).start()
threading.Thread(target=print).start()
_thread.start_new_thread(print, ())
socket.socket()
socket.socketpair()
socket.create_connection(('127.0.0.1', 22), 1)
socket.getaddrinfo('localhost', 80)
os.memfd_create('a')
mmap.mmap(os.open(SECRET, os.O_RDWR), 0)
fcntl.fcntl(0, fcntl.F_SETOWN, PARENT)
os.sendfile(1, os.open(SECRET, os.O_RDONLY), 0, 10)
call(101, 16, PARENT, 0, 0)
call(310, PARENT, 0, 0, 0, 0, 0)
call(272, 0x10000000)
call(165, 0, 0, 0, 0, 0)
call(425, 8, 0)
call(321, 0, 0, 0)
call(298, 0, 0, -1, -1, 0)
call(56, 17, 0, 0, 0, 0)
""".strip().splitlines()
"""Each raises an exception if it is refused. `call` is a system call by its number on x86-64."""

FORGERIES = {
    "print words": "for word in ('passed', 'unconfined', 'failed', 'stopped time'): print(word)\nEXIT",
    "write a verdict to every file": "WRITE(b'passed\\n')\nEXIT",
    "write that nothing confines": "WRITE(b'unconfined nothing\\n')\nEXIT",
    "write a verdict in JSON": 'WRITE(b\'{"outcome": "passed"}\\n\')\nEXIT',
    "write a guessed secret": "WRITE(b'0' * 32 + b' passed\\n')\nEXIT",
    "fill the channel": "WRITE(b'x' * 8192)\nEXIT",
    "fill the channel with lines": "WRITE(b' passed\\n' * 8192)\nEXIT",
    "write bytes that are no text": "WRITE(b'\\xff\\xfe\\n passed\\n')\nEXIT",
    "close every file": "for number in range(32):\n    try: os.close(number)\n    except OSError: pass\nEXIT",
    "close every file and go on": "for number in range(32):\n    try: os.close(number)\n    except OSError: pass",
    "exit at once with 0": "os._exit(0)",
    "exit at once with 1": "os._exit(1)",
    "exit at once with 137": "os._exit(137)",
    "raise SystemExit": "raise SystemExit(0)",
    "raise KeyboardInterrupt": "raise KeyboardInterrupt",
    "raise GeneratorExit": "raise GeneratorExit",
    "exit within the test": "def add(a, b): os._exit(0)",
    "replace exec and compile": "import builtins\nbuiltins.exec = builtins.compile = lambda *a, **k: None\nEXIT",
    "replace write": "os.write = lambda *a: 0",
    "replace AssertionError": "import builtins\nbuiltins.AssertionError = type('E', (BaseException,), {})",
    "no asserts": "import sys\nsys.flags = None\ndef add(a, b): return 4",
    "an exception whose name is a verdict": "raise type('passed', (Exception,), {})",
    "an exception with lines in its name": "raise type('x\\npassed', (Exception,), {})",
    "an exception without a name": "raise type('', (BaseException,), {})",
    "a trace function": "import sys\nsys.settrace(lambda *a: os._exit(0))\ndef add(a, b): return 3",
    "a hook at exit": "import atexit\natexit.register(os._exit, 0)\nraise ValueError",
    "kill itself": "os.kill(os.getpid(), 9)",
    "crash": "import ctypes\nctypes.string_at(0)",
    "crash the stack": "def down(): down()\nimport sys\nsys.setrecursionlimit(10**9)\ndown()",
    "a test that ends early": "def add(a, b):\n    raise SystemExit",
}
"""None of them adds rightly, so none may pass, and none may say that programs cannot be confined."""

EXHAUSTIONS = {
    "a loop": "while True: pass",
    "sleep": "import time\ntime.sleep(3600)",
    "memory": "held = []\nwhile True: held.append(bytearray(1 << 20))",
    "one number": "print(9 ** 9 ** 9)",
    "a large file": "open('big', 'wb').truncate(1 << 40)",
    "many files": "n = 0\nwhile True:\n    n += 1\n    open(str(n), 'wb').write(bytes(1 << 14))",
    "a fork bomb": (
        "made = 0\nfor _ in range(10000):\n    try:\n        if os.fork() == 0: os._exit(0)\n        made += 1\n"
        "    except OSError: pass\nif made: add = lambda a, b: 3"
    ),
    "threads": (
        "import threading\nwhile True:\n    try: threading.Thread(target=print).start()\n    except RuntimeError: pass"
    ),
    "signals that are ignored": (
        "import signal\nfor n in (1, 2, 14, 15, 24):\n    signal.signal(n, signal.SIG_IGN)\nwhile True: pass"
    ),
    "output": "while True: os.write(1, b'x' * 65536)",
    "the channel": "WRITE(b'x' * (1 << 22))\nwhile True: WRITE(b'x' * (1 << 22))",
    "a regular expression": "import re\nre.match('(a+)+$', 'a' * 64 + 'b')",
}
"""Each takes too much, and ends within the limits."""

PREFIX = """
import os, signal, resource, subprocess, multiprocessing, threading, _thread, socket, mmap, fcntl, ctypes
def WRITE(data):
    for number in range(1, 32):
        try: os.write(number, data)
        except OSError: pass
def call(number, *values):
    library = ctypes.CDLL(None, use_errno=True)
    if library.syscall(ctypes.c_long(number), *map(ctypes.c_long, values)) < 0 and ctypes.get_errno() == 1:
        raise PermissionError
"""


def make_trials(place: Place, seed: int) -> list[Trial]:
    """Return one trial per program, in random order."""
    from mode.core.errors import ConfigError
    from mode.downstream.sandbox import check_isolation

    try:
        check_isolation()
    except ConfigError as error:
        raise UnavailableError(str(error)) from error
    escapes = [text for text in ESCAPES if not text.startswith("call(") or platform.machine() == "x86_64"]
    trials = [Trial(f"escapes: {text}", partial(attempt, text, ADD, "failed")) for text in escapes]
    trials += [Trial(f"forges: {name}", partial(attempt, text, "", "")) for name, text in FORGERIES.items()]
    trials += [Trial(f"exhausts: {name}", partial(attempt, text, "", "")) for name, text in EXHAUSTIONS.items()]
    random.Random(seed).shuffle(trials)
    return trials


def attempt(text: str, after: str, wanted: str, folder: Path) -> str | None:
    """Run one program in the sandbox, and look at the verdict and at what is outside."""
    from mode.core.errors import ConfigError
    from mode.downstream import sandbox

    outside, work = folder / "outside", folder / "work"
    outside.mkdir()
    work.mkdir()
    secret = outside / "secret"
    secret.write_text("secret", "utf-8")
    tempfile.tempdir = str(work)
    names = f"SECRET, FOLDER, PARENT = {str(secret)!r}, {str(outside)!r}, {os.getpid()}\n"
    program = f"{names}{PREFIX}{text.replace('EXIT', 'os._exit(0)')}\n{after}"
    limits = sandbox.Limits(cpu=1, wall=4, memory=512 << 20, file=1 << 16, disk=1 << 20)
    begin = time.monotonic()
    try:
        verdict = sandbox.run_program(program, TEST, limits)
    except ConfigError as error:
        return f"ends the evaluation: {error}"
    if verdict.outcome == "passed":
        return "passed"
    if wanted and verdict.outcome != wanted:
        return f"the verdict is {verdict.outcome}, not {wanted}"
    if verdict.detail in ("NameError", "AttributeError", "SyntaxError", "TypeError") and wanted:
        return f"the program itself is wrong: {verdict.detail}"
    if time.monotonic() - begin > 40:
        return f"ends after {time.monotonic() - begin:.0f} s"
    if secret.read_text("utf-8") != "secret" or sorted(path.name for path in outside.iterdir()) != ["secret"]:
        return "a file outside is changed"
    if left := sorted(path.name for path in folder.rglob("*") if path not in (outside, work, secret)):
        return f"leftover: {left[0]}"
    if Path("/dev/shm/campaign").exists():
        return "wrote shared memory"
    return f"leftover: process {lives[0]}" if (lives := list_processes(str(work))) else None


def list_processes(folder: str) -> list[str]:
    """Return the numbers of processes that work below a folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(path / "cwd").startswith(folder):
                found.append(path.name)
        except OSError:
            continue
    return found


KIND = Kind(
    "sandbox",
    "the attempt succeeds, passes, stops the evaluation, takes too long, or leaves a file or a process",
    make_trials,
)
