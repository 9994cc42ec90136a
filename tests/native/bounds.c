/* Every offset, block and size outside the region is refused before anything is touched. */
#include "check.h"

static const uint64_t OUTSIDE[] = {SIZE - 7,           SIZE,           SIZE + 8,
                                   UINT64_C(1) << 63, UINT64_MAX - 7, UINT64_MAX};

static void words(struct mapping *mapping)
{
    uint64_t value = 0;
    uint32_t passed;
    bool replaced;

    check(word_write(mapping, SIZE - 8, 7) == STATUS_OK);
    check(word_read(mapping, SIZE - 8, &value) == STATUS_OK && value == 7);
    check(word_compare_and_swap(mapping, SIZE - 8, 7, 8, &value) == STATUS_OK && value == 7);
    check(word_compare_and_swap(mapping, SIZE - 8, 7, 9, &value) == STATUS_OK && value == 8);
    check(word_swap_then_see(mapping, SIZE - 8, 7, 9, 0, 0, &passed) == STATUS_OK && passed == 0);
    check(word_swap_then_see(mapping, SIZE - 8, 8, 9, 0, 1, &passed) == STATUS_OK && passed == 1);
    check(word_swap_then_see(mapping, SIZE - 8, 9, 8, 0, 0, &passed) == STATUS_OK && passed == 2);
    check(word_swap_then_see(mapping, SIZE - 8, 8, 8, SIZE, 0, &passed) == STATUS_RANGE);
    check(word_swap_then_see(mapping, SIZE, 0, 8, 0, 0, &passed) == STATUS_RANGE && passed == 0);
    check(word_replace(mapping, SIZE - 8, 5, 0, 1, &replaced) == STATUS_OK && !replaced);
    check(word_replace(mapping, SIZE - 8, 8, 0, 1, &replaced) == STATUS_OK && replaced); /* it is 8 */
    check(word_replace(mapping, SIZE - 8, 5, 0, 0, &replaced) == STATUS_OK && replaced);
    check(word_read(mapping, SIZE - 8, &value) == STATUS_OK && value == 5);
    check(word_replace(mapping, SIZE - 8, 6, SIZE, 0, &replaced) == STATUS_RANGE && !replaced);
    check(word_replace(mapping, SIZE, 6, 0, 0, &replaced) == STATUS_RANGE && !replaced);
    for (size_t at = 0; at < sizeof OUTSIDE / sizeof *OUTSIDE; at++) {
        check(word_read(mapping, OUTSIDE[at], &value) == STATUS_RANGE);
        check(word_write(mapping, OUTSIDE[at], 1) == STATUS_RANGE);
        check(word_compare_and_swap(mapping, OUTSIDE[at], 0, 1, &value) == STATUS_RANGE);
    }
    for (uint64_t at = 1; at < 8; at++)
        check(word_read(mapping, at, &value) == STATUS_RANGE);
}

static void ranges(struct mapping *mapping)
{
    unsigned char bytes[16] = {0};
    bool zero;

    check(range_check(mapping, SIZE, 0) == STATUS_OK);
    check(range_check(mapping, SIZE + 1, 0) == STATUS_RANGE);
    check(range_write(mapping, SIZE - 16, bytes, 16) == STATUS_OK);
    check(range_read(mapping, SIZE, bytes, 0) == STATUS_OK);
    check(range_write(mapping, SIZE - 15, bytes, 16) == STATUS_RANGE);
    check(range_write(mapping, UINT64_MAX, bytes, 16) == STATUS_RANGE);
    check(range_read(mapping, 16, bytes, UINT64_MAX) == STATUS_RANGE);
    check(range_write(mapping, 0, NULL, SIZE + 1) == STATUS_RANGE);
    check(range_is_zero(mapping, SIZE - 8, 9, &zero) == STATUS_RANGE);
    check(range_is_zero(mapping, 0, SIZE - 8, &zero) == STATUS_OK && zero);
    check(word_write(mapping, SIZE - 8, 1) == STATUS_OK);
    check(range_is_zero(mapping, 0, SIZE, &zero) == STATUS_OK && !zero);
}

static void columns(struct mapping *mapping)
{
    uint64_t words_of[4] = {9, 9, 9, 9};

    check(column_read(mapping, 0, 64, 4, words_of) == STATUS_OK && words_of[3] == 0);
    check(column_read(mapping, SIZE - 8, 64, 2, words_of) == STATUS_RANGE);
    check(column_read(mapping, 0, 0, 2, words_of) == STATUS_RANGE);
    check(column_read(mapping, 0, 4, 2, words_of) == STATUS_RANGE);
    check(column_read(mapping, 0, UINT64_C(1) << 62, 3, words_of) == STATUS_RANGE);
    check(column_check(mapping, 0, 8, SIZE / 8) == STATUS_OK);
    check(column_check(mapping, 0, 8, SIZE / 8 + 1) == STATUS_RANGE);
}

