/* Waiting for a word: it ends by a change, by the count of naps, by a signal, by the end. */
#include <signal.h>
#include <sys/time.h>

#include "check.h"

enum { AT = 64, FOREVER = 1000000 };

static struct mapping *waiting;
static int naps, change_after, close_after, refused;

static void *leave(void)
{
    naps++;
    return NULL;
}

static void enter(void *left)
{
    check(left == NULL);
    if (naps == change_after)
        waiting->base[AT] = 5;
    if (naps == close_after)
        mapping_close(waiting);
}

static int interrupted(void *context)
{
    ++*(int *)context;
    return refused;
}

static void ignore(int number)
{
    (void)number;
}

static uint64_t awaited(int expected, uint64_t most)
{
    uint64_t found = 99;

    naps = 0;
    check(mapping_use(waiting) == STATUS_OK);
    check(word_await(waiting, AT, 0, 1000, most, &found) == expected);
    mapping_unuse(waiting);
    return found;
}

int main(void)
{
    struct mapping mapping;
    struct itimerval soon = {.it_value = {.tv_usec = 2000}};
    uint64_t word = 0;
    int signals = 0;

    region_map(&mapping, ACCESS_NORMAL);
    waiting = &mapping;
    check(awaited(STATUS_OK, 3) == 0); /* without a host */
    mapping.host = (struct host){.leave = leave, .enter = enter, .interrupted = interrupted,
                                 .context = &signals};
    check(awaited(STATUS_OK, 0) == 0 && naps == 0);
    check(awaited(STATUS_OK, 7) == 0 && naps == 7);
    check(word_await(&mapping, SIZE, 0, 1000, 1, &word) == STATUS_RANGE);
    check(word_await(&mapping, AT + 1, 0, 1000, 1, &word) == STATUS_RANGE);

    check(signal(SIGALRM, ignore) != SIG_ERR);
    refused = 1;
    check(setitimer(ITIMER_REAL, &soon, NULL) == 0);
    check(mapping_use(&mapping) == STATUS_OK);
    check(word_await(&mapping, AT, 0, 60000000000, FOREVER, &word) == STATUS_INTERRUPTED);
    mapping_unuse(&mapping);
    check(signals == 1);

    change_after = 3;
    check(awaited(STATUS_OK, FOREVER) == 5 && naps == 3);
    check(awaited(STATUS_OK, FOREVER) == 5 && naps == 0); /* it has changed before */
    mapping.base[AT] = 0;
    change_after = 0;
    close_after = 2;
    check(awaited(STATUS_CLOSED, FOREVER) == 0 && naps == 2);
    return 0;
}
