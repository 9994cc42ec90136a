/* Copies: ranges of the mapping, and blocks by packed pointers.
 *
 * Bulk stores count two events for each piece of a block, so that a trap finds blocks filled by
 * halves.  A gather checks the tags after the copy; a scatter looks at the guard before each row.
 */
#include "kernel.h"

#define CHUNK 4096 /* bytes that range_write() counts as one block */

int range_check(const struct mapping *mapping, uint64_t offset, uint64_t length)
{
    return offset > mapping->length || length > mapping->length - offset ? STATUS_RANGE : STATUS_OK;
}

/* --- bulk stores ------------------------------------------------------------------------------- */

/* One block, or one chunk of a plain range: `filled` bytes from `from`, zeros up to `size`. */
struct piece {
    unsigned char *to;
    const unsigned char *from;
    uint64_t filled;
    uint64_t size;
};

struct bulk {
    struct mapping *mapping;
    const struct blocks *blocks;   /* NULL for a plain range */
    const struct blocks *guarding; /* check their guard before each piece; NULL: do not */
    const unsigned char *pointers;
    unsigned char *to; /* plain range: the next chunk */
    uint64_t chunk;
    const unsigned char *from; /* NULL: zeros */
    uint64_t left;
    uint64_t events;
    bool bad;   /* a pointer changed during the copy and left the region */
    bool stale; /* the guard changed: the caller must not fill the blocks any more */
};

static bool bulk_next(struct bulk *bulk, struct piece *piece)
{
    uint64_t room = bulk->chunk;

    if (bulk->left == 0)
        return false;
    if (bulk->blocks != NULL) {
        uint64_t block = pointer_block(bulk->pointers);
        if (block >= bulk->blocks->block_count) {
            bulk->bad = true;
            return false;
        }
        piece->to = block_address(bulk->blocks, block);
        bulk->pointers += POINTER_SIZE;
    } else {
        piece->to = bulk->to;
        bulk->to += room;
    }
    piece->filled = bulk->left < room ? bulk->left : room;
    piece->size = bulk->blocks != NULL ? room : piece->filled;
    bulk->left -= piece->filled;
    piece->from = bulk->from;
    if (bulk->from != NULL)
        bulk->from += piece->filled;
    else
        piece->filled = 0;
    return true;
}

static void piece_store(int access, bool streaming, const struct piece *piece)
{
    if (piece->filled > 0 && streaming)
        stream_in(piece->to, piece->from, piece->filled);
    else if (piece->filled > 0)
        copy_in(access, piece->to, piece->from, piece->filled);
    if (piece->size > piece->filled)
        clear_in(access, piece->to + piece->filled, piece->size - piece->filled);
}

/* Extend a piece by those that follow it in the region, but not beyond a window: the guard is
 * checked once for each piece. */
static void piece_extend(struct piece *piece, struct bulk *bulk)
{
    struct bulk ahead = *bulk;
    struct piece next;

    while (piece->size < WINDOW && bulk_next(&ahead, &next) &&
           next.to == piece->to + piece->size) {
        piece->filled += next.filled;
        piece->size += next.size;
        *bulk = ahead;
    }
}

static void bulk_body(void *argument)
{
    struct bulk *bulk = argument;
    struct piece piece;
    bool streaming, streamed = false;

    while (!bulk->stale && bulk_next(bulk, &piece)) {
        piece_extend(&piece, bulk);
        streaming = long_run(bulk->mapping, piece.to, piece.size);
        if (bulk->guarding != NULL && UNLIKELY(!guarded(bulk->guarding))) {
            bulk->stale = true;
        } else {
            piece_store(bulk->mapping->access, streaming, &piece);
            bulk->events += 2 * ((piece.size + bulk->chunk - 1) / bulk->chunk);
            streamed |= streaming;
        }
    }
    if (streamed)
        fence_full(); /* streaming stores are ordered by nothing else */
}

struct half {
    struct piece piece;
    int access;
    const struct blocks *guarding; /* NULL in the second half: a block is guarded once */
    bool stale;
};

static void half_body(void *argument)
{
    struct half *half = argument;

    if (half->guarding != NULL && !guarded(half->guarding))
        half->stale = true;
    else
        piece_store(half->access, false, &half->piece);
}

static struct half piece_half(const struct bulk *bulk, const struct piece *piece, bool second)
{
    uint64_t middle = piece->size / 2;
    struct half half = {*piece, bulk->mapping->access, second ? NULL : bulk->guarding, false};

    if (middle >= 8)
        middle &= ~UINT64_C(7);
    if (second) {
        uint64_t skipped = middle < piece->filled ? middle : piece->filled;
        half.piece.to += middle;
        half.piece.size -= middle;
        half.piece.filled -= skipped;
        if (piece->filled > 0)
            half.piece.from += skipped;
    } else {
        half.piece.size = middle;
        half.piece.filled = piece->filled < middle ? piece->filled : middle;
    }
    return half;
}

