/* Copies between blocks and an open file.
 *
 * The kernel copies between a file's pages and the blocks by itself, which saves one copy of two.
 * Where the region is a file of tmpfs it copies from file to file, and no page of a long run needs
 * to be mapped.  Both ways reach the same memory.
 * In three cases a buffer is used instead.  Device memory may not allow the kernel's way to copy.
 * Some filesystems cannot reach a device's memory (EFAULT).  A trap must see each store. */
#include <errno.h>
#include <stdlib.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include "kernel.h"

struct transfer {
    struct span span; /* which part of the blocks; `to` is unused */
    int file;
    uint64_t at; /* in the file, of the first byte of `span` */
    bool filling;
    bool sending; /* from file to file, as long as that works */
    bool stale;   /* the guard changed */
};

enum {
    ROWS = 64,           /* most parts of one system call */
    FILLED = 4 * WINDOW, /* most bytes stored without a look at the guard */
    SENT = WINDOW / 2,   /* least bytes of a row for a system call of its own */
};

/* STATUS_SYSTEM with EFAULT, which tells the caller to take the buffer. */
static int unreachable(const struct mapping *mapping, int status)
{
    return status == STATUS_SYSTEM && mapping->code == EFAULT;
}

static bool kernel_may_copy(const struct mapping *mapping)
{
    return mapping->access != ACCESS_DEVICE && !mapping->armed;
}

static void *leave(const struct mapping *mapping)
{
    return mapping->host.leave != NULL ? mapping->host.leave() : NULL;
}

static void enter(const struct mapping *mapping, void *left)
{
    if (mapping->host.enter != NULL)
        mapping->host.enter(left);
}

/* What a failed system call means: STATUS_OK to call it again. */
static int failed(struct mapping *mapping, int code)
{
    if (code == EINTR) {
        if (mapping->host.interrupted == NULL)
            return STATUS_OK;
        return mapping->host.interrupted(mapping->host.context) != 0 ? STATUS_INTERRUPTED
                                                                     : STATUS_OK;
    }
    mapping->code = code;
    return STATUS_SYSTEM;
}

/* Whether the region still has all its bytes: a write behind the end of a file would add some. */
static bool whole(const struct mapping *mapping)
{
    struct stat now;

    return fstat(mapping->file, &now) == 0 &&
           (uint64_t)now.st_size >= mapping->start + mapping->length;
}

/* Send the next row from file to file.  Returns how many bytes it moved, or minus an errno; ENOTSUP
 * for a row that has to be copied through the mapping. */
static int64_t send_step(struct transfer *transfer)
{
    struct span *span = &transfer->span;
    struct mapping *mapping = span->blocks->mapping;
    off_t place, at = (off_t)transfer->at;
    unsigned char *to;
    uint64_t length = span_row(span, &to);
    int64_t moved;
    void *left;

    if (to == NULL || length < SENT)
        return -ENOTSUP;
    place = (off_t)(mapping->start + (uint64_t)(to - mapping->base));
    if (!whole(mapping) || lseek(mapping->file, place, SEEK_SET) != place)
        return -ENOTSUP;
    left = leave(mapping);
    moved = sendfile(mapping->file, transfer->file, &at, length < FILLED ? length : FILLED);
    moved = moved < 0 ? -errno : moved;
    enter(mapping, left);
    return moved;
}

/* Copy the next rows through the mapping.  Returns as send_step() does. */
static int64_t copy_step(struct transfer *transfer)
{
    static const unsigned char zeros[64 * 1024];
    struct span span = transfer->span;
    struct mapping *mapping = span.blocks->mapping;
    struct iovec rows[ROWS];
    int64_t moved;
    int count = 0;
    void *left;

    if (transfer->filling && span.stop - span.position > FILLED)
        span.stop = span.position + FILLED;
    for (; count < ROWS && span.position < span.stop; count++) {
        unsigned char *from;
        uint64_t length = span_row(&span, &from);
        if (from == NULL && length > sizeof zeros)
            length = sizeof zeros;
        if (transfer->filling && from != NULL)
            long_run(mapping, from, length);
        rows[count].iov_base = from != NULL ? from : (void *)(uintptr_t)zeros;
        rows[count].iov_len = length;
        span.position += length;
    }
    left = leave(mapping);
    moved = transfer->filling ? preadv(transfer->file, rows, count, (off_t)transfer->at)
                              : pwritev(transfer->file, rows, count, (off_t)transfer->at);
    moved = moved < 0 ? -errno : moved;
    enter(mapping, left);
    return moved;
}

/* Returns how many bytes the last system call moved, or minus an errno.  That sendfile(2) sends
 * nothing does not show the end of a file: it goes by a size that the kernel may have kept. */
static int64_t transfer_step(struct transfer *transfer)
{
    int64_t moved = transfer->sending ? send_step(transfer) : -ENOTSUP;

    if (moved <= 0 && moved != -EINTR) {
        transfer->sending &= moved == -ENOTSUP;
        moved = copy_step(transfer);
    }
    if (moved > 0)
        transfer->span.position += (uint64_t)moved, transfer->at += (uint64_t)moved;
    return moved;
}

