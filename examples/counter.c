/* A counter that programs on all machines share.
 *
 *   ivshmemfs map --create 4096 label=hello:/counter
 *   ivshmemfs map --c label=hello:/counter >counter.h
 *   cc -O2 -o counter counter.c
 *   ./counter 1000
 *
 * The first line is for one machine, the others are for each.  The last one adds 1000, and prints
 * the sum.
 *
 * It maps the file's bytes where `counter.h` says they are: in the region's file on the host, in the
 * device's BAR 2 in a guest.  No part of ivshmemfs runs meanwhile.
 */
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include "counter.h"

int main(int argc, char **argv)
{
    long times = argc > 1 ? strtol(argv[1], NULL, 10) : 1;
    int file = open(COUNTER_FILE, O_RDWR | O_CLOEXEC);
    void *map = MAP_FAILED;

    if (file >= 0)
        map = mmap(NULL, COUNTER_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, file, COUNTER_OFFSET);
    if (map == MAP_FAILED) {
        perror(COUNTER_FILE);
        return 1;
    }
    /* Whole, aligned words, as the memory of a device needs them. */
    uint64_t *counter = map;
    while (times-- > 0)
        __atomic_fetch_add(counter, 1, __ATOMIC_SEQ_CST);
    printf("%llu\n", (unsigned long long)__atomic_load_n(counter, __ATOMIC_SEQ_CST));
    return 0;
}
