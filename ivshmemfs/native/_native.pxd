# What _native.pyx takes from the C kernel: native.h, crc32c.h, requests.h and the kinds of access.h.

from libc.stdint cimport int64_t, uint32_t, uint64_t


cdef extern from "<stdbool.h>" nogil:
    ctypedef bint boolean "bool"

cdef extern from "access.h" nogil:
    enum:
        ACCESS_NORMAL
        ACCESS_DEVICE
        ACCESS_WRITE_COMBINING

cdef extern from "crc32c.h" nogil:
    uint32_t crc32c_of(uint32_t seed, const unsigned char *data, size_t length) noexcept
    uint32_t crc32c_by_instruction_of(uint32_t seed, const unsigned char *data, size_t length) noexcept
    uint32_t crc32c_by_table_of(uint32_t seed, const unsigned char *data, size_t length) noexcept

cdef extern from "requests.h" nogil:
    struct fuse_in_header:
        uint32_t opcode
        uint64_t unique
        uint64_t nodeid
        uint32_t uid
        uint32_t gid
        uint32_t pid

    struct fuse_attr:
        uint64_t ino
        uint64_t size
        uint64_t blocks
        uint64_t atime
        uint64_t mtime
        uint64_t ctime
        uint32_t atimensec
        uint32_t mtimensec
        uint32_t ctimensec
        uint32_t mode
        uint32_t nlink
        uint32_t uid
        uint32_t gid
        uint32_t rdev
        uint32_t blksize

    struct fuse_entry_out:
        uint64_t nodeid
        fuse_attr attr

    struct fuse_attr_out:
        fuse_attr attr

    struct requests:
        int file
        unsigned char *into
        size_t room
        size_t size

    int requests_read(requests *requests)
    int requests_await(requests *requests, uint64_t spin, int nap)
    int requests_answer(const requests *requests, uint64_t unique, int error,
                        const unsigned char *body, size_t size)
    void requests_time(int64_t moment, uint64_t *seconds, uint32_t *nanoseconds)