static void guard_body(void *argument)
{
    struct transfer *transfer = argument;
    transfer->stale = transfer->filling && !guarded(transfer->span.blocks);
}

/* Until all is moved, the file ends, or the guard changes. */
static int transfer_run(struct transfer *transfer)
{
    struct mapping *mapping = transfer->span.blocks->mapping;
    int status;

    while (transfer->span.position < transfer->span.stop) {
        int64_t moved;
        if ((status = perform(mapping, guard_body, transfer, WORD_SIZE)) != STATUS_OK)
            return status;
        moved = transfer->stale ? 0 : transfer_step(transfer);
        if (moved == 0)
            return STATUS_OK;
        if (moved < 0 && (status = failed(mapping, (int)-moved)) != STATUS_OK)
            return status;
    }
    return STATUS_OK;
}

/* The same between a file and private memory. */
static int buffer_run(const struct transfer *transfer, unsigned char *buffer, uint64_t length,
                      uint64_t *done)
{
    struct mapping *mapping = transfer->span.blocks->mapping;
    int status;

    for (*done = 0; *done < length;) {
        void *left = leave(mapping);
        off_t at = (off_t)(transfer->at + *done);
        ssize_t moved = transfer->filling
                            ? pread(transfer->file, buffer + *done, length - *done, at)
                            : pwrite(transfer->file, buffer + *done, length - *done, at);
        int code = errno;
        enter(mapping, left);
        if (moved == 0)
            break;
        if (moved > 0)
            *done += (uint64_t)moved;
        else if ((status = failed(mapping, code)) != STATUS_OK)
            return status;
    }
    return STATUS_OK;
}

/* Zeros from byte `used` on to the end of the last block that is used. */
static int fill_rest(const struct transfer *transfer, uint64_t used)
{
    const struct blocks *blocks = transfer->span.blocks;
    struct span rest = transfer->span;
    unsigned char *to;
    uint64_t length;

    rest.position = used;
    rest.stop = (used + blocks->block_size - 1) / blocks->block_size * blocks->block_size;
    if (rest.position == rest.stop)
        return STATUS_OK;
    length = span_row(&rest, &to);
    return to == NULL ? STATUS_CHANGED : store_zeros(blocks->mapping, to, length);
}

static int fill_straight(struct transfer transfer, uint64_t *done)
{
    const struct blocks *blocks = transfer.span.blocks;
    int status = transfer_run(&transfer);

    *done = transfer.span.position;
    if (unreachable(blocks->mapping, status))
        return status;
    blocks->mapping->stores += 2 * ((*done + blocks->block_size - 1) / blocks->block_size);
    if (status != STATUS_OK || transfer.stale)
        return unless_stale(status, transfer.stale);
    return fill_rest(&transfer, *done);
}

int blocks_fill(const struct blocks *blocks, const unsigned char *pointers, uint64_t count,
                int file, uint64_t at, uint64_t length, uint64_t *done)
{
    struct transfer transfer = {
        .span = {blocks, pointers, 0, length, NULL},
        .file = file,
        .at = at,
        .filling = true,
        .sending = blocks->mapping->file >= 0};
    unsigned char *buffer;
    int status;

    if (length > count * blocks->block_size)
        return STATUS_RANGE;
    if (kernel_may_copy(blocks->mapping)) {
        status = fill_straight(transfer, done);
        if (!unreachable(blocks->mapping, status))
            return status;
    }
    if ((buffer = malloc(length + 1)) == NULL)
        return STATUS_NO_MEMORY;
    status = buffer_run(&transfer, buffer, length, done);
    if (status == STATUS_OK)
        status = blocks_scatter(blocks, pointers, count, buffer, *done);
    free(buffer);
    return status;
}

static int drain_straight(struct transfer transfer)
{
    const struct blocks *blocks = transfer.span.blocks;
    uint64_t first = transfer.span.position / blocks->block_size;
    uint64_t last = (transfer.span.stop - 1) / blocks->block_size + 1;
    int status = transfer_run(&transfer);

    return status == STATUS_OK ? tags_check_range(blocks, transfer.span.pointers, first, last)
                               : status;
}

int blocks_drain(const struct blocks *blocks, const unsigned char *pointers, uint64_t count,
                 uint64_t skip, uint64_t length, int file, uint64_t at)
{
    struct transfer transfer = {
        .span = {blocks, pointers, skip, skip + length, NULL}, .file = file, .at = at};
    uint64_t available = count * blocks->block_size, done;
    unsigned char *buffer;
    int status;

    if (skip > available || length > available - skip)
        return STATUS_RANGE;
    if (kernel_may_copy(blocks->mapping) && length > 0) {
        status = drain_straight(transfer);
        if (!unreachable(blocks->mapping, status))
            return status;
    }
    if ((buffer = malloc(length + 1)) == NULL)
        return STATUS_NO_MEMORY;
    transfer.span.to = buffer;
    status = span_gather(&transfer.span);
    if (status == STATUS_OK)
        status = buffer_run(&transfer, buffer, length, &done);
    free(buffer);
    return status;
}
