"""Runs one program where it can do no harm. A script of its own: `python -I sandbox_child.py`, see sandbox.py.

In new namespaces of users, mounts, processes, network, IPC and host name it has a root of its own: the interpreter and
system libraries, read only, and a small /tmp in memory. Then it gives up every privilege, limits memory, time, file
sizes and open files, and lets the kernel refuse new processes and threads, sockets and what escapes are made of. Needs
Linux and namespaces that users may make; exits with UNAVAILABLE where they may not. Imports nothing of this project.

The program is process 1 of its namespace, and nothing of ours is beside it there. The kernel keeps such a process from
signals of its own namespace only: SIGKILL from outside and at a hard limit ends it (`_kill` in sandbox.py, RLIMIT_CPU),
a fault too, and the hard limits cannot be raised without a capability. A first process of our own would add nothing:
there are no orphans to wait for, because there is no fork; and what waits for the program and knows its status is
outside, where no process id of the program's leads.
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
from typing import NoReturn

UNAVAILABLE = 99
"""Exit status if there can be no sandbox here; the reason is on standard error."""
RESULT = 3
"""File descriptor on which the program tells that it has reached its end."""

NEW = {"CLONE_NEWNS": 0x20000, "CLONE_NEWUTS": 0x4000000, "CLONE_NEWIPC": 0x8000000, "CLONE_NEWUSER": 0x10000000}
NEW |= {"CLONE_NEWPID": 0x20000000, "CLONE_NEWNET": 0x40000000}
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
MNT_DETACH = 2
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, PR_CAPBSET_DROP, LAST_CAPABILITY = 1, 38, 22, 24, 40

# Numbers of system calls: asm/unistd_64.h and asm-generic/unistd.h. prctl would undo that the program dies with its
# parent; shared memory and message queues are not counted in its memory.
NUMBERS = {
    "x86_64": {
        "clone": 56, "fork": 57, "vfork": 58, "clone3": 435, "socket": 41, "socketpair": 53, "ptrace": 101,
        "mount": 165, "umount2": 166, "unshare": 272, "setns": 308, "pivot_root": 155, "chroot": 161, "bpf": 321,
        "keyctl": 250, "add_key": 248, "request_key": 249, "io_uring_setup": 425, "perf_event_open": 298,
        "userfaultfd": 323, "process_vm_writev": 311, "prctl": 157, "shmget": 29, "msgget": 68, "memfd_create": 319,
    },
    "aarch64": {
        "clone": 220, "clone3": 435, "socket": 198, "socketpair": 199, "ptrace": 117, "mount": 40, "umount2": 39,
        "unshare": 97, "setns": 268, "pivot_root": 41, "chroot": 51, "bpf": 280, "keyctl": 219, "add_key": 217,
        "request_key": 218, "io_uring_setup": 425, "perf_event_open": 241, "userfaultfd": 282,
        "process_vm_writev": 271, "prctl": 167, "shmget": 194, "msgget": 186, "memfd_create": 279,
    },
}  # fmt: skip
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
X32_BIT = 0x40000000
"""Calls of the 32-bit-pointer ABI of x86_64 have this bit, and would pass a filter by number."""

libc = ctypes.CDLL(None, use_errno=True)


def call(name: str, *arguments: object) -> None:
    """A function of the C library. Raises OSError."""
    made = [ctypes.c_char_p(each.encode()) if isinstance(each, str) else each for each in arguments]
    if getattr(libc, name)(*made) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")


def enter_namespaces() -> None:
    """A user namespace in which this user is root, and all others owned by it."""
    user, group = os.getuid(), os.getgid()
    call("unshare", sum(NEW.values()))
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def mount(source: str, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    """mount(2)."""
    call("mount", source, target, kind, ctypes.c_ulong(flags), options)


def own_root(place: str, readable: list[str], files: dict[str, str]) -> None:
    """Make a tmpfs the root: `readable` paths of the host, read only, some devices, and /tmp with `files`."""
    mount("none", "/", None, MS_REC | MS_PRIVATE)
    mount("tmpfs", place, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    for path in [*readable, "/dev/null", "/dev/zero", "/dev/urandom"]:
        target = place + path
        if os.path.islink(path):
            os.makedirs(os.path.dirname(target), exist_ok=True)
            os.symlink(os.readlink(path), target)
            continue
        if os.path.isdir(path):
            os.makedirs(target, exist_ok=True)
        else:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            os.close(os.open(target, os.O_CREAT))
        mount(path, target, None, MS_BIND)
        is_device = path.startswith("/dev/")
        mount(path, target, None, MS_BIND | MS_REMOUNT | MS_RDONLY | MS_NOSUID | (0 if is_device else MS_NODEV))
    os.makedirs(place + "/tmp", exist_ok=True)
    mount("tmpfs", place + "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, "size=32m,nr_inodes=4096,mode=777")
    for name, text in files.items():
        with open(f"{place}/tmp/{name}", "w", encoding="utf-8") as file:
            file.write(text)
    mount("none", place, None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV)
    os.chdir(place)
    call("syscall", {"x86_64": 155, "aarch64": 41}[platform.machine()], ".", ".")  # pivot_root
    call("umount2", ".", MNT_DETACH)
    os.chdir("/tmp")


def set_limits(memory_bytes: int, seconds: int) -> None:
    """Limits that the kernel keeps for this process."""
    limits = {resource.RLIMIT_AS: memory_bytes, resource.RLIMIT_CPU: seconds, resource.RLIMIT_FSIZE: 16 << 20}
    limits |= {resource.RLIMIT_NOFILE: 64, resource.RLIMIT_CORE: 0, resource.RLIMIT_STACK: 64 << 20}
    for which, limit in limits.items():
        resource.setrlimit(which, (limit, limit))


def refuse_calls() -> None:
    """From now on the calls of NUMBERS fail with EPERM, and those of another ABI end the process."""
    machine = platform.machine()
    numbers = list(NUMBERS[machine].values())
    kill, refuse, allow = 0x80000000, 0x00050001, 0x7FFF0000

    def statement(code: int, value: int, yes: int = 0, no: int = 0) -> bytes:
        return struct.pack("HBBI", code, yes, no, value)

    load, equal, at_least, give = 0x20, 0x15, 0x35, 0x06
    program = [statement(load, 4), statement(equal, AUDIT_ARCH[machine], 1), statement(give, kill), statement(load, 0)]
    if machine == "x86_64":
        program += [statement(at_least, X32_BIT, 0, 1), statement(give, kill)]
    program += [statement(equal, number, len(numbers) - place) for place, number in enumerate(numbers)]
    program += [statement(give, allow), statement(give, refuse)]
    code = ctypes.create_string_buffer(b"".join(program))
    filter_ = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program), ctypes.addressof(code)))
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    call("prctl", PR_SET_SECCOMP, 2, filter_, 0, 0)


def drop_privileges() -> None:
    """Nothing that is run from here has a capability, also as root of its namespace."""
    for capability in range(LAST_CAPABILITY + 1):
        libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)


def prepare_inside(wanted: dict) -> None:
    """In the first process of the new namespaces."""
    call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    os.setsid()
    own_root(wanted["place"], wanted["readable"], wanted["files"])
    set_limits(wanted["memory_bytes"], wanted["seconds"])
    drop_privileges()
    refuse_calls()


def run(command: list[str]) -> NoReturn:
    """Become the program, without input or output."""
    null = os.open("/dev/null", os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    os.closerange(RESULT + 1, 256)
    os.execve(command[0], command, {"PATH": "/usr/bin:/bin", "HOME": "/tmp", "LANG": "C.UTF-8"})


def main() -> int:
    """Reads what to run from standard input; returns the program's exit status."""
    wanted = json.load(sys.stdin)
    os.dup2(wanted["result"], RESULT)
    if "place" not in wanted:
        set_limits(wanted["memory_bytes"], wanted["seconds"])
        run(wanted["command"])
    try:
        if platform.machine() not in NUMBERS:
            raise OSError(f"no list of system calls for {platform.machine()}")
        enter_namespaces()
    except OSError as error:
        print(error, file=sys.stderr)
        return UNAVAILABLE
    ready, at_start = os.pipe()  # closed by the program's start, without a word unless it fails
    child = os.fork()
    if child == 0:
        try:
            prepare_inside(wanted)
        except OSError as error:
            os.write(at_start, str(error).encode())
            os._exit(1)
        run(wanted["command"])
    os.close(at_start)
    if why := os.read(ready, 4096):
        print(why.decode(), file=sys.stderr)
        return UNAVAILABLE
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status) & 0xFF
    return 1 if code == UNAVAILABLE else code  # a program cannot say that there is no sandbox


if __name__ == "__main__":
    sys.exit(main())
