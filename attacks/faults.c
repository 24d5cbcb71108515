// LD_PRELOAD: the FAULT_AT-th call that changes a plain file or a folder fails (FAULT=ENOSPC or EIO), writes a part
// first (FAULT=short), or is the last of the process (FAULT=kill). FAULT_COUNT names a file that gets the number of calls.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

static long calls;

static int is_plain(int fd) {
    struct stat found;
    return fstat(fd, &found) == 0 && (S_ISREG(found.st_mode) || S_ISDIR(found.st_mode));
}

// Whether this call is to fail.
static int fails(void) {
    const char *at = getenv("FAULT_AT"), *what = getenv("FAULT");
    if (!at || !what || __atomic_add_fetch(&calls, 1, __ATOMIC_SEQ_CST) != atol(at)) return 0;
    if (!strcmp(what, "kill")) kill(getpid(), SIGKILL);
    errno = !strcmp(what, "EIO") ? EIO : ENOSPC;
    return 1;
}

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

ssize_t write(int fd, const void *bytes, size_t len) {
    if (is_plain(fd) && fails()) {
        if (!strcmp(getenv("FAULT"), "short") && len > 1) NEXT(write)(fd, bytes, len / 2);
        errno = !strcmp(getenv("FAULT"), "EIO") ? EIO : ENOSPC;
        return -1;
    }
    return NEXT(write)(fd, bytes, len);
}
int fsync(int fd) { return fails() ? -1 : NEXT(fsync)(fd); }
int fdatasync(int fd) { return fails() ? -1 : NEXT(fdatasync)(fd); }
int ftruncate64(int fd, off64_t len) { return fails() ? -1 : NEXT(ftruncate64)(fd, len); }
int rename(const char *from, const char *to) { return fails() ? -1 : NEXT(rename)(from, to); }
int mkdir(const char *path, mode_t mode) { return fails() ? -1 : NEXT(mkdir)(path, mode); }
int unlink(const char *path) { return fails() ? -1 : NEXT(unlink)(path); }
int unlinkat(int fd, const char *path, int flags) { return fails() ? -1 : NEXT(unlinkat)(fd, path, flags); }

__attribute__((destructor)) static void end(void) {
    const char *path = getenv("FAULT_COUNT");
    FILE *file = path ? fopen(path, "w") : NULL;
    if (file) {
        fprintf(file, "%ld", calls);
        fclose(file);
    }
}
