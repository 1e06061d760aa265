"""Run one program in a confined process and report the verdict. Linux only; started by `mode.downstream.sandbox`.

This script uses only the standard library, because its interpreter sees no other package. The script reads a request in
JSON from standard input, drops its own rights, and then runs the program in the same process:

- Landlock allows reading the standard library and shared libraries, and writing one folder.
- A seccomp filter allows the system calls that Python needs to compute and to use those files. All other calls fail:
  sockets, new processes and threads, signals, tracing, and changes of modes, owners, limits and name spaces.
- Resource limits bound processor time, memory, file size and the number of open files.

The restrictions need no privileges and cannot be undone. The existence and size of other files can still be read.

The first line in the pipe says whether this process is confined. It is written before the program runs, so the program
cannot write or change it. The verdict is the second line, after a secret that the program does not get. The secret
protects against programs that end early or print a verdict. A program that searches its own process for the secret can
find it, and a program can return an object that is equal to everything. The sandbox protects the machine and the other
programs' scores, not the program's own score.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import resource
import signal
import struct
import sys
import sysconfig
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

ALLOWED = {
    "x86_64": """
        read 0, write 1, open 2, close 3, stat 4, fstat 5, lstat 6, lseek 8, mmap 9, mprotect 10, munmap 11, brk 12,
        rt_sigaction 13, rt_sigprocmask 14, rt_sigreturn 15, pread64 17, pwrite64 18, readv 19, writev 20, access 21,
        sched_yield 24, mremap 25, madvise 28, dup 32, nanosleep 35, getpid 39, exit 60, uname 63, fsync 74,
        ftruncate 77, getcwd 79, rename 82, unlink 87, readlink 89, gettimeofday 96, getrusage 98,
        sysinfo 99, times 100, getuid 102, getgid 104, geteuid 107, getegid 108, sigaltstack 131, gettid 186, time 201,
        futex 202, sched_getaffinity 204, getdents64 217, restart_syscall 219, clock_gettime 228, clock_getres 229,
        clock_nanosleep 230, exit_group 231, openat 257, newfstatat 262, unlinkat 263, renameat 264,
        readlinkat 267, faccessat 269, renameat2 316, getrandom 318, statx 332, faccessat2 439
    """,
    "aarch64": """
        getcwd 17, dup 23, unlinkat 35, renameat 38, ftruncate 46, faccessat 48, openat 56, close 57,
        getdents64 61, lseek 62, read 63, write 64, readv 65, writev 66, pread64 67, pwrite64 68, readlinkat 78,
        newfstatat 79, fstat 80, fsync 82, exit 93, exit_group 94, futex 98, nanosleep 101, clock_gettime 113,
        clock_getres 114, clock_nanosleep 115, sched_getaffinity 123, sched_yield 124, restart_syscall 128,
        sigaltstack 132, rt_sigaction 134, rt_sigprocmask 135, rt_sigreturn 139, times 153, uname 160, getrusage 165,
        gettimeofday 169, getpid 172, getuid 174, geteuid 175, getgid 176, getegid 177, gettid 178, sysinfo 179,
        brk 214, munmap 215, mremap 216, mmap 222, mprotect 226, madvise 233, renameat2 276, getrandom 278, statx 291,
        faccessat2 439
    """,
}
"""Names and numbers of the allowed system calls, by processor."""


AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
"""Number of the processor in a seccomp filter."""


# linux/landlock.h; the numbers of the calls are the same on every processor.
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446


NEEDED_ABI = 3  # the first version that controls truncation


EVERY_RIGHT = (1 << 15) - 1


READ_FILE, READ_FOLDER = 1 << 2, 1 << 3


# Write, read, list, remove, create and truncate files. No folders (a deep tree is hard to remove), links or devices.
WORK = 1 << 1 | READ_FILE | READ_FOLDER | 1 << 5 | 1 << 8 | 1 << 14


# linux/prctl.h, linux/seccomp.h, linux/bpf_common.h
PARENT_DEATH_SIGNAL, NO_NEW_PRIVILEGES, SET_SECCOMP, FILTER = 1, 38, 22, 2


LOAD, EQUAL, RETURN = 0x20, 0x15, 0x06


ALLOW, REFUSE, KILL = 0x7FFF0000, 0x00050001, 0x80000000  # a refused call fails with EPERM


def list_allowed_calls(processor: str) -> list[int]:
    """Return the numbers of the allowed system calls.

    >>> list_allowed_calls("x86_64")[:3]
    [0, 1, 2]
    """
    return [int(entry.split()[1]) for entry in ALLOWED[processor].split(",")]


def limit_resources(limits: Mapping[str, int]) -> None:
    """Limit the resources of this process.

    Args:
        limits: `cpu` in seconds; `memory`, the size of the address space, in bytes; `file`, the size of a file, in
            bytes.
    """
    resource.setrlimit(resource.RLIMIT_CPU, (limits["cpu"], limits["cpu"] + 1))
    for name, value in (
        (resource.RLIMIT_AS, limits["memory"]),
        (resource.RLIMIT_FSIZE, limits["file"]),
        (resource.RLIMIT_NOFILE, 32),
        (resource.RLIMIT_NPROC, 0),  # does not bind root, but the seccomp filter does
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(name, (value, value))


def list_readable_folders() -> set[Path]:
    """Return the folders that the interpreter needs: standard library, and shared libraries that are loaded."""
    folders = {Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib")}
    for line in Path("/proc/self/maps").read_text("utf-8").splitlines():
        name = line.partition("/")[2]
        if ".so" in name.rpartition("/")[2]:
            folders.add(Path("/" + name).parent)
    return {path for path in folders if path.is_dir()}


class Kernel:
    """System calls through the C library. Errors are raised as exceptions."""

    def __init__(self) -> None:
        """Open the C library.

        Raises:
            OSError: The C library cannot be opened.
        """
        self.library = ctypes.CDLL(None, use_errno=True)

    def __call__(self, name: str, number: int, *arguments: int | Any) -> int:
        """Make a system call and return its result.

        Raises:
            OSError: The kernel refused it; the message begins with `name`.
        """
        plain = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
        result: int = self.library.syscall(ctypes.c_long(number), *plain)
        if result < 0:
            code = ctypes.get_errno()
            raise OSError(code, f"{name}: {os.strerror(code)}")
        return result

    def control(self, name: str, option: int, *arguments: int | Any) -> None:
        """Set a property of this process (prctl).

        Raises:
            OSError: The kernel refused it; the message begins with `name`.
        """
        plain = [ctypes.c_ulong(value) if isinstance(value, int) else value for value in arguments]
        if self.library.prctl(ctypes.c_int(option), *plain) < 0:
            code = ctypes.get_errno()
            raise OSError(code, f"{name}: {os.strerror(code)}")


def confine_files(kernel: Kernel, folder: Path) -> None:
    """Restrict this process to reading the interpreter's folders and writing one folder.

    Raises:
        OSError: The kernel has no Landlock, or an older version.
    """
    abi = kernel("Landlock", CREATE_RULESET, 0, 0, 1)
    if abi < NEEDED_ABI:
        raise OSError(f"Landlock version {abi} is too old: version {NEEDED_ABI} (Linux 6.2) is needed")
    handled = ctypes.create_string_buffer(struct.pack("=Q", EVERY_RIGHT), 8)
    rules = kernel("Landlock", CREATE_RULESET, handled, 8, 0)
    for path, rights in [*((path, READ_FILE | READ_FOLDER) for path in list_readable_folders()), (folder, WORK)]:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = ctypes.create_string_buffer(struct.pack("=Qi", rights, place), 12)
        kernel("Landlock", ADD_RULE, rules, 1, rule, 0)
        os.close(place)
    kernel("Landlock", RESTRICT_SELF, rules, 0)
    os.close(rules)


def build_filter(processor: str, numbers: Iterable[int]) -> list[tuple[int, int, int, int]]:
    """Return the instructions of a seccomp filter: code, jump if equal, jump if not equal, operand."""
    program = [(LOAD, 0, 0, 4), (EQUAL, 1, 0, AUDIT_ARCH[processor]), (RETURN, 0, 0, KILL), (LOAD, 0, 0, 0)]
    for number in numbers:
        program += [(EQUAL, 0, 1, number), (RETURN, 0, 0, ALLOW)]
    return [*program, (RETURN, 0, 0, REFUSE)]


def confine_calls(kernel: Kernel, processor: str) -> None:
    """Restrict this process to the allowed system calls.

    Raises:
        OSError: The processor has no list of calls, or the kernel refuses the filter.
    """
    if processor not in ALLOWED:
        raise OSError(f"seccomp: no list of system calls for the processor {processor}")
    program = build_filter(processor, list_allowed_calls(processor))
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *instruction) for instruction in program))
    head = ctypes.create_string_buffer(struct.pack("@HP", len(program), ctypes.addressof(code)))
    kernel.control("seccomp", SET_SECCOMP, FILTER, head, 0, 0)


def judge(program: str, test: str) -> str:
    """Run a program and its test; return `passed`, `unparsed`, or `failed` and the name of the exception."""
    try:
        compile(program, "program", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, OverflowError, RecursionError, MemoryError):
        return "unparsed"
    try:
        exec(compile(f"{program}\n{test}", "program", "exec", dont_inherit=True), {"__name__": "program"})
    except BaseException as error:  # includes SystemExit: a program that exits has not passed
        return f"failed {type(error).__name__}"
    return "passed"


def make_reporter(pipe: int, secret: str) -> Callable[[str], None]:
    """Return a function that writes the secret and a word to the pipe, in one write of one line."""

    def report(word: str) -> None:
        os.write(pipe, f"{secret} {' '.join(word.split())}\n".encode())

    return report


def end_with_parent(kernel: Kernel, parent: int) -> None:
    """Let the kernel kill this process as soon as its parent ends, since only the parent enforces the wall time.

    Raises:
        OSError: The parent has ended already.
    """
    kernel.control("parent", PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        raise OSError("the parent process has ended")


def main() -> None:
    """Read the request, confine this process, run the program, and exit without running exit handlers."""
    request = json.load(sys.stdin.buffer)
    report = make_reporter(int(sys.argv[1]), request.pop("secret"))
    try:
        kernel = Kernel()
        end_with_parent(kernel, request["parent"])
        limit_resources(request["limits"])
        kernel.control("no_new_privs", NO_NEW_PRIVILEGES, 1, 0, 0, 0)
        confine_files(kernel, Path.cwd())
        confine_calls(kernel, platform.machine())
    except OSError as error:
        report(f"unconfined {error.strerror or error}")
        return
    report("confined")
    report(judge(request["program"], request["test"]))
    os._exit(0)


if __name__ == "__main__":
    main()
