/* Requests of a FUSE descriptor: one system call reads one, and one writes its answer.
 *
 * The layouts are the kernel's own, of linux/fuse.h.  Each function returns 0 or an errno.
 */
#ifndef IVSHMEMFS_REQUESTS_H
#define IVSHMEMFS_REQUESTS_H

#include <linux/fuse.h>
#include <stddef.h>
#include <stdint.h>

struct requests {
    int file;            /* does not block */
    unsigned char *into; /* where a request goes */
    size_t room;         /* bytes there */
    size_t size;         /* of the last request */
};

/* Read a request.  EAGAIN: none is queued.  A shorter one than its header is EIO. */
int requests_read(struct requests *requests);

/* Look for a request for `spin` nanoseconds, then sleep for `nap` milliseconds until there is one.
 * EAGAIN: none came.  EINTR: a signal came first.
 */
int requests_await(struct requests *requests, uint64_t spin, int nap);

/* Write the answer to request `unique`: a body, or the errno `error` and no body. */
int requests_answer(const struct requests *requests, uint64_t unique, int error,
                    const unsigned char *body, size_t size);

/* Split nanoseconds since 1970, which may be negative. */
void requests_time(int64_t moment, uint64_t *seconds, uint32_t *nanoseconds);

#endif
