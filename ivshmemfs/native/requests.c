/* See requests.h. */
#define _GNU_SOURCE

#include "requests.h"

#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define BILLION 1000000000
#define SHORT_BODY 1024 /* bytes; a shorter body is copied behind its header, for one segment */

int requests_read(struct requests *requests)
{
    ssize_t got = read(requests->file, requests->into, requests->room);

    if (got < 0)
        /* ENOENT: the kernel withdrew it, because its process was killed. */
        return errno == ENOENT ? EAGAIN : errno;
    if ((size_t)got < sizeof(struct fuse_in_header))
        return EIO;
    requests->size = (size_t)got;
    return 0;
}

static uint64_t now(void)
{
    struct timespec time;

    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * BILLION + (uint64_t)time.tv_nsec;
}

int requests_await(struct requests *requests, uint64_t spin, int nap)
{
    struct pollfd ready = {.fd = requests->file, .events = POLLIN};
    int error;

    if (spin > 0) {
        uint64_t end = now() + spin;

        do {
            error = requests_read(requests);
            if (error != EAGAIN)
                return error;
        } while (now() < end);
    }
    if (poll(&ready, 1, nap) < 0)
        return errno;
    return requests_read(requests);
}

int requests_answer(const struct requests *requests, uint64_t unique, int error,
                    const unsigned char *body, size_t size)
{
    struct {
        struct fuse_out_header header;
        unsigned char body[SHORT_BODY];
    } answer;
    struct iovec parts[2] = {
        {.iov_base = &answer, .iov_len = sizeof(answer.header)},
        {.iov_base = (void *)body, .iov_len = size},
    };
    ssize_t done;

    answer.header.len = (uint32_t)(sizeof(answer.header) + size);
    answer.header.error = -error;
    answer.header.unique = unique;
    if (size > 0 && size <= SHORT_BODY) {
        memcpy(answer.body, body, size);
        parts[0].iov_len += size;
    }
    do {
        if (size > SHORT_BODY)
            done = writev(requests->file, parts, 2);
        else
            done = write(requests->file, &answer, parts[0].iov_len);
    } while (done < 0 && errno == EINTR);
    return done < 0 ? errno : 0;
}

void requests_time(int64_t moment, uint64_t *seconds, uint32_t *nanoseconds)
{
    int64_t whole = moment / BILLION, rest = moment % BILLION;

    if (rest < 0) {
        rest += BILLION;
        whole--;
    }
    *seconds = (uint64_t)whole;
    *nanoseconds = (uint32_t)rest;
}
