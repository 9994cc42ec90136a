/* A file that shrinks under its mapping costs STATUS_FAULT, in every operation, again and again. */
#include "check.h"

static int left_count, entered_count;

static void *leave(void)
{
    left_count++;
    return &left_count;
}

static void enter(void *left)
{
    check(left == &left_count);
    entered_count++;
}

#define faults(call, offset)                                                                       \
    do {                                                                                           \
        mapping.fault = NULL;                                                                      \
        check((call) == STATUS_FAULT);                                                             \
        check((unsigned char *)mapping.fault >= mapping.base + (offset) &&                         \
              (unsigned char *)mapping.fault < mapping.base + SIZE);                               \
    } while (0)

int main(void)
{
    static unsigned char bytes[SIZE], marks[8 * COUNT], limits[8 * LIMITS];
    unsigned char pointer[POINTER_SIZE];
    struct mapping mapping;

    pointer_put(pointer, 0, 9);
    for (int access = ACCESS_NORMAL; access <= ACCESS_WRITE_COMBINING; access++) {
        struct blocks blocks;
        struct node_read read;
        uint64_t word, cursor = 0;
        bool zero;

        region_map(&mapping, access);
        mapping.host.leave = leave;
        mapping.host.enter = enter;
        blocks = blocks_on(&mapping);
        read = (struct node_read){.blocks = &blocks, .block = 0, .tag = 9};
        check(ftruncate(region_file, 0) == 0);
        for (int again = 0; again < 2; again++) {
            faults(word_read(&mapping, 8192, &word), 8192);
            faults(word_write(&mapping, 8192, 1), 8192);
            faults(word_compare_and_swap(&mapping, 8192, 0, 1, &word), 8192);
            faults(column_read(&mapping, 8192, 8, 3, (uint64_t *)(void *)bytes), 8192);
            faults(range_read(&mapping, 0, bytes, SIZE), 0);
            faults(range_write(&mapping, 0, bytes, SIZE), 0);
            faults(range_write(&mapping, 0, NULL, SIZE), 0);
            faults(range_is_zero(&mapping, 0, SIZE, &zero), 0);
            faults(tags_claim(&blocks, 3, 5, &cursor, bytes, &word), TAGS);
            faults(tags_reclaim(&blocks, pointer, 1, 5, bytes, &word), TAGS);
            faults(tags_release(&blocks, pointer, 1, &word), TAGS);
            faults(tags_check(&blocks, pointer, 1), TAGS);
            faults(tags_read(&blocks, 0, &word), TAGS);
            faults(tags_free_count(&blocks, 0, blocks.block_count, &word), TAGS);
            faults(tags_sweep(&blocks, marks, limits, 0, COUNT, bytes, &word), TAGS);
            faults(blocks_gather(&blocks, pointer, 1, 0, BLOCK, bytes), DATA);
            faults(blocks_scatter(&blocks, pointer, 1, bytes, BLOCK), DATA);
            faults(node_read_header(&read), DATA);
            faults(node_write(&blocks, 0, bytes, 40), DATA);
        }
        check(ftruncate(region_file, SIZE) == 0);
        check(word_write(&mapping, 8192, 3) == STATUS_OK);
        check(word_read(&mapping, 8192, &word) == STATUS_OK && word == 3);
        mapping_close(&mapping);
    }
    check(left_count > 0 && left_count == entered_count); /* the long accesses, faults or not */
    return 0;
}
