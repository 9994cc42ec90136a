/* Block tags: claim, release, check and sweep.
 *
 * A tag is 0 for a free block, else it names the claim.  Tags change by compare-and-swap only, from
 * 0 to the claim and from the claim to 0. */
#include "kernel.h"

/* --- claim ------------------------------------------------------------------------------------- */

struct claim {
    const struct blocks *blocks;
    uint64_t tag;
    const unsigned char *places; /* pointers to the blocks to visit; NULL: all, from cursor on */
    uint64_t cursor;
    uint64_t unvisited;
    uint64_t wanted;
    uint64_t swaps_allowed; /* stop before the next swap when used up */
    uint64_t swaps;
    unsigned char *pointers;
    uint64_t got;
    bool unable;
};

/* The block to visit; HOLE for a null pointer. */
static inline uint64_t claim_place(const struct claim *claim)
{
    if (claim->places == NULL)
        return claim->cursor;
    return pointer_tag(claim->places) != 0 ? pointer_block(claim->places) : HOLE;
}

static inline void claim_advance(struct claim *claim)
{
    claim->unvisited--;
    if (claim->places != NULL)
        claim->places += POINTER_SIZE;
    else if (++claim->cursor == claim->blocks->block_count)
        claim->cursor = 0;
}

static void claim_body(void *argument)
{
    struct claim *claim = argument;
    const struct blocks *blocks = claim->blocks;

    fence_around_swap(blocks->mapping->access);
    for (; claim->got < claim->wanted && claim->unvisited > 0; claim_advance(claim)) {
        uint64_t previous, block = claim_place(claim);
        unsigned char *address;
        if (block >= blocks->block_count)
            continue;
        address = tag_address(blocks, block);
        previous = word_peek(address);
        if (previous == 0) {
            if (claim->swaps == claim->swaps_allowed)
                return;
            claim->swaps++;
            claim->unable = !word_swap(address, 0, claim->tag, &previous);
            if (claim->unable)
                return;
            if (previous == 0)
                pointer_make(claim->pointers + POINTER_SIZE * claim->got++, (uint32_t)block,
                             claim->tag);
        }
    }
    fence_around_swap(blocks->mapping->access);
}

static int claim_run(struct claim *claim)
{
    struct mapping *mapping = claim->blocks->mapping;
    const bool trapped = mapping->armed;
    int status;

    claim->swaps_allowed = trapped ? 0 : UINT64_MAX;
    for (;;) {
        if ((status = perform(mapping, claim_body, claim, WORD_SIZE)) != STATUS_OK)
            return status;
        if (claim->unable)
            return STATUS_UNABLE;
        if (claim->got == claim->wanted || claim->unvisited == 0)
            break;
        if ((status = store_event(mapping)) != STATUS_OK) /* the body stopped before its next swap */
            return status;
        claim->swaps_allowed = claim->swaps + 1;
    }
    if (!trapped)
        mapping->stores += claim->swaps;
    return STATUS_OK;
}

int tags_claim(const struct blocks *blocks, uint64_t wanted, uint64_t tag, uint64_t *cursor,
               unsigned char *pointers, uint64_t *got)
{
    struct claim claim = {.blocks = blocks,
                          .tag = tag,
                          .cursor = *cursor,
                          .unvisited = blocks->block_count,
                          .wanted = wanted,
                          .pointers = pointers};
    int status;

    if (*cursor >= blocks->block_count)
        return STATUS_RANGE;
    status = claim_run(&claim);
    *cursor = claim.cursor;
    *got = claim.got;
    return status;
}

int tags_reclaim(const struct blocks *blocks, const unsigned char *places, uint64_t count,
                 uint64_t tag, unsigned char *pointers, uint64_t *got)
{
    struct claim claim = {.blocks = blocks,
                          .tag = tag,
                          .places = places,
                          .unvisited = count,
                          .wanted = count,
                          .pointers = pointers};
    int status = claim_run(&claim);

    *got = claim.got;
    return status;
}

/* --- release ----------------------------------------------------------------------------------- */

struct release {
    const struct blocks *blocks;
    const unsigned char *pointers;
    uint64_t count;
    uint64_t released;
    uint64_t swaps;
    bool unable;
};

static void release_body(void *argument)
{
    struct release *release = argument;
    const struct blocks *blocks = release->blocks;

    fence_around_swap(blocks->mapping->access);
    for (; release->count > 0 && !release->unable; release->count--) {
        uint64_t previous, tag = pointer_tag(release->pointers);
        uint64_t block = pointer_block(release->pointers);
        release->pointers += POINTER_SIZE;
        if (tag == 0 || block >= blocks->block_count)
            continue;
        release->swaps++;
        release->unable = !word_swap(tag_address(blocks, block), tag, 0, &previous);
        if (!release->unable && previous == tag)
            release->released++;
    }
    fence_around_swap(blocks->mapping->access);
}

static int release_trapped(struct mapping *mapping, struct release *all)
{
    struct release one = *all;
    int status;

    for (uint64_t at = 0; at < all->count && !one.unable; at++) {
        one.pointers = all->pointers + at * POINTER_SIZE;
        one.count = 1;
        if (pointer_tag(one.pointers) != 0 && (status = store_event(mapping)) != STATUS_OK)
            return status;
        if ((status = perform(mapping, release_body, &one, WORD_SIZE)) != STATUS_OK)
            return status;
    }
    all->released = one.released;
    all->unable = one.unable;
    return STATUS_OK;
}

