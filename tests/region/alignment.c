/* Copies to and from device memory, while the processor refuses every unaligned access.
 *
 * x86 does so when the AC flag is set (it answers with SIGBUS).  The private side of each copy is
 * kept congruent to the region's.  So only an unaligned access to the region, or a merged one, can
 * trap.  argv[1]: "device" for the word copies, "plain" for memcpy, to show that it traps.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "access.h"

bool access_has_extras; /* which mapping.c has otherwise */

static _Alignas(64) unsigned char region[256], private_copy[256], expected[256];

static inline void alignment_check(int on)
{
    if (on)
        __asm__ volatile("pushfq; orl $0x40000, (%%rsp); popfq" ::: "memory", "cc");
    else
        __asm__ volatile("pushfq; andl $~0x40000, (%%rsp); popfq" ::: "memory", "cc");
}

static void fill(void)
{
    for (int i = 0; i < 256; i++) {
        region[i] = (unsigned char)(i * 7 + 1);
        private_copy[i] = (unsigned char)(i * 5 + 3);
    }
}

static int one(int offset, int length)
{
    fill();
    memcpy(expected, private_copy, 256);
    memcpy(expected + offset, region + offset, (size_t)length);
    alignment_check(1);
    device_load(private_copy + offset, region + offset, (size_t)length);
    alignment_check(0);
    if (memcmp(expected, private_copy, 256) != 0)
        return 0;
    fill();
    memcpy(expected, region, 256);
    memcpy(expected + offset, private_copy + offset, (size_t)length);
    alignment_check(1);
    device_store(region + offset, private_copy + offset, (size_t)length);
    alignment_check(0);
    if (memcmp(expected, region, 256) != 0)
        return 0;
    memset(expected + offset, 0, (size_t)length);
    clear_in(ACCESS_DEVICE, region + offset, (size_t)length);
    return memcmp(expected, region, 256) == 0;
}

int main(int count, char **arguments)
{
    if (count > 1 && strcmp(arguments[1], "plain") == 0) {
        alignment_check(1);
        memcpy(private_copy + 1, region + 1, (size_t)(count * 16 + 7));
        alignment_check(0);
        return 0;
    }
    for (int offset = 0; offset < 24; offset++)
        for (int length = 0; length < 200; length++)
            if (!one(offset, length)) {
                printf("wrong bytes at offset %d, length %d\n", offset, length);
                return 1;
            }
    puts("aligned");
    return 0;
}
