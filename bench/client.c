/* The measuring client: works in the current directory, times each operation, prints JSON.
 *
 *   client GROUP [ARGUMENT...]
 *
 * One group may yield several results: "name": {count, seconds, p50, p99, bytes}, times in
 * nanoseconds.  Preparation and clean-up are not timed.  Small and in C, so that what is measured is
 * the file system; the same binary serves every peer of a run.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

extern char **environ;

static uint64_t *samples;
static size_t sample_count, sample_room;
static int results;

static void die(const char *what)
{
	fprintf(stderr, "client: %s: %s\n", what, strerror(errno));
	exit(1);
}

static uint64_t now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void note(uint64_t started)
{
	uint64_t taken = now() - started;

	if (sample_count == sample_room) {
		sample_room = sample_room ? 2 * sample_room : 4096;
		samples = realloc(samples, sample_room * sizeof *samples);
		if (!samples)
			die("realloc");
	}
	samples[sample_count++] = taken;
}

static int ascending(const void *a, const void *b)
{
	uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

	return (x > y) - (x < y);
}

/* Print the samples taken since the last report, and forget them. */
static void report(const char *name, uint64_t bytes)
{
	uint64_t total = 0;

	for (size_t i = 0; i < sample_count; i++)
		total += samples[i];
	qsort(samples, sample_count, sizeof *samples, ascending);
	printf("%s\"%s\": {\"count\": %zu, \"seconds\": %.9f, \"p50\": %llu, \"p99\": %llu, \"bytes\": %llu}",
	       results++ ? ", " : "", name, sample_count, (double)total / 1e9,
	       (unsigned long long)(sample_count ? samples[sample_count / 2] : 0),
	       (unsigned long long)(sample_count ? samples[sample_count * 99 / 100] : 0),
	       (unsigned long long)bytes);
	sample_count = 0;
}

static uint64_t state = 88172645463325252ull;

static uint64_t chance(uint64_t below)
{
	state ^= state << 13;
	state ^= state >> 7;
	state ^= state << 17;
	return state % below;
}

static char *buffer(size_t size)
{
	char *made = aligned_alloc(4096, (size + 4095) & ~(size_t)4095);

	if (!made)
		die("aligned_alloc");
	for (size_t i = 0; i < size; i++)
		made[i] = (char)(i * 31 + i / 4096);
	return made;
}

static int opened(const char *name, int flags)
{
	int fd = open(name, flags, 0644);

	if (fd < 0)
		die(name);
	return fd;
}

static void write_all(int fd, const char *data, size_t size)
{
	while (size) {
		ssize_t done = write(fd, data, size);
		if (done <= 0)
			die("write");
		data += done;
		size -= (size_t)done;
	}
}

static void make_file(const char *name, size_t size)
{
	static char *data;
	int fd = opened(name, O_WRONLY | O_CREAT | O_TRUNC);

	if (!data)
		data = buffer(1 << 20);
	for (size_t done = 0; done < size; done += 1 << 20)
		write_all(fd, data, size - done < 1 << 20 ? size - done : 1 << 20);
	close(fd);
}

static long number(const char *text)
{
	return strtol(text, NULL, 0);
}

/* --- groups -------------------------------------------------------------------------------- */

/* stat and open-read-close of small files */
static void look(char **arg)
{
	enum { FILES = 100, SIZE = 1024 };
	long count = number(arg[0]);
	char name[64], data[4096];
	struct stat st;

	for (int i = 0; i < FILES; i++) {
		snprintf(name, sizeof name, "look%d", i);
		if (stat(name, &st))
			make_file(name, SIZE);
	}
	for (long i = 0; i < count; i++) {
		snprintf(name, sizeof name, "look%d", (int)chance(FILES));
		uint64_t started = now();
		if (stat(name, &st))
			die(name);
		note(started);
	}
	report("stat", 0);
	for (long i = 0; i < count; i++) {
		snprintf(name, sizeof name, "look%d", (int)chance(FILES));
		uint64_t started = now();
		int fd = opened(name, O_RDONLY);
		if (read(fd, data, sizeof data) != SIZE)
			die("read");
		close(fd);
		note(started);
	}
	report("open-read-close", 0);
}

