/* Counts the calls that change files below a folder, and makes one of them fail or kills the process at it.
 *
 * Loaded with LD_PRELOAD. Nothing happens until campaign_arm is called. Calls are counted over all threads. A library
 * that enters the kernel without the C library is not seen, such as safetensors when it renames its temporary file; the
 * calls before and after are.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { COUNT = 1, KILL = 2, FULL = 3 };

static char root[PATH_MAX];
static int action, log_file = -1;
static long chosen, counter;

/* Watch the calls below `folder`. COUNT: write the name and the path of each call to the file `log`. KILL: kill the
 * process at call `number`; a write has written its first half. FULL: from call `number` on, the disk is full. */
void campaign_arm(const char *folder, int what, long number, const char *log) {
    snprintf(root, sizeof root, "%s/", folder);
    log_file = what == COUNT ? syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600) : -1;
    chosen = number;
    counter = 0;
    action = what;
}

/* Return 1 if the call must fail. `grows` says whether the call needs space on the disk. */
static int watch(const char *name, const char *path, int grows, int file, const void *data, size_t size) {
    if (!action || !path || strncmp(path, root, strlen(root)))
        return 0;
    long number = __atomic_add_fetch(&counter, 1, __ATOMIC_SEQ_CST);
    if (action == COUNT) {
        char line[PATH_MAX + 64];
        int length = snprintf(line, sizeof line, "%s %d %s\n", name, grows, path);
        syscall(SYS_write, log_file, line, (size_t)length);
    } else if (action == KILL && number == chosen) {
        if (data && size > 1)
            syscall(SYS_write, file, data, size / 2);
        syscall(SYS_kill, getpid(), SIGKILL);
    } else if (action == FULL && number >= chosen && grows) {
        errno = ENOSPC;
        return 1;
    }
    return 0;
}

static const char *path_of(int file, char *buffer) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, buffer, PATH_MAX - 1);
    buffer[length < 0 ? 0 : length] = 0;
    return buffer;
}

/* A relative path is made absolute by its folder. */
static const char *path_at(int folder, const char *path, char *buffer) {
    char base[PATH_MAX];
    if (!action || !path || path[0] == '/')
        return path;
    if (folder == AT_FDCWD) {
        if (!getcwd(base, sizeof base))
            return path;
    } else
        path_of(folder, base);
    snprintf(buffer, PATH_MAX, "%.2000s/%.2000s", base, path);
    return buffer;
}

#define REAL(name) static __typeof__(&name) real; if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)
#define FAIL_IF(condition) do { if (action && (condition)) return -1; } while (0)

