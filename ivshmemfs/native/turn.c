/* The words with which a transaction begins, commits and ends, in the order of the protocol.
 *
 * Each step is done only if the one before it found what the caller expected. */
#include "kernel.h"

static inline int passed_if(struct turn *turn, int status, uint64_t found, uint64_t expected)
{
    if (status != STATUS_OK)
        return status;
    if (found != expected)
        return STATUS_STALE;
    turn->passed++;
    return STATUS_OK;
}

static int swapped(struct turn *turn, uint64_t offset, uint64_t expected, uint64_t value)
{
    uint64_t found = 0;
    int status =
        word_compare_and_swap(turn->blocks->mapping, offset, expected, value, &found);

    return passed_if(turn, status, found, expected);
}

static int seen(struct turn *turn, uint64_t offset, uint64_t expected)
{
    uint64_t found = 0;
    int status = word_read(turn->blocks->mapping, offset, &found);

    return passed_if(turn, status, found, expected);
}

int turn_begin(struct turn *turn, uint64_t hint, uint64_t repairs, uint64_t idle, uint64_t active,
               uint64_t nonce, uint64_t *commit)
{
    int status;

    turn->passed = 0;
    if ((status = swapped(turn, turn->hint_offset, 0, hint)) != STATUS_OK ||
        (status = seen(turn, turn->repair_offset, repairs)) != STATUS_OK ||
        (status = swapped(turn, turn->state_offset, idle, active)) != STATUS_OK ||
        (status = seen(turn, turn->nonce_offset, nonce)) != STATUS_OK)
        return status;
    turn->blocks->guard_offset = turn->state_offset;
    turn->blocks->guard = active;
    if ((status = word_read(turn->blocks->mapping, turn->commit_offset, commit)) != STATUS_OK)
        return status;
    turn->passed++;
    return seen(turn, turn->state_offset, active);
}

int turn_commit(struct turn *turn, uint64_t planned_on, uint64_t root, uint64_t *commit)
{
    uint64_t sequence = ((planned_on >> BLOCK_BITS) + 1) & SEQUENCE_MASK;

    if (sequence == 0)
        sequence = 1;
    turn->passed = 0;
    *commit = sequence << BLOCK_BITS | root;
    fence();
    return swapped(turn, turn->commit_offset, planned_on, *commit);
}

int turn_end(struct turn *turn, uint64_t active, uint64_t idle, uint64_t repairs,
             const unsigned char *pointers, uint64_t count, uint64_t hint)
{
    uint64_t ignored;
    int status;

    turn->passed = 0;
    if ((status = swapped(turn, turn->state_offset, active, idle)) != STATUS_OK)
        return status;
    if (count > 0) {
        if ((status = seen(turn, turn->repair_offset, repairs)) != STATUS_OK ||
            (status = tags_release(turn->blocks, pointers, count, &ignored)) != STATUS_OK)
            return status;
        turn->passed++;
    }
    if (hint != 0)
        status = word_compare_and_swap(turn->blocks->mapping, turn->hint_offset, hint, 0, &ignored);
    return status;
}
