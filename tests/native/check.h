/* A test program is main() that calls check() for each fact; the first that does not hold ends it. */
#ifndef IVSHMEMFS_CHECK_H
#define IVSHMEMFS_CHECK_H

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "access.h"
#include "native.h"

#define check(fact)                                                                                \
    do {                                                                                           \
        if (!(fact)) {                                                                             \
            fprintf(stderr, "%s:%d: %s does not hold\n", __FILE__, __LINE__, #fact);               \
            exit(1);                                                                               \
        }                                                                                          \
    } while (0)

enum { SIZE = 256 * 1024, TAGS = 4096, DATA = 64 * 1024, BLOCK = 512, COUNT = 64 };

static int region_file = -1;

/* A mapping of a new file of SIZE bytes; region_file is its descriptor. */
static inline void region_map(struct mapping *mapping, int access)
{
    char name[] = "/dev/shm/ivshmemfs-native-XXXXXX";

    native_prepare();
    if (region_file >= 0)
        close(region_file);
    region_file = mkstemp(name);
    check(region_file >= 0 && unlink(name) == 0 && ftruncate(region_file, SIZE) == 0);
    memset(mapping, 0, sizeof *mapping);
    mapping->length = SIZE;
    mapping->writable = true;
    mapping->access = access;
    check(mapping_map(mapping, region_file, 0) == STATUS_OK);
}

static inline struct blocks blocks_on(struct mapping *mapping)
{
    struct blocks blocks = {mapping, TAGS, DATA, BLOCK, COUNT, 0, 0};
    char wrong;

    check(blocks_check(&blocks, &wrong) == STATUS_OK);
    return blocks;
}

static inline void pointer_put(unsigned char *pointer, uint32_t block, uint64_t tag)
{
    memset(pointer, 0, POINTER_SIZE);
    memcpy(pointer + POINTER_BLOCK_AT, &block, 4);
    memcpy(pointer + POINTER_TAG_AT, &tag, 8);
}

#endif
