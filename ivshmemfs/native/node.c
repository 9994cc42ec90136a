/* Metadata nodes: read with their tag and checksum judged, written with their checksum. */
#include <stdlib.h>

#include "crc32c.h"
#include "kernel.h"

struct node_copy {
    const struct node_read *read;
    unsigned char *to;
    uint64_t from;
    uint64_t stop;
    bool same;
};

static void copy_body(void *argument)
{
    struct node_copy *copy = argument;
    const struct blocks *blocks = copy->read->blocks;
    const int access = blocks->mapping->access;
    const unsigned char *address = block_address(blocks, copy->read->block);

    copy_out(access, copy->to + copy->from, address + copy->from, copy->stop - copy->from);
    fence_acquire(access);
    copy->same = word_peek(tag_address(blocks, copy->read->block)) == copy->read->tag;
    fence_acquire(access);
}

static int copy_run(struct node_copy *copy)
{
    struct mapping *mapping = copy->read->blocks->mapping;
    int status = load_event(mapping);

    if (status == STATUS_OK)
        status = perform(mapping, copy_body, copy, WORD_SIZE);
    return unless_stale(status, !copy->same);
}

int node_read_header(struct node_read *read)
{
    struct node_copy copy = {read, read->header, 0, NODE_HEADER, false};
    int status = read->block < read->blocks->block_count ? copy_run(&copy) : STATUS_RANGE;

    if (status != STATUS_OK)
        return status;
    read->used = u32_at(read->header, NODE_USED_AT);
    return read->used < NODE_HEADER || read->used > read->blocks->block_size ? STATUS_NODE_SIZE
                                                                             : STATUS_OK;
}

int node_read_rest(const struct node_read *read, unsigned char *node)
{
    struct node_copy copy = {read, node, NODE_HEADER, read->used, false};
    int status;

    memcpy(node, read->header, NODE_HEADER); /* as judged; the region's may have changed since */
    if ((status = copy_run(&copy)) != STATUS_OK)
        return status;
    if (crc32c_of(0, node + NODE_CRC_FROM, read->used - NODE_CRC_FROM) != u32_at(node, NODE_CRC_AT))
        return STATUS_NODE_CHECKSUM;
    return u64_at(node + NODE_TAG_AT, 0) == read->tag ? STATUS_OK : STATUS_NODE_TAG;
}

void node_seal(const struct node_header *header, unsigned char *node, uint64_t size)
{
    const uint16_t count = (uint16_t)header->count;
    const uint32_t used = (uint32_t)size;
    uint32_t crc;

    memset(node, 0, NODE_HEADER);
    node[NODE_KIND_AT] = (unsigned char)header->kind;
    node[NODE_LEVEL_AT] = (unsigned char)header->level;
    memcpy(node + NODE_COUNT_AT, &count, sizeof count);
    memcpy(node + NODE_USED_AT, &used, sizeof used);
    memcpy(node + NODE_OWNER_AT, &header->owner, sizeof header->owner);
    memcpy(node + NODE_TAG_AT, &header->tag, sizeof header->tag);
    crc = crc32c_of(0, node + NODE_CRC_FROM, size - NODE_CRC_FROM);
    memcpy(node + NODE_CRC_AT, &crc, sizeof crc);
}

int node_store(const struct blocks *blocks, uint64_t block, const unsigned char *node,
               uint64_t size)
{
    if (block >= blocks->block_count || size < NODE_HEADER || size > blocks->block_size)
        return STATUS_RANGE;
    return store_guarded(blocks, block_address(blocks, block), node, size);
}

/* Stores a private copy that has its checksum filled in. */
int node_write(const struct blocks *blocks, uint64_t block, const unsigned char *node,
               uint64_t size)
{
    unsigned char usual[4096];
    unsigned char *copy = usual;
    uint32_t crc;
    int status;

    if (block >= blocks->block_count || size < NODE_HEADER || size > blocks->block_size)
        return STATUS_RANGE;
    if (size > sizeof usual && (copy = malloc(size)) == NULL)
        return STATUS_NO_MEMORY;
    memcpy(copy, node, size);
    crc = crc32c_of(0, copy + NODE_CRC_FROM, size - NODE_CRC_FROM);
    memcpy(copy + NODE_CRC_AT, &crc, sizeof crc);
    status = store_guarded(blocks, block_address(blocks, block), copy, size);
    if (copy != usual)
        free(copy);
    return status;
}
