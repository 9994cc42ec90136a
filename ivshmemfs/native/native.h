/* The interface of the native layer: what _native.pyx and the C tests may call.
 *
 * Nothing here knows Python.  Functions return a status; they print and raise nothing.
 *
 *     sigbus.c    end an access with a status when the memory behind it is gone
 *     mapping.c   map and unmap, words, the rules of an access (trap.h: events for the tests)
 *     copy.c      read, write and zero ranges; gather and scatter blocks
 *     tags.c      claim and release blocks, check tags, sweep
 *     node.c      metadata nodes with their checksum
 *     transfer.c  copy between blocks and an open file
 *     turn.c      the words with which a transaction begins, commits and ends
 *     packed.c    packed words, slots and directory leaves in private memory
 *     crc32c.c    checksums
 *     requests.c  requests of FUSE (requests.h); they touch no region
 *
 * Three rules hold everywhere:
 *
 * - The region is hostile.  The code reads each byte of it once, into private memory, and checks it
 *   there.  It checks an index from the region immediately before it makes an address of it.
 * - The region may vanish (truncated file, removed device).  Each access runs inside attempt(),
 *   which a SIGBUS ends with STATUS_FAULT.  The body of an attempt owns no resource that a jump
 *   could leak.
 * - Stores are events.  A trap stops or diverts a peer before its N-th store event.  Without a trap
 *   an event costs one addition.
 *
 * Life of a mapping: mapping_map() begins it.  Each operation is between mapping_use() (or
 * mapping_use_for_stores()) and mapping_unuse().  mapping_close() forbids new operations, and the
 * last mapping_unuse() after it unmaps.  The caller serializes all calls on one mapping, except
 * between an operation's host.leave() and host.enter().
 */
#ifndef IVSHMEMFS_NATIVE_H
#define IVSHMEMFS_NATIVE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "layout.h"

#define UNLIKELY(condition) __builtin_expect(!!(condition), 0)

enum status {
    STATUS_OK = 0,
    STATUS_STALE,       /* no error: a tag or the guard word has changed */
    STATUS_CLOSED,      /* the mapping is closed */
    STATUS_READ_ONLY,   /* the mapping is read-only */
    STATUS_DEAD,        /* a trap killed the mapping: it stops storing */
    STATUS_TRAPPED,     /* the trap's callback failed now */
    STATUS_INTERRUPTED, /* host.interrupted() failed */
    STATUS_FAULT,       /* SIGBUS at mapping->fault */
    STATUS_UNABLE,      /* the mapping cannot compare and swap */
    STATUS_SYSTEM,      /* a system call failed; its errno is in mapping->code */
    STATUS_NO_MEMORY,
    STATUS_RANGE,         /* an offset, block or size is outside */
    STATUS_CHANGED,       /* the caller's pointers changed while they were used */
    STATUS_NULL,          /* a pointer is null where none may be */
    STATUS_NODE_SIZE,     /* a node's `used` is impossible */
    STATUS_NODE_CHECKSUM, /* a node's checksum does not match */
    STATUS_NODE_TAG,      /* a node's `tag` is not its block's tag */
};

/* What the kernel asks of the program that it runs in.  Null pointers mean: nothing to do. */
struct host {
    void *(*leave)(void);             /* give up the program's lock before a long access */
    void (*enter)(void *left);        /* take it again */
    int (*interrupted)(void *context); /* after EINTR: not 0 to give up */
    int (*spring)(void *context);     /* the trap's callback: not 0 when it failed */
    void *context;                    /* for the last two */
};

struct mapping {
    unsigned char *base;
    uint64_t length;
    uint64_t start; /* byte of the file that `base` shows */
    int file;   /* descriptor that the kernel may write to in place of the mapping, or -1 */
    int access; /* one of access.h's kinds */
    bool writable;
    bool closed;
    bool dead;       /* the trap's callback failed once */
    bool armed;      /* a trap waits */
    bool trap_loads; /* ... for loads as well */
    uint32_t users;  /* operations in progress; the last one unmaps after mapping_close() */
    uint64_t stores; /* store events so far */
    uint64_t countdown; /* events still to pass before the trap springs */
    uint64_t moved;     /* bytes stored by long runs so far */
    uint32_t *warmth;   /* for each window: when it was last stored to, see long_run() */
    void *fault;        /* address of the last STATUS_FAULT */
    int code;           /* errno of the last STATUS_SYSTEM */
    struct host host;
};

