// Lets one call that touches a file fail, or the process die there with all unsynced data lost.
//
// Preloaded (LD_PRELOAD), it counts the calls whose path lies under a prefix. At call number
// `fail_at` it returns an error; or it cuts every file back to what was last synced, as a power cut
// would, and ends the process.

#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { kMaxFiles = 256, kPowerCut = 137 };

static char prefix[PATH_MAX];
static long fail_at, count;
static int error_number;  // 0: a power cut

static struct {
  char path[PATH_MAX];
  off_t synced;
} unsynced[kMaxFiles];
static int num_unsynced;

// Begins to count calls under `folder`; with `at` 0 nothing fails.
void faults_arm(const char* folder, long at, int number) {
  snprintf(prefix, sizeof prefix, "%s", folder);
  fail_at = at;
  error_number = number;
  count = 0;
  num_unsynced = 0;
}

long faults_count(void) { return count; }

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static int is_watched(const char* path) {
  return prefix[0] != 0 && strncmp(path, prefix, strlen(prefix)) == 0;
}

static int path_at(int folder, const char* path, char* full) {
  char base[PATH_MAX] = "", link[64];
  if (path[0] != '/') {
    if (folder == AT_FDCWD) {
      if (getcwd(base, sizeof base) == NULL) return 0;
    } else {
      snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
      const ssize_t size = readlink(link, base, sizeof base - 1);
      if (size < 0) return 0;
      base[size] = 0;
    }
    if (snprintf(full, PATH_MAX, "%s/%s", base, path) >= PATH_MAX) return 0;
  } else {
    snprintf(full, PATH_MAX, "%s", path);
  }
  return is_watched(full);
}

static int path_of(int fd, char* full) {
  char link[64];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  const ssize_t size = readlink(link, full, PATH_MAX - 1);
  if (size < 0) return 0;
  full[size] = 0;
  return is_watched(full);
}

static void cut_power(void) {
  for (int i = 0; i < num_unsynced; ++i) {
    if (truncate(unsynced[i].path, unsynced[i].synced) != 0) continue;
  }
  _exit(kPowerCut);
}

// Counts a call; whether it must fail.
static int fails(void) {
  if (++count != fail_at) return 0;
  if (error_number == 0) cut_power();
  errno = error_number;
  return 1;
}

static void note_write(const char* path) {
  for (int i = 0; i < num_unsynced; ++i) {
    if (strcmp(unsynced[i].path, path) == 0) return;
  }
  struct stat status;
  if (num_unsynced == kMaxFiles || stat(path, &status) != 0) return;
  snprintf(unsynced[num_unsynced].path, PATH_MAX, "%s", path);
  unsynced[num_unsynced++].synced = status.st_size;
}

static void note_sync(const char* path) {
  for (int i = 0; i < num_unsynced; ++i) {
    if (strcmp(unsynced[i].path, path) == 0) unsynced[i] = unsynced[--num_unsynced];
  }
}

static void note_rename(const char* from, const char* to) {
  const size_t size = strlen(from);
  for (int i = 0; i < num_unsynced; ++i) {
    char* path = unsynced[i].path;
    if (strncmp(path, from, size) == 0 && (path[size] == 0 || path[size] == '/')) {
      char moved[2 * PATH_MAX];
      snprintf(moved, sizeof moved, "%s%s", to, path + size);
      snprintf(path, PATH_MAX, "%.*s", PATH_MAX - 1, moved);
    }
  }
}

#define OPEN(name, folder)                                                            \
  do {                                                                                \
    mode_t mode = 0;                                                                  \
    if (flags & (O_CREAT | O_TMPFILE)) {                                              \
      va_list arguments;                                                              \
      va_start(arguments, flags);                                                     \
      mode = va_arg(arguments, mode_t);                                               \
      va_end(arguments);                                                              \
    }                                                                                 \
    char full[PATH_MAX];                                                              \
    const int writes = flags & (O_WRONLY | O_RDWR);                                   \
    if (path_at(folder, path, full) && fails()) return -1;                            \
    if (writes && (flags & O_TRUNC) && path_at(folder, path, full)) note_write(full); \
    return name;                                                                      \
  } while (0)

int open(const char* path, int flags, ...) { OPEN(REAL(open)(path, flags, mode), AT_FDCWD); }
int open64(const char* path, int flags, ...) { OPEN(REAL(open64)(path, flags, mode), AT_FDCWD); }
int openat(int folder, const char* path, int flags, ...) {
  OPEN(REAL(openat)(folder, path, flags, mode), folder);
}
int openat64(int folder, const char* path, int flags, ...) {
  OPEN(REAL(openat64)(folder, path, flags, mode), folder);
}