int tags_release(const struct blocks *blocks, const unsigned char *pointers, uint64_t count,
                 uint64_t *released)
{
    struct mapping *mapping = blocks->mapping;
    struct release release = {.blocks = blocks, .pointers = pointers, .count = count};
    int status;

    if (mapping->armed) {
        status = release_trapped(mapping, &release);
    } else {
        status = perform(mapping, release_body, &release, WORD_SIZE);
        if (status == STATUS_OK)
            mapping->stores += release.swaps;
    }
    *released = release.released;
    return status == STATUS_OK && release.unable ? STATUS_UNABLE : status;
}

/* --- looks ------------------------------------------------------------------------------------- */

/* The fence comes first: the copies before it are done before the tags are read. */
void tag_check_body(void *argument)
{
    struct tag_check *check = argument;
    const struct blocks *blocks = check->blocks;

    fence_acquire(blocks->mapping->access);
    check->same = true;
    for (uint64_t at = check->first; at < check->last && check->same; at++) {
        const unsigned char *pointer = check->pointers + at * POINTER_SIZE;
        uint64_t tag = pointer_tag(pointer);
        uint64_t block = pointer_block(pointer);
        if (tag != 0)
            check->same =
                block < blocks->block_count && word_peek(tag_address(blocks, block)) == tag;
    }
    fence_acquire(blocks->mapping->access);
}

int tags_check_range(const struct blocks *blocks, const unsigned char *pointers, uint64_t first,
                     uint64_t last)
{
    struct tag_check check = {blocks, pointers, first, last, false};
    int status = perform(blocks->mapping, tag_check_body, &check, WORD_SIZE);

    return unless_stale(status, !check.same);
}

int tags_check(const struct blocks *blocks, const unsigned char *pointers, uint64_t count)
{
    int status = load_event(blocks->mapping);

    return status == STATUS_OK ? tags_check_range(blocks, pointers, 0, count) : status;
}

int tags_read(const struct blocks *blocks, uint64_t block, uint64_t *tag)
{
    if (block >= blocks->block_count)
        return STATUS_RANGE;
    return word_read(blocks->mapping, blocks->tags_offset + block * WORD_SIZE, tag);
}

struct scan {
    const struct blocks *blocks;
    const unsigned char *marks; /* sweep only, as are limits and pointers */
    const unsigned char *limits;
    uint64_t start;
    uint64_t stop;
    unsigned char *pointers;
    uint64_t found;
};

static void free_count_body(void *argument)
{
    struct scan *scan = argument;
    const unsigned char *address = tag_address(scan->blocks, scan->start);

    for (uint64_t block = scan->start; block < scan->stop; block++, address += WORD_SIZE)
        scan->found += word_peek(address) == 0;
}

int tags_free_count(const struct blocks *blocks, uint64_t start, uint64_t stop, uint64_t *count)
{
    struct scan scan = {.blocks = blocks, .start = start, .stop = stop};
    int status = load_event(blocks->mapping);

    if (status == STATUS_OK)
        status = perform(blocks->mapping, free_count_body, &scan, WORD_SIZE * (stop - start));
    *count = scan.found;
    return status;
}

/* --- sweep ------------------------------------------------------------------------------------- */

/* A claim is settled when its peer can no longer publish it.  Then its slot does not exist, or has
 * a later incarnation, or the claim's counter is below the limit's.  A claim of a later incarnation
 * than the limit's is not settled: a peer took the slot after the caller read the limits. */
static bool claim_settled(const unsigned char *limits, uint64_t tag)
{
    uint64_t limit = u64_at(limits, tag >> SLOT_SHIFT);
    uint64_t age =
        ((limit >> INCARNATION_SHIFT) - (tag >> INCARNATION_SHIFT)) & INCARNATION_MASK;

    if (limit == 0)
        return true;
    if (age != 0)
        return age <= INCARNATION_MASK / 2;
    return (tag & COUNTER_MASK) < (limit & COUNTER_MASK);
}

static void sweep_body(void *argument)
{
    struct scan *scan = argument;

    for (uint64_t block = scan->start; block < scan->stop; block++) {
        uint64_t tag = word_peek(tag_address(scan->blocks, block));
        if (tag != 0 && u64_at(scan->marks, block) != tag && claim_settled(scan->limits, tag))
            pointer_make(scan->pointers + POINTER_SIZE * scan->found++, (uint32_t)block, tag);
    }
}

int tags_sweep(const struct blocks *blocks, const unsigned char *marks,
               const unsigned char *limits, uint64_t start, uint64_t stop,
               unsigned char *pointers, uint64_t *found)
{
    struct scan scan = {.blocks = blocks,
                        .marks = marks,
                        .limits = limits,
                        .start = start,
                        .stop = stop,
                        .pointers = pointers};
    int status;

    if (start > stop || stop > blocks->block_count)
        return STATUS_RANGE;
    if ((status = load_event(blocks->mapping)) == STATUS_OK)
        status = perform(blocks->mapping, sweep_body, &scan, WORD_SIZE * (stop - start));
    *found = scan.found;
    return status;
}

void tags_mark(const struct blocks *blocks, const unsigned char *pointers, uint64_t count,
               unsigned char *marks)
{
    for (; count > 0; count--, pointers += POINTER_SIZE) {
        uint64_t tag = pointer_tag(pointers);
        uint64_t block = pointer_block(pointers);
        if (tag != 0 && block < blocks->block_count)
            memcpy(marks + WORD_SIZE * block, &tag, WORD_SIZE);
    }
}