struct blocks {
    struct mapping *mapping;
    uint64_t tags_offset;
    uint64_t data_offset;
    uint64_t block_size;
    uint64_t block_count;
    uint64_t guard_offset; /* of the word that must be `guard` while blocks are filled */
    uint64_t guard;        /* 0: there is none */
};

/* --- mapping.c --------------------------------------------------------------------------------- */

void native_prepare(void); /* once, before anything else */

/* `mapping` has length, access, writable and host set, and is zero elsewhere. */
int mapping_map(struct mapping *mapping, int file, uint64_t offset);
void mapping_close(struct mapping *mapping);
void mapping_unmap(struct mapping *mapping);

/* Begin an operation: STATUS_OK, STATUS_CLOSED, STATUS_READ_ONLY or STATUS_DEAD. */
static inline int mapping_use(struct mapping *mapping)
{
    if (UNLIKELY(mapping->closed))
        return STATUS_CLOSED;
    mapping->users++;
    return STATUS_OK;
}

static inline int mapping_use_for_stores(struct mapping *mapping)
{
    if (UNLIKELY(mapping->closed))
        return STATUS_CLOSED;
    if (UNLIKELY(!mapping->writable))
        return STATUS_READ_ONLY;
    if (UNLIKELY(mapping->dead))
        return STATUS_DEAD;
    mapping->users++;
    return STATUS_OK;
}

static inline void mapping_unuse(struct mapping *mapping)
{
    mapping->users--;
    if (UNLIKELY(mapping->closed) && mapping->users == 0)
        mapping_unmap(mapping);
}

int word_read(struct mapping *mapping, uint64_t offset, uint64_t *value);
int word_write(struct mapping *mapping, uint64_t offset, uint64_t value);
int word_compare_and_swap(struct mapping *mapping, uint64_t offset, uint64_t expected,
                          uint64_t value, uint64_t *previous);
/* Swap a word; after that, look whether another one is `wanted`.  `passed`: 0, 1 or 2 of both. */
int word_swap_then_see(struct mapping *mapping, uint64_t offset, uint64_t expected, uint64_t value,
                       uint64_t other, uint64_t wanted, uint32_t *passed);
/* Store a word by compare-and-swap from the value that it has, after a look at another word that must
 * be `wanted`.  It is stored already when it has the value. */
int word_replace(struct mapping *mapping, uint64_t offset, uint64_t value, uint64_t other,
                 uint64_t wanted, bool *replaced);
/* Wait until a word is no longer `value`: up to `naps` naps of so many nanoseconds, each ended by
 * one load.  A signal ends a nap, after host.interrupted().  `found` is the word that was seen last.
 * Others may call and close the mapping meanwhile. */
int word_await(struct mapping *mapping, uint64_t offset, uint64_t value, uint64_t nanoseconds,
               uint64_t naps, uint64_t *found);
/* STATUS_RANGE when one of the words would be outside or not aligned. */
int column_check(const struct mapping *mapping, uint64_t offset, uint64_t stride, uint64_t count);
int column_read(struct mapping *mapping, uint64_t offset, uint64_t stride, uint64_t count,
                uint64_t *into);
int unaligned_load_works(struct mapping *mapping, uint64_t offset, bool *works);
void fence(void);

/* --- copy.c ------------------------------------------------------------------------------------ */

int range_check(const struct mapping *mapping, uint64_t offset, uint64_t length);
int range_read(struct mapping *mapping, uint64_t offset, unsigned char *to, uint64_t length);
int range_is_zero(struct mapping *mapping, uint64_t offset, uint64_t length, bool *zero);
/* Store `length` bytes; zeros when `from` is NULL. */
int range_write(struct mapping *mapping, uint64_t offset, const unsigned char *from,
                uint64_t length);

/* Are the tables aligned and inside?  *wrong: 't' tags_offset, 'd' data_offset, 's', 'c'. */
int blocks_check(const struct blocks *blocks, char *wrong);

