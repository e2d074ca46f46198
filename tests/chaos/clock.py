"""A wall clock that lies: a small library, loaded before libc, that shifts CLOCK_REALTIME.

Compiled with the C compiler of the machine, if there is one; without, clock jumps are reported as
not run. The shift stands in a file that all processes with the library have mapped, so that the
clock of a running process can jump. Monotonic clocks are left alone, as a real jump leaves them.
"""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

SOURCE = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static volatile long long *shift;
static int (*real_gettime)(clockid_t, struct timespec *);

__attribute__((constructor)) static void open_shift(void) {
    real_gettime = dlsym(RTLD_NEXT, "clock_gettime");
    const char *path = getenv("CLOCK_SHIFT_FILE");
    int fd = path ? open(path, O_RDONLY) : -1;
    if (fd < 0) return;
    void *found = mmap(0, sizeof *shift, PROT_READ, MAP_SHARED, fd, 0);
    close(fd);
    if (found != MAP_FAILED) shift = found;
}

int clock_gettime(clockid_t id, struct timespec *now) {
    if (!real_gettime) real_gettime = dlsym(RTLD_NEXT, "clock_gettime");
    int failed = real_gettime(id, now);
    if (!failed && shift && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE))
        now->tv_sec += *shift;
    return failed;
}

int gettimeofday(struct timeval *now, void *zone) {
    struct timespec found;
    (void)zone;
    if (clock_gettime(CLOCK_REALTIME, &found)) return -1;
    now->tv_sec = found.tv_sec;
    now->tv_usec = found.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *where) {
    struct timespec found;
    if (clock_gettime(CLOCK_REALTIME, &found)) return -1;
    if (where) *where = found.tv_sec;
    return found.tv_sec;
}
"""


class ShiftedClock:
    """`environment` puts a process on this clock; `jump` moves it, for all that are on it."""

    def __init__(self, library: Path, shift_file: Path) -> None:
        self._shift_file = shift_file
        self.environment = {"LD_PRELOAD": str(library), "CLOCK_SHIFT_FILE": str(shift_file)}
        self.jump(0)

    def jump(self, seconds: int) -> None:
        """How far the clock is from the truth, from now on."""
        with self._shift_file.open("r+b" if self._shift_file.exists() else "w+b") as file:
            file.write(struct.pack("q", seconds))


def make_clock(folder: Path) -> ShiftedClock | None:
    """Compile the library; None when this machine has no C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        return None
    source, library = folder / "clock.c", folder / "clock.so"
    source.write_text(SOURCE)
    command = [compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"]
    said = subprocess.run(command, capture_output=True, check=False)
    return ShiftedClock(library, folder / "clock.shift") if said.returncode == 0 else None
