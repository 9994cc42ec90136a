/* A SIGBUS inside attempt() jumps out of it; any other goes where it went before. */
#include "sigbus.h"

#include <setjmp.h>
#include <signal.h>
#include <stddef.h>

#include "access.h"

struct guard {
    sigjmp_buf jump;
    void *volatile address;
    struct guard *outer;
};

#ifdef __GLIBC__ /* a signal handler must not be the first to allocate the thread's storage */
static __thread struct guard *guard_now __attribute__((tls_model("initial-exec")));
#else
static __thread struct guard *guard_now;
#endif

static struct sigaction sigbus_before;
static volatile sig_atomic_t sigbus_passed_on;

/* A foreign SIGBUS goes to the handler that had the signal before.  If it comes back once more
 * (two handlers that chain to each other), the default action ends the process as it should. */
static void sigbus_pass_on(bool synchronous)
{
    struct sigaction fallback = {.sa_handler = SIG_DFL};

    sigaction(SIGBUS, sigbus_passed_on ? &fallback : &sigbus_before, NULL);
    sigbus_passed_on = 1;
    if (!synchronous)
        raise(SIGBUS); /* a fault needs no help: the instruction simply faults again */
}

static void sigbus_handler(int number, siginfo_t *info, void *context)
{
    struct guard *guard = guard_now;

    (void)number, (void)context;
    if (guard == NULL || info->si_code <= 0) {
        sigbus_pass_on(info->si_code > 0);
        return;
    }
    guard->address = info->si_addr;
    siglongjmp(guard->jump, 1);
}

/* SA_NODEFER: the jump out of the handler leaves no signal blocked and need not save a mask. */
int sigbus_install(void)
{
    struct sigaction now;
    struct sigaction ours = {.sa_sigaction = sigbus_handler,
                             .sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK};

    if (sigaction(SIGBUS, NULL, &now) < 0)
        return -1;
    if ((now.sa_flags & SA_SIGINFO) && now.sa_sigaction == sigbus_handler)
        return 0;
    sigbus_before = now;
    sigbus_passed_on = 0;
    return sigaction(SIGBUS, &ours, NULL);
}

__attribute__((noinline)) bool attempt(void (*body)(void *), void *argument, void **fault)
{
    struct guard guard;

    guard.address = NULL;
    guard.outer = guard_now;
    if (sigsetjmp(guard.jump, 0) != 0) {
        guard_now = guard.outer;
        *fault = guard.address;
        return false;
    }
    guard_now = &guard;
    compiler_barrier();
    body(argument);
    compiler_barrier();
    guard_now = guard.outer;
    return true;
}
