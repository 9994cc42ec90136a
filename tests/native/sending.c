/* Long rows of blocks are filled from file to file, where the region is a file of tmpfs. */
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>

#include "check.h"

enum { ROW = COUNT * BLOCK, PLACE = 3 * 4096 };

static unsigned char source[ROW], into[ROW];
static bool sends_nothing;

/* In place of the C library's. */
ssize_t sendfile(int to, int from, off_t *at, size_t length)
{
    return sends_nothing ? 0 : syscall(SYS_sendfile, to, from, at, length);
}

static int source_file(void)
{
    char name[] = "/dev/shm/ivshmemfs-native-XXXXXX";
    int file = mkstemp(name);

    check(file >= 0 && unlink(name) == 0);
    check(pwrite(file, source, ROW, PLACE) == ROW);
    return file;
}

static uint64_t region_size(void)
{
    struct stat now;

    check(fstat(region_file, &now) == 0);
    return (uint64_t)now.st_size;
}

/* No page of the blocks can be reached through the mapping, and yet they are filled. */
static void without_the_mapping(struct blocks *blocks, unsigned char *pointers, int file)
{
    unsigned char *data = blocks->mapping->base + DATA;
    uint64_t done;

    check(blocks->mapping->file >= 0);
    check(mprotect(data, ROW, PROT_NONE) == 0);
    check(blocks_fill(blocks, pointers, COUNT, file, PLACE, ROW, &done) == STATUS_OK);
    check(done == ROW);
    check(mprotect(data, ROW, PROT_READ | PROT_WRITE) == 0);
    check(blocks_gather(blocks, pointers, COUNT, 0, ROW, into) == STATUS_OK);
    check(memcmp(into, source, ROW) == 0);
}

static void the_end_of_the_file(struct blocks *blocks, unsigned char *pointers, int file)
{
    uint64_t done;

    check(blocks_fill(blocks, pointers, COUNT, file, PLACE + BLOCK + 7, ROW, &done) == STATUS_OK);
    check(done == ROW - BLOCK - 7);
    check(blocks_gather(blocks, pointers, COUNT, 0, ROW, into) == STATUS_OK);
    check(memcmp(into, source + BLOCK + 7, done) == 0);
    for (int at = 0; at < 7; at++)
        check(into[done + at] == 0);
    check(blocks_fill(blocks, pointers, COUNT, file, PLACE + ROW, ROW, &done) == STATUS_OK);
    check(done == 0);
}

static void a_guard_that_changed(struct blocks *blocks, unsigned char *pointers, int file)
{
    uint64_t done;

    blocks->guard_offset = 8192;
    blocks->guard = 5;
    check(word_write(blocks->mapping, 8192, 4) == STATUS_OK);
    check(blocks_fill(blocks, pointers, COUNT, file, PLACE, ROW, &done) == STATUS_STALE);
    check(done == 0);
    check(word_write(blocks->mapping, 8192, 5) == STATUS_OK);
    check(blocks_fill(blocks, pointers, COUNT, file, PLACE, ROW, &done) == STATUS_OK);
    check(done == ROW);
    blocks->guard = 0;
}

/* Where the kernel refuses to write to the region's file, the mapping is filled. */
static void a_file_that_cannot_be_written(struct blocks *blocks, unsigned char *pointers, int file)
{
    int mine = blocks->mapping->file;
    char name[64];
    uint64_t done;

    memset(into, 0, ROW);
    check(range_write(blocks->mapping, DATA, into, ROW) == STATUS_OK);
    snprintf(name, sizeof name, "/proc/self/fd/%d", mine);
    blocks->mapping->file = open(name, O_RDONLY | O_CLOEXEC);
    check(blocks->mapping->file >= 0);
    check(blocks_fill(blocks, pointers, COUNT, file, PLACE, ROW, &done) == STATUS_OK);
    check(close(blocks->mapping->file) == 0);
    blocks->mapping->file = mine;
    check(done == ROW);
    check(blocks_gather(blocks, pointers, COUNT, 0, ROW, into) == STATUS_OK);
    check(memcmp(into, source, ROW) == 0);
}

/* A source of which the kernel knows an old size, maybe on another machine, is read to its end. */
static void a_file_that_is_longer_than_known(struct blocks *blocks, unsigned char *pointers,
                                             int file)
{
    uint64_t done;

    memset(into, 0, ROW);
    check(range_write(blocks->mapping, DATA, into, ROW) == STATUS_OK);
    sends_nothing = true;
    check(blocks_fill(blocks, pointers, COUNT, file, PLACE, ROW, &done) == STATUS_OK);
    sends_nothing = false;
    check(done == ROW);
    check(blocks_gather(blocks, pointers, COUNT, 0, ROW, into) == STATUS_OK);
    check(memcmp(into, source, ROW) == 0);
}

/* A region that was cut stays as it is. */
static void a_cut_region(struct blocks *blocks, unsigned char *pointers, int file)
{
    uint64_t done;

    check(ftruncate(region_file, SIZE - 4096) == 0); /* behind the blocks */
    check(blocks_fill(blocks, pointers, COUNT, file, PLACE, ROW, &done) == STATUS_OK);
    check(region_size() == SIZE - 4096);
    check(ftruncate(region_file, DATA + 4096) == 0);
    check(blocks_fill(blocks, pointers, COUNT, file, PLACE, ROW, &done) == STATUS_FAULT);
    check(region_size() == DATA + 4096);
    check(ftruncate(region_file, SIZE) == 0);
}

/* A device is reached through its mapping, also where its node is on a tmpfs, as in /dev. */
static void a_device(void)
{
    struct mapping mapping = {.length = SIZE, .writable = true, .access = ACCESS_NORMAL};
    int device = open("/dev/zero", O_RDWR | O_CLOEXEC);

    check(device >= 0 && mapping_map(&mapping, device, 0) == STATUS_OK);
    check(mapping.file < 0);
    mapping_close(&mapping);
    close(device);
}

int main(void)
{
    struct mapping mapping;
    struct blocks blocks;
    unsigned char pointers[COUNT * POINTER_SIZE];
    uint64_t cursor = 0, count;
    int file;

    for (size_t at = 0; at < sizeof source; at++)
        source[at] = (unsigned char)(at * 31 + at / 256 + 1);
    file = source_file();
    region_map(&mapping, ACCESS_NORMAL);
    blocks = blocks_on(&mapping);
    check(tags_claim(&blocks, COUNT, 7, &cursor, pointers, &count) == STATUS_OK && count == COUNT);
    without_the_mapping(&blocks, pointers, file);
    the_end_of_the_file(&blocks, pointers, file);
    a_guard_that_changed(&blocks, pointers, file);
    a_file_that_cannot_be_written(&blocks, pointers, file);
    a_file_that_is_longer_than_known(&blocks, pointers, file);
    a_cut_region(&blocks, pointers, file);
    file = (close(file), mapping.file);
    mapping_close(&mapping);
    check(fcntl(file, F_GETFD) < 0);
    region_map(&mapping, ACCESS_DEVICE);
    check(mapping.file < 0);
    mapping_close(&mapping);
    a_device();
    close(region_file);
    return 0;
}
