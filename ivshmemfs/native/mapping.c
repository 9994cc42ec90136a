/* Mappings: their life, their words, and how the files of this layer touch them. */
#include <sched.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <time.h>
#include <unistd.h>

#include "crc32c.h"
#include "kernel.h"

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22 /* Linux 5.14 */
#endif

#define LONG_RUN (16 * 1024) /* contiguous bytes for which long_run() looks at the windows */
#define WARM_WINDOWS 64      /* after so many windows of stores, a window has left the caches */

bool access_has_extras;

void native_prepare(void)
{
    access_prepare();
    crc_prepare();
}

/* --- life -------------------------------------------------------------------------------------- */

/* A descriptor of the mapped file if write(2) to it changes the very bytes that are mapped; or -1.
 * /dev is a tmpfs, too, so the device nodes there are sorted out. */
static int file_behind(const struct mapping *mapping, int file)
{
    struct statfs where;
    struct stat what;

    if (!mapping->writable || mapping->access != ACCESS_NORMAL || fstatfs(file, &where) < 0 ||
        where.f_type != TMPFS_MAGIC || fstat(file, &what) < 0 || !S_ISREG(what.st_mode))
        return -1;
    return fcntl(file, F_DUPFD_CLOEXEC, 0);
}

int mapping_map(struct mapping *mapping, int file, uint64_t offset)
{
    int protection = PROT_READ | (mapping->writable ? PROT_WRITE : 0);
    void *base = mmap(NULL, mapping->length, protection, MAP_SHARED, file, (off_t)offset);

    if (base == MAP_FAILED || sigbus_install() < 0) {
        mapping->code = errno;
        if (base != MAP_FAILED)
            munmap(base, mapping->length);
        return STATUS_SYSTEM;
    }
    mapping->base = base;
    mapping->start = offset;
    mapping->file = file_behind(mapping, file);
    if (mapping->writable && mapping->access == ACCESS_NORMAL) /* without it, runs are just slower */
        mapping->warmth = calloc(mapping->length / WINDOW + 1, sizeof *mapping->warmth);
    return STATUS_OK;
}

void mapping_unmap(struct mapping *mapping)
{
    if (mapping->base != NULL) {
        munmap(mapping->base, mapping->length);
        if (mapping->file >= 0)
            close(mapping->file);
    }
    mapping->base = NULL;
    free(mapping->warmth);
    mapping->warmth = NULL;
}

void mapping_close(struct mapping *mapping)
{
    mapping->closed = true;
    if (mapping->users == 0)
        mapping_unmap(mapping);
}

/* --- accesses ---------------------------------------------------------------------------------- */

int perform_long(struct mapping *mapping, void (*body)(void *), void *argument)
{
    const bool may_leave = !mapping->armed && mapping->host.leave != NULL;
    void *left = may_leave ? mapping->host.leave() : NULL;
    void *fault = NULL;
    bool done = attempt(body, argument, &fault);

    if (may_leave)
        mapping->host.enter(left);
    if (done)
        return STATUS_OK;
    mapping->fault = fault;
    return STATUS_FAULT;
}

/* A file's pages appear in a mapping when they are first touched.  One fault for each page takes
 * longer than the store to it, so this asks the kernel to map a whole window at once.  A window
 * that was last stored to long ago is not cached, so a plain store would first fetch it.  The
 * answers are hints: other threads may change them at the same time. */
bool long_run(struct mapping *mapping, const unsigned char *to, uint64_t length)
{
    uint64_t first = (uint64_t)(to - mapping->base) >> WINDOW_BITS;
    uint64_t last = (uint64_t)(to + length - 1 - mapping->base) >> WINDOW_BITS;
    uint32_t now = (uint32_t)(mapping->moved >> WINDOW_BITS) + 1;
    uint64_t cold = 0;

    if (mapping->warmth == NULL || (length < LONG_RUN && mapping->warmth[first] != 0))
        return false;
    for (uint64_t window = first; window <= last; window++) {
        uint32_t since = __atomic_exchange_n(&mapping->warmth[window], now, __ATOMIC_RELAXED);
        uint64_t rest = mapping->length - (window << WINDOW_BITS);
        if (since == 0)
            madvise(mapping->base + (window << WINDOW_BITS), rest < WINDOW ? rest : WINDOW,
                    MADV_POPULATE_READ); /* older kernels refuse; then each page faults */
        cold += since == 0 || now - since > WARM_WINDOWS;
    }
    mapping->moved += length;
    return length >= LONG_RUN && 2 * cold > last - first;
}

/* --- words ------------------------------------------------------------------------------------- */

struct word_access {
    unsigned char *address;
    uint64_t value;
    uint64_t expected;
    uint64_t previous;
    int access;
    bool unable;
};

static void load_body(void *argument)
{
    struct word_access *word = argument;
    word->value = word_load(word->access, word->address);
}

static void store_body(void *argument)
{
    struct word_access *word = argument;
    word_store(word->access, word->address, word->value);
}

static void swap_body(void *argument)
{
    struct word_access *word = argument;
    fence_around_swap(word->access);
    word->unable = !word_swap(word->address, word->expected, word->value, &word->previous);
    fence_around_swap(word->access);
}

static inline int word_find(const struct mapping *mapping, uint64_t offset,
                            struct word_access *word)
{
    if (UNLIKELY((offset & (WORD_SIZE - 1)) != 0 || offset >= mapping->length ||
                 mapping->length - offset < WORD_SIZE))
        return STATUS_RANGE;
    word->address = mapping->base + offset;
    word->access = mapping->access;
    return STATUS_OK;
}