cdef extern from "native.h" nogil:
    enum:
        ENTRY_FIXED
        LEAF_NAME_MAX
        LIMITS
        MAX_SLOTS
        NODE_HEADER
        POINTER_SIZE
        POINTER_TAG_AT
        POINTER_WEIGHT_AT
        WORD_SIZE

    enum:
        STATUS_OK
        STATUS_STALE
        STATUS_CLOSED
        STATUS_READ_ONLY
        STATUS_DEAD
        STATUS_TRAPPED
        STATUS_INTERRUPTED
        STATUS_FAULT
        STATUS_UNABLE
        STATUS_SYSTEM
        STATUS_NO_MEMORY
        STATUS_RANGE
        STATUS_CHANGED
        STATUS_NULL
        STATUS_NODE_SIZE
        STATUS_NODE_CHECKSUM
        STATUS_NODE_TAG

    struct host:
        void *(*leave)() noexcept
        void (*enter)(void *left) noexcept
        int (*interrupted)(void *context) noexcept
        int (*spring)(void *context) noexcept
        void *context

    struct mapping:
        unsigned char *base
        uint64_t length
        int access
        boolean writable
        boolean closed
        boolean dead
        boolean armed
        boolean trap_loads
        uint32_t users
        uint64_t stores
        uint64_t countdown
        void *fault
        int code
        host host

    struct blocks:
        mapping *mapping
        uint64_t tags_offset
        uint64_t data_offset
        uint64_t block_size
        uint64_t block_count
        uint64_t guard_offset
        uint64_t guard

    struct turn:
        blocks *blocks
        uint64_t hint_offset
        uint64_t repair_offset
        uint64_t commit_offset
        uint64_t state_offset
        uint64_t nonce_offset
        uint32_t passed

    struct node_read:
        const blocks *blocks
        uint64_t block
        uint64_t tag
        uint32_t used

    struct node_header:
        uint64_t kind
        uint64_t level
        uint64_t count
        uint64_t owner
        uint64_t tag

    struct leaf:
        const unsigned char *raw
        uint64_t length
        uint64_t count

    void native_prepare()
    int mapping_map(mapping *mapping, int file, uint64_t offset)
    void mapping_close(mapping *mapping)
    void mapping_unmap(mapping *mapping)
    int mapping_use(mapping *mapping)
    int mapping_use_for_stores(mapping *mapping)
    void mapping_unuse(mapping *mapping)

    int word_read(mapping *mapping, uint64_t offset, uint64_t *value)
    int word_await(mapping *mapping, uint64_t offset, uint64_t value, uint64_t nanoseconds,
                   uint64_t naps, uint64_t *found)
    int word_write(mapping *mapping, uint64_t offset, uint64_t value)
    int word_compare_and_swap(mapping *mapping, uint64_t offset, uint64_t expected, uint64_t value,
                              uint64_t *previous)
    int word_swap_then_see(mapping *mapping, uint64_t offset, uint64_t expected, uint64_t value,
                           uint64_t other, uint64_t wanted, uint32_t *passed)
    int word_replace(mapping *mapping, uint64_t offset, uint64_t value, uint64_t other,
                     uint64_t wanted, boolean *replaced)
    int column_check(const mapping *mapping, uint64_t offset, uint64_t stride, uint64_t count)
    int column_read(mapping *mapping, uint64_t offset, uint64_t stride, uint64_t count,
                    uint64_t *into)
    int unaligned_load_works(mapping *mapping, uint64_t offset, boolean *works)
    void fence()

    int range_check(const mapping *mapping, uint64_t offset, uint64_t length)
    int range_read(mapping *mapping, uint64_t offset, unsigned char *to, uint64_t length)
    int range_is_zero(mapping *mapping, uint64_t offset, uint64_t length, boolean *zero)
    int range_write(mapping *mapping, uint64_t offset, const unsigned char *source,
                    uint64_t length)

    int blocks_check(const blocks *blocks, char *wrong)
    int pointers_check(const blocks *blocks, const unsigned char *pointers, uint64_t count,
                       bint nulls, uint64_t *at)
    int blocks_gather(const blocks *blocks, const unsigned char *pointers, uint64_t count,
                      uint64_t skip, uint64_t length, unsigned char *into)
    int blocks_overwrite(const blocks *blocks, uint64_t block, uint64_t skip,
                         const unsigned char *data, uint64_t length)
    int blocks_scatter(const blocks *blocks, const unsigned char *pointers, uint64_t count,
                       const unsigned char *source, uint64_t length)
    int blocks_fill(const blocks *blocks, const unsigned char *pointers, uint64_t count, int file,
                    uint64_t at, uint64_t length, uint64_t *done)
    int blocks_drain(const blocks *blocks, const unsigned char *pointers, uint64_t count,
                     uint64_t skip, uint64_t length, int file, uint64_t at)

    int tags_claim(const blocks *blocks, uint64_t wanted, uint64_t tag, uint64_t *cursor,
                   unsigned char *pointers, uint64_t *got)
    int tags_reclaim(const blocks *blocks, const unsigned char *places, uint64_t count,
                     uint64_t tag, unsigned char *pointers, uint64_t *got)
    int tags_release(const blocks *blocks, const unsigned char *pointers, uint64_t count,
                     uint64_t *released)
    int tags_check(const blocks *blocks, const unsigned char *pointers, uint64_t count)
    int tags_read(const blocks *blocks, uint64_t block, uint64_t *tag)
    int tags_free_count(const blocks *blocks, uint64_t start, uint64_t stop, uint64_t *count)
    int tags_sweep(const blocks *blocks, const unsigned char *marks, const unsigned char *limits,
                   uint64_t start, uint64_t stop, unsigned char *pointers, uint64_t *found)
    void tags_mark(const blocks *blocks, const unsigned char *pointers, uint64_t count,
                   unsigned char *marks)

    int node_read_header(node_read *read)
    int node_read_rest(const node_read *read, unsigned char *node)
    void node_seal(const node_header *header, unsigned char *node, uint64_t size)
    int node_store(const blocks *blocks, uint64_t block, const unsigned char *node, uint64_t size)
    int node_write(const blocks *blocks, uint64_t block, const unsigned char *node, uint64_t size)

    int turn_begin(turn *turn, uint64_t hint, uint64_t repairs, uint64_t idle, uint64_t active,
                   uint64_t nonce, uint64_t *commit)
    int turn_commit(turn *turn, uint64_t planned_on, uint64_t root, uint64_t *commit)
    int turn_end(turn *turn, uint64_t active, uint64_t idle, uint64_t repairs,
                 const unsigned char *pointers, uint64_t count, uint64_t hint)

    uint64_t packed_lower_bound(const unsigned char *words, uint64_t count, uint64_t value)
    uint64_t packed_range(const unsigned char *words, uint64_t count, uint64_t value)
    bint packed_ascending(const unsigned char *words, uint64_t count)
    uint64_t packed_sum(const unsigned char *data, uint64_t start, uint64_t stop)
    uint64_t packed_weight(const unsigned char *pointers, uint64_t count)
    uint64_t slots_trimmed(const unsigned char *slots, uint64_t size)
    uint64_t filter_bit "filter_index"(uint64_t ino)
    bint name_is_fit(const unsigned char *name, uint64_t length)
    int leaf_check(const leaf *leaf)
    int64_t leaf_search "leaf_find"(const leaf *leaf, uint64_t key, uint64_t span,
                                    const unsigned char *name, uint64_t length)
    uint64_t leaf_size_without(const leaf *leaf, uint64_t at)
    void leaf_without(const leaf *leaf, uint64_t at, unsigned char *to)
    bint leaf_free_key(const leaf *leaf, uint64_t gone, uint64_t span, uint64_t *key)
    uint64_t leaf_size_with(const leaf *leaf, uint64_t gone, uint64_t length)
    void leaf_with(const leaf *leaf, uint64_t gone, uint64_t key, uint64_t value,
                   const unsigned char *name, uint64_t length, unsigned char *to)
