/* Events: a test stops or diverts a peer before its N-th store, or its N-th access.
 *
 * A trap is armed with a number of events to let pass.  Then host.spring() runs once, before the
 * access, and may use the mapping itself.  If it fails, the mapping is dead for stores. */
#ifndef IVSHMEMFS_TRAP_H
#define IVSHMEMFS_TRAP_H

#include "native.h"

static inline int trap_event(struct mapping *mapping)
{
    if (!mapping->armed)
        return STATUS_OK;
    if (mapping->countdown > 0) {
        mapping->countdown--;
        return STATUS_OK;
    }
    mapping->armed = false;
    if (mapping->host.spring(mapping->host.context) != 0) {
        mapping->dead = true;
        return STATUS_TRAPPED;
    }
    return mapping->dead ? STATUS_DEAD : STATUS_OK;
}

/* Before each store event that happens while a trap is armed. */
static inline int store_event(struct mapping *mapping)
{
    mapping->stores++;
    return UNLIKELY(mapping->armed) ? trap_event(mapping) : STATUS_OK;
}

static inline int load_event(struct mapping *mapping)
{
    return UNLIKELY(mapping->armed && mapping->trap_loads) ? trap_event(mapping) : STATUS_OK;
}

#endif
