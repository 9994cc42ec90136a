/* A transaction's words change in order, and nothing is done after a word that is unexpected. */
#include "check.h"

enum { HINT = 0, REPAIR = 8, COMMIT = 16, STATE = 24, NONCE = 32 };
enum { MINE = 7, REPAIRS = 5, IDLE = 100, ACTIVE = 101, OWN = 9 };

static struct turn turn_on(struct blocks *blocks)
{
    struct turn turn = {blocks, HINT, REPAIR, COMMIT, STATE, NONCE, 0};
    const uint64_t words[] = {0, REPAIRS, 3 << BLOCK_BITS, IDLE, OWN};

    for (uint64_t at = 0; at < sizeof words / sizeof *words; at++)
        check(word_write(blocks->mapping, 8 * at, words[at]) == STATUS_OK);
    blocks->guard = 0;
    return turn;
}

static uint64_t word(struct blocks *blocks, uint64_t offset)
{
    uint64_t value = 0;

    check(word_read(blocks->mapping, offset, &value) == STATUS_OK);
    return value;
}

static int begin(struct turn *turn, uint64_t *commit)
{
    return turn_begin(turn, MINE, REPAIRS, IDLE, ACTIVE, OWN, commit);
}

static void begins(struct blocks *blocks)
{
    struct turn turn = turn_on(blocks);
    uint64_t commit = 0, stores = blocks->mapping->stores;

    check(begin(&turn, &commit) == STATUS_OK && turn.passed == 6 && commit == 3 << BLOCK_BITS);
    check(word(blocks, HINT) == MINE && word(blocks, STATE) == ACTIVE);
    check(blocks->guard == ACTIVE && blocks->guard_offset == STATE);
    check(blocks->mapping->stores == stores + 2);
}

/* The first word that another peer has changed is the last one that is looked at. */
static void begins_not(struct blocks *blocks)
{
    static const uint64_t OTHER[] = {HINT, REPAIR, STATE, NONCE};

    for (uint32_t at = 0; at < sizeof OTHER / sizeof *OTHER; at++) {
        struct turn turn = turn_on(blocks);
        uint64_t commit = 0;

        check(word_write(blocks->mapping, OTHER[at], 77) == STATUS_OK);
        check(begin(&turn, &commit) == STATUS_STALE && turn.passed == at && commit == 0);
        check((word(blocks, STATE) == ACTIVE) == (at > 2) && blocks->guard == 0);
    }
}

static void outside(struct blocks *blocks)
{
    struct turn turn = turn_on(blocks);
    uint64_t commit = 0;

    turn.nonce_offset = SIZE;
    check(begin(&turn, &commit) == STATUS_RANGE && turn.passed == 3 && blocks->guard == 0);
}

static void commits(struct blocks *blocks)
{
    struct turn turn = turn_on(blocks);
    const uint64_t last = SEQUENCE_MASK << BLOCK_BITS;
    uint64_t commit = 0;

    check(turn_commit(&turn, 3 << BLOCK_BITS, 6, &commit) == STATUS_OK && turn.passed == 1);
    check(commit == (UINT64_C(4) << BLOCK_BITS | 6) && word(blocks, COMMIT) == commit);
    check(turn_commit(&turn, 3 << BLOCK_BITS, 8, &commit) == STATUS_STALE && turn.passed == 0);
    check(word(blocks, COMMIT) == (UINT64_C(4) << BLOCK_BITS | 6));
    check(word_write(blocks->mapping, COMMIT, last) == STATUS_OK); /* 0 is not a number of a commit */
    check(turn_commit(&turn, last, 0, &commit) == STATUS_OK && commit == UINT64_C(1) << BLOCK_BITS);
}

static void ends(struct blocks *blocks)
{
    struct turn turn = turn_on(blocks);
    unsigned char claims[2 * POINTER_SIZE];
    uint64_t commit, cursor = 0, got = 0;

    check(begin(&turn, &commit) == STATUS_OK);
    check(tags_claim(blocks, 2, 11, &cursor, claims, &got) == STATUS_OK && got == 2);
    check(turn_end(&turn, IDLE, IDLE, REPAIRS, claims, 2, MINE) == STATUS_STALE);
    check(turn.passed == 0 && tags_check(blocks, claims, 2) == STATUS_OK);
    check(turn_end(&turn, ACTIVE, IDLE, REPAIRS + 1, claims, 2, MINE) == STATUS_STALE);
    check(turn.passed == 1 && tags_check(blocks, claims, 2) == STATUS_OK);
    check(word(blocks, STATE) == IDLE && word(blocks, HINT) == MINE);
    check(turn_end(&turn, IDLE, IDLE, REPAIRS, claims, 2, 0) == STATUS_OK && turn.passed == 3);
    check(tags_check(blocks, claims, 2) == STATUS_STALE && word(blocks, HINT) == MINE);
    check(turn_end(&turn, IDLE, IDLE, 0, NULL, 0, MINE) == STATUS_OK && turn.passed == 1);
    check(word(blocks, HINT) == 0);
    check(word_write(blocks->mapping, HINT, 77) == STATUS_OK); /* another peer took it over */
    check(turn_end(&turn, IDLE, IDLE, 0, NULL, 0, MINE) == STATUS_OK && word(blocks, HINT) == 77);
}

int main(void)
{
    for (int access = ACCESS_NORMAL; access <= ACCESS_WRITE_COMBINING; access++) {
        struct mapping mapping;
        struct blocks blocks;

        region_map(&mapping, access);
        blocks = blocks_on(&mapping);
        begins(&blocks);
        begins_not(&blocks);
        outside(&blocks);
        commits(&blocks);
        ends(&blocks);
        mapping_close(&mapping);
    }
    return 0;
}