static void tables(struct mapping *mapping)
{
    struct blocks good = blocks_on(mapping), bad;
    char wrong;

    bad = good, bad.block_count = MAX_BLOCKS + 1;
    check(blocks_check(&bad, &wrong) == STATUS_RANGE && wrong == 'c');
    bad = good, bad.block_count = MAX_BLOCKS;
    check(blocks_check(&bad, &wrong) == STATUS_RANGE && wrong == 't');
    bad = good, bad.block_size = 24;
    check(blocks_check(&bad, &wrong) == STATUS_RANGE && wrong == 's');
    bad = good, bad.block_size = UINT64_C(1) << 63;
    check(blocks_check(&bad, &wrong) == STATUS_RANGE && wrong == 'd');
    bad = good, bad.data_offset = UINT64_MAX - 7;
    check(blocks_check(&bad, &wrong) == STATUS_RANGE && wrong == 'd');
}

static void pointers(struct mapping *mapping)
{
    struct blocks blocks = blocks_on(mapping);
    unsigned char two[2 * POINTER_SIZE], into[BLOCK];
    struct node_read read = {.blocks = &blocks, .block = COUNT, .tag = 5};
    uint64_t at, found;

    pointer_put(two, 3, 5);
    pointer_put(two + POINTER_SIZE, COUNT, 5);
    check(pointers_check(&blocks, two, 2, true, &at) == STATUS_RANGE && at == 1);
    memset(two, 0, POINTER_SIZE);
    check(pointers_check(&blocks, two, 1, true, &at) == STATUS_OK);
    check(pointers_check(&blocks, two, 1, false, &at) == STATUS_NULL && at == 0);
    /* Pointers that change after the check lead nowhere either. */
    check(blocks_gather(&blocks, two + POINTER_SIZE, 1, 0, BLOCK, into) == STATUS_STALE);
    check(blocks_scatter(&blocks, two + POINTER_SIZE, 1, into, BLOCK) == STATUS_CHANGED);
    check(tags_release(&blocks, two, 2, &found) == STATUS_OK && found == 0);
    check(tags_reclaim(&blocks, two, 2, 9, into, &found) == STATUS_OK && found == 0);
    check(blocks_gather(&blocks, two, 2, 2 * BLOCK, 1, into) == STATUS_RANGE);
    check(blocks_gather(&blocks, two, 2, 1, UINT64_MAX, into) == STATUS_RANGE);
    check(blocks_scatter(&blocks, two, 0, into, 1) == STATUS_RANGE);
    check(blocks_overwrite(&blocks, COUNT, 0, into, 1) == STATUS_RANGE);
    check(blocks_overwrite(&blocks, COUNT - 1, 1, into, BLOCK) == STATUS_RANGE);
    check(blocks_overwrite(&blocks, 0, UINT64_MAX, into, 2) == STATUS_RANGE);
    check(blocks_overwrite(&blocks, 0, 1, into, UINT64_MAX) == STATUS_RANGE);
    check(tags_read(&blocks, COUNT, &found) == STATUS_RANGE);
    check(node_read_header(&read) == STATUS_RANGE);
    check(node_write(&blocks, COUNT, into, 32) == STATUS_RANGE);
    check(node_write(&blocks, 0, into, 31) == STATUS_RANGE);
    check(node_write(&blocks, 0, into, BLOCK + 1) == STATUS_RANGE);
    check(node_store(&blocks, COUNT, into, 32) == STATUS_RANGE);
    check(node_store(&blocks, 0, into, 31) == STATUS_RANGE);
    check(node_store(&blocks, 0, into, BLOCK + 1) == STATUS_RANGE);
}

static void lives(struct mapping *mapping)
{
    check(mapping_use(mapping) == STATUS_OK);
    mapping_close(mapping); /* the operation in progress keeps the mapping */
    check(mapping->base != NULL && mapping_use(mapping) == STATUS_CLOSED);
    mapping_unuse(mapping);
    check(mapping->base == NULL && mapping_use_for_stores(mapping) == STATUS_CLOSED);
}

int main(void)
{
    struct mapping mapping;

    for (int access = ACCESS_NORMAL; access <= ACCESS_WRITE_COMBINING; access++) {
        region_map(&mapping, access);
        words(&mapping);
        ranges(&mapping);
        columns(&mapping);
        tables(&mapping);
        pointers(&mapping);
        lives(&mapping);
    }
    return 0;
}