/* The same stores one event at a time, so that a callback can run between any two of them. */
static int bulk_trapped(struct bulk *bulk)
{
    struct piece piece;
    int status;

    while (bulk_next(bulk, &piece))
        for (int second = 0; second < 2; second++) {
            struct half half = piece_half(bulk, &piece, second != 0);
            if ((status = store_event(bulk->mapping)) != STATUS_OK ||
                (status = perform(bulk->mapping, half_body, &half, half.piece.size)) != STATUS_OK)
                return status;
            if (half.stale) {
                bulk->stale = true;
                return STATUS_OK;
            }
        }
    return STATUS_OK;
}

static int bulk_run(struct bulk *bulk)
{
    struct mapping *mapping = bulk->mapping;
    int status;

    if (UNLIKELY(mapping->armed)) {
        status = bulk_trapped(bulk);
    } else {
        status = perform(mapping, bulk_body, bulk, bulk->left);
        mapping->stores += bulk->events;
    }
    if (status == STATUS_OK && bulk->bad)
        return STATUS_CHANGED;
    return unless_stale(status, bulk->stale);
}

int range_write(struct mapping *mapping, uint64_t offset, const unsigned char *from,
                uint64_t length)
{
    struct bulk bulk = {.mapping = mapping, .chunk = CHUNK, .from = from, .left = length};
    int status = range_check(mapping, offset, length);

    bulk.to = mapping->base + offset;
    return status == STATUS_OK ? bulk_run(&bulk) : status;
}

int store_guarded(const struct blocks *blocks, unsigned char *to, const unsigned char *from,
                  uint64_t size)
{
    struct bulk bulk = {.mapping = blocks->mapping,
                        .guarding = blocks,
                        .chunk = size,
                        .to = to,
                        .from = from,
                        .left = size};

    return bulk_run(&bulk);
}

/* The mapping's part of a block keeps its other bytes: programs may store to them meanwhile. */
int blocks_overwrite(const struct blocks *blocks, uint64_t block, uint64_t skip,
                     const unsigned char *from, uint64_t length)
{
    uint64_t available = blocks->block_count * blocks->block_size;
    uint64_t start = block * blocks->block_size + skip;
    struct bulk bulk = {.mapping = blocks->mapping,
                        .guarding = blocks,
                        .chunk = CHUNK,
                        .from = from,
                        .left = length};

    if (block >= blocks->block_count || skip > available || start > available ||
        length > available - start)
        return STATUS_RANGE;
    bulk.to = block_address(blocks, 0) + start;
    return bulk_run(&bulk);
}

int store_zeros(struct mapping *mapping, unsigned char *to, uint64_t length)
{
    struct half half = {.piece = {.to = to, .size = length}, .access = mapping->access};

    return perform(mapping, half_body, &half, length);
}

int blocks_scatter(const struct blocks *blocks, const unsigned char *pointers, uint64_t count,
                   const unsigned char *from, uint64_t length)
{
    struct bulk bulk = {.mapping = blocks->mapping,
                        .blocks = blocks,
                        .guarding = blocks,
                        .chunk = blocks->block_size,
                        .pointers = pointers,
                        .from = from,
                        .left = length};

    return length > count * blocks->block_size ? STATUS_RANGE : bulk_run(&bulk);
}

/* --- ranges ------------------------------------------------------------------------------------ */

struct range {
    unsigned char *from;
    unsigned char *to;
    uint64_t length;
    int access;
    bool zero;
};

static void read_body(void *argument)
{
    struct range *range = argument;

    copy_out(range->access, range->to, range->from, range->length);
    fence_acquire(range->access);
}

static void is_zero_body(void *argument)
{
    struct range *range = argument;
    uint64_t chunk[CHUNK / 8];
    uint64_t any = 0;

    while (range->length > 0 && any == 0) {
        size_t step = range->length < sizeof chunk ? range->length : sizeof chunk;
        if (step < sizeof chunk)
            memset(chunk, 0, sizeof chunk);
        copy_out(range->access, (unsigned char *)chunk, range->from, step);
        for (size_t i = 0; i < CHUNK / 8; i++)
            any |= chunk[i];
        range->from += step, range->length -= step;
    }
    range->zero = any == 0;
}

static int range_run(struct mapping *mapping, uint64_t offset, struct range *range,
                     void (*body)(void *))
{
    int status = range_check(mapping, offset, range->length);

    range->from = mapping->base + offset;
    range->access = mapping->access;
    if (status == STATUS_OK && (status = load_event(mapping)) == STATUS_OK)
        status = perform(mapping, body, range, range->length);
    return status;
}

int range_read(struct mapping *mapping, uint64_t offset, unsigned char *to, uint64_t length)
{
    struct range range = {.to = to, .length = length};

    return range_run(mapping, offset, &range, read_body);
}

int range_is_zero(struct mapping *mapping, uint64_t offset, uint64_t length, bool *zero)
{
    struct range range = {.length = length};
    int status = range_run(mapping, offset, &range, is_zero_body);

    *zero = range.zero;
    return status;
}

