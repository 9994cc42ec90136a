/* Packed words and leaves, also with lengths that contradict themselves, in exact allocations. */
#include "check.h"

enum { ENTRIES = 6 };

static unsigned char *leaf_build(struct leaf *leaf)
{
    unsigned char *raw = malloc(ENTRIES * (ENTRY_FIXED + 4));

    leaf->raw = raw;
    leaf->count = ENTRIES;
    leaf->length = ENTRIES * (ENTRY_FIXED + 4);
    for (uint64_t at = 0; at < ENTRIES; at++) {
        uint64_t key = 256 * (at + 1), value = 1000 + at;
        memcpy(raw + 8 * at, &key, 8);
        memcpy(raw + 8 * (ENTRIES + at), &value, 8);
        raw[16 * ENTRIES + at] = 4;
        memcpy(raw + ENTRY_FIXED * ENTRIES + 4 * at, "nam", 3);
        raw[ENTRY_FIXED * ENTRIES + 4 * at + 3] = (unsigned char)('a' + at);
    }
    return raw;
}

static void words_of(void)
{
    uint64_t words[] = {1, 5, 5, 9};
    const unsigned char *raw = (const unsigned char *)words;
    unsigned char full[40];

    check(packed_lower_bound(raw, 4, 0) == 0 && packed_lower_bound(raw, 4, 5) == 1);
    check(packed_lower_bound(raw, 4, 10) == 4 && packed_lower_bound(raw, 0, 1) == 0);
    check(packed_range(raw, 4, 0) == 0 && packed_range(raw, 4, 1) == 0);
    check(packed_range(raw, 4, 8) == 2 && packed_range(raw, 4, UINT64_MAX) == 3);
    check(packed_range(raw, 0, 1) == 0);
    check(packed_ascending(raw, 2) && !packed_ascending(raw, 3) && packed_ascending(raw, 0));
    check(packed_sum(raw, 0, 8) == 1 && packed_sum(raw, 9, 8) == 0);
    check(packed_sum(raw, 0, 32) == 20 && packed_sum(raw, 1, 25) == 19);
    memset(full, 0xff, sizeof full);
    for (uint64_t stop = 0; stop <= sizeof full; stop++)
        check(packed_sum(full, 0, stop) == 255 * stop && packed_sum(full, stop, sizeof full) ==
                                                            255 * (sizeof full - stop));
    check(slots_trimmed(raw, 32) == 32 && slots_trimmed((unsigned char[48]){1}, 48) == 16);
    check(slots_trimmed((unsigned char[16]){0}, 16) == 0);
    check(packed_weight((unsigned char[32]){[4] = 3, [16] = 9, [20] = 2, [23] = 1}, 2) == 16777221);
    check(packed_weight(raw, 0) == 0);
}

static void filters(void)
{
    check(filter_index(1) == 500 && filter_index(1000) == 1455);
    check(filter_index((UINT64_C(1) << 56) - 1) == 523);
}

static bool fit(const char *name, uint64_t length)
{
    unsigned char *exact = malloc(length + !length);
    bool is_fit;

    memcpy(exact, name, length);
    is_fit = name_is_fit(exact, length);
    free(exact);
    return is_fit;
}

static void names(void)
{
    static const char longest[256] = {[0 ... 255] = 'n'};

    check(fit("a", 1) && fit(".a", 2) && fit("..a", 3) && fit("...", 3) && fit(longest, 255));
    check(!fit("", 0) && !fit(".", 1) && !fit("..", 2) && !fit(longest, 256));
    check(!fit("a/", 2) && !fit("/", 1) && !fit("a\0b", 3));
}