/* create, rename, chmod, unlink of empty files; mkdir; create-write-close of small files */
static void names(char **arg)
{
	long count = number(arg[0]);
	char name[64], other[64], *data = buffer(1024);

	for (long i = 0; i < count; i++) {
		snprintf(name, sizeof name, "name%ld", i);
		uint64_t started = now();
		close(opened(name, O_WRONLY | O_CREAT | O_EXCL));
		note(started);
	}
	report("create", 0);
	for (long i = 0; i < count; i++) {
		snprintf(name, sizeof name, "name%ld", i);
		snprintf(other, sizeof other, "other%ld", i);
		uint64_t started = now();
		if (rename(name, other))
			die("rename");
		note(started);
	}
	report("rename", 0);
	for (long i = 0; i < count; i++) {
		snprintf(other, sizeof other, "other%ld", i);
		uint64_t started = now();
		if (chmod(other, i % 2 ? 0600 : 0640))
			die("chmod");
		note(started);
	}
	report("setattr", 0);
	for (long i = 0; i < count; i++) {
		snprintf(other, sizeof other, "other%ld", i);
		uint64_t started = now();
		if (unlink(other))
			die("unlink");
		note(started);
	}
	report("unlink", 0);
	for (long i = 0; i < count; i++) {
		snprintf(name, sizeof name, "folder%ld", i);
		uint64_t started = now();
		if (mkdir(name, 0755))
			die("mkdir");
		note(started);
	}
	report("mkdir", 0);
	for (long i = 0; i < count; i++) {
		snprintf(name, sizeof name, "folder%ld", i);
		if (rmdir(name))
			die("rmdir");
	}
	for (long i = 0; i < count; i++) {
		snprintf(name, sizeof name, "full%ld", i);
		uint64_t started = now();
		int fd = opened(name, O_WRONLY | O_CREAT | O_EXCL);
		write_all(fd, data, 1024);
		close(fd);
		note(started);
	}
	report("create-write-close", 0);
	for (long i = 0; i < count; i++) {
		snprintf(name, sizeof name, "full%ld", i);
		if (unlink(name))
			die("unlink");
	}
}

/* 4 KiB at random places of a file of some MiB */
static void random_io(char **arg)
{
	uint64_t size = (uint64_t)number(arg[0]) << 20;
	long count = number(arg[1]);
	char *data = buffer(4096);
	struct stat st;

	if (stat("random", &st) || (uint64_t)st.st_size != size)
		make_file("random", size);
	int fd = opened("random", O_RDWR);
	for (long i = 0; i < count; i++) {
		off_t at = (off_t)(chance(size / 4096) * 4096);
		uint64_t started = now();
		if (pread(fd, data, 4096, at) != 4096)
			die("pread");
		note(started);
	}
	report("random-read-4K", (uint64_t)count * 4096);
	for (long i = 0; i < count; i++) {
		off_t at = (off_t)(chance(size / 4096) * 4096);
		uint64_t started = now();
		if (pwrite(fd, data, 4096, at) != 4096)
			die("pwrite");
		note(started);
	}
	report("random-write-4K", (uint64_t)count * 4096);
	close(fd);
}

static const char *label(const char *what, size_t block)
{
	static char text[64];

	if (block >= 1 << 20)
		snprintf(text, sizeof text, "%s-%zuM", what, block >> 20);
	else
		snprintf(text, sizeof text, "%s-%zuK", what, block >> 10);
	return text;
}

/* a file of some MiB, over and over it in blocks of some KiB: written in place, then read */
static void sequential(char **arg)
{
	uint64_t size = (uint64_t)number(arg[0]) << 20;
	size_t block = (size_t)number(arg[1]) << 10;
	char *data = buffer(block);
	struct stat st;

	if (stat("sequential", &st) || (uint64_t)st.st_size < size)
		make_file("sequential", size);
	int fd = opened("sequential", O_RDWR);
	for (uint64_t at = 0; at < size; at += block) {
		uint64_t started = now();
		if (pwrite(fd, data, block, (off_t)at) != (ssize_t)block)
			die("pwrite");
		note(started);
	}
	report(label("write", block), size);
	close(fd);
	fd = opened("sequential", O_RDONLY);
	for (uint64_t at = 0; at < size; at += block) {
		uint64_t started = now();
		if (read(fd, data, block) != (ssize_t)block)
			die("read");
		note(started);
	}
	report(label("read", block), size);
	close(fd);
}