/* Do all pointers lead inside?  *at is the index of the first that does not. */
int pointers_check(const struct blocks *blocks, const unsigned char *pointers, uint64_t count,
                   bool nulls, uint64_t *at);

/* Copy bytes [skip, skip + length) of the blocks in a row; STATUS_STALE when one is stale. */
int blocks_gather(const struct blocks *blocks, const unsigned char *pointers, uint64_t count,
                  uint64_t skip, uint64_t length, unsigned char *into);
/* Store from byte `skip` of a block on, over it and those behind it.  STATUS_STALE as below. */
int blocks_overwrite(const struct blocks *blocks, uint64_t block, uint64_t skip,
                     const unsigned char *from, uint64_t length);
/* Store over the blocks in order; zeros fill the last.  STATUS_STALE when the guard changed. */
int blocks_scatter(const struct blocks *blocks, const unsigned char *pointers, uint64_t count,
                   const unsigned char *from, uint64_t length);

/* --- tags.c ------------------------------------------------------------------------------------ */

/* Claim up to `wanted` free blocks from block *cursor on and around; `pointers` takes them. */
int tags_claim(const struct blocks *blocks, uint64_t wanted, uint64_t tag, uint64_t *cursor,
               unsigned char *pointers, uint64_t *got);
/* Claim those of `count` pointers' blocks that are free. */
int tags_reclaim(const struct blocks *blocks, const unsigned char *places, uint64_t count,
                 uint64_t tag, unsigned char *pointers, uint64_t *got);
/* Free the blocks that still have their pointer's tag. */
int tags_release(const struct blocks *blocks, const unsigned char *pointers, uint64_t count,
                 uint64_t *released);
/* STATUS_OK or STATUS_STALE: do all blocks still have their pointer's tag? */
int tags_check(const struct blocks *blocks, const unsigned char *pointers, uint64_t count);
int tags_read(const struct blocks *blocks, uint64_t block, uint64_t *tag);
int tags_free_count(const struct blocks *blocks, uint64_t start, uint64_t stop, uint64_t *count);
/* Packed pointers of the blocks [start, stop) whose claim is settled and not marked. */
int tags_sweep(const struct blocks *blocks, const unsigned char *marks,
               const unsigned char *limits, uint64_t start, uint64_t stop,
               unsigned char *pointers, uint64_t *found);
void tags_mark(const struct blocks *blocks, const unsigned char *pointers, uint64_t count,
               unsigned char *marks);
#define LIMITS 256 /* words in `limits`: one per value of a tag's slot */

/* --- node.c ------------------------------------------------------------------------------------ */

/* A node is read in two steps, so that the caller can allocate what the header asks for. */
struct node_read {
    const struct blocks *blocks;
    uint64_t block;
    uint64_t tag;
    uint32_t used; /* bytes of the node, as the header says; judged */
    unsigned char header[NODE_HEADER];
};

int node_read_header(struct node_read *read);
int node_read_rest(const struct node_read *read, unsigned char *node); /* `used` bytes */
/* The fields of a node's header that its writer chooses. */
struct node_header {
    uint64_t kind;  /* u8 */
    uint64_t level; /* u8 */
    uint64_t count; /* u16 */
    uint64_t owner;
    uint64_t tag;
};

/* Fill in the header of a node in private memory, with its size and the checksum of its bytes. */
void node_seal(const struct node_header *header, unsigned char *node, uint64_t size);
/* Store a node of `size` bytes as it is; STATUS_STALE: the guard changed. */
int node_store(const struct blocks *blocks, uint64_t block, const unsigned char *node,
               uint64_t size);
/* The same with its checksum filled in. */
int node_write(const struct blocks *blocks, uint64_t block, const unsigned char *node,
               uint64_t size);

/* --- transfer.c -------------------------------------------------------------------------------- */

/* Store up to `length` bytes of a file, from its byte `at` on; zeros fill the last block used. */
int blocks_fill(const struct blocks *blocks, const unsigned char *pointers, uint64_t count,
                int file, uint64_t at, uint64_t length, uint64_t *done);