#define OPEN(name)                                                                                                     \
    int name(const char *path, int flags, ...) {                                                                       \
        REAL(name);                                                                                                    \
        va_list rest;                                                                                                  \
        va_start(rest, flags);                                                                                         \
        mode_t mode = flags & (O_CREAT | __O_TMPFILE) ? va_arg(rest, mode_t) : 0;                                      \
        va_end(rest);                                                                                                  \
        char buffer[PATH_MAX];                                                                                         \
        FAIL_IF(flags & (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC) &&                                                     \
                watch("open", path_at(AT_FDCWD, path, buffer), (flags & O_CREAT) != 0, -1, NULL, 0));                  \
        return real(path, flags, mode);                                                                                \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                                                                   \
    int name(int folder, const char *path, int flags, ...) {                                                           \
        REAL(name);                                                                                                    \
        va_list rest;                                                                                                  \
        va_start(rest, flags);                                                                                         \
        mode_t mode = flags & (O_CREAT | __O_TMPFILE) ? va_arg(rest, mode_t) : 0;                                      \
        va_end(rest);                                                                                                  \
        char buffer[PATH_MAX];                                                                                         \
        FAIL_IF(flags & (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC) &&                                                     \
                watch("open", path_at(folder, path, buffer), (flags & O_CREAT) != 0, -1, NULL, 0));                    \
        return real(folder, path, flags, mode);                                                                        \
    }
OPENAT(openat)
OPENAT(openat64)

ssize_t write(int file, const void *data, size_t size) {
    REAL(write);
    char buffer[PATH_MAX];
    FAIL_IF(file != log_file && watch("write", path_of(file, buffer), 1, file, data, size));
    return real(file, data, size);
}

#define PWRITE(name, offset_type)                                                                                      \
    ssize_t name(int file, const void *data, size_t size, offset_type offset) {                                        \
        REAL(name);                                                                                                    \
        char buffer[PATH_MAX];                                                                                         \
        FAIL_IF(watch("pwrite", path_of(file, buffer), 1, file, NULL, 0));                                             \
        return real(file, data, size, offset);                                                                         \
    }
PWRITE(pwrite, off_t)
PWRITE(pwrite64, off64_t)

ssize_t writev(int file, const struct iovec *parts, int count) {
    REAL(writev);
    char buffer[PATH_MAX];
    FAIL_IF(watch("writev", path_of(file, buffer), 1, file, NULL, 0));
    return real(file, parts, count);
}

/* NumPy writes arrays through the C library's streams, whose own calls cannot be seen from here. */
size_t fwrite(const void *data, size_t size, size_t count, FILE *stream) {
    REAL(fwrite);
    char buffer[PATH_MAX];
    if (action && watch("write", path_of(fileno(stream), buffer), 1, fileno(stream), data, size * count))
        return 0;
    return real(data, size, count, stream);
}

int mkdir(const char *path, mode_t mode) {
    REAL(mkdir);
    char buffer[PATH_MAX];
    FAIL_IF(watch("mkdir", path_at(AT_FDCWD, path, buffer), 1, -1, NULL, 0));
    return real(path, mode);
}

int mkdirat(int folder, const char *path, mode_t mode) {
    REAL(mkdirat);
    char buffer[PATH_MAX];
    FAIL_IF(watch("mkdir", path_at(folder, path, buffer), 1, -1, NULL, 0));
    return real(folder, path, mode);
}

int rename(const char *from, const char *to) {
    REAL(rename);
    char buffer[PATH_MAX];
    FAIL_IF(watch("rename", path_at(AT_FDCWD, to, buffer), 0, -1, NULL, 0));
    return real(from, to);
}

int renameat(int from_folder, const char *from, int to_folder, const char *to) {
    REAL(renameat);
    char buffer[PATH_MAX];
    FAIL_IF(watch("rename", path_at(to_folder, to, buffer), 0, -1, NULL, 0));
    return real(from_folder, from, to_folder, to);
}

int unlink(const char *path) {
    REAL(unlink);
    char buffer[PATH_MAX];
    FAIL_IF(watch("unlink", path_at(AT_FDCWD, path, buffer), 0, -1, NULL, 0));
    return real(path);
}

int unlinkat(int folder, const char *path, int flags) {
    REAL(unlinkat);
    char buffer[PATH_MAX];
    FAIL_IF(watch("unlink", path_at(folder, path, buffer), 0, -1, NULL, 0));
    return real(folder, path, flags);
}

int rmdir(const char *path) {
    REAL(rmdir);
    char buffer[PATH_MAX];
    FAIL_IF(watch("rmdir", path_at(AT_FDCWD, path, buffer), 0, -1, NULL, 0));
    return real(path);
}

int fsync(int file) {
    REAL(fsync);
    char buffer[PATH_MAX];
    FAIL_IF(watch("fsync", path_of(file, buffer), 1, -1, NULL, 0));
    return real(file);
}

int fdatasync(int file) {
    REAL(fdatasync);
    char buffer[PATH_MAX];
    FAIL_IF(watch("fsync", path_of(file, buffer), 1, -1, NULL, 0));
    return real(file);
}

#define TRUNCATE(name, offset_type)                                                                                    \
    int name(int file, offset_type size) {                                                                             \
        REAL(name);                                                                                                    \
        char buffer[PATH_MAX];                                                                                         \
        FAIL_IF(watch("truncate", path_of(file, buffer), size > 0, -1, NULL, 0));                                      \
        return real(file, size);                                                                                       \
    }
TRUNCATE(ftruncate, off_t)
TRUNCATE(ftruncate64, off64_t)