/* the same on a mapping of a file, with memcpy */
static void mapping(char **arg)
{
	uint64_t size = (uint64_t)number(arg[0]) << 20;
	size_t block = (size_t)number(arg[1]) << 10;
	char *data = buffer(block);
	int fd = opened("mapping", O_RDWR | O_CREAT);

	if (ftruncate(fd, (off_t)size))
		die("ftruncate");
	char *map = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, 0);
	if (map == MAP_FAILED)
		die("mmap");
	for (uint64_t at = 0; at < size; at += block) {
		uint64_t started = now();
		memcpy(map + at, data, block);
		__asm__ volatile("" ::: "memory");
		note(started);
	}
	report(label("write", block), size);
	for (uint64_t at = 0; at < size; at += block) {
		uint64_t started = now();
		memcpy(data, map + at, block);
		__asm__ volatile("" ::"r"(data) : "memory");
		note(started);
	}
	report(label("read", block), size);
}

/* Copies the bytes of a file into a mapping that is in memory, or out of it, with one call. */
static void once(char **arg)
{
	uint64_t size = (uint64_t)number(arg[0]) << 20, started;
	int in = strcmp(arg[1], "in") == 0, region = opened(arg[2], O_RDWR), file;
	int protection = in ? PROT_READ | PROT_WRITE : PROT_READ;
	char *map = mmap(NULL, size, protection, MAP_SHARED | MAP_POPULATE, region, 0);

	if (map == MAP_FAILED)
		die("mmap");
	file = opened(arg[3], in ? O_RDONLY : O_WRONLY | O_CREAT | O_TRUNC);
	started = now();
	if ((in ? read(file, map, size) : write(file, map, size)) != (ssize_t)size)
		die(arg[3]);
	note(started);
	report("once", size);
}

/* COUNT files of SIZE bytes in the current directory, unless they are there already */
static void fill(char **arg)
{
	long count = number(arg[0]), size = number(arg[1]);
	char name[64];
	struct stat st;

	snprintf(name, sizeof name, "file%ld", count - 1);
	if (stat(name, &st) == 0)
		return;
	for (long i = 0; i < count; i++) {
		snprintf(name, sizeof name, "file%ld", i);
		make_file(name, (size_t)size);
	}
}

static void list_once(const char *path, long expected)
{
	long found = 0;
	uint64_t started = now();
	DIR *folder = opendir(path);

	if (!folder)
		die(path);
	while (readdir(folder))
		found++;
	closedir(folder);
	note(started);
	if (found < expected) {
		fprintf(stderr, "client: only %ld of %ld names listed\n", found, expected);
		exit(1);
	}
}

/* list the current directory, which has COUNT names, some TIMES */
static void list(char **arg)
{
	for (long times = number(arg[1]); times > 0; times--)
		list_once(".", number(arg[0]));
	report("readdir", 0);
}

/* lookup, create, unlink in a directory filled with COUNT names; PATHs are walked in turn, so two
 * paths through two mounts alternate */
static void crowd(char **arg)
{
	long count = number(arg[0]), times = number(arg[1]);
	int paths = 0;
	char name[4096];
	struct stat st;

	while (arg[2 + paths])
		paths++;
	for (long i = 0; i < times; i++) {
		snprintf(name, sizeof name, "%s/file%ld", arg[2 + i % paths], (long)chance((uint64_t)count));
		uint64_t started = now();
		if (stat(name, &st))
			die(name);
		note(started);
	}
	report("lookup", 0);
	for (long i = 0; i < times; i++) {
		snprintf(name, sizeof name, "%s/extra%ld", arg[2 + i % paths], i);
		uint64_t started = now();
		close(opened(name, O_WRONLY | O_CREAT | O_EXCL));
		note(started);
	}
	report("create", 0);
	for (long i = 0; i < times; i++) {
		snprintf(name, sizeof name, "%s/extra%ld", arg[2 + (i + 1) % paths], i);
		uint64_t started = now();
		if (unlink(name))
			die(name);
		note(started);
	}
	report("unlink", 0);
}

/* 4 KiB writes at random places of an own file, from a moment (ns, monotonic) for some ms */
static void pump(char **arg)
{
	uint64_t start = strtoull(arg[1], NULL, 0), end = start + (uint64_t)number(arg[2]) * 1000000u;
	uint64_t size = 4 << 20;
	char *data = buffer(4096);
	struct stat st;

	if (stat(arg[0], &st) || (uint64_t)st.st_size != size)
		make_file(arg[0], size);
	int fd = opened(arg[0], O_RDWR);
	while (now() < start)
		usleep(1000);
	for (uint64_t started; (started = now()) < end;) {
		if (pwrite(fd, data, 4096, (off_t)(chance(size / 4096) * 4096)) != 4096)
			die("pwrite");
		note(started);
	}
	close(fd);
	report("pump", 0);
}