/* --- blocks ------------------------------------------------------------------------------------ */

static bool table_fits(const struct mapping *mapping, uint64_t offset, uint64_t width,
                       uint64_t count)
{
    return (offset & (WORD_SIZE - 1)) == 0 && offset <= mapping->length &&
           width <= (mapping->length - offset) / count;
}

int blocks_check(const struct blocks *blocks, char *wrong)
{
    const struct mapping *mapping = blocks->mapping;

    if (blocks->block_size < NODE_HEADER || (blocks->block_size & (WORD_SIZE - 1)) != 0)
        *wrong = 's';
    else if (blocks->block_count == 0 || blocks->block_count > MAX_BLOCKS)
        *wrong = 'c';
    else if (!table_fits(mapping, blocks->tags_offset, WORD_SIZE, blocks->block_count))
        *wrong = 't';
    else if (!table_fits(mapping, blocks->data_offset, blocks->block_size, blocks->block_count))
        *wrong = 'd';
    else
        return STATUS_OK;
    return STATUS_RANGE;
}

int pointers_check(const struct blocks *blocks, const unsigned char *pointers, uint64_t count,
                   bool nulls, uint64_t *at)
{
    for (*at = 0; *at < count; ++*at, pointers += POINTER_SIZE) {
        if (pointer_tag(pointers) == 0) {
            if (!nulls)
                return STATUS_NULL;
        } else if (UNLIKELY(pointer_block(pointers) >= blocks->block_count)) {
            return STATUS_RANGE;
        }
    }
    return STATUS_OK;
}

/* The block that a pointer leads to.  A pointer that changed under us and leads outside is a hole:
 * the tag check finds it. */
static inline uint64_t span_block(const struct blocks *blocks, const unsigned char *pointer)
{
    uint64_t block = pointer_block(pointer);

    return pointer_tag(pointer) == 0 || block >= blocks->block_count ? HOLE : block;
}

uint64_t span_row(const struct span *span, unsigned char **from)
{
    const struct blocks *blocks = span->blocks;
    uint64_t left = span->stop - span->position;
    uint64_t within = span->position % blocks->block_size;
    uint64_t length = blocks->block_size - within;
    const unsigned char *pointer =
        span->pointers + span->position / blocks->block_size * POINTER_SIZE;
    uint64_t block = span_block(blocks, pointer), next = block;

    while (block != HOLE && length < left &&
           span_block(blocks, pointer += POINTER_SIZE) == ++next)
        length += blocks->block_size;
    *from = block == HOLE ? NULL : block_address(blocks, block) + within;
    return length < left ? length : left;
}

static void gather_body(void *argument)
{
    struct span *span = argument;

    while (span->position < span->stop) {
        unsigned char *from;
        uint64_t length = span_row(span, &from);
        if (from == NULL)
            memset(span->to, 0, length);
        else
            copy_out(span->blocks->mapping->access, span->to, from, length);
        span->to += length;
        span->position += length;
    }
}

struct gather {
    struct span *span;
    struct tag_check check;
};

static void gather_and_check_body(void *argument)
{
    struct gather *gather = argument;

    gather_body(gather->span);
    tag_check_body(&gather->check);
}

/* The copy alone, with an event before each block and one between it and the tag check. */
static int gather_trapped(struct span *span)
{
    struct mapping *mapping = span->blocks->mapping;
    const uint64_t end = span->stop;
    const uint64_t size = span->blocks->block_size;
    int status;

    while (span->position < end) {
        span->stop = (span->position / size + 1) * size;
        if (span->stop > end)
            span->stop = end;
        if ((status = load_event(mapping)) != STATUS_OK ||
            (status = perform(mapping, gather_body, span, WORD_SIZE)) != STATUS_OK)
            return status;
    }
    return load_event(mapping);
}

int span_gather(struct span *span)
{
    const struct blocks *blocks = span->blocks;
    struct mapping *mapping = blocks->mapping;
    struct gather gather = {span, {blocks, span->pointers, 0, 0, false}};
    int status;

    if (span->position == span->stop)
        return STATUS_OK;
    gather.check.first = span->position / blocks->block_size;
    gather.check.last = (span->stop - 1) / blocks->block_size + 1;
    if (UNLIKELY(mapping->armed && mapping->trap_loads)) {
        status = gather_trapped(span);
        if (status == STATUS_OK)
            status = perform(mapping, tag_check_body, &gather.check, WORD_SIZE);
    } else {
        status = perform(mapping, gather_and_check_body, &gather, span->stop - span->position);
    }
    return unless_stale(status, !gather.check.same);
}

int blocks_gather(const struct blocks *blocks, const unsigned char *pointers, uint64_t count,
                  uint64_t skip, uint64_t length, unsigned char *into)
{
    uint64_t available = count * blocks->block_size;
    struct span span = {blocks, pointers, skip, skip + length, into};

    if (skip > available || length > available - skip)
        return STATUS_RANGE;
    return span_gather(&span);
}
