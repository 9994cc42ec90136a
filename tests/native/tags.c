/* Tags: claims go around, releases are exact, stale pointers are seen; traps stop before a store. */
#include "check.h"

#define TAG(slot, incarnation, counter)                                                            \
    ((uint64_t)(slot) << SLOT_SHIFT | (uint64_t)(incarnation) << INCARNATION_SHIFT | (counter))

static void claims(struct blocks *blocks)
{
    unsigned char got[COUNT * POINTER_SIZE], again[COUNT * POINTER_SIZE];
    uint64_t cursor = COUNT - 2, count = 0, tag = 0, released = 0;
    uint32_t block;

    check(tags_claim(blocks, 4, 7, &cursor, got, &count) == STATUS_OK && count == 4 && cursor == 2);
    memcpy(&block, got + 3 * POINTER_SIZE, 4);
    check(block == 1); /* COUNT - 2, COUNT - 1, 0, 1 */
    check(tags_read(blocks, COUNT - 1, &tag) == STATUS_OK && tag == 7);
    check(tags_check(blocks, got, 4) == STATUS_OK);
    check(tags_reclaim(blocks, got, 4, 8, again, &count) == STATUS_OK && count == 0);
    check(tags_claim(blocks, COUNT, 8, &cursor, again, &count) == STATUS_OK && count == COUNT - 4);
    check(tags_free_count(blocks, 0, blocks->block_count, &count) == STATUS_OK && count == 0);
    check(tags_release(blocks, got, 4, &released) == STATUS_OK && released == 4);
    check(tags_release(blocks, got, 4, &released) == STATUS_OK && released == 0);
    check(tags_check(blocks, got, 4) == STATUS_STALE);
    check(tags_reclaim(blocks, got, 4, 9, again, &count) == STATUS_OK && count == 4);
    check(tags_check(blocks, got, 4) == STATUS_STALE); /* another claim of the same blocks */
    check(tags_check(blocks, again, 4) == STATUS_OK);
    check(tags_release(blocks, again, 4, &released) == STATUS_OK && released == 4);
}

static void sweeps(struct blocks *blocks)
{
    static unsigned char marks[8 * COUNT], limits[8 * LIMITS], found[COUNT * POINTER_SIZE];
    unsigned char pointer[POINTER_SIZE];
    const uint64_t limit = TAG(2, 5, 100);
    const struct {
        uint64_t tag;
        bool settled;
    } cases[] = {
        {TAG(2, 5, 99), true},  {TAG(2, 5, 100), false}, {TAG(2, 4, 200), true},
        {TAG(2, 6, 1), false},  {TAG(3, 5, 100), true},
    };
    uint64_t count, released;

    memcpy(limits + 8 * 2, &limit, 8);
    for (size_t at = 0; at < sizeof cases / sizeof *cases; at++) {
        pointer_put(pointer, 5, cases[at].tag);
        check(tags_reclaim(blocks, pointer, 1, cases[at].tag, found, &count) == STATUS_OK);
        check(count == 1);
        memset(marks, 0, sizeof marks);
        check(tags_sweep(blocks, marks, limits, 5, 6, found, &count) == STATUS_OK);
        check(count == cases[at].settled);
        tags_mark(blocks, pointer, 1, marks);
        check(tags_sweep(blocks, marks, limits, 5, 6, found, &count) == STATUS_OK && count == 0);
        check(tags_release(blocks, pointer, 1, &released) == STATUS_OK && released == 1);
    }
    check(tags_sweep(blocks, marks, limits, 1, COUNT + 1, found, &count) == STATUS_RANGE);
}

static int sprung;

static int spring(void *context)
{
    sprung++;
    return *(int *)context;
}

static void traps(struct blocks *blocks)
{
    struct mapping *mapping = blocks->mapping;
    unsigned char got[COUNT * POINTER_SIZE];
    uint64_t cursor = 0, count, stores = mapping->stores;
    int fails = 0;

    mapping->host.spring = spring;
    mapping->host.context = &fails;
    mapping->armed = true;
    mapping->countdown = 2;
    check(mapping_use_for_stores(mapping) == STATUS_OK);
    check(word_write(mapping, 0, 1) == STATUS_OK && word_write(mapping, 0, 2) == STATUS_OK);
    check(sprung == 0);
    check(word_write(mapping, 0, 3) == STATUS_OK && sprung == 1 && !mapping->armed);
    check(mapping->stores == stores + 3);
    blocks->guard = 3, blocks->guard_offset = 0;
    pointer_put(got, 9, 1);
    check(blocks_scatter(blocks, got, 1, got, 10) == STATUS_OK);
    blocks->guard = 4;
    check(blocks_scatter(blocks, got, 1, got, 10) == STATUS_STALE);
    blocks->guard = 0;
    fails = 1;
    mapping->armed = true;
    mapping->countdown = 1;
    check(tags_claim(blocks, 3, 11, &cursor, got, &count) == STATUS_TRAPPED && count == 1);
    mapping_unuse(mapping);
    check(mapping_use_for_stores(mapping) == STATUS_DEAD && mapping_use(mapping) == STATUS_OK);
    check(tags_read(blocks, 1, &count) == STATUS_OK && count == 0); /* it stopped before that one */
    mapping_unuse(mapping);
}

int main(void)
{
    for (int access = ACCESS_NORMAL; access <= ACCESS_WRITE_COMBINING; access++) {
        struct mapping mapping;
        struct blocks blocks;

        sprung = 0;
        region_map(&mapping, access);
        blocks = blocks_on(&mapping);
        claims(&blocks);
        for (uint32_t block = 0; block < COUNT; block++)
            check(word_write(&mapping, TAGS + 8 * block, 0) == STATUS_OK);
        sweeps(&blocks);
        traps(&blocks);
        mapping_close(&mapping);
    }
    return 0;
}