/* how long after a write through one path began does a reader of the other path see it */
static void see(char **arg)
{
	long count = number(arg[2]);
	uint64_t stamp = 0, seen = 0;

	make_file(arg[0], 4096);
	pid_t child = fork();
	if (child < 0)
		die("fork");
	if (child == 0) {
		int fd = opened(arg[0], O_WRONLY);
		for (long i = 0; i < count; i++) {
			usleep(2000);
			stamp = now();
			if (pwrite(fd, &stamp, sizeof stamp, 0) != sizeof stamp)
				die("pwrite");
		}
		stamp = UINT64_MAX;
		if (pwrite(fd, &stamp, sizeof stamp, 0) != sizeof stamp)
			die("pwrite");
		_exit(0);
	}
	int fd = opened(arg[1], O_RDONLY);
	while (stamp != UINT64_MAX) {
		if (pread(fd, &stamp, sizeof stamp, 0) != sizeof stamp)
			die("pread");
		if (stamp != seen && stamp != UINT64_MAX && seen)
			note(stamp);
		seen = stamp;
	}
	waitpid(child, NULL, 0);
	report("seen", 0);
}

/* the same change, read back through the other path as soon as the call has returned */
static void coherent(char **arg)
{
	long count = number(arg[2]), missed = 0;
	uint64_t value;

	make_file(arg[0], 4096);
	int out = opened(arg[0], O_WRONLY), in = opened(arg[1], O_RDONLY);
	for (uint64_t i = 1; i <= (uint64_t)count; i++) {
		uint64_t started = now();
		if (pwrite(out, &i, sizeof i, 0) != sizeof i || pread(in, &value, sizeof value, 0) != sizeof value)
			die("pread");
		note(started);
		missed += value != i;
	}
	report("write-then-read", 0);
	for (long i = 0; i < missed; i++)
		note(now());
	report("missed", 0);
}

/* what the machine itself costs: batches of 100 empty system calls, and of 100 fresh pages */
static void machine(char **arg)
{
	enum { BATCH = 100, PAGE = 4096 };
	long count = number(arg[0]);

	for (long i = 0; i < count; i++) {
		uint64_t started = now();
		for (int call = 0; call < BATCH; call++)
			syscall(SYS_getppid);
		note(started);
	}
	report("empty-call", 0);
	for (long i = 0; i < count; i++) {
		volatile char *pages = mmap(NULL, BATCH * PAGE, PROT_READ | PROT_WRITE,
					    MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		if (pages == MAP_FAILED)
			die("mmap");
		madvise((void *)pages, BATCH * PAGE, MADV_NOHUGEPAGE);
		uint64_t started = now();
		for (int page = 0; page < BATCH; page++)
			pages[page * PAGE] = 1;
		note(started);
		munmap((void *)pages, BATCH * PAGE);
	}
	report("fresh-page", 0);
}

/* run a command; its time is the only sample */
static void run(char **arg)
{
	pid_t child;
	int status;
	uint64_t started = now();

	if ((errno = posix_spawnp(&child, arg[0], NULL, NULL, arg, environ)))
		die(arg[0]);
	if (waitpid(child, &status, 0) != child)
		die("waitpid");
	note(started);
	if (status)
		exit(1);
	report("run", 0);
}

static const struct {
	const char *name;
	void (*group)(char **);
	int arguments;
} groups[] = {
	{"look", look, 1},	   {"names", names, 1}, {"random", random_io, 2},
	{"sequential", sequential, 2}, {"mapping", mapping, 2}, {"fill", fill, 2},
	{"list", list, 2},	   {"crowd", crowd, 3}, {"pump", pump, 3},
	{"see", see, 3},	   {"coherent", coherent, 3}, {"run", run, 1},
	{"once", once, 4},	   {"machine", machine, 1},
};

int main(int argc, char **argv)
{
	for (size_t i = 0; argc > 1 && i < sizeof groups / sizeof *groups; i++) {
		if (strcmp(argv[1], groups[i].name) == 0 && argc - 2 >= groups[i].arguments) {
			printf("{");
			fflush(stdout); /* a fork must not print it twice */
			groups[i].group(argv + 2);
			printf("}\n");
			return 0;
		}
	}
	fprintf(stderr, "usage: client GROUP ARGUMENT...\n");
	return 2;
}