int word_read(struct mapping *mapping, uint64_t offset, uint64_t *value)
{
    struct word_access word;
    int status = word_find(mapping, offset, &word);

    if (status == STATUS_OK && (status = load_event(mapping)) == STATUS_OK &&
        (status = perform(mapping, load_body, &word, WORD_SIZE)) == STATUS_OK)
        *value = word.value;
    return status;
}

int word_await(struct mapping *mapping, uint64_t offset, uint64_t value, uint64_t nanoseconds,
               uint64_t naps, uint64_t *found)
{
    const struct timespec nap = {.tv_sec = (time_t)(nanoseconds / 1000000000),
                                 .tv_nsec = (long)(nanoseconds % 1000000000)};
    int status = word_read(mapping, offset, found);

    while (status == STATUS_OK && *found == value && naps-- > 0) {
        void *left = mapping->host.leave != NULL ? mapping->host.leave() : NULL;
        bool cut_short = nanoseconds == 0 ? sched_yield() != 0 : nanosleep(&nap, NULL) != 0;

        if (mapping->host.enter != NULL)
            mapping->host.enter(left);
        if (mapping->closed)
            return STATUS_CLOSED;
        if (cut_short && mapping->host.interrupted != NULL &&
            mapping->host.interrupted(mapping->host.context) != 0)
            return STATUS_INTERRUPTED;
        status = word_read(mapping, offset, found);
    }
    return status;
}

int word_write(struct mapping *mapping, uint64_t offset, uint64_t value)
{
    struct word_access word;
    int status = word_find(mapping, offset, &word);

    word.value = value;
    if (status == STATUS_OK && (status = store_event(mapping)) == STATUS_OK)
        status = perform(mapping, store_body, &word, WORD_SIZE);
    return status;
}

int word_compare_and_swap(struct mapping *mapping, uint64_t offset, uint64_t expected,
                          uint64_t value, uint64_t *previous)
{
    struct word_access word;
    int status = word_find(mapping, offset, &word);

    word.expected = expected;
    word.value = value;
    if (status == STATUS_OK && (status = store_event(mapping)) == STATUS_OK &&
        (status = perform(mapping, swap_body, &word, WORD_SIZE)) == STATUS_OK) {
        *previous = word.previous;
        status = word.unable ? STATUS_UNABLE : STATUS_OK;
    }
    return status;
}

int word_swap_then_see(struct mapping *mapping, uint64_t offset, uint64_t expected, uint64_t value,
                       uint64_t other, uint64_t wanted, uint32_t *passed)
{
    uint64_t found = 0;
    int status = word_compare_and_swap(mapping, offset, expected, value, &found);

    *passed = 0;
    if (status != STATUS_OK || found != expected)
        return status;
    *passed = 1;
    status = word_read(mapping, other, &found);
    *passed += status == STATUS_OK && found == wanted;
    return status;
}

int word_replace(struct mapping *mapping, uint64_t offset, uint64_t value, uint64_t other,
                 uint64_t wanted, bool *replaced)
{
    uint64_t seen = 0, before = 0, found = 0;
    int status = word_read(mapping, offset, &seen);

    *replaced = false;
    while (status == STATUS_OK && seen != value) {
        status = word_read(mapping, other, &found);
        if (status != STATUS_OK || found != wanted)
            return status;
        before = seen;
        status = word_compare_and_swap(mapping, offset, before, value, &seen);
        if (status != STATUS_OK || seen == before)
            break;
    }
    *replaced = status == STATUS_OK;
    return status;
}

void fence(void)
{
    fence_full();
}

struct column {
    const unsigned char *from;
    uint64_t stride;
    uint64_t count;
    uint64_t *into;
    int access;
};

static void column_body(void *argument)
{
    struct column *column = argument;
    const unsigned char *from = column->from;

    for (uint64_t at = 0; at < column->count; at++, from += column->stride)
        column->into[at] = word_load(column->access, from);
}

int column_check(const struct mapping *mapping, uint64_t offset, uint64_t stride, uint64_t count)
{
    struct word_access first;

    if (word_find(mapping, offset, &first) != STATUS_OK || (stride & (WORD_SIZE - 1)) != 0 ||
        stride == 0 || count > (mapping->length - offset - WORD_SIZE) / stride + 1)
        return STATUS_RANGE;
    return STATUS_OK;
}

/* Each word is a load event of its own. */
int column_read(struct mapping *mapping, uint64_t offset, uint64_t stride, uint64_t count,
                uint64_t *into)
{
    struct column column = {.access = mapping->access, .stride = stride, .into = into};
    int status = column_check(mapping, offset, stride, count);

    column.from = mapping->base + offset;
    while (status == STATUS_OK && count > 0) {
        column.count = mapping->armed && mapping->trap_loads ? 1 : count;
        if ((status = load_event(mapping)) == STATUS_OK)
            status = perform(mapping, column_body, &column, WORD_SIZE * column.count);
        count -= column.count;
        column.into += column.count;
        column.from += column.count * stride;
    }
    return status;
}

static void unaligned_body(void *argument)
{
    struct word_access *word = argument;
    word->value = unaligned_peek(word->address);
}

int unaligned_load_works(struct mapping *mapping, uint64_t offset, bool *works)
{
    struct word_access word = {.access = mapping->access};
    void *fault = NULL;
    int status = range_check(mapping, offset, 2 * WORD_SIZE);

    if (status == STATUS_OK) {
        word.address = mapping->base + offset;
        word.address = (unsigned char *)(((uintptr_t)word.address & ~(uintptr_t)7) + 5);
        *works = attempt(unaligned_body, &word, &fault);
    }
    return status;
}
