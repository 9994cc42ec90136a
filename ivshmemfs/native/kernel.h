/* What the files of the native layer share and others need not see. */
#ifndef IVSHMEMFS_KERNEL_H
#define IVSHMEMFS_KERNEL_H

#include <string.h>

#include "access.h"
#include "native.h"
#include "sigbus.h"
#include "trap.h"

#define LONG_ACCESS (64 * 1024) /* bytes; for less, giving up the program's lock costs too much */
#define WINDOW_BITS 16          /* as much as the kernel maps at one fault */
#define WINDOW (UINT64_C(1) << WINDOW_BITS)
#define HOLE UINT64_MAX

/* perform() without the program's lock, as far as it may be given up now. */
int perform_long(struct mapping *mapping, void (*body)(void *), void *argument);

/* Run body(argument) on the mapping, moving about `bytes`: STATUS_OK or STATUS_FAULT. */
static inline int perform(struct mapping *mapping, void (*body)(void *), void *argument,
                          uint64_t bytes)
{
    void *fault = NULL;

    if (UNLIKELY(bytes >= LONG_ACCESS))
        return perform_long(mapping, body, argument);
    if (attempt(body, argument, &fault))
        return STATUS_OK;
    mapping->fault = fault;
    return STATUS_FAULT;
}

/* Prepare a run of stores; whether they are many and should go past the caches. */
bool long_run(struct mapping *mapping, const unsigned char *to, uint64_t length);

/* --- pointers and words in private memory ------------------------------------------------------ */

static inline uint64_t u64_at(const unsigned char *table, uint64_t index)
{
    uint64_t value;
    memcpy(&value, table + WORD_SIZE * index, 8);
    return value;
}

static inline uint32_t u32_at(const unsigned char *bytes, size_t at)
{
    uint32_t value;
    memcpy(&value, bytes + at, 4);
    return value;
}

static inline uint32_t pointer_block(const unsigned char *pointer)
{
    return u32_at(pointer, POINTER_BLOCK_AT);
}

static inline uint64_t pointer_tag(const unsigned char *pointer)
{
    return u64_at(pointer + POINTER_TAG_AT, 0);
}

static inline void pointer_make(unsigned char *pointer, uint32_t block, uint64_t tag)
{
    const uint32_t weight = 1;
    memcpy(pointer + POINTER_BLOCK_AT, &block, 4);
    memcpy(pointer + POINTER_WEIGHT_AT, &weight, 4);
    memcpy(pointer + POINTER_TAG_AT, &tag, 8);
}

/* --- places in the region ---------------------------------------------------------------------- */

static inline unsigned char *block_address(const struct blocks *blocks, uint64_t block)
{
    return blocks->mapping->base + blocks->data_offset + block * blocks->block_size;
}

static inline unsigned char *tag_address(const struct blocks *blocks, uint64_t block)
{
    return blocks->mapping->base + blocks->tags_offset + block * WORD_SIZE;
}

/* Do the blocks that are being filled still belong to the caller, as far as it can know?  Only
 * inside attempt(). */
static inline bool guarded(const struct blocks *blocks)
{
    return blocks->guard == 0 ||
           word_load(blocks->mapping->access, blocks->mapping->base + blocks->guard_offset) ==
               blocks->guard;
}

/* Fold "stale" into a status. */
static inline int unless_stale(int status, bool stale)
{
    return status == STATUS_OK && stale ? STATUS_STALE : status;
}

/* --- copy.c ------------------------------------------------------------------------------------ */

/* A part of the blocks in a row. */
struct span {
    const struct blocks *blocks;
    const unsigned char *pointers;
    uint64_t position; /* in the virtual concatenation of the blocks */
    uint64_t stop;
    unsigned char *to; /* private memory; unused by transfer.c */
};

/* How many bytes from `position` on are contiguous, and where: NULL for a hole. */
uint64_t span_row(const struct span *span, unsigned char **from);

/* Copy a span, then check the tags: STATUS_OK or STATUS_STALE. */
int span_gather(struct span *span);

/* Store `length` bytes, less than a block, of zeros; STATUS_FAULT like perform(). */
int store_zeros(struct mapping *mapping, unsigned char *to, uint64_t length);

/* Store `size` bytes at an address that the caller has checked, after each look at the guard. */
int store_guarded(const struct blocks *blocks, unsigned char *to, const unsigned char *from,
                  uint64_t size);

/* --- tags.c ------------------------------------------------------------------------------------ */

/* Do the blocks of pointers [first, last) still have their tags? */
struct tag_check {
    const struct blocks *blocks;
    const unsigned char *pointers;
    uint64_t first;
    uint64_t last;
    bool same;
};

void tag_check_body(void *argument); /* inside attempt() */
int tags_check_range(const struct blocks *blocks, const unsigned char *pointers, uint64_t first,
                     uint64_t last);

#endif
