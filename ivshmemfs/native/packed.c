/* Packed words, slots and directory leaves in private memory: what each change does many times. */
#include "kernel.h"

uint64_t packed_lower_bound(const unsigned char *words, uint64_t count, uint64_t value)
{
    uint64_t low = 0;

    while (low < count) {
        uint64_t middle = low + (count - low) / 2;
        if (u64_at(words, middle) < value)
            low = middle + 1;
        else
            count = middle;
    }
    return low;
}

uint64_t packed_range(const unsigned char *words, uint64_t count, uint64_t value)
{
    uint64_t above = value < UINT64_MAX ? packed_lower_bound(words, count, value + 1) : count;

    return above > 0 ? above - 1 : 0;
}

bool packed_ascending(const unsigned char *words, uint64_t count)
{
    uint64_t before = count > 0 ? u64_at(words, 0) : 0;

    for (uint64_t at = 1; at < count; at++) {
        uint64_t word = u64_at(words, at);
        if (word <= before)
            return false;
        before = word;
    }
    return true;
}

uint64_t packed_sum(const unsigned char *bytes, uint64_t start, uint64_t stop)
{
    const uint64_t even = UINT64_C(0x00ff00ff00ff00ff), ones = UINT64_C(0x0001000100010001);
    uint64_t sum = 0, pairs;

    for (; start < stop && stop - start >= 8; start += 8) {
        memcpy(&pairs, bytes + start, 8);
        pairs = (pairs & even) + (pairs >> 8 & even);
        sum += pairs * ones >> 48; /* the four pairs */
    }
    for (; start < stop; start++)
        sum += bytes[start];
    return sum;
}

uint64_t packed_weight(const unsigned char *pointers, uint64_t count)
{
    uint64_t sum = 0;

    for (; count > 0; count--, pointers += POINTER_SIZE)
        sum += u32_at(pointers, POINTER_WEIGHT_AT);
    return sum;
}

uint64_t slots_trimmed(const unsigned char *slots, uint64_t size)
{
    while (size >= POINTER_SIZE &&
           (u64_at(slots + size - POINTER_SIZE, 0) | u64_at(slots + size - POINTER_SIZE, 1)) == 0)
        size -= POINTER_SIZE;
    return size;
}

/* --- directory leaves -------------------------------------------------------------------------- */

uint64_t filter_index(uint64_t ino)
{
    __extension__ const unsigned __int128 product = (unsigned __int128)ino * FILTER_FACTOR;

    return (uint64_t)((product >> FILTER_SHIFT) % FILTER_SIZE);
}

bool name_is_fit(const unsigned char *name, uint64_t length)
{
    if (length == 0 || length > LEAF_NAME_MAX)
        return false;
    if (name[0] == '.' && (length == 1 || (length == 2 && name[1] == '.')))
        return false;
    return memchr(name, '/', length) == NULL && memchr(name, 0, length) == NULL;
}

int leaf_check(const struct leaf *leaf)
{
    return leaf->count > leaf->length / ENTRY_FIXED ? STATUS_RANGE : STATUS_OK;
}

static inline const unsigned char *leaf_values(const struct leaf *leaf)
{
    return leaf->raw + 8 * leaf->count;
}

static inline const unsigned char *leaf_sizes(const struct leaf *leaf)
{
    return leaf->raw + 16 * leaf->count;
}

/* Where the name of entry `at` begins; the end of the leaf if the lengths lead beyond it. */
static uint64_t name_at(const struct leaf *leaf, uint64_t at)
{
    uint64_t place = ENTRY_FIXED * leaf->count + packed_sum(leaf_sizes(leaf), 0, at);

    return place < leaf->length ? place : leaf->length;
}

/* Where the name of entry `at`, which begins at `cut`, ends. */
static inline uint64_t name_end(const struct leaf *leaf, uint64_t at, uint64_t cut)
{
    uint64_t end = cut + leaf_sizes(leaf)[at];

    return end < leaf->length ? end : leaf->length;
}

