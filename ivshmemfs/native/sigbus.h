/* Accesses that survive the memory behind them going away. */
#ifndef IVSHMEMFS_SIGBUS_H
#define IVSHMEMFS_SIGBUS_H

#include <stdbool.h>

/* Take the signal; 0, or -1 with errno.  Called for every new mapping, because another handler
 * (faulthandler) may have come later. */
int sigbus_install(void);

/* Run body(argument); false, with the address, when a SIGBUS ended it. */
bool attempt(void (*body)(void *), void *argument, void **fault);

#endif