#define ON_FILE(fd, note, call) \
  do {                          \
    char full[PATH_MAX];        \
    if (path_of(fd, full)) {    \
      if (fails()) return -1;   \
      note(full);               \
    }                           \
    return call;                \
  } while (0)
#define WRITE(fd, call) ON_FILE(fd, note_write, call)
#define SYNC(fd, call) ON_FILE(fd, note_sync, call)

ssize_t write(int fd, const void* data, size_t size) { WRITE(fd, REAL(write)(fd, data, size)); }
ssize_t writev(int fd, const struct iovec* parts, int n) { WRITE(fd, REAL(writev)(fd, parts, n)); }
ssize_t pwrite(int fd, const void* data, size_t size, off_t at) {
  WRITE(fd, REAL(pwrite)(fd, data, size, at));
}
ssize_t pwrite64(int fd, const void* data, size_t size, off64_t at) {
  WRITE(fd, REAL(pwrite64)(fd, data, size, at));
}
ssize_t sendfile(int fd, int from, off_t* at, size_t size) {
  WRITE(fd, REAL(sendfile)(fd, from, at, size));
}
ssize_t sendfile64(int fd, int from, off64_t* at, size_t size) {
  WRITE(fd, REAL(sendfile64)(fd, from, at, size));
}
ssize_t copy_file_range(int from, off64_t* at, int fd, off64_t* to, size_t size, unsigned flags) {
  WRITE(fd, REAL(copy_file_range)(from, at, fd, to, size, flags));
}
int ftruncate(int fd, off_t size) { WRITE(fd, REAL(ftruncate)(fd, size)); }
int ftruncate64(int fd, off64_t size) { WRITE(fd, REAL(ftruncate64)(fd, size)); }

int fsync(int fd) { SYNC(fd, REAL(fsync)(fd)); }
int fdatasync(int fd) { SYNC(fd, REAL(fdatasync)(fd)); }

#define RENAME(from_folder, to_folder, call)                                                     \
  do {                                                                                           \
    char full_from[PATH_MAX], full_to[PATH_MAX];                                                 \
    const int watched = path_at(from_folder, from, full_from) + path_at(to_folder, to, full_to); \
    if (watched && fails()) return -1;                                                           \
    const int result = call;                                                                     \
    if (watched && result == 0) note_rename(full_from, full_to);                                 \
    return result;                                                                               \
  } while (0)

int rename(const char* from, const char* to) { RENAME(AT_FDCWD, AT_FDCWD, REAL(rename)(from, to)); }
int renameat(int a, const char* from, int b, const char* to) {
  RENAME(a, b, REAL(renameat)(a, from, b, to));
}
int renameat2(int a, const char* from, int b, const char* to, unsigned flags) {
  RENAME(a, b, REAL(renameat2)(a, from, b, to, flags));
}

#define CHANGE(folder, path, call)                         \
  do {                                                     \
    char full[PATH_MAX];                                   \
    if (path_at(folder, path, full) && fails()) return -1; \
    return call;                                           \
  } while (0)

DIR* opendir(const char* path) {
  char full[PATH_MAX];
  return path_at(AT_FDCWD, path, full) && fails() ? NULL : REAL(opendir)(path);
}

int unlink(const char* path) { CHANGE(AT_FDCWD, path, REAL(unlink)(path)); }
int unlinkat(int folder, const char* path, int flags) {
  CHANGE(folder, path, REAL(unlinkat)(folder, path, flags));
}
int rmdir(const char* path) { CHANGE(AT_FDCWD, path, REAL(rmdir)(path)); }
int mkdir(const char* path, mode_t mode) { CHANGE(AT_FDCWD, path, REAL(mkdir)(path, mode)); }
int mkdirat(int folder, const char* path, mode_t mode) {
  CHANGE(folder, path, REAL(mkdirat)(folder, path, mode));
}
int symlink(const char* to, const char* path) { CHANGE(AT_FDCWD, path, REAL(symlink)(to, path)); }
int symlinkat(const char* to, int folder, const char* path) {
  CHANGE(folder, path, REAL(symlinkat)(to, folder, path));
}
int link(const char* from, const char* path) { CHANGE(AT_FDCWD, path, REAL(link)(from, path)); }
int linkat(int a, const char* from, int b, const char* path, int flags) {
  CHANGE(b, path, REAL(linkat)(a, from, b, path, flags));
}