/* One call with an entry gone and another there, beside two calls. */
static void moved(const struct leaf *leaf, uint64_t gone, uint64_t key)
{
    const unsigned char name[] = "another";
    struct leaf less = {NULL, leaf_size_without(leaf, gone), leaf->count - 1};
    const uint64_t size = leaf_size_with(leaf, gone, 7);
    unsigned char *without = malloc(less.length), *two = malloc(size), *one = malloc(size);
    uint64_t first = key, second = key;

    leaf_without(leaf, gone, without);
    less.raw = without;
    check(leaf_free_key(&less, less.count, 256, &first) && leaf_free_key(leaf, gone, 256, &second));
    check(first == second && leaf_size_with(&less, less.count, 7) == size);
    leaf_with(&less, less.count, first, 5, name, 7, two);
    leaf_with(leaf, gone, first, 5, name, 7, one);
    check(memcmp(one, two, size) == 0);
    free(without);
    free(two);
    free(one);
}

static void leaves(void)
{
    struct leaf leaf, more;
    unsigned char *raw = leaf_build(&leaf), *grown, *back;

    check(leaf_check(&leaf) == STATUS_OK);
    check(leaf_find(&leaf, 512, 256, (const unsigned char *)"namb", 4) == 1);
    check(leaf_find(&leaf, 512, 256, (const unsigned char *)"namc", 4) == -1);
    check(leaf_find(&leaf, 0, UINT64_MAX, (const unsigned char *)"namf", 4) == 5);
    for (uint64_t key = 0; key < 2000; key += 130) {
        const unsigned char name[] = "a longer name";
        uint64_t free_key = key;
        more = (struct leaf){NULL, leaf_size_with(&leaf, ENTRIES, 13), ENTRIES + 1};
        check(more.length == leaf.length + ENTRY_FIXED + 13);
        more.raw = grown = malloc(more.length);
        check(leaf_free_key(&leaf, ENTRIES, 2, &free_key) && free_key <= key + 1);
        leaf_with(&leaf, ENTRIES, free_key, 77, name, 13, grown);
        check(packed_ascending(grown, ENTRIES + 1));
        int64_t at = leaf_find(&more, key, 2, name, 13);
        check(at >= 0);
        check(leaf_size_without(&more, (uint64_t)at) == leaf.length);
        back = malloc(leaf.length);
        leaf_without(&more, (uint64_t)at, back);
        check(memcmp(back, raw, leaf.length) == 0);
        free(back);
        free(grown);
        for (uint64_t gone = 0; gone < ENTRIES; gone++)
            moved(&leaf, gone, key);
    }
    check(!leaf_free_key(&leaf, ENTRIES, 1, &(uint64_t){512}));
    check(leaf_free_key(&leaf, 1, 1, &(uint64_t){512}));
    check(!leaf_free_key(&leaf, ENTRIES, 0, &(uint64_t){1}));
    leaf.count = leaf.length / ENTRY_FIXED + 1;
    check(leaf_check(&leaf) == STATUS_RANGE);
    free(raw);
}

/* Any lengths of names: nothing outside the allocations is touched (the sanitizer watches). */
static void contradictions(void)
{
    unsigned int state = 1;

    for (int round = 0; round < 2000; round++) {
        struct leaf leaf;
        unsigned char *raw = leaf_build(&leaf), name[255] = {0}, *made;
        for (int at = 0; at < ENTRIES; at++)
            raw[16 * ENTRIES + at] = (unsigned char)((state = state * 1103515245 + 12345) >> 16);
        check(leaf_find(&leaf, 0, UINT64_MAX, name, state % 256) >= -1);
        made = malloc(leaf_size_with(&leaf, ENTRIES, 255));
        leaf_with(&leaf, ENTRIES, state, 1, name, 255, made);
        for (uint64_t at = 0; at < ENTRIES; at++) {
            unsigned char *less = malloc(leaf_size_without(&leaf, at));
            leaf_without(&leaf, at, less);
            free(less);
            less = malloc(leaf_size_with(&leaf, at, 255));
            leaf_with(&leaf, at, state % 2000, 1, name, 255, less);
            free(less);
        }
        free(made);
        free(raw);
    }
}

int main(void)
{
    filters();
    names();
    words_of();
    leaves();
    contradictions();
    return 0;
}
