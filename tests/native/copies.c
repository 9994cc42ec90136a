/* Gather and scatter over blocks in any order, files included; nodes with their checksums. */
#include "check.h"

static unsigned char source[8 * BLOCK], into[8 * BLOCK];

static void scattered(struct blocks *blocks)
{
    static const uint32_t order[] = {4, 5, 6, 2, 60, 9, 8, 10};
    unsigned char pointers[8 * POINTER_SIZE], got[POINTER_SIZE];
    uint64_t count, cursor, released;

    for (int at = 0; at < 8; at++) {
        cursor = order[at];
        check(tags_claim(blocks, 1, 7, &cursor, got, &count) == STATUS_OK && count == 1);
        memcpy(pointers + at * POINTER_SIZE, got, POINTER_SIZE);
    }
    check(blocks_scatter(blocks, pointers, 8, source, 8 * BLOCK - 100) == STATUS_OK);
    check(blocks_gather(blocks, pointers, 8, 0, 8 * BLOCK, into) == STATUS_OK);
    check(memcmp(into, source, 8 * BLOCK - 100) == 0);
    for (int at = 1; at <= 100; at++)
        check(into[8 * BLOCK - at] == 0);
    for (uint64_t skip = 0; skip < 3 * BLOCK; skip += 77)
        for (uint64_t length = 0; length < 4 * BLOCK; length += 191) {
            memset(into, 0xee, sizeof into);
            check(blocks_gather(blocks, pointers, 8, skip, length, into) == STATUS_OK);
            check(memcmp(into, source + skip, length) == 0 && into[length] == 0xee);
        }
    memset(pointers + POINTER_SIZE, 0, POINTER_SIZE); /* a hole */
    check(blocks_gather(blocks, pointers, 8, BLOCK, BLOCK, into) == STATUS_OK);
    check(into[0] == 0 && into[BLOCK - 1] == 0);
    check(tags_release(blocks, pointers, 8, &released) == STATUS_OK && released == 7);
    check(blocks_gather(blocks, pointers, 8, 2 * BLOCK, 1, into) == STATUS_STALE);
}

static void files(struct blocks *blocks)
{
    unsigned char pointers[8 * POINTER_SIZE];
    char name[] = "/dev/shm/ivshmemfs-native-XXXXXX";
    int file = mkstemp(name);
    uint64_t cursor = 20, count, done;

    check(file >= 0 && unlink(name) == 0);
    check(tags_claim(blocks, 8, 7, &cursor, pointers, &count) == STATUS_OK && count == 8);
    check(write(file, source, 3 * BLOCK + 5) == 3 * BLOCK + 5);
    check(blocks_fill(blocks, pointers, 8, file, 5, 8 * BLOCK, &done) == STATUS_OK);
    check(done == 3 * BLOCK);
    check(blocks_drain(blocks, pointers, 8, 100, 2 * BLOCK, file, 0) == STATUS_OK);
    check(pread(file, into, 2 * BLOCK, 0) == 2 * BLOCK);
    check(memcmp(into, source + 5 + 100, 2 * BLOCK) == 0);
    check(blocks_fill(blocks, pointers, 8, file, 0, 8 * BLOCK + 1, &done) == STATUS_RANGE);
    check(blocks_drain(blocks, pointers, 8, 8 * BLOCK, 1, file, 0) == STATUS_RANGE);
    check(close(file) == 0);
    check(blocks_fill(blocks, pointers, 8, file, 0, BLOCK, &done) == STATUS_SYSTEM);
    check(tags_release(blocks, pointers, 8, &done) == STATUS_OK);
}

static void nodes(struct blocks *blocks)
{
    unsigned char node[BLOCK] = {0}, back[BLOCK], pointer[POINTER_SIZE];
    const uint64_t tag = 7;
    uint32_t used = 100;
    uint64_t cursor = 3, count;
    struct node_read read = {.blocks = blocks, .block = 3, .tag = tag};

    check(tags_claim(blocks, 1, tag, &cursor, pointer, &count) == STATUS_OK);
    memcpy(node + NODE_USED_AT, &used, 4);
    memcpy(node + NODE_TAG_AT, &tag, 8);
    check(node_write(blocks, 3, node, used) == STATUS_OK);
    check(node_read_header(&read) == STATUS_OK && read.used == used);
    check(node_read_rest(&read, back) == STATUS_OK);
    check(memcmp(back + NODE_CRC_FROM, node + NODE_CRC_FROM, used - NODE_CRC_FROM) == 0);
    node_seal(&(struct node_header){2, 1, 515, 77, tag}, node, used);
    check(node[NODE_KIND_AT] == 2 && node[NODE_LEVEL_AT] == 1 && node[NODE_OWNER_AT] == 77);
    check(node[NODE_COUNT_AT] == 3 && node[NODE_COUNT_AT + 1] == 2);
    check(node_store(blocks, 3, node, used) == STATUS_OK);
    check(node_read_header(&read) == STATUS_OK && read.used == used);
    check(node_read_rest(&read, back) == STATUS_OK && memcmp(back, node, used) == 0);
    check(range_write(blocks->mapping, DATA + 3 * BLOCK + 50, (unsigned char *)"x", 1) == STATUS_OK);
    check(node_read_header(&read) == STATUS_OK);
    check(node_read_rest(&read, back) == STATUS_NODE_CHECKSUM);
    for (int at = 0; at < 3; at++) {
        static const uint32_t impossible[] = {31, BLOCK + 1, UINT32_MAX};
        memcpy(node + NODE_USED_AT, &impossible[at], 4);
        check(node_write(blocks, 3, node, BLOCK) == STATUS_OK);
        check(node_read_header(&read) == STATUS_NODE_SIZE);
    }
    memcpy(node + NODE_USED_AT, &used, 4);
    memcpy(node + NODE_TAG_AT, "another", 8);
    check(node_write(blocks, 3, node, used) == STATUS_OK);
    check(node_read_header(&read) == STATUS_OK);
    check(node_read_rest(&read, back) == STATUS_NODE_TAG);
    check(tags_release(blocks, pointer, 1, &count) == STATUS_OK);
    check(node_read_header(&read) == STATUS_STALE);
}

int main(void)
{
    for (size_t at = 0; at < sizeof source; at++)
        source[at] = (unsigned char)(at * 31 + at / 256 + 1);
    for (int access = ACCESS_NORMAL; access <= ACCESS_WRITE_COMBINING; access++) {
        struct mapping mapping;
        struct blocks blocks;

        region_map(&mapping, access);
        blocks = blocks_on(&mapping);
        scattered(&blocks);
        files(&blocks);
        nodes(&blocks);
        mapping_close(&mapping);
    }
    close(region_file);
    return 0;
}