int64_t leaf_find(const struct leaf *leaf, uint64_t key, uint64_t span, const unsigned char *name,
                  uint64_t length)
{
    uint64_t at = packed_lower_bound(leaf->raw, leaf->count, key), place;

    for (; at < leaf->count && u64_at(leaf->raw, at) - key < span; at++) {
        if (leaf_sizes(leaf)[at] != length)
            continue;
        place = name_at(leaf, at);
        if (leaf->length - place >= length && memcmp(leaf->raw + place, name, length) == 0)
            return (int64_t)at;
    }
    return -1;
}

static unsigned char *put(unsigned char *to, const void *from, uint64_t length)
{
    memcpy(to, from, length);
    return to + length;
}

bool leaf_free_key(const struct leaf *leaf, uint64_t gone, uint64_t span, uint64_t *key)
{
    uint64_t at = packed_lower_bound(leaf->raw, leaf->count, *key), offset = 0;

    for (; at < leaf->count && offset < span; at++) {
        if (at == gone)
            continue;
        if (u64_at(leaf->raw, at) != *key + offset)
            break;
        offset++;
    }
    *key += offset;
    return offset < span && *key >= offset;
}

/* What changes in a column.  `gone` bytes from `cut` on are left out.  `size` bytes of `item` are put
 * in before byte `place`, which is not inside of what is left out. */
struct change {
    uint64_t cut;
    uint64_t gone;
    uint64_t place;
    const void *item;
    uint64_t size;
};

static unsigned char *put_changed(unsigned char *to, const unsigned char *column, uint64_t length,
                                  const struct change *change)
{
    const uint64_t cut = change->cut, behind = cut + change->gone, place = change->place;

    if (place <= cut) {
        to = put(to, column, place);
        to = put(to, change->item, change->size);
        to = put(to, column + place, cut - place);
        return put(to, column + behind, length - behind);
    }
    to = put(to, column, cut);
    to = put(to, column + behind, place - behind);
    to = put(to, change->item, change->size);
    return put(to, column + place, length - place);
}

uint64_t leaf_size_with(const struct leaf *leaf, uint64_t gone, uint64_t length)
{
    return ENTRY_FIXED + length + (gone < leaf->count ? leaf_size_without(leaf, gone)
                                                      : leaf->length);
}

void leaf_with(const struct leaf *leaf, uint64_t gone, uint64_t key, uint64_t value,
               const unsigned char *name, uint64_t length, unsigned char *to)
{
    const uint64_t count = leaf->count, names = ENTRY_FIXED * count;
    const uint64_t at = packed_lower_bound(leaf->raw, count, key), place = name_at(leaf, at);
    const uint64_t cut = gone < count ? gone : at, one = gone < count;
    const uint64_t named = one ? name_at(leaf, cut) : place;
    const uint64_t freed = one ? name_end(leaf, cut, named) - named : 0;
    const unsigned char size = (unsigned char)length;

    to = put_changed(to, leaf->raw, 8 * count, &(struct change){8 * cut, 8 * one, 8 * at, &key, 8});
    to = put_changed(to, leaf_values(leaf), 8 * count,
                     &(struct change){8 * cut, 8 * one, 8 * at, &value, 8});
    to = put_changed(to, leaf_sizes(leaf), count, &(struct change){cut, one, at, &size, 1});
    put_changed(to, leaf->raw + names, leaf->length - names,
                &(struct change){named - names, freed, place - names, name, length});
}

uint64_t leaf_size_without(const struct leaf *leaf, uint64_t at)
{
    uint64_t cut = name_at(leaf, at);

    return leaf->length - ENTRY_FIXED - (name_end(leaf, at, cut) - cut);
}

void leaf_without(const struct leaf *leaf, uint64_t at, unsigned char *to)
{
    const unsigned char *raw = leaf->raw, *sizes = leaf_sizes(leaf);
    uint64_t cut = name_at(leaf, at), behind = name_end(leaf, at, cut);

    to = put(to, raw, 8 * at);
    to = put(to, raw + 8 * (at + 1), 8 * (leaf->count - 1));
    to = put(to, leaf_values(leaf) + 8 * (at + 1), 8 * (leaf->count - 1 - at) + at);
    to = put(to, sizes + at + 1, cut - (uint64_t)(sizes + at + 1 - raw));
    put(to, raw + behind, leaf->length - behind);
}