/* Write bytes [skip, skip + length) of the blocks in a row into a file, from its byte `at` on. */
int blocks_drain(const struct blocks *blocks, const unsigned char *pointers, uint64_t count,
                 uint64_t skip, uint64_t length, int file, uint64_t at);

/* --- turn.c ------------------------------------------------------------------------------------ */

/* Where the words of one mount's transactions are.  Each function below returns STATUS_OK, or
 * STATUS_STALE when a word was not what the caller expected; the steps after that are not done. */
struct turn {
    struct blocks *blocks;
    uint64_t hint_offset;
    uint64_t repair_offset;
    uint64_t commit_offset;
    uint64_t state_offset; /* of the own slot, as is the next */
    uint64_t nonce_offset;
    uint32_t passed; /* steps that the last call did, in their order below */
};

/* 1. hint: 0 -> `hint`
 * 2. the repair slot's state is `repairs`
 * 3. own state: `idle` -> `active`
 * 4. own nonce is `nonce`; then `active` guards the blocks
 * 5. load the commit word
 * 6. own state is `active` */
int turn_begin(struct turn *turn, uint64_t hint, uint64_t repairs, uint64_t idle, uint64_t active,
               uint64_t nonce, uint64_t *commit);
/* Fence.  1 commit word: `planned_on` -> the next one with root block `root`, which is `commit`. */
int turn_commit(struct turn *turn, uint64_t planned_on, uint64_t root, uint64_t *commit);
/* 1 own state: `active` -> `idle`.  Only with pointers: 2 the repair slot's state is `repairs`;
 * 3 free the blocks that still have their pointer's tag.  Then hint, unless it is 0: `hint` -> 0, if
 * it is still that. */
int turn_end(struct turn *turn, uint64_t active, uint64_t idle, uint64_t repairs,
             const unsigned char *pointers, uint64_t count, uint64_t hint);

/* --- packed.c ---------------------------------------------------------------------------------- */

uint64_t packed_lower_bound(const unsigned char *words, uint64_t count, uint64_t value);
/* Index of the last of `count` ascending words that is not above `value`; 0 if all are. */
uint64_t packed_range(const unsigned char *words, uint64_t count, uint64_t value);
bool packed_ascending(const unsigned char *words, uint64_t count);
uint64_t packed_sum(const unsigned char *bytes, uint64_t start, uint64_t stop);
/* The blocks that `count` packed pointers lead to: the sum of their weights. */
uint64_t packed_weight(const unsigned char *pointers, uint64_t count);
/* Bytes of `slots` without the null pointers at its end. */
uint64_t slots_trimmed(const unsigned char *slots, uint64_t size);

/* The bit of the open filter that lists an inode. */
uint64_t filter_index(uint64_t ino);
/* 1 to LEAF_NAME_MAX bytes without '/' and NUL, and neither "." nor "..". */
bool name_is_fit(const unsigned char *name, uint64_t length);

/* The packed entries of a directory leaf: keys u64, values u64, lengths of names u8, the names. */
struct leaf {
    const unsigned char *raw;
    uint64_t length;
    uint64_t count;
};

int leaf_check(const struct leaf *leaf); /* STATUS_RANGE: `raw` is too short for `count` */
/* Index of the entry `name` with a key in [key, key + span), or -1. */
int64_t leaf_find(const struct leaf *leaf, uint64_t key, uint64_t span, const unsigned char *name,
                  uint64_t length);
/* Bytes of the leaf without entry `at`, which must exist. */
uint64_t leaf_size_without(const struct leaf *leaf, uint64_t at);
void leaf_without(const struct leaf *leaf, uint64_t at, unsigned char *to);
/* The lowest of `span` keys from *key on that no entry has but `gone`; false when there is none. */
bool leaf_free_key(const struct leaf *leaf, uint64_t gone, uint64_t span, uint64_t *key);
/* The leaf with one entry more, and without entry `gone`, if there is such an entry. */
uint64_t leaf_size_with(const struct leaf *leaf, uint64_t gone, uint64_t length);
void leaf_with(const struct leaf *leaf, uint64_t gone, uint64_t key, uint64_t value,
               const unsigned char *name, uint64_t length, unsigned char *to);

#endif
