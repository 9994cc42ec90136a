/* ivshmemfs.region._memory: bare shared memory for Python.
 *
 * Python has neither compare-and-swap nor fences, and its slices are memcpy.  This module maps a
 * region and gives bounds-checked word accesses (Memory) and operations on tagged blocks (Blocks).
 * Three rules hold everywhere:
 *
 * - The region is hostile.  Every byte of it is read once, into private memory, and judged there;
 *   an index that came out of it is checked immediately before it becomes an address.
 * - The region may vanish (truncated file, removed device).  Whatever touches it runs inside
 *   attempt(), where a SIGBUS ends the attempt and becomes OSError(EIO).  Nothing inside an attempt
 *   calls Python or owns anything that a jump could leak.
 * - Stores are events.  trap() lets a test stop or divert a peer before its N-th store event; while
 *   no trap is armed an event costs one addition.
 *
 * At its end stand functions that know no region: what every change does to packed words, slots,
 * leaves and records in private memory, each in one call because a change consists of so many.
 */
#define PY_SSIZE_T_CLEAN
#ifndef Py_LIMITED_API
#define Py_LIMITED_API 0x030b0000
#endif
#include <Python.h>
#include <structmember.h>

#include <errno.h>
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

#include "_access.h"
#include "_crc32c.h"

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22 /* Linux 5.14 */
#endif

#define UNLIKELY(condition) __builtin_expect(!!(condition), 0)
#define NOGIL_BYTES (64 * 1024) /* below this, handing over the GIL costs more than it gives */
#define CHUNK 4096              /* what write() and zero() count as one block */
#define LONG_RUN (16 * 1024)    /* bytes in a row from which on it is worth thinking how */
#define WINDOW_BITS 16          /* as much as the kernel maps at one fault */
#define WINDOW (UINT64_C(1) << WINDOW_BITS)
#define WARM_WINDOWS 64 /* stored to so recently, a window is still in a cache */
#define POINTER_SIZE 16
#define NODE_HEADER 32
#define NODE_USED_AT 8
#define NODE_TAG_AT 24
#define SLOTS_MOST (UINT64_C(1) << 20) /* more than any node or inode has */
#define LEAF_FIXED 17 /* bytes of an entry besides its name */
#define MAX_BLOCKS (UINT64_C(1) << 32) /* block numbers are 32 bits wide */
#define COUNTER_MASK ((UINT64_C(1) << 36) - 1)
#define INCARNATION_MASK ((UINT64_C(1) << 20) - 1)

typedef struct {
    PyTypeObject *memory_type;
    PyTypeObject *blocks_type;
} module_state;

typedef struct {
    PyObject_HEAD
    unsigned char *base;
    uint64_t length;
    int access;
    char writable;
    char closed;
    char armed;      /* a trap waits */
    char trap_loads; /* ... for loads as well */
    uint32_t users;  /* operations in progress; the last one unmaps after close() */
    uint64_t stores;
    uint64_t countdown; /* events still to pass before the trap springs */
    uint64_t moved;     /* bytes stored by long runs so far */
    uint32_t *warmth;   /* for each window: when it was last stored to, see long_run() */
    PyObject *callback;
    PyObject *dead; /* class of the exception that a trap's callback raised */
} Memory;

typedef struct {
    PyObject_HEAD
    Memory *memory;
    uint64_t tags_offset;
    uint64_t data_offset;
    uint64_t block_size;
    uint64_t block_count;
    uint64_t guard_offset; /* of the word that must be `guard` while blocks are filled */
    uint64_t guard;        /* 0: there is none */
} Blocks;

/* --- arguments -------------------------------------------------------------------------------- */

typedef struct {
    const char *function;
    const char *names[6];
    Py_ssize_t required;
    Py_ssize_t total;
} signature;

static int take_keyword(const signature *sig, PyObject *name, PyObject *value, PyObject **out)
{
    for (Py_ssize_t i = 0; i < sig->total; i++) {
        if (PyUnicode_CompareWithASCIIString(name, sig->names[i]) != 0)
            continue;
        if (out[i] != NULL) {
            PyErr_Format(PyExc_TypeError, "%s() got two values for '%U'", sig->function, name);
            return -1;
        }
        out[i] = value;
        return 0;
    }
    PyErr_Format(PyExc_TypeError, "%s() has no argument '%U'", sig->function, name);
    return -1;
}

/* Sorts a vectorcall's arguments into `out`; the missing optional ones stay NULL. */
static int take_args(const signature *sig, PyObject *const *args, Py_ssize_t count,
                     PyObject *keywords, PyObject **out)
{
    Py_ssize_t named = keywords == NULL ? 0 : PyTuple_Size(keywords);

    if (count > sig->total) {
        PyErr_Format(PyExc_TypeError, "%s() takes %zd arguments, got %zd", sig->function,
                     sig->total, count);
        return -1;
    }
    for (Py_ssize_t i = 0; i < sig->total; i++)
        out[i] = i < count ? args[i] : NULL;
    for (Py_ssize_t i = 0; i < named; i++)
        if (take_keyword(sig, PyTuple_GetItem(keywords, i), args[count + i], out) < 0)
            return -1;
    for (Py_ssize_t i = 0; i < sig->required; i++)
        if (out[i] == NULL) {
            PyErr_Format(PyExc_TypeError, "%s() misses its argument '%s'", sig->function,
                         sig->names[i]);
            return -1;
        }
    return 0;
}

static int take_u64(PyObject *object, const char *name, uint64_t *out)
{
    uint64_t value = PyLong_AsUnsignedLongLong(object);

    if (UNLIKELY(value == UINT64_MAX) && PyErr_Occurred()) {
        if (PyErr_ExceptionMatches(PyExc_OverflowError)) {
            PyErr_Clear();
            PyErr_Format(PyExc_ValueError, "%s out of range: %R", name, object);
        }
        return -1;
    }
    *out = value;
    return 0;
}

static PyObject *from_u64(uint64_t value)
{
    return PyLong_FromUnsignedLongLong(value);
}

/* --- surviving SIGBUS ------------------------------------------------------------------------- */

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

/* A SIGBUS that is not ours goes to whoever had the signal before; if it comes back once more
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

/* Called for every new mapping, because something such as faulthandler may have come later.
 * SA_NODEFER: the jump out of the handler leaves no signal blocked and need not save a mask. */
static int sigbus_install(void)
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

/* Runs body(argument); false, with the address, when it ended in a SIGBUS. */
__attribute__((noinline)) static bool attempt(void (*body)(void *), void *argument, void **fault)
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

static int raise_os(int code, const char *message)
{
    PyObject *arguments = Py_BuildValue("(is)", code, message);

    if (arguments != NULL) {
        PyErr_SetObject(PyExc_OSError, arguments);
        Py_DECREF(arguments);
    }
    return -1;
}

static int raise_fault(const Memory *memory, const void *address)
{
    char message[160];
    uint64_t at = (uint64_t)((uintptr_t)address - (uintptr_t)memory->base);

    if (at < memory->length)
        snprintf(message, sizeof message,
                 "bus error at offset 0x%llx of the region: it shrank, or cannot be accessed so",
                 (unsigned long long)at);
    else
        snprintf(message, sizeof message, "bus error outside the region");
    return raise_os(EIO, message);
}

/* Runs body(argument) on the mapping, moving about `bytes`. -1 with OSError after SIGBUS. */
static int perform(Memory *memory, void (*body)(void *), void *argument, uint64_t bytes)
{
    void *fault = NULL;
    bool done;

    if (bytes >= NOGIL_BYTES && !memory->armed) {
        PyThreadState *state = PyEval_SaveThread();
        done = attempt(body, argument, &fault);
        PyEval_RestoreThread(state);
    } else {
        done = attempt(body, argument, &fault);
    }
    return done ? 0 : raise_fault(memory, fault);
}

/* --- Memory: life and events ------------------------------------------------------------------ */

static void memory_unmap(Memory *memory)
{
    if (memory->base != NULL)
        munmap(memory->base, memory->length);
    memory->base = NULL;
    free(memory->warmth);
    memory->warmth = NULL;
}

/* Brackets every operation: close() meanwhile, by a callback or a thread, must not unmap. */
static inline int use(Memory *memory)
{
    if (UNLIKELY(memory->closed)) {
        PyErr_SetString(PyExc_ValueError, "the memory is closed");
        return -1;
    }
    memory->users++;
    return 0;
}

static inline void unuse(Memory *memory)
{
    memory->users--;
    if (UNLIKELY(memory->closed) && memory->users == 0)
        memory_unmap(memory);
}

static int raise_dead(const Memory *memory)
{
    PyObject *error = PyObject_CallFunction(memory->dead, "s", "the memory is dead");

    if (error == NULL || !PyExceptionInstance_Check(error)) {
        PyErr_Clear();
        PyErr_SetString(PyExc_RuntimeError, "the memory is dead");
    } else {
        PyErr_SetObject(memory->dead, error);
    }
    Py_XDECREF(error);
    return -1;
}

static inline int use_for_stores(Memory *memory)
{
    if (UNLIKELY(memory->closed))
        return use(memory);
    if (UNLIKELY(!memory->writable))
        return raise_os(EROFS, "the region is mapped read-only");
    if (UNLIKELY(memory->dead != NULL))
        return raise_dead(memory);
    return use(memory);
}

__attribute__((noinline)) static int trap_event(Memory *memory)
{
    PyObject *callback, *result;

    if (!memory->armed)
        return 0;
    if (memory->countdown > 0) {
        memory->countdown--;
        return 0;
    }
    callback = memory->callback;
    memory->callback = NULL;
    memory->armed = 0;
    result = PyObject_CallNoArgs(callback);
    Py_DECREF(callback);
    if (result == NULL) {
        if (memory->dead == NULL) {
            memory->dead = PyErr_Occurred();
            Py_INCREF(memory->dead);
        }
        return -1;
    }
    Py_DECREF(result);
    return memory->dead != NULL ? raise_dead(memory) : 0;
}

/* Before each store event that happens while a trap is armed. */
static inline int store_event(Memory *memory)
{
    memory->stores++;
    return UNLIKELY(memory->armed) ? trap_event(memory) : 0;
}

static inline int load_event(Memory *memory)
{
    return UNLIKELY(memory->armed && memory->trap_loads) ? trap_event(memory) : 0;
}

static int memory_map(Memory *memory, uint64_t fd, uint64_t offset)
{
    int protection = PROT_READ | (memory->writable ? PROT_WRITE : 0);
    void *base = mmap(NULL, memory->length, protection, MAP_SHARED, (int)fd, (off_t)offset);

    if (base == MAP_FAILED || sigbus_install() < 0) {
        PyErr_SetFromErrno(PyExc_OSError);
        if (base != MAP_FAILED)
            munmap(base, memory->length);
        return -1;
    }
    memory->base = base;
    if (memory->writable && memory->access == ACCESS_NORMAL) /* without it, runs are just slower */
        memory->warmth = calloc(memory->length / WINDOW + 1, sizeof *memory->warmth);
    return 0;
}

static int check_limit(const char *name, uint64_t value, uint64_t least, uint64_t most)
{
    if (value >= least && value <= most)
        return 0;
    PyErr_Format(PyExc_ValueError, "%s out of range: %llu", name, (unsigned long long)value);
    return -1;
}

static PyObject *memory_new(PyTypeObject *type, PyObject *args, PyObject *keywords)
{
    static char *names[] = {"fd", "length", "offset", "writable", "access", NULL};
    PyObject *given[4] = {NULL, NULL, NULL, NULL};
    uint64_t fd, length, offset = 0, access = ACCESS_NORMAL;
    int writable = 1;
    allocfunc allocate = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    Memory *memory;

    if (!PyArg_ParseTupleAndKeywords(args, keywords, "OO|O$pO:Memory", names, &given[0], &given[1],
                                     &given[2], &writable, &given[3]) ||
        take_u64(given[0], "fd", &fd) < 0 || take_u64(given[1], "length", &length) < 0 ||
        (given[2] != NULL && take_u64(given[2], "offset", &offset) < 0) ||
        (given[3] != NULL && take_u64(given[3], "access", &access) < 0) ||
        check_limit("fd", fd, 0, INT_MAX) < 0 || check_limit("length", length, 1, INT64_MAX) < 0 ||
        check_limit("offset", offset, 0, INT64_MAX - length) < 0 ||
        check_limit("access", access, ACCESS_NORMAL, ACCESS_WRITE_COMBINING) < 0)
        return NULL;
    memory = (Memory *)allocate(type, 0);
    if (memory == NULL)
        return NULL;
    memory->length = length;
    memory->writable = (char)writable;
    memory->access = (int)access;
    if (memory_map(memory, fd, offset) < 0) {
        Py_DECREF((PyObject *)memory);
        return NULL;
    }
    return (PyObject *)memory;
}

static int memory_traverse(PyObject *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(((Memory *)self)->callback);
    Py_VISIT(((Memory *)self)->dead);
    return 0;
}

static int memory_clear(PyObject *self)
{
    ((Memory *)self)->armed = 0;
    Py_CLEAR(((Memory *)self)->callback);
    Py_CLEAR(((Memory *)self)->dead);
    return 0;
}

static void free_object(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);

    ((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

static void memory_dealloc(PyObject *self)
{
    PyObject_GC_UnTrack(self);
    memory_clear(self);
    memory_unmap((Memory *)self);
    free_object(self);
}

static PyObject *memory_close(PyObject *self, PyObject *unused)
{
    Memory *memory = (Memory *)self;

    (void)unused;
    memory->closed = 1;
    if (memory->users == 0)
        memory_unmap(memory);
    Py_RETURN_NONE;
}

static const signature trap_signature = {"trap", {"after", "callback", "loads"}, 2, 3};

static PyObject *memory_trap(PyObject *self, PyObject *const *args, Py_ssize_t count,
                             PyObject *keywords)
{
    Memory *memory = (Memory *)self;
    PyObject *given[3], *old;
    uint64_t after;
    int loads = 0;

    if (take_args(&trap_signature, args, count, keywords, given) < 0 ||
        take_u64(given[0], "after", &after) < 0)
        return NULL;
    if (given[2] != NULL && (loads = PyObject_IsTrue(given[2])) < 0)
        return NULL;
    if (given[1] != Py_None && !PyCallable_Check(given[1])) {
        PyErr_SetString(PyExc_TypeError, "callback must be callable, or None to disarm");
        return NULL;
    }
    old = memory->callback;
    memory->armed = given[1] != Py_None;
    memory->trap_loads = (char)loads;
    memory->countdown = after;
    memory->callback = memory->armed ? Py_NewRef(given[1]) : NULL;
    Py_XDECREF(old);
    Py_RETURN_NONE;
}

/* --- Memory: words ---------------------------------------------------------------------------- */

struct word_access {
    unsigned char *address;
    uint64_t value;
    uint64_t expected;
    uint64_t previous;
    int access;
    bool unable;
};

static void load_body(void *argument)
{
    struct word_access *word = argument;
    word->value = word_load(word->access, word->address);
}

static void store_body(void *argument)
{
    struct word_access *word = argument;
    word_store(word->access, word->address, word->value);
}

static void swap_body(void *argument)
{
    struct word_access *word = argument;
    fence_around_swap(word->access);
    word->unable = !word_swap(word->address, word->expected, word->value, &word->previous);
    fence_around_swap(word->access);
}

static int raise_unable(void)
{
    return raise_os(EIO, "compare-and-swap does not work on this mapping");
}

static int take_word(Memory *memory, PyObject *object, struct word_access *word)
{
    uint64_t offset;

    if (take_u64(object, "offset", &offset) < 0)
        return -1;
    if (UNLIKELY((offset & 7) != 0 || offset >= memory->length || memory->length - offset < 8)) {
        PyErr_Format(PyExc_ValueError, "offset out of range or not a multiple of 8: %R", object);
        return -1;
    }
    word->address = memory->base + offset;
    word->access = memory->access;
    word->unable = false;
    return 0;
}

static const signature load_signature = {"load", {"offset"}, 1, 1};

static PyObject *memory_load(PyObject *self, PyObject *const *args, Py_ssize_t count,
                             PyObject *keywords)
{
    Memory *memory = (Memory *)self;
    PyObject *given[1], *result = NULL;
    struct word_access word;

    if (take_args(&load_signature, args, count, keywords, given) < 0 || use(memory) < 0)
        return NULL;
    if (take_word(memory, given[0], &word) == 0 && load_event(memory) == 0 &&
        perform(memory, load_body, &word, 8) == 0)
        result = from_u64(word.value);
    unuse(memory);
    return result;
}

static const signature store_signature = {"store", {"offset", "value"}, 2, 2};

static PyObject *memory_store(PyObject *self, PyObject *const *args, Py_ssize_t count,
                              PyObject *keywords)
{
    Memory *memory = (Memory *)self;
    PyObject *given[2], *result = NULL;
    struct word_access word;

    if (take_args(&store_signature, args, count, keywords, given) < 0 ||
        use_for_stores(memory) < 0)
        return NULL;
    if (take_word(memory, given[0], &word) == 0 && take_u64(given[1], "value", &word.value) == 0 &&
        store_event(memory) == 0 && perform(memory, store_body, &word, 8) == 0)
        result = Py_NewRef(Py_None);
    unuse(memory);
    return result;
}

static const signature column_signature = {"load_column", {"offset", "stride", "count"}, 3, 3};
static const signature large_signature = {
    "large_in_column", {"offset", "stride", "count", "least"}, 4, 4};

/* One word after the other, each a load event of its own, into a list: all, or which are `least`
 * or more. */
static int column_run(Memory *memory, struct word_access *word, uint64_t stride, uint64_t count,
                      uint64_t least, PyObject *into)
{
    for (uint64_t at = 0; at < count; at++, word->address += stride) {
        PyObject *value;
        int status;

        if (load_event(memory) < 0 || perform(memory, load_body, word, 8) < 0)
            return -1;
        if (word->value < least)
            continue;
        if ((value = from_u64(least > 0 ? at : word->value)) == NULL)
            return -1;
        status = PyList_Append(into, value);
        Py_DECREF(value);
        if (status < 0)
            return -1;
    }
    return 0;
}

static PyObject *column_call(const signature *sig, PyObject *self, PyObject *const *args,
                             Py_ssize_t nargs, PyObject *keywords)
{
    Memory *memory = (Memory *)self;
    PyObject *given[4], *result = NULL;
    uint64_t stride, count, least = 0;
    struct word_access word;

    if (take_args(sig, args, nargs, keywords, given) < 0 ||
        take_u64(given[1], "stride", &stride) < 0 || take_u64(given[2], "count", &count) < 0 ||
        (sig == &large_signature &&
         (take_u64(given[3], "least", &least) < 0 || check_limit("least", least, 1, UINT64_MAX) < 0)))
        return NULL;
    if (use(memory) < 0)
        return NULL;
    if (take_word(memory, given[0], &word) < 0) {
        /* it has said what is wrong */
    } else if ((stride & 7) != 0 || stride == 0 ||
               count > (memory->length - (uint64_t)(word.address - memory->base) - 8) / stride + 1) {
        PyErr_Format(PyExc_ValueError, "%R words every %R bytes leave the region, or its words",
                     given[2], given[1]);
    } else if ((result = PyList_New(0)) != NULL) {
        if (column_run(memory, &word, stride, count, least, result) < 0)
            Py_CLEAR(result);
    }
    unuse(memory);
    return result;
}

static PyObject *memory_load_column(PyObject *self, PyObject *const *args, Py_ssize_t nargs,
                                    PyObject *keywords)
{
    return column_call(&column_signature, self, args, nargs, keywords);
}

static PyObject *memory_large_in_column(PyObject *self, PyObject *const *args, Py_ssize_t nargs,
                                        PyObject *keywords)
{
    return column_call(&large_signature, self, args, nargs, keywords);
}

static const signature cas_signature = {"cas", {"offset", "expected", "new"}, 3, 3};

static PyObject *memory_cas(PyObject *self, PyObject *const *args, Py_ssize_t count,
                            PyObject *keywords)
{
    Memory *memory = (Memory *)self;
    PyObject *given[3], *result = NULL;
    struct word_access word;

    if (take_args(&cas_signature, args, count, keywords, given) < 0 || use_for_stores(memory) < 0)
        return NULL;
    if (take_word(memory, given[0], &word) == 0 &&
        take_u64(given[1], "expected", &word.expected) == 0 &&
        take_u64(given[2], "new", &word.value) == 0 && store_event(memory) == 0 &&
        perform(memory, swap_body, &word, 8) == 0) {
        if (word.unable)
            raise_unable();
        else
            result = from_u64(word.previous);
    }
    unuse(memory);
    return result;
}

static PyObject *memory_fence(PyObject *self, PyObject *unused)
{
    (void)self, (void)unused;
    fence_full();
    Py_RETURN_NONE;
}

/* --- bulk stores: write, zero, scatter, write_node -------------------------------------------- */

/* One block, or one chunk of a plain range: `filled` bytes from `from`, zeros up to `size`. */
struct piece {
    unsigned char *to;
    const unsigned char *from;
    uint64_t filled;
    uint64_t size;
};

struct bulk {
    Memory *memory;
    const Blocks *blocks;   /* NULL for a plain range */
    const Blocks *guarding; /* whose guard is looked at before each piece, or NULL */
    const unsigned char *pointers;
    unsigned char *to; /* plain range: the next chunk */
    uint64_t chunk;
    const unsigned char *from; /* NULL: zeros */
    uint64_t left;
    uint64_t events;
    bool bad;   /* a pointer changed under us and left the region */
    bool stale; /* the guard changed: the blocks are no longer ours to fill */
};

static inline uint32_t pointer_block(const unsigned char *pointer)
{
    uint32_t block;
    memcpy(&block, pointer, 4);
    return block;
}

static inline uint64_t pointer_tag(const unsigned char *pointer)
{
    uint64_t tag;
    memcpy(&tag, pointer + 8, 8);
    return tag;
}

static inline void pointer_make(unsigned char *pointer, uint32_t block, uint64_t tag)
{
    const uint32_t weight = 1;
    memcpy(pointer, &block, 4);
    memcpy(pointer + 4, &weight, 4);
    memcpy(pointer + 8, &tag, 8);
}

static inline unsigned char *block_address(const Blocks *blocks, uint64_t block)
{
    return blocks->memory->base + blocks->data_offset + block * blocks->block_size;
}

static inline unsigned char *tag_address(const Blocks *blocks, uint64_t block)
{
    return blocks->memory->base + blocks->tags_offset + block * 8;
}

/* Whether the blocks that are being filled are still ours, as far as that can be known. */
static bool guarded(const Blocks *blocks)
{
    return blocks->guard == 0 ||
           word_load(blocks->memory->access, blocks->memory->base + blocks->guard_offset) ==
               blocks->guard;
}

static bool bulk_next(struct bulk *bulk, struct piece *piece)
{
    uint64_t room = bulk->chunk;

    if (bulk->left == 0)
        return false;
    if (bulk->blocks != NULL) {
        uint64_t block = pointer_block(bulk->pointers);
        if (block >= bulk->blocks->block_count) {
            bulk->bad = true;
            return false;
        }
        piece->to = block_address(bulk->blocks, block);
        bulk->pointers += POINTER_SIZE;
    } else {
        piece->to = bulk->to;
        bulk->to += room;
    }
    piece->filled = bulk->left < room ? bulk->left : room;
    piece->size = bulk->blocks != NULL ? room : piece->filled;
    bulk->left -= piece->filled;
    piece->from = bulk->from;
    if (bulk->from != NULL)
        bulk->from += piece->filled;
    else
        piece->filled = 0;
    return true;
}

static void piece_store(int access, bool streaming, const struct piece *piece)
{
    if (piece->filled > 0 && streaming)
        stream_in(piece->to, piece->from, piece->filled);
    else if (piece->filled > 0)
        copy_in(access, piece->to, piece->from, piece->filled);
    if (piece->size > piece->filled)
        clear_in(access, piece->to + piece->filled, piece->size - piece->filled);
}

/* Makes one piece of those that follow each other in the region; not too long, so that the guard is
 * looked at now and then. */
static void piece_extend(struct piece *piece, struct bulk *bulk)
{
    struct bulk ahead = *bulk;
    struct piece next;

    while (piece->size < WINDOW && bulk_next(&ahead, &next) &&
           next.to == piece->to + piece->size) {
        piece->filled += next.filled;
        piece->size += next.size;
        *bulk = ahead;
    }
}

/* Prepares a run of stores; whether they are many, and had better go past the caches.
 *
 * A file's pages appear in a mapping when they are first touched, and one fault for each of them
 * takes longer than storing to it.  The kernel maps a whole window at once when it is asked to.
 * What was stored to long ago is in no cache, so that storing to it there would have to fetch it
 * first.  Nothing depends on the answers: other threads may change them at the same time. */
static bool long_run(Memory *memory, const unsigned char *to, uint64_t length)
{
    uint64_t first = (uint64_t)(to - memory->base) >> WINDOW_BITS;
    uint64_t last = (uint64_t)(to + length - 1 - memory->base) >> WINDOW_BITS;
    uint32_t now = (uint32_t)(memory->moved >> WINDOW_BITS) + 1;
    uint64_t cold = 0;

    if (memory->warmth == NULL || (length < LONG_RUN && memory->warmth[first] != 0))
        return false;
    for (uint64_t window = first; window <= last; window++) {
        uint32_t since = __atomic_exchange_n(&memory->warmth[window], now, __ATOMIC_RELAXED);
        uint64_t rest = memory->length - (window << WINDOW_BITS);
        if (since == 0)
            madvise(memory->base + (window << WINDOW_BITS), rest < WINDOW ? rest : WINDOW,
                    MADV_POPULATE_READ); /* older kernels refuse, and then it happens as it did */
        cold += since == 0 || now - since > WARM_WINDOWS;
    }
    memory->moved += length;
    return length >= LONG_RUN && 2 * cold > last - first;
}

static void bulk_body(void *argument)
{
    struct bulk *bulk = argument;
    struct piece piece;
    bool streaming, streamed = false;

    while (!bulk->stale && bulk_next(bulk, &piece)) {
        piece_extend(&piece, bulk);
        streaming = long_run(bulk->memory, piece.to, piece.size);
        if (bulk->guarding != NULL && UNLIKELY(!guarded(bulk->guarding))) {
            bulk->stale = true;
        } else {
            piece_store(bulk->memory->access, streaming, &piece);
            bulk->events += 2 * ((piece.size + bulk->chunk - 1) / bulk->chunk);
            streamed |= streaming;
        }
    }
    if (streamed)
        fence_full(); /* streaming stores are ordered by nothing else */
}

struct half {
    struct piece piece;
    int access;
    const Blocks *guarding; /* NULL in the second half: a block is looked after once */
    bool stale;
};

static void half_body(void *argument)
{
    struct half *half = argument;

    if (half->guarding != NULL && !guarded(half->guarding))
        half->stale = true;
    else
        piece_store(half->access, false, &half->piece);
}

static struct half piece_half(const struct bulk *bulk, const struct piece *piece, bool second)
{
    uint64_t middle = piece->size / 2;
    struct half half = {*piece, bulk->memory->access, second ? NULL : bulk->guarding, false};

    if (middle >= 8)
        middle &= ~UINT64_C(7);
    if (second) {
        uint64_t skipped = middle < piece->filled ? middle : piece->filled;
        half.piece.to += middle;
        half.piece.size -= middle;
        half.piece.filled -= skipped;
        if (piece->filled > 0)
            half.piece.from += skipped;
    } else {
        half.piece.size = middle;
        half.piece.filled = piece->filled < middle ? piece->filled : middle;
    }
    return half;
}

/* The same stores one event at a time, so that a callback can run between any two of them. */
static int bulk_trapped(struct bulk *bulk)
{
    struct piece piece;

    while (bulk_next(bulk, &piece))
        for (int second = 0; second < 2; second++) {
            struct half half = piece_half(bulk, &piece, second != 0);
            if (store_event(bulk->memory) < 0 ||
                perform(bulk->memory, half_body, &half, half.piece.size) < 0)
                return -1;
            if (half.stale) {
                bulk->stale = true;
                return 0;
            }
        }
    return 0;
}

static int bulk_run(struct bulk *bulk)
{
    Memory *memory = bulk->memory;
    int status;

    if (UNLIKELY(memory->armed)) {
        status = bulk_trapped(bulk);
    } else {
        status = perform(memory, bulk_body, bulk, bulk->left);
        memory->stores += bulk->events;
    }
    if (status == 0 && bulk->bad) {
        PyErr_SetString(PyExc_ValueError, "the pointers changed while they were used");
        return -1;
    }
    return status;
}

static int take_range(const Memory *memory, PyObject *offset_object, uint64_t length,
                      unsigned char **address)
{
    uint64_t offset;

    if (take_u64(offset_object, "offset", &offset) < 0)
        return -1;
    if (offset > memory->length || length > memory->length - offset) {
        PyErr_Format(PyExc_ValueError, "%llu bytes at offset %R are outside the region's %llu",
                     (unsigned long long)length, offset_object,
                     (unsigned long long)memory->length);
        return -1;
    }
    *address = memory->base + offset;
    return 0;
}

static const signature write_signature = {"write", {"offset", "buffer"}, 2, 2};

static PyObject *memory_write(PyObject *self, PyObject *const *args, Py_ssize_t count,
                              PyObject *keywords)
{
    Memory *memory = (Memory *)self;
    PyObject *given[2], *result = NULL;
    struct bulk bulk = {.memory = memory, .chunk = CHUNK};
    Py_buffer buffer;

    if (take_args(&write_signature, args, count, keywords, given) < 0 ||
        PyObject_GetBuffer(given[1], &buffer, PyBUF_SIMPLE) < 0)
        return NULL;
    bulk.from = buffer.buf;
    bulk.left = (uint64_t)buffer.len;
    if (use_for_stores(memory) == 0) {
        if (take_range(memory, given[0], bulk.left, &bulk.to) == 0 && bulk_run(&bulk) == 0)
            result = Py_NewRef(Py_None);
        unuse(memory);
    }
    PyBuffer_Release(&buffer);
    return result;
}

static const signature zero_signature = {"zero", {"offset", "length"}, 2, 2};

static PyObject *memory_zero(PyObject *self, PyObject *const *args, Py_ssize_t count,
                             PyObject *keywords)
{
    Memory *memory = (Memory *)self;
    PyObject *given[2], *result = NULL;
    struct bulk bulk = {.memory = memory, .chunk = CHUNK};

    if (take_args(&zero_signature, args, count, keywords, given) < 0 ||
        take_u64(given[1], "length", &bulk.left) < 0 || use_for_stores(memory) < 0)
        return NULL;
    if (take_range(memory, given[0], bulk.left, &bulk.to) == 0 && bulk_run(&bulk) == 0)
        result = Py_NewRef(Py_None);
    unuse(memory);
    return result;
}

/* --- Memory: reading ranges ------------------------------------------------------------------- */

struct range {
    unsigned char *from;
    unsigned char *to;
    uint64_t length;
    int access;
    bool zero;
};

static void read_body(void *argument)
{
    struct range *range = argument;
    copy_out(range->access, range->to, range->from, range->length);
    fence_acquire(range->access);
}

static const signature read_signature = {"read", {"offset", "length"}, 2, 2};

static PyObject *memory_read(PyObject *self, PyObject *const *args, Py_ssize_t count,
                             PyObject *keywords)
{
    Memory *memory = (Memory *)self;
    PyObject *given[2], *result = NULL;
    struct range range = {.access = memory->access};

    if (take_args(&read_signature, args, count, keywords, given) < 0 ||
        take_u64(given[1], "length", &range.length) < 0 || use(memory) < 0)
        return NULL;
    if (take_range(memory, given[0], range.length, &range.from) == 0 && load_event(memory) == 0 &&
        (result = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)range.length)) != NULL) {
        range.to = (unsigned char *)PyBytes_AsString(result);
        if (perform(memory, read_body, &range, range.length) < 0)
            Py_CLEAR(result);
    }
    unuse(memory);
    return result;
}

static void is_zero_body(void *argument)
{
    struct range *range = argument;
    uint64_t chunk[CHUNK / 8];
    uint64_t any = 0;

    while (range->length > 0 && any == 0) {
        size_t step = range->length < sizeof chunk ? range->length : sizeof chunk;
        if (step < sizeof chunk)
            memset(chunk, 0, sizeof chunk);
        copy_out(range->access, (unsigned char *)chunk, range->from, step);
        for (size_t i = 0; i < CHUNK / 8; i++)
            any |= chunk[i];
        range->from += step, range->length -= step;
    }
    range->zero = any == 0;
}

static const signature is_zero_signature = {"is_zero", {"offset", "length"}, 2, 2};

static PyObject *memory_is_zero(PyObject *self, PyObject *const *args, Py_ssize_t count,
                                PyObject *keywords)
{
    Memory *memory = (Memory *)self;
    PyObject *given[2], *result = NULL;
    struct range range = {.access = memory->access};

    if (take_args(&is_zero_signature, args, count, keywords, given) < 0 ||
        take_u64(given[1], "length", &range.length) < 0 || use(memory) < 0)
        return NULL;
    if (take_range(memory, given[0], range.length, &range.from) == 0 && load_event(memory) == 0 &&
        perform(memory, is_zero_body, &range, range.length) == 0)
        result = PyBool_FromLong(range.zero);
    unuse(memory);
    return result;
}

static void unaligned_body(void *argument)
{
    struct word_access *word = argument;
    word->value = unaligned_peek(word->address);
}

static const signature unaligned_signature = {"unaligned_ok", {"offset"}, 1, 1};

static PyObject *memory_unaligned_ok(PyObject *self, PyObject *const *args, Py_ssize_t count,
                                     PyObject *keywords)
{
    Memory *memory = (Memory *)self;
    PyObject *given[1], *result = NULL;
    struct word_access word = {.access = memory->access};
    void *fault = NULL;

    if (take_args(&unaligned_signature, args, count, keywords, given) < 0 || use(memory) < 0)
        return NULL;
    if (take_range(memory, given[0], 16, &word.address) == 0) {
        word.address = (unsigned char *)(((uintptr_t)word.address & ~(uintptr_t)7) + 5);
        result = PyBool_FromLong(attempt(unaligned_body, &word, &fault));
    }
    unuse(memory);
    return result;
}

/* --- Blocks: life and pointers ---------------------------------------------------------------- */

static int blocks_check_table(const Memory *memory, const char *name, uint64_t offset,
                              uint64_t width, uint64_t count)
{
    if ((offset & 7) != 0 || offset > memory->length ||
        width > (memory->length - offset) / count) {
        PyErr_Format(PyExc_ValueError, "%s misaligned or outside the region: %llu", name,
                     (unsigned long long)offset);
        return -1;
    }
    return 0;
}

static int blocks_take(Blocks *blocks, PyObject *tags, PyObject *data, PyObject *size,
                       PyObject *count)
{
    if (take_u64(tags, "tags_offset", &blocks->tags_offset) < 0 ||
        take_u64(data, "data_offset", &blocks->data_offset) < 0 ||
        take_u64(size, "block_size", &blocks->block_size) < 0 ||
        take_u64(count, "block_count", &blocks->block_count) < 0)
        return -1;
    if (blocks->block_size < NODE_HEADER || (blocks->block_size & 7) != 0) {
        PyErr_Format(PyExc_ValueError, "block_size must be a multiple of 8, from 32: %R", size);
        return -1;
    }
    if (blocks->block_count == 0 || blocks->block_count > MAX_BLOCKS) {
        PyErr_Format(PyExc_ValueError, "block_count out of range: %R", count);
        return -1;
    }
    if (blocks_check_table(blocks->memory, "tags_offset", blocks->tags_offset, 8,
                           blocks->block_count) < 0 ||
        blocks_check_table(blocks->memory, "data_offset", blocks->data_offset, blocks->block_size,
                           blocks->block_count) < 0)
        return -1;
    return 0;
}

static PyObject *blocks_new(PyTypeObject *type, PyObject *args, PyObject *keywords)
{
    static char *names[] = {"memory",     "tags_offset", "data_offset",
                            "block_size", "block_count", NULL};
    module_state *state = PyType_GetModuleState(type);
    allocfunc allocate = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    PyObject *memory, *tags, *data, *size, *count;
    Blocks *blocks;

    if (state == NULL ||
        !PyArg_ParseTupleAndKeywords(args, keywords, "O!OOOO:Blocks", names, state->memory_type,
                                     &memory, &tags, &data, &size, &count))
        return NULL;
    blocks = (Blocks *)allocate(type, 0);
    if (blocks == NULL)
        return NULL;
    blocks->memory = (Memory *)Py_NewRef(memory);
    if (blocks_take(blocks, tags, data, size, count) < 0) {
        Py_DECREF(blocks);
        return NULL;
    }
    return (PyObject *)blocks;
}

static int blocks_traverse(PyObject *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(((Blocks *)self)->memory);
    return 0;
}

/* No tp_clear: a Blocks must never be without its Memory, and Memory's own breaks any cycle. */
static void blocks_dealloc(PyObject *self)
{
    PyObject_GC_UnTrack(self);
    Py_XDECREF((PyObject *)((Blocks *)self)->memory);
    free_object(self);
}

static int check_block(const Blocks *blocks, uint64_t block)
{
    if (UNLIKELY(block >= blocks->block_count)) {
        PyErr_Format(PyExc_ValueError, "block %llu is outside the region's %llu",
                     (unsigned long long)block, (unsigned long long)blocks->block_count);
        return -1;
    }
    return 0;
}

/* Gets the packed pointers and refuses those that lead outside; nulls only where allowed. */
static int take_pointers(const Blocks *blocks, PyObject *object, bool nulls, Py_buffer *buffer)
{
    if (PyObject_GetBuffer(object, buffer, PyBUF_SIMPLE) < 0)
        return -1;
    if (buffer->len % POINTER_SIZE != 0) {
        PyErr_Format(PyExc_ValueError, "pointers must be 16 bytes each, got %zd bytes",
                     buffer->len);
        goto refuse;
    }
    for (Py_ssize_t at = 0; at < buffer->len; at += POINTER_SIZE) {
        const unsigned char *pointer = (const unsigned char *)buffer->buf + at;
        if (pointer_tag(pointer) == 0) {
            if (nulls)
                continue;
            PyErr_Format(PyExc_ValueError, "pointer %zd is null", at / POINTER_SIZE);
            goto refuse;
        }
        if (check_block(blocks, pointer_block(pointer)) < 0)
            goto refuse;
    }
    return 0;
refuse:
    PyBuffer_Release(buffer);
    return -1;
}

/* --- Blocks: claim and release ---------------------------------------------------------------- */

struct claim {
    const Blocks *blocks;
    uint64_t tag;
    const unsigned char *places; /* pointers to the blocks to visit; NULL: all, from cursor on */
    uint64_t cursor;
    uint64_t unvisited;
    uint64_t wanted;
    uint64_t swaps_allowed; /* stops before the next swap when used up */
    uint64_t swaps;
    unsigned char *pointers;
    uint64_t got;
    bool unable;
};

/* The block to visit; none (a number that is too large) for a null pointer. */
static inline uint64_t claim_place(const struct claim *claim)
{
    if (claim->places == NULL)
        return claim->cursor;
    return pointer_tag(claim->places) != 0 ? pointer_block(claim->places) : MAX_BLOCKS;
}

static inline void claim_advance(struct claim *claim)
{
    claim->unvisited--;
    if (claim->places != NULL)
        claim->places += POINTER_SIZE;
    else if (++claim->cursor == claim->blocks->block_count)
        claim->cursor = 0;
}

static void claim_body(void *argument)
{
    struct claim *claim = argument;
    const Blocks *blocks = claim->blocks;

    fence_around_swap(blocks->memory->access);
    for (; claim->got < claim->wanted && claim->unvisited > 0; claim_advance(claim)) {
        uint64_t previous, block = claim_place(claim);
        unsigned char *address;
        if (block >= blocks->block_count)
            continue;
        address = tag_address(blocks, block);
        previous = word_peek(address);
        if (previous == 0) {
            if (claim->swaps == claim->swaps_allowed)
                return;
            claim->swaps++;
            claim->unable = !word_swap(address, 0, claim->tag, &previous);
            if (claim->unable)
                return;
            if (previous == 0)
                pointer_make(claim->pointers + POINTER_SIZE * claim->got++, (uint32_t)block,
                             claim->tag);
        }
    }
    fence_around_swap(blocks->memory->access);
}

static int claim_run(struct claim *claim)
{
    Memory *memory = claim->blocks->memory;
    const bool trapped = memory->armed;

    claim->swaps_allowed = trapped ? 0 : UINT64_MAX;
    for (;;) {
        if (perform(memory, claim_body, claim, 8) < 0)
            return -1;
        if (claim->unable)
            return raise_unable();
        if (claim->got == claim->wanted || claim->unvisited == 0)
            break;
        if (store_event(memory) < 0) /* the body stands before its next swap */
            return -1;
        claim->swaps_allowed = claim->swaps + 1;
    }
    if (!trapped)
        memory->stores += claim->swaps;
    return 0;
}

static int take_tag(PyObject *object, uint64_t *tag)
{
    if (take_u64(object, "tag", tag) < 0)
        return -1;
    if (*tag == 0) {
        PyErr_SetString(PyExc_ValueError, "tag 0 means free and claims nothing");
        return -1;
    }
    return 0;
}

static const signature claim_signature = {"claim", {"count", "tag", "cursor"}, 3, 3};

static int take_claim(const Blocks *blocks, PyObject **given, struct claim *claim)
{
    if (take_u64(given[0], "count", &claim->wanted) < 0 || take_tag(given[1], &claim->tag) < 0 ||
        take_u64(given[2], "cursor", &claim->cursor) < 0 || check_block(blocks, claim->cursor) < 0)
        return -1;
    if (claim->wanted > blocks->block_count)
        claim->wanted = blocks->block_count;
    return 0;
}

static PyObject *blocks_claim(PyObject *self, PyObject *const *args, Py_ssize_t count,
                              PyObject *keywords)
{
    Blocks *blocks = (Blocks *)self;
    PyObject *given[3], *result = NULL;
    unsigned char few[64 * POINTER_SIZE];
    struct claim claim = {.blocks = blocks, .unvisited = blocks->block_count, .pointers = few};

    if (take_args(&claim_signature, args, count, keywords, given) < 0 ||
        take_claim(blocks, given, &claim) < 0)
        return NULL;
    if (claim.wanted > 64 && (claim.pointers = malloc(claim.wanted * POINTER_SIZE)) == NULL)
        return PyErr_NoMemory();
    if (use_for_stores(blocks->memory) == 0) {
        if (claim_run(&claim) == 0)
            result = Py_BuildValue("(y#K)", (const char *)claim.pointers,
                                   (Py_ssize_t)(claim.got * POINTER_SIZE),
                                   (unsigned long long)claim.cursor);
        unuse(blocks->memory);
    }
    if (claim.pointers != few)
        free(claim.pointers);
    return result;
}

static const signature reclaim_signature = {"reclaim", {"pointers", "tag"}, 2, 2};

static PyObject *blocks_reclaim(PyObject *self, PyObject *const *args, Py_ssize_t count,
                                PyObject *keywords)
{
    Blocks *blocks = (Blocks *)self;
    PyObject *given[2], *result = NULL;
    struct claim claim = {.blocks = blocks};
    Py_buffer places;

    if (take_args(&reclaim_signature, args, count, keywords, given) < 0 ||
        take_tag(given[1], &claim.tag) < 0 || take_pointers(blocks, given[0], true, &places) < 0)
        return NULL;
    claim.places = places.buf;
    claim.wanted = claim.unvisited = (uint64_t)places.len / POINTER_SIZE;
    claim.pointers = malloc((size_t)places.len + 1);
    if (claim.pointers == NULL) {
        PyErr_NoMemory();
    } else if (use_for_stores(blocks->memory) == 0) {
        if (claim_run(&claim) == 0)
            result = PyBytes_FromStringAndSize((const char *)claim.pointers,
                                               (Py_ssize_t)(claim.got * POINTER_SIZE));
        unuse(blocks->memory);
    }
    free(claim.pointers);
    PyBuffer_Release(&places);
    return result;
}

struct release {
    const Blocks *blocks;
    const unsigned char *pointers;
    uint64_t count;
    uint64_t released;
    uint64_t swaps;
    bool unable;
};

static void release_body(void *argument)
{
    struct release *release = argument;
    const Blocks *blocks = release->blocks;

    fence_around_swap(blocks->memory->access);
    for (; release->count > 0 && !release->unable; release->count--) {
        uint64_t previous, tag = pointer_tag(release->pointers);
        uint64_t block = pointer_block(release->pointers);
        release->pointers += POINTER_SIZE;
        if (tag == 0 || block >= blocks->block_count)
            continue;
        release->swaps++;
        release->unable = !word_swap(tag_address(blocks, block), tag, 0, &previous);
        if (!release->unable && previous == tag)
            release->released++;
    }
    fence_around_swap(blocks->memory->access);
}

static int release_trapped(Memory *memory, struct release *all)
{
    struct release one = *all;

    for (uint64_t at = 0; at < all->count && !one.unable; at++) {
        one.pointers = all->pointers + at * POINTER_SIZE;
        one.count = 1;
        if (pointer_tag(one.pointers) != 0 && store_event(memory) < 0)
            return -1;
        if (perform(memory, release_body, &one, 8) < 0)
            return -1;
    }
    all->released = one.released;
    all->unable = one.unable;
    return 0;
}

static int release_run(Memory *memory, struct release *release)
{
    if (memory->armed) {
        if (release_trapped(memory, release) < 0)
            return -1;
    } else {
        if (perform(memory, release_body, release, 8) < 0)
            return -1;
        memory->stores += release->swaps;
    }
    return release->unable ? raise_unable() : 0;
}

static const signature release_signature = {"release", {"pointers"}, 1, 1};

static PyObject *blocks_release(PyObject *self, PyObject *const *args, Py_ssize_t count,
                                PyObject *keywords)
{
    Blocks *blocks = (Blocks *)self;
    PyObject *given[1], *result = NULL;
    struct release release = {.blocks = blocks};
    Py_buffer pointers;

    if (take_args(&release_signature, args, count, keywords, given) < 0 ||
        take_pointers(blocks, given[0], true, &pointers) < 0)
        return NULL;
    release.pointers = pointers.buf;
    release.count = (uint64_t)pointers.len / POINTER_SIZE;
    if (use_for_stores(blocks->memory) == 0) {
        if (release_run(blocks->memory, &release) == 0)
            result = from_u64(release.released);
        unuse(blocks->memory);
    }
    PyBuffer_Release(&pointers);
    return result;
}

/* --- Blocks: looking at tags ------------------------------------------------------------------ */

struct tags {
    const Blocks *blocks;
    const unsigned char *pointers;
    uint64_t first;
    uint64_t last;
    bool same;
};

/* Are the tags still what the pointers [first, last) say?  Fences first: copies come before it. */
static void tags_body(void *argument)
{
    struct tags *tags = argument;
    const Blocks *blocks = tags->blocks;

    fence_acquire(blocks->memory->access);
    tags->same = true;
    for (uint64_t at = tags->first; at < tags->last && tags->same; at++) {
        const unsigned char *pointer = tags->pointers + at * POINTER_SIZE;
        uint64_t tag = pointer_tag(pointer);
        uint64_t block = pointer_block(pointer);
        if (tag != 0)
            tags->same =
                block < blocks->block_count && word_peek(tag_address(blocks, block)) == tag;
    }
    fence_acquire(blocks->memory->access);
}

static const signature check_signature = {"check", {"pointers"}, 1, 1};

static PyObject *blocks_check(PyObject *self, PyObject *const *args, Py_ssize_t count,
                              PyObject *keywords)
{
    Blocks *blocks = (Blocks *)self;
    PyObject *given[1], *result = NULL;
    struct tags tags = {.blocks = blocks};
    Py_buffer pointers;

    if (take_args(&check_signature, args, count, keywords, given) < 0 ||
        take_pointers(blocks, given[0], true, &pointers) < 0)
        return NULL;
    tags.pointers = pointers.buf;
    tags.last = (uint64_t)pointers.len / POINTER_SIZE;
    if (use(blocks->memory) == 0) {
        if (load_event(blocks->memory) == 0 && perform(blocks->memory, tags_body, &tags, 8) == 0)
            result = PyBool_FromLong(tags.same);
        unuse(blocks->memory);
    }
    PyBuffer_Release(&pointers);
    return result;
}

static const signature guard_signature = {"guard", {"offset", "word"}, 2, 2};

static PyObject *blocks_guard(PyObject *self, PyObject *const *args, Py_ssize_t count,
                              PyObject *keywords)
{
    Blocks *blocks = (Blocks *)self;
    PyObject *given[2];
    uint64_t offset, word;

    if (take_args(&guard_signature, args, count, keywords, given) < 0 ||
        take_u64(given[0], "offset", &offset) < 0 || take_u64(given[1], "word", &word) < 0)
        return NULL;
    if (offset % 8 != 0 || offset > blocks->memory->length - 8)
        return PyErr_Format(PyExc_ValueError, "there is no word at offset %R", given[0]);
    blocks->guard_offset = offset;
    blocks->guard = word;
    Py_RETURN_NONE;
}

static const signature tag_signature = {"tag", {"block"}, 1, 1};

static PyObject *blocks_tag(PyObject *self, PyObject *const *args, Py_ssize_t count,
                            PyObject *keywords)
{
    Blocks *blocks = (Blocks *)self;
    PyObject *given[1], *result = NULL;
    struct word_access word = {.access = blocks->memory->access};
    uint64_t block;

    if (take_args(&tag_signature, args, count, keywords, given) < 0 ||
        take_u64(given[0], "block", &block) < 0 || check_block(blocks, block) < 0 ||
        use(blocks->memory) < 0)
        return NULL;
    word.address = tag_address(blocks, block);
    if (load_event(blocks->memory) == 0 && perform(blocks->memory, load_body, &word, 8) == 0)
        result = from_u64(word.value);
    unuse(blocks->memory);
    return result;
}

struct scan {
    const Blocks *blocks;
    uint64_t start;
    uint64_t stop;
    const unsigned char *marks; /* sweep only, as are the next two */
    const unsigned char *limits;
    unsigned char *pointers;
    uint64_t found;
};

static void free_count_body(void *argument)
{
    struct scan *scan = argument;
    const unsigned char *address = tag_address(scan->blocks, scan->start);

    for (uint64_t block = scan->start; block < scan->stop; block++, address += 8)
        scan->found += word_peek(address) == 0;
}

static const signature free_count_signature = {"free_count", {"start", "stop"}, 0, 2};

static PyObject *blocks_free_count(PyObject *self, PyObject *const *args, Py_ssize_t count,
                                   PyObject *keywords)
{
    Blocks *blocks = (Blocks *)self;
    struct scan scan = {.blocks = blocks, .stop = blocks->block_count};
    PyObject *given[2], *result = NULL;

    if (take_args(&free_count_signature, args, count, keywords, given) < 0 ||
        (given[0] != NULL && take_u64(given[0], "start", &scan.start) < 0) ||
        (given[1] != NULL && take_u64(given[1], "stop", &scan.stop) < 0))
        return NULL;
    if (scan.start > scan.stop || scan.stop > blocks->block_count)
        return PyErr_Format(PyExc_ValueError, "blocks from %llu to %llu: the region has %llu",
                            (unsigned long long)scan.start, (unsigned long long)scan.stop,
                            (unsigned long long)blocks->block_count);
    if (use(blocks->memory) < 0)
        return NULL;
    if (load_event(blocks->memory) == 0 &&
        perform(blocks->memory, free_count_body, &scan, 8 * (scan.stop - scan.start)) == 0)
        result = from_u64(scan.found);
    unuse(blocks->memory);
    return result;
}

static inline uint64_t u64_at(const unsigned char *table, uint64_t index)
{
    uint64_t value;
    memcpy(&value, table + 8 * index, 8);
    return value;
}

/* A claim is settled when nobody can still publish it: its slot does not exist, or has moved on to
 * a later incarnation, or the claim's number lies below the one that the limit gives.  Claims of an
 * incarnation later than the limit's are not: the slot was taken after the limits were read. */
static bool claim_settled(const unsigned char *limits, uint64_t tag)
{
    uint64_t limit = u64_at(limits, tag >> 56);

    uint64_t age = ((limit >> 36) - (tag >> 36)) & INCARNATION_MASK;

    if (limit == 0)
        return true;
    if (age != 0)
        return age <= INCARNATION_MASK / 2;
    return (tag & COUNTER_MASK) < (limit & COUNTER_MASK);
}

static void sweep_body(void *argument)
{
    struct scan *scan = argument;

    for (uint64_t block = scan->start; block < scan->stop; block++) {
        uint64_t tag = word_peek(tag_address(scan->blocks, block));
        if (tag != 0 && u64_at(scan->marks, block) != tag && claim_settled(scan->limits, tag))
            pointer_make(scan->pointers + POINTER_SIZE * scan->found++, (uint32_t)block, tag);
    }
}

static int take_table(PyObject *object, const char *name, int flags, uint64_t words,
                      Py_buffer *buffer)
{
    if (PyObject_GetBuffer(object, buffer, flags) < 0)
        return -1;
    if ((uint64_t)buffer->len != 8 * words) {
        PyErr_Format(PyExc_ValueError, "%s must be %llu words of 8 bytes, got %zd bytes", name,
                     (unsigned long long)words, buffer->len);
        PyBuffer_Release(buffer);
        return -1;
    }
    return 0;
}

static const signature sweep_signature = {"sweep", {"marks", "limits", "start", "stop"}, 4, 4};

static PyObject *sweep_run(const Blocks *blocks, struct scan *scan)
{
    uint64_t size = (scan->stop - scan->start) * POINTER_SIZE;
    PyObject *result = NULL;

    scan->pointers = malloc(size + 1); /* only what is used of it costs memory */
    if (scan->pointers == NULL)
        return PyErr_NoMemory();
    if (use(blocks->memory) == 0) {
        if (load_event(blocks->memory) == 0 &&
            perform(blocks->memory, sweep_body, scan, 8 * (scan->stop - scan->start)) == 0)
            result = PyBytes_FromStringAndSize((const char *)scan->pointers,
                                               (Py_ssize_t)(scan->found * POINTER_SIZE));
        unuse(blocks->memory);
    }
    free(scan->pointers);
    return result;
}

static PyObject *blocks_sweep(PyObject *self, PyObject *const *args, Py_ssize_t count,
                              PyObject *keywords)
{
    Blocks *blocks = (Blocks *)self;
    PyObject *given[4], *result;
    struct scan scan = {.blocks = blocks};
    Py_buffer marks, limits;

    if (take_args(&sweep_signature, args, count, keywords, given) < 0 ||
        take_u64(given[2], "start", &scan.start) < 0 || take_u64(given[3], "stop", &scan.stop) < 0)
        return NULL;
    if (scan.start > scan.stop || scan.stop > blocks->block_count)
        return PyErr_Format(PyExc_ValueError, "sweep from %R to %R is outside the region's %llu",
                            given[2], given[3], (unsigned long long)blocks->block_count);
    if (take_table(given[0], "marks", PyBUF_SIMPLE, blocks->block_count, &marks) < 0)
        return NULL;
    if (take_table(given[1], "limits", PyBUF_SIMPLE, 256, &limits) < 0) {
        PyBuffer_Release(&marks);
        return NULL;
    }
    scan.marks = marks.buf;
    scan.limits = limits.buf;
    result = sweep_run(blocks, &scan);
    PyBuffer_Release(&limits);
    PyBuffer_Release(&marks);
    return result;
}

static const signature mark_signature = {"mark", {"pointers", "marks"}, 2, 2};

static PyObject *blocks_mark(PyObject *self, PyObject *const *args, Py_ssize_t count,
                             PyObject *keywords)
{
    Blocks *blocks = (Blocks *)self;
    PyObject *given[2];
    Py_buffer pointers, marks;

    if (take_args(&mark_signature, args, count, keywords, given) < 0 ||
        take_pointers(blocks, given[0], true, &pointers) < 0)
        return NULL;
    if (take_table(given[1], "marks", PyBUF_WRITABLE, blocks->block_count, &marks) < 0) {
        PyBuffer_Release(&pointers);
        return NULL;
    }
    for (Py_ssize_t at = 0; at < pointers.len; at += POINTER_SIZE) {
        const unsigned char *pointer = (const unsigned char *)pointers.buf + at;
        uint64_t tag = pointer_tag(pointer);
        uint64_t block = pointer_block(pointer);
        if (tag != 0 && block < blocks->block_count)
            memcpy((unsigned char *)marks.buf + 8 * block, &tag, 8);
    }
    PyBuffer_Release(&marks);
    PyBuffer_Release(&pointers);
    Py_RETURN_NONE;
}

/* --- Blocks: gather and scatter --------------------------------------------------------------- */

struct gather {
    const Blocks *blocks;
    const unsigned char *pointers;
    uint64_t position; /* in the virtual concatenation of the blocks */
    uint64_t stop;
    unsigned char *to;
};

#define HOLE UINT64_MAX

/* The block that a pointer leads to; also a hole is one that changed under us and leads outside. */
static inline uint64_t gather_block(const Blocks *blocks, const unsigned char *pointer)
{
    uint64_t block = pointer_block(pointer);

    return pointer_tag(pointer) == 0 || block >= blocks->block_count ? HOLE : block;
}

/* How many bytes from `position` on lie in a row, and where: NULL for a hole. */
static uint64_t gather_row(const struct gather *gather, unsigned char **from)
{
    const Blocks *blocks = gather->blocks;
    uint64_t left = gather->stop - gather->position;
    uint64_t within = gather->position % blocks->block_size;
    uint64_t length = blocks->block_size - within;
    const unsigned char *pointer =
        gather->pointers + gather->position / blocks->block_size * POINTER_SIZE;
    uint64_t block = gather_block(blocks, pointer), next = block;

    while (block != HOLE && length < left &&
           gather_block(blocks, pointer += POINTER_SIZE) == ++next)
        length += blocks->block_size;
    *from = block == HOLE ? NULL : block_address(blocks, block) + within;
    return length < left ? length : left;
}

static void gather_body(void *argument)
{
    struct gather *gather = argument;

    while (gather->position < gather->stop) {
        unsigned char *from;
        uint64_t length = gather_row(gather, &from);
        if (from == NULL)
            memset(gather->to, 0, length);
        else
            copy_out(gather->blocks->memory->access, gather->to, from, length);
        gather->to += length;
        gather->position += length;
    }
}

/* The same, with an event before each block and one between the copying and the tag check. */
static int gather_trapped(struct gather *gather)
{
    Memory *memory = gather->blocks->memory;
    const uint64_t end = gather->stop;
    const uint64_t size = gather->blocks->block_size;

    while (gather->position < end) {
        gather->stop = (gather->position / size + 1) * size;
        if (gather->stop > end)
            gather->stop = end;
        if (load_event(memory) < 0 || perform(memory, gather_body, gather, 8) < 0)
            return -1;
    }
    return load_event(memory);
}

/* 1 when every touched block was good, 0 when one is stale, -1 with an exception. */
static int gather_run(struct gather *gather, uint64_t length)
{
    const Blocks *blocks = gather->blocks;
    Memory *memory = blocks->memory;
    struct tags tags = {.blocks = blocks, .pointers = gather->pointers};
    int status;

    if (length == 0)
        return 1;
    tags.first = gather->position / blocks->block_size;
    tags.last = (gather->stop - 1) / blocks->block_size + 1;
    if (UNLIKELY(memory->armed && memory->trap_loads))
        status = gather_trapped(gather);
    else
        status = perform(memory, gather_body, gather, length);
    if (status < 0 || perform(memory, tags_body, &tags, 8) < 0)
        return -1;
    return tags.same;
}

static int take_span(PyObject *const *given, uint64_t available, uint64_t room,
                     struct gather *gather, uint64_t *length)
{
    uint64_t skip, at = 0;

    if (take_u64(given[1], "skip", &skip) < 0 || take_u64(given[2], "length", length) < 0 ||
        (given[4] != NULL && take_u64(given[4], "at", &at) < 0))
        return -1;
    if (skip > available || *length > available - skip) {
        PyErr_Format(PyExc_ValueError, "%R bytes from %R on are more than the pointers' %llu",
                     given[2], given[1], (unsigned long long)available);
        return -1;
    }
    if (at > room || *length > room - at) {
        PyErr_Format(PyExc_ValueError, "%R bytes at %llu do not fit the buffer's %llu", given[2],
                     (unsigned long long)at, (unsigned long long)room);
        return -1;
    }
    gather->position = skip;
    gather->stop = skip + *length;
    gather->to += at;
    return 0;
}

static const signature gather_signature = {
    "gather", {"pointers", "skip", "length", "into", "at"}, 4, 5};

static PyObject *blocks_gather(PyObject *self, PyObject *const *args, Py_ssize_t count,
                               PyObject *keywords)
{
    Blocks *blocks = (Blocks *)self;
    PyObject *given[5];
    struct gather gather = {.blocks = blocks};
    Py_buffer pointers, into;
    uint64_t available, length;
    int good = -1;

    if (take_args(&gather_signature, args, count, keywords, given) < 0 ||
        take_pointers(blocks, given[0], true, &pointers) < 0)
        return NULL;
    if (PyObject_GetBuffer(given[3], &into, PyBUF_WRITABLE) < 0) {
        PyBuffer_Release(&pointers);
        return NULL;
    }
    gather.pointers = pointers.buf;
    gather.to = into.buf;
    available = (uint64_t)pointers.len / POINTER_SIZE * blocks->block_size;
    if (use(blocks->memory) == 0) {
        if (take_span(given, available, (uint64_t)into.len, &gather, &length) == 0)
            good = gather_run(&gather, length);
        unuse(blocks->memory);
    }
    PyBuffer_Release(&into);
    PyBuffer_Release(&pointers);
    return good < 0 ? NULL : PyBool_FromLong(good);
}

static const signature scatter_signature = {"scatter", {"pointers", "buffer"}, 2, 2};

static PyObject *blocks_scatter(PyObject *self, PyObject *const *args, Py_ssize_t count,
                                PyObject *keywords)
{
    Blocks *blocks = (Blocks *)self;
    PyObject *given[2], *result = NULL;
    struct bulk bulk = {.memory = blocks->memory,
                        .blocks = blocks,
                        .guarding = blocks,
                        .chunk = blocks->block_size};
    Py_buffer pointers, buffer;

    if (take_args(&scatter_signature, args, count, keywords, given) < 0 ||
        take_pointers(blocks, given[0], false, &pointers) < 0)
        return NULL;
    if (PyObject_GetBuffer(given[1], &buffer, PyBUF_SIMPLE) < 0) {
        PyBuffer_Release(&pointers);
        return NULL;
    }
    bulk.pointers = pointers.buf;
    bulk.from = buffer.buf;
    bulk.left = (uint64_t)buffer.len;
    if (bulk.left > (uint64_t)pointers.len / POINTER_SIZE * blocks->block_size) {
        PyErr_Format(PyExc_ValueError, "%zd bytes do not fit %zd blocks of %llu", buffer.len,
                     pointers.len / POINTER_SIZE, (unsigned long long)blocks->block_size);
    } else if (use_for_stores(blocks->memory) == 0) {
        if (bulk_run(&bulk) == 0)
            result = PyBool_FromLong(!bulk.stale);
        unuse(blocks->memory);
    }
    PyBuffer_Release(&buffer);
    PyBuffer_Release(&pointers);
    return result;
}

/* --- Blocks: out of a file and into a file ----------------------------------------------------- */

/* The kernel copies between a file's pages and the blocks by itself, which saves one copy of two.
 * Not everywhere: device memory may not bear how it copies, some filesystems cannot reach a device's
 * memory (EFAULT), and a trap wants to see every store.  There a buffer stands between. */
struct transfer {
    struct gather span; /* what of the blocks; `to` is not used */
    int file;
    uint64_t at; /* in the file, of what `span` begins with */
    bool filling;
    bool stale; /* the guard changed */
};

enum { ROWS = 64, FILLED = 4 * WINDOW };

static bool kernel_may_copy(const Memory *memory)
{
    return memory->access != ACCESS_DEVICE && !memory->armed;
}

/* Moves as much as one call does; returns how much, or minus an errno.  Not much at once into the
 * blocks, so that the guard is looked at now and then. */
static int64_t transfer_step(struct transfer *transfer)
{
    static const unsigned char zeros[64 * 1024];
    struct gather span = transfer->span;
    struct iovec rows[ROWS];
    PyThreadState *state;
    int64_t moved;
    int count = 0;

    if (transfer->filling && span.stop - span.position > FILLED)
        span.stop = span.position + FILLED;
    for (; count < ROWS && span.position < span.stop; count++) {
        unsigned char *from;
        uint64_t length = gather_row(&span, &from);
        if (from == NULL && length > sizeof zeros)
            length = sizeof zeros;
        if (transfer->filling && from != NULL)
            long_run(span.blocks->memory, from, length);
        rows[count].iov_base = from != NULL ? from : (void *)(uintptr_t)zeros;
        rows[count].iov_len = length;
        span.position += length;
    }
    state = PyEval_SaveThread();
    moved = transfer->filling ? preadv(transfer->file, rows, count, (off_t)transfer->at)
                              : pwritev(transfer->file, rows, count, (off_t)transfer->at);
    moved = moved < 0 ? -errno : moved;
    PyEval_RestoreThread(state);
    if (moved > 0)
        transfer->span.position += (uint64_t)moved, transfer->at += (uint64_t)moved;
    return moved;
}

static void transfer_guard_body(void *argument)
{
    struct transfer *transfer = argument;
    transfer->stale = transfer->filling && !guarded(transfer->span.blocks);
}

/* 0 when it is done, or found out to be in vain; -1 with OSError, or without one where the kernel
 * cannot do it. */
static int transfer_run(struct transfer *transfer)
{
    while (transfer->span.position < transfer->span.stop) {
        int64_t moved;
        if (perform(transfer->span.blocks->memory, transfer_guard_body, transfer, 8) < 0)
            return -1;
        moved = transfer->stale ? 0 : transfer_step(transfer);
        if (moved == 0)
            return 0;
        if (moved == -EINTR ? PyErr_CheckSignals() < 0 : moved == -EFAULT)
            return -1;
        if (moved < 0 && moved != -EINTR)
            return raise_os((int)-moved, strerror((int)-moved));
    }
    return 0;
}

/* The same between a file and private memory. */
static int buffer_run(const struct transfer *transfer, unsigned char *buffer, uint64_t length,
                      uint64_t *done)
{
    for (*done = 0; *done < length;) {
        PyThreadState *state = PyEval_SaveThread();
        off_t at = (off_t)(transfer->at + *done);
        ssize_t moved = transfer->filling
                            ? pread(transfer->file, buffer + *done, length - *done, at)
                            : pwrite(transfer->file, buffer + *done, length - *done, at);
        int code = errno;
        PyEval_RestoreThread(state);
        if (moved == 0)
            break;
        if (moved > 0)
            *done += (uint64_t)moved;
        else if (code != EINTR)
            return raise_os(code, strerror(code));
        else if (PyErr_CheckSignals() < 0)
            return -1;
    }
    return 0;
}

static int take_file(PyObject *file, PyObject *at, struct transfer *transfer)
{
    uint64_t descriptor;

    if (take_u64(file, "file", &descriptor) < 0 || check_limit("file", descriptor, 0, INT_MAX) < 0 ||
        take_u64(at, "at", &transfer->at) < 0 ||
        check_limit("at", transfer->at, 0, INT64_MAX / 2) < 0)
        return -1;
    transfer->file = (int)descriptor;
    return 0;
}

/* Zeros from `used` bytes on to the end of the last block that is used. */
static int fill_rest(const struct transfer *transfer, uint64_t used)
{
    const Blocks *blocks = transfer->span.blocks;
    struct gather rest = transfer->span;
    struct half half = {.access = blocks->memory->access};

    rest.position = used;
    rest.stop = (used + blocks->block_size - 1) / blocks->block_size * blocks->block_size;
    if (rest.position == rest.stop)
        return 0;
    half.piece.size = gather_row(&rest, &half.piece.to);
    if (half.piece.to == NULL) {
        PyErr_SetString(PyExc_ValueError, "the pointers changed while they were used");
        return -1;
    }
    return perform(blocks->memory, half_body, &half, half.piece.size);
}

static int fill_run(struct transfer *transfer, uint64_t length, uint64_t *done)
{
    const Blocks *blocks = transfer->span.blocks;
    struct transfer straight = *transfer;
    struct bulk bulk = {.memory = blocks->memory,
                        .blocks = blocks,
                        .guarding = blocks,
                        .chunk = blocks->block_size};
    unsigned char *buffer;
    int status;

    if (kernel_may_copy(blocks->memory)) {
        status = transfer_run(&straight);
        *done = straight.span.position;
        transfer->stale = straight.stale;
        if (status == 0 || PyErr_Occurred()) {
            blocks->memory->stores += 2 * ((*done + blocks->block_size - 1) / blocks->block_size);
            return status < 0 || straight.stale ? status : fill_rest(transfer, *done);
        }
    }
    if ((buffer = malloc(length + 1)) == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    status = buffer_run(transfer, buffer, length, done);
    bulk.pointers = transfer->span.pointers;
    bulk.from = buffer;
    bulk.left = *done;
    if (status == 0)
        status = bulk_run(&bulk);
    transfer->stale = bulk.stale;
    free(buffer);
    return status;
}

static const signature fill_signature = {"fill", {"pointers", "file", "at", "length"}, 4, 4};

static PyObject *blocks_fill(PyObject *self, PyObject *const *args, Py_ssize_t count,
                             PyObject *keywords)
{
    Blocks *blocks = (Blocks *)self;
    PyObject *given[4], *result = NULL;
    struct transfer transfer = {.span = {.blocks = blocks}, .filling = true};
    uint64_t length, done;
    Py_buffer pointers;

    if (take_args(&fill_signature, args, count, keywords, given) < 0 ||
        take_file(given[1], given[2], &transfer) < 0 || take_u64(given[3], "length", &length) < 0 ||
        take_pointers(blocks, given[0], false, &pointers) < 0)
        return NULL;
    transfer.span.pointers = pointers.buf;
    transfer.span.stop = length;
    if (length > (uint64_t)pointers.len / POINTER_SIZE * blocks->block_size) {
        PyErr_Format(PyExc_ValueError, "%R bytes do not fit %zd blocks of %llu", given[3],
                     pointers.len / POINTER_SIZE, (unsigned long long)blocks->block_size);
    } else if (use_for_stores(blocks->memory) == 0) {
        if (fill_run(&transfer, length, &done) == 0)
            result = PyLong_FromLongLong(transfer.stale ? -1 : (long long)done);
        unuse(blocks->memory);
    }
    PyBuffer_Release(&pointers);
    return result;
}

/* 1 when every block was good, 0 when one is stale, -1 with an exception. */
static int drain_run(struct transfer *transfer, uint64_t length)
{
    const Blocks *blocks = transfer->span.blocks;
    struct transfer straight = *transfer;
    struct tags tags = {.blocks = blocks, .pointers = transfer->span.pointers};
    unsigned char *buffer;
    uint64_t done;
    int status;

    if (kernel_may_copy(blocks->memory) && length > 0) {
        status = transfer_run(&straight);
        if (status < 0 && PyErr_Occurred())
            return -1;
        tags.first = transfer->span.position / blocks->block_size;
        tags.last = (transfer->span.stop - 1) / blocks->block_size + 1;
        if (status >= 0)
            return perform(blocks->memory, tags_body, &tags, 8) < 0 ? -1 : tags.same;
    }
    if ((buffer = malloc(length + 1)) == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    transfer->span.to = buffer;
    status = gather_run(&transfer->span, length);
    if (status == 1 && buffer_run(transfer, buffer, length, &done) < 0)
        status = -1;
    free(buffer);
    return status;
}

static const signature drain_signature = {
    "drain", {"pointers", "skip", "length", "file", "at"}, 5, 5};

static PyObject *blocks_drain(PyObject *self, PyObject *const *args, Py_ssize_t count,
                              PyObject *keywords)
{
    Blocks *blocks = (Blocks *)self;
    PyObject *given[5];
    struct transfer transfer = {.span = {.blocks = blocks}};
    uint64_t length, available;
    Py_buffer pointers;
    int good = -1;

    if (take_args(&drain_signature, args, count, keywords, given) < 0 ||
        take_file(given[3], given[4], &transfer) < 0 ||
        take_pointers(blocks, given[0], true, &pointers) < 0)
        return NULL;
    given[4] = NULL;
    available = (uint64_t)pointers.len / POINTER_SIZE * blocks->block_size;
    transfer.span.pointers = pointers.buf;
    if (use(blocks->memory) == 0) {
        if (take_span(given, available, UINT64_MAX, &transfer.span, &length) == 0)
            good = drain_run(&transfer, length);
        unuse(blocks->memory);
    }
    PyBuffer_Release(&pointers);
    return good < 0 ? NULL : PyBool_FromLong(good);
}

/* --- Blocks: metadata nodes ------------------------------------------------------------------- */

static inline uint32_t u32_at(const unsigned char *bytes, size_t at)
{
    uint32_t value;
    memcpy(&value, bytes + at, 4);
    return value;
}

struct node_read {
    const Blocks *blocks;
    uint64_t block;
    uint64_t tag;
    unsigned char *to;
    uint64_t from;
    uint64_t stop;
    bool same;
};

static void node_read_body(void *argument)
{
    struct node_read *read = argument;
    const Memory *memory = read->blocks->memory;
    const unsigned char *address = block_address(read->blocks, read->block);

    copy_out(memory->access, read->to + read->from, address + read->from, read->stop - read->from);
    fence_acquire(memory->access);
    read->same = word_peek(tag_address(read->blocks, read->block)) == read->tag;
    fence_acquire(memory->access);
}

static int raise_node(const struct node_read *read, const char *what)
{
    PyErr_Format(PyExc_ValueError, "block %llu: %s", (unsigned long long)read->block, what);
    return -1;
}

static PyObject *node_read_rest(Memory *memory, struct node_read *read,
                                const unsigned char *header)
{
    PyObject *node = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)read->stop);

    if (node == NULL)
        return NULL;
    read->to = (unsigned char *)PyBytes_AsString(node);
    read->from = NODE_HEADER;
    memcpy(read->to, header, NODE_HEADER); /* as judged; the region's may have changed since */
    if (load_event(memory) < 0 || perform(memory, node_read_body, read, 8) < 0)
        goto fail;
    if (!read->same) {
        Py_DECREF(node);
        return Py_NewRef(Py_None);
    }
    if (crc32c_of(0, read->to + 4, read->stop - 4) != u32_at(read->to, 0)) {
        raise_node(read, "checksum does not match");
        goto fail;
    }
    if (u64_at(read->to + NODE_TAG_AT, 0) != read->tag) {
        raise_node(read, "node names another claim than its block's tag");
        goto fail;
    }
    return node;
fail:
    Py_DECREF(node);
    return NULL;
}

static PyObject *node_read_run(Memory *memory, struct node_read *read)
{
    unsigned char header[NODE_HEADER];
    uint32_t used;

    read->to = header;
    read->stop = NODE_HEADER;
    if (load_event(memory) < 0 || perform(memory, node_read_body, read, 8) < 0)
        return NULL;
    if (!read->same)
        return Py_NewRef(Py_None);
    used = u32_at(header, NODE_USED_AT);
    if (used < NODE_HEADER || used > read->blocks->block_size)
        return PyErr_Format(PyExc_ValueError, "block %llu: used size %u is not from 32 to %llu",
                            (unsigned long long)read->block, (unsigned int)used,
                            (unsigned long long)read->blocks->block_size);
    read->stop = used;
    return node_read_rest(memory, read, header);
}

static const signature read_node_signature = {"read_node", {"block", "tag"}, 2, 2};

static PyObject *blocks_read_node(PyObject *self, PyObject *const *args, Py_ssize_t count,
                                  PyObject *keywords)
{
    Blocks *blocks = (Blocks *)self;
    PyObject *given[2], *result;
    struct node_read read = {.blocks = blocks};

    if (take_args(&read_node_signature, args, count, keywords, given) < 0 ||
        take_u64(given[0], "block", &read.block) < 0 || take_u64(given[1], "tag", &read.tag) < 0 ||
        check_block(blocks, read.block) < 0)
        return NULL;
    if (read.tag == 0) {
        PyErr_SetString(PyExc_ValueError, "tag 0 means free: there is no node to read");
        return NULL;
    }
    if (use(blocks->memory) < 0)
        return NULL;
    result = node_read_run(blocks->memory, &read);
    unuse(blocks->memory);
    return result;
}

/* Stores a private copy of the node that has its checksum filled in; 1, 0 when stale, or -1. */
static int node_write_run(const Blocks *blocks, uint64_t block, const Py_buffer *node)
{
    unsigned char usual[4096];
    unsigned char *copy = usual;
    uint64_t size = (uint64_t)node->len;
    struct bulk bulk = {
        .memory = blocks->memory, .guarding = blocks, .chunk = size, .left = size};
    uint32_t crc;
    int status;

    if (size > sizeof usual && (copy = malloc(size)) == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    memcpy(copy, node->buf, size);
    crc = crc32c_of(0, copy + 4, size - 4);
    memcpy(copy, &crc, 4);
    bulk.from = copy;
    bulk.to = block_address(blocks, block);
    status = bulk_run(&bulk);
    if (copy != usual)
        free(copy);
    return status < 0 ? -1 : !bulk.stale;
}

static const signature write_node_signature = {"write_node", {"block", "node"}, 2, 2};

static PyObject *blocks_write_node(PyObject *self, PyObject *const *args, Py_ssize_t count,
                                   PyObject *keywords)
{
    Blocks *blocks = (Blocks *)self;
    PyObject *given[2], *result = NULL;
    uint64_t block;
    int good;
    Py_buffer node;

    if (take_args(&write_node_signature, args, count, keywords, given) < 0 ||
        take_u64(given[0], "block", &block) < 0 || check_block(blocks, block) < 0 ||
        PyObject_GetBuffer(given[1], &node, PyBUF_SIMPLE) < 0)
        return NULL;
    if (node.len < NODE_HEADER || (uint64_t)node.len > blocks->block_size) {
        PyErr_Format(PyExc_ValueError, "a node has 32 to %llu bytes, not %zd",
                     (unsigned long long)blocks->block_size, node.len);
    } else if (use_for_stores(blocks->memory) == 0) {
        good = node_write_run(blocks, block, &node);
        if (good >= 0)
            result = PyBool_FromLong(good);
        unuse(blocks->memory);
    }
    PyBuffer_Release(&node);
    return result;
}

/* 1 when all were stored, 0 when the guard changed, -1 with an exception. */
static int nodes_write_run(const Blocks *blocks, PyObject *pointers, PyObject *nodes)
{
    int good = 1;

    for (Py_ssize_t at = 0; at < PyList_Size(pointers) && good == 1; at++) {
        PyObject *node_object = PyList_GetItem(nodes, at), *pointer = PyList_GetItem(pointers, at);
        Py_buffer node, packed;

        if (node_object == NULL || pointer == NULL || /* a callback shortened the lists */
            take_pointers(blocks, pointer, false, &packed) < 0)
            return -1;
        if (PyObject_GetBuffer(node_object, &node, PyBUF_SIMPLE) < 0) {
            good = -1;
        } else {
            if (packed.len != POINTER_SIZE || node.len < NODE_HEADER ||
                (uint64_t)node.len > blocks->block_size) {
                PyErr_Format(PyExc_ValueError, "a node has 32 to %llu bytes and one pointer",
                             (unsigned long long)blocks->block_size);
                good = -1;
            } else {
                good = node_write_run(blocks, pointer_block(packed.buf), &node);
            }
            PyBuffer_Release(&node);
        }
        PyBuffer_Release(&packed);
    }
    return good;
}

static const signature write_nodes_signature = {"write_nodes", {"pointers", "nodes"}, 2, 2};

static PyObject *blocks_write_nodes(PyObject *self, PyObject *const *args, Py_ssize_t count,
                                    PyObject *keywords)
{
    Blocks *blocks = (Blocks *)self;
    PyObject *given[2], *result = NULL;
    int good;

    if (take_args(&write_nodes_signature, args, count, keywords, given) < 0)
        return NULL;
    if (!PyList_Check(given[0]) || !PyList_Check(given[1]) ||
        PyList_Size(given[0]) != PyList_Size(given[1])) {
        PyErr_SetString(PyExc_TypeError, "pointers and nodes must be lists of one length");
        return NULL;
    }
    if (use_for_stores(blocks->memory) == 0) {
        good = nodes_write_run(blocks, given[0], given[1]);
        if (good >= 0)
            result = PyBool_FromLong(good);
        unuse(blocks->memory);
    }
    return result;
}

/* --- the module ------------------------------------------------------------------------------- */

#define FAST(function) ((PyCFunction)(void (*)(void))(function)), METH_FASTCALL | METH_KEYWORDS

static PyMethodDef memory_methods[] = {
    {"close", memory_close, METH_NOARGS,
     "close($self)\n--\n\nUnmap; any later access raises ValueError. Closing twice is harmless."},
    {"load", FAST(memory_load),
     "load($self, offset)\n--\n\nThe 64-bit word at offset; later accesses come after it."},
    {"load_column", FAST(memory_load_column),
     "load_column($self, offset, stride, count)\n--\n\n"
     "A list of the words at offset, offset + stride, and so on."},
    {"large_in_column", FAST(memory_large_in_column),
     "large_in_column($self, offset, stride, count, least)\n--\n\n"
     "A list of which of these words are least or more; the first is number 0."},
    {"store", FAST(memory_store),
     "store($self, offset, value)\n--\n\nStore a 64-bit word after everything stored before."},
    {"cas", FAST(memory_cas),
     "cas($self, offset, expected, new)\n--\n\n"
     "Store new if the word equals expected. Returns the word as it was before."},
    {"fence", memory_fence, METH_NOARGS, "fence($self)\n--\n\nA full barrier."},
    {"read", FAST(memory_read), "read($self, offset, length)\n--\n\nA private copy of a range."},
    {"write", FAST(memory_write), "write($self, offset, buffer)\n--\n\nStore bytes at offset."},
    {"zero", FAST(memory_zero), "zero($self, offset, length)\n--\n\nStore zero bytes."},
    {"is_zero", FAST(memory_is_zero),
     "is_zero($self, offset, length)\n--\n\nWhether a range holds nothing but zero bytes."},
    {"unaligned_ok", FAST(memory_unaligned_ok),
     "unaligned_ok($self, offset)\n--\n\n"
     "Whether the mapping bears a load across two words near offset; false on device memory."},
    {"trap", FAST(memory_trap),
     "trap($self, after, callback, loads=False)\n--\n\n"
     "Call callback() before the (after + 1)-th store event from now, once; None disarms."},
    {NULL, NULL, 0, NULL}};

static PyMemberDef memory_members[] = {
    {"length", T_ULONGLONG, offsetof(Memory, length), READONLY, "Bytes mapped."},
    {"writable", T_BOOL, offsetof(Memory, writable), READONLY, "Whether stores are allowed."},
    {"access", T_INT, offsetof(Memory, access), READONLY, "NORMAL, DEVICE or WRITE_COMBINING."},
    {"closed", T_BOOL, offsetof(Memory, closed), READONLY, "Whether close() was called."},
    {"stores", T_ULONGLONG, offsetof(Memory, stores), READONLY, "Store events so far."},
    {NULL, 0, 0, 0, NULL}};

static PyType_Slot memory_slots[] = {
    {Py_tp_doc,
     "Memory(fd, length, offset=0, *, writable=True, access=NORMAL)\n--\n\n"
     "A shared mapping of a file or device. Every access is bounds-checked, and one that the\n"
     "file or device no longer backs raises OSError(EIO)."},
    {Py_tp_new, memory_new},
    {Py_tp_dealloc, memory_dealloc},
    {Py_tp_traverse, memory_traverse},
    {Py_tp_clear, memory_clear},
    {Py_tp_methods, memory_methods},
    {Py_tp_members, memory_members},
    {0, NULL}};

static PyType_Spec memory_spec = {
    .name = "ivshmemfs.region._memory.Memory",
    .basicsize = sizeof(Memory),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = memory_slots,
};

static PyMethodDef blocks_methods[] = {
    {"claim", FAST(blocks_claim),
     "claim($self, count, tag, cursor)\n--\n\n"
     "Claim up to count free blocks for tag, from block cursor on and around.\n"
     "Returns their packed pointers and the next cursor."},
    {"reclaim", FAST(blocks_reclaim),
     "reclaim($self, pointers, tag)\n--\n\n"
     "Claim those of the pointers' blocks that are free, for tag. Returns pointers to them."},
    {"release", FAST(blocks_release),
     "release($self, pointers)\n--\n\n"
     "Free the blocks that still carry their pointer's tag. Returns how many."},
    {"guard", FAST(blocks_guard),
     "guard($self, offset, word)\n--\n\n"
     "From now on, before a block is filled, the word at offset must be this one. 0: no guard."},
    {"tag", FAST(blocks_tag), "tag($self, block)\n--\n\nThe tag word of a block; 0 is free."},
    {"check", FAST(blocks_check),
     "check($self, pointers)\n--\n\nWhether every pointer's block still carries its tag."},
    {"gather", FAST(blocks_gather),
     "gather($self, pointers, skip, length, into, at=0)\n--\n\n"
     "Copy bytes [skip, skip + length) of the blocks in a row; False when one is stale."},
    {"scatter", FAST(blocks_scatter),
     "scatter($self, pointers, buffer)\n--\n\n"
     "Store a buffer over the blocks in order; zeros fill the last one used.\n"
     "False when the guard changed: then only blocks before that were filled."},
    {"fill", FAST(blocks_fill),
     "fill($self, pointers, file, at, length)\n--\n\n"
     "Store up to length bytes, from byte `at` of an open file on, over the blocks in order; zeros\n"
     "fill the last one used. Returns how many bytes the file had; -1 when the guard changed."},
    {"drain", FAST(blocks_drain),
     "drain($self, pointers, skip, length, file, at)\n--\n\n"
     "Write bytes [skip, skip + length) of the blocks in a row into an open file, from its byte\n"
     "`at` on; False when a block is stale, and what was written of no use."},
    {"read_node", FAST(blocks_read_node),
     "read_node($self, block, tag)\n--\n\n"
     "A checked private copy of a metadata node, None when its tag is another by now."},
    {"write_node", FAST(blocks_write_node),
     "write_node($self, block, node)\n--\n\n"
     "Store a metadata node, with its checksum filled in; False when the guard changed."},
    {"write_nodes", FAST(blocks_write_nodes),
     "write_nodes($self, pointers, nodes)\n--\n\n"
     "The same for a list of packed pointers and one of nodes, in order."},
    {"free_count", FAST(blocks_free_count),
     "free_count($self, start=0, stop=None)\n--\n\n"
     "How many blocks are free, of all or of those from start to before stop."},
    {"mark", FAST(blocks_mark),
     "mark($self, pointers, marks)\n--\n\nmarks[block] = tag for each pointer that is not null."},
    {"sweep", FAST(blocks_sweep),
     "sweep($self, marks, limits, start, stop)\n--\n\n"
     "Packed pointers of the blocks whose claim is settled and not marked."},
    {NULL, NULL, 0, NULL}};

static PyMemberDef blocks_members[] = {
    {"memory", T_OBJECT_EX, offsetof(Blocks, memory), READONLY, "The Memory they lie in."},
    {"block_size", T_ULONGLONG, offsetof(Blocks, block_size), READONLY, "Bytes of a block."},
    {"block_count", T_ULONGLONG, offsetof(Blocks, block_count), READONLY, "How many there are."},
    {NULL, 0, 0, 0, NULL}};

static PyType_Slot blocks_slots[] = {
    {Py_tp_doc,
     "Blocks(memory, tags_offset, data_offset, block_size, block_count)\n--\n\n"
     "The tagged blocks of a region: claimed, released and copied by packed pointers."},
    {Py_tp_new, blocks_new},
    {Py_tp_dealloc, blocks_dealloc},
    {Py_tp_traverse, blocks_traverse},
    {Py_tp_methods, blocks_methods},
    {Py_tp_members, blocks_members},
    {0, NULL}};

static PyType_Spec blocks_spec = {
    .name = "ivshmemfs.region._memory.Blocks",
    .basicsize = sizeof(Blocks),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = blocks_slots,
};

typedef uint32_t crc_function(uint32_t seed, const unsigned char *data, size_t length);

static PyObject *crc_call(const signature *sig, crc_function *function, PyObject *const *args,
                          Py_ssize_t count, PyObject *keywords)
{
    PyObject *given[2];
    uint64_t seed = 0;
    uint32_t crc;
    Py_buffer buffer;

    if (take_args(sig, args, count, keywords, given) < 0 ||
        (given[1] != NULL && take_u64(given[1], "seed", &seed) < 0))
        return NULL;
    if (seed > UINT32_MAX)
        return PyErr_Format(PyExc_ValueError, "seed out of range: %R", given[1]);
    if (PyObject_GetBuffer(given[0], &buffer, PyBUF_SIMPLE) < 0)
        return NULL;
    crc = function((uint32_t)seed, buffer.buf, (size_t)buffer.len);
    PyBuffer_Release(&buffer);
    return PyLong_FromUnsignedLong(crc);
}

static const signature crc_signature = {"crc32c", {"buffer", "seed"}, 1, 2};

static PyObject *module_crc32c(PyObject *self, PyObject *const *args, Py_ssize_t count,
                               PyObject *keywords)
{
    (void)self;
    return crc_call(&crc_signature, crc32c_of, args, count, keywords);
}

static uint32_t crc32c_by_table_of(uint32_t seed, const unsigned char *data, size_t length)
{
    return ~crc_by_table(~seed, data, length);
}

static PyObject *module_crc32c_table(PyObject *self, PyObject *const *args, Py_ssize_t count,
                                     PyObject *keywords)
{
    (void)self;
    return crc_call(&crc_signature, crc32c_by_table_of, args, count, keywords);
}

/* --- packed words and bytes in private memory -------------------------------------------------- */

/* Gets a buffer that has room for `count` things of `width` bytes each. */
static int take_counted(PyObject *object, PyObject *count_object, uint64_t width, const char *things,
                        Py_buffer *buffer, uint64_t *count)
{
    if (take_u64(count_object, "count", count) < 0 ||
        PyObject_GetBuffer(object, buffer, PyBUF_SIMPLE) < 0)
        return -1;
    if (*count > (uint64_t)buffer->len / width) {
        PyErr_Format(PyExc_ValueError, "%llu %s are more than %zd bytes hold",
                     (unsigned long long)*count, things, buffer->len);
        PyBuffer_Release(buffer);
        return -1;
    }
    return 0;
}

/* Gets a buffer that has `count` packed words at its beginning. */
static int take_words(PyObject *object, PyObject *count_object, Py_buffer *buffer, uint64_t *count)
{
    return take_counted(object, count_object, 8, "words", buffer, count);
}

/* The first of `count` ascending words that is not below `value`. */
static uint64_t lower_of(const unsigned char *keys, uint64_t count, uint64_t value)
{
    uint64_t low = 0;

    while (low < count) {
        uint64_t middle = low + (count - low) / 2;
        if (u64_at(keys, middle) < value)
            low = middle + 1;
        else
            count = middle;
    }
    return low;
}

static const signature lower_bound_signature = {
    "lower_bound", {"buffer", "count", "value"}, 3, 3};

static PyObject *module_lower_bound(PyObject *self, PyObject *const *args, Py_ssize_t nargs,
                                    PyObject *keywords)
{
    PyObject *given[3];
    uint64_t count, value;
    Py_buffer buffer;

    (void)self;
    if (take_args(&lower_bound_signature, args, nargs, keywords, given) < 0 ||
        take_u64(given[2], "value", &value) < 0 ||
        take_words(given[0], given[1], &buffer, &count) < 0)
        return NULL;
    count = lower_of(buffer.buf, count, value);
    PyBuffer_Release(&buffer);
    return from_u64(count);
}

static const signature ascending_signature = {"ascending", {"buffer", "count"}, 2, 2};

static PyObject *module_ascending(PyObject *self, PyObject *const *args, Py_ssize_t nargs,
                                  PyObject *keywords)
{
    PyObject *given[2];
    uint64_t count, at = 1;
    Py_buffer buffer;

    (void)self;
    if (take_args(&ascending_signature, args, nargs, keywords, given) < 0 ||
        take_words(given[0], given[1], &buffer, &count) < 0)
        return NULL;
    while (at < count && u64_at(buffer.buf, at - 1) < u64_at(buffer.buf, at))
        at++;
    PyBuffer_Release(&buffer);
    return PyBool_FromLong(at >= count);
}

static const signature sum_bytes_signature = {"sum_bytes", {"buffer", "start", "stop"}, 3, 3};

static PyObject *module_sum_bytes(PyObject *self, PyObject *const *args, Py_ssize_t nargs,
                                  PyObject *keywords)
{
    PyObject *given[3];
    uint64_t start, stop, sum = 0;
    Py_buffer buffer;

    (void)self;
    if (take_args(&sum_bytes_signature, args, nargs, keywords, given) < 0 ||
        take_u64(given[1], "start", &start) < 0 || take_u64(given[2], "stop", &stop) < 0 ||
        PyObject_GetBuffer(given[0], &buffer, PyBUF_SIMPLE) < 0)
        return NULL;
    if (stop > (uint64_t)buffer.len)
        stop = (uint64_t)buffer.len;
    for (; start < stop; start++)
        sum += ((const unsigned char *)buffer.buf)[start];
    PyBuffer_Release(&buffer);
    return from_u64(sum);
}

/* --- packed slots of pointers ------------------------------------------------------------------ */

/* Takes apart a change of slots, (index, packed slots). */
static int take_change(PyObject *change, uint64_t *offset, const char **slots, uint64_t *length)
{
    PyObject *packed;

    if (!PyTuple_Check(change) || PyTuple_Size(change) != 2 ||
        !PyBytes_Check(packed = PyTuple_GetItem(change, 1))) {
        PyErr_SetString(PyExc_TypeError, "a change is (index, packed slots)");
        return -1;
    }
    if (take_u64(PyTuple_GetItem(change, 0), "index", offset) < 0 ||
        check_limit("index", *offset, 0, SLOTS_MOST) < 0)
        return -1;
    *offset *= POINTER_SIZE;
    *slots = PyBytes_AsString(packed);
    *length = (uint64_t)PyBytes_Size(packed);
    if (*length % POINTER_SIZE == 0)
        return 0;
    PyErr_SetString(PyExc_ValueError, "half a slot");
    return -1;
}

/* Puts all changes into `into`; when that is NULL, makes `*size` what they need. */
static int slots_put(unsigned char *into, uint64_t *size, PyObject *changes)
{
    for (Py_ssize_t at = 0; at < PyList_Size(changes); at++) {
        uint64_t offset, length;
        const char *slots;

        if (take_change(PyList_GetItem(changes, at), &offset, &slots, &length) < 0)
            return -1;
        if (into != NULL)
            memcpy(into + offset, slots, length);
        else if (offset + length > *size)
            *size = offset + length;
    }
    return 0;
}

static PyObject *slots_changed(const unsigned char *had, uint64_t length, PyObject *changes)
{
    uint64_t size = length, kept;
    unsigned char *slots;
    PyObject *result, *trimmed;

    if (slots_put(NULL, &size, changes) < 0 ||
        (result = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)size)) == NULL)
        return NULL;
    slots = (unsigned char *)PyBytes_AsString(result);
    memcpy(slots, had, length);
    memset(slots + length, 0, size - length);
    slots_put(slots, &size, changes); /* it cannot fail: it has seen them all */
    kept = size;
    while (kept > 0 && (u64_at(slots, kept / 8 - 1) | u64_at(slots, kept / 8 - 2)) == 0)
        kept -= POINTER_SIZE;
    if (kept == size)
        return result;
    trimmed = PyBytes_FromStringAndSize((const char *)slots, (Py_ssize_t)kept);
    Py_DECREF(result);
    return trimmed;
}

static const signature put_slots_signature = {"put_slots", {"buffer", "start", "changes"}, 3, 3};

static PyObject *module_put_slots(PyObject *self, PyObject *const *args, Py_ssize_t nargs,
                                  PyObject *keywords)
{
    PyObject *given[3], *result = NULL;
    uint64_t start, length;
    Py_buffer buffer;

    (void)self;
    if (take_args(&put_slots_signature, args, nargs, keywords, given) < 0 ||
        take_u64(given[1], "start", &start) < 0 ||
        PyObject_GetBuffer(given[0], &buffer, PyBUF_SIMPLE) < 0)
        return NULL;
    length = (uint64_t)buffer.len;
    if (start > length || (length - start) % POINTER_SIZE != 0)
        PyErr_SetString(PyExc_ValueError, "the buffer does not end with whole slots");
    else if (!PyList_Check(given[2]))
        PyErr_SetString(PyExc_TypeError, "changes must be a list");
    else
        result = slots_changed((unsigned char *)buffer.buf + start, length - start, given[2]);
    PyBuffer_Release(&buffer);
    return result;
}

/* --- packed directory leaves ------------------------------------------------------------------- */

/* Columns in a row: keys u64, values u64, lengths of names u8; then the names. */
struct leaf {
    Py_buffer buffer;
    const unsigned char *keys, *values, *sizes;
    uint64_t count;
    uint64_t names; /* where they begin */
    uint64_t length;
};

static int take_leaf(PyObject *raw, PyObject *count, struct leaf *leaf)
{
    if (take_counted(raw, count, LEAF_FIXED, "entries", &leaf->buffer, &leaf->count) < 0)
        return -1;
    leaf->length = (uint64_t)leaf->buffer.len;
    leaf->keys = leaf->buffer.buf;
    leaf->values = leaf->keys + 8 * leaf->count;
    leaf->sizes = leaf->values + 8 * leaf->count;
    leaf->names = LEAF_FIXED * leaf->count;
    return 0;
}

/* Where the name of entry `at` begins; at the end at the latest, whatever the lengths say. */
static uint64_t name_at(const struct leaf *leaf, uint64_t at)
{
    uint64_t place = leaf->names;

    for (uint64_t i = 0; i < at; i++)
        place += leaf->sizes[i];
    return place < leaf->length ? place : leaf->length;
}

static const signature leaf_find_signature = {
    "leaf_find", {"raw", "count", "key", "span", "name"}, 5, 5};

static PyObject *module_leaf_find(PyObject *self, PyObject *const *args, Py_ssize_t nargs,
                                  PyObject *keywords)
{
    PyObject *given[5];
    uint64_t key, span, at, place;
    long long found = -1;
    struct leaf leaf;
    Py_buffer name;

    (void)self;
    if (take_args(&leaf_find_signature, args, nargs, keywords, given) < 0 ||
        take_u64(given[2], "key", &key) < 0 || take_u64(given[3], "span", &span) < 0 ||
        PyObject_GetBuffer(given[4], &name, PyBUF_SIMPLE) < 0)
        return NULL;
    if (take_leaf(given[0], given[1], &leaf) < 0) {
        PyBuffer_Release(&name);
        return NULL;
    }
    at = lower_of(leaf.keys, leaf.count, key);
    for (; found < 0 && at < leaf.count && u64_at(leaf.keys, at) - key < span; at++) {
        if (leaf.sizes[at] != (uint64_t)name.len)
            continue;
        place = name_at(&leaf, at);
        if (leaf.length - place >= (uint64_t)name.len &&
            memcmp(leaf.keys + place, name.buf, (size_t)name.len) == 0)
            found = (long long)at;
    }
    PyBuffer_Release(&leaf.buffer);
    PyBuffer_Release(&name);
    return PyLong_FromLongLong(found);
}

static unsigned char *put(unsigned char *to, const void *from, uint64_t length)
{
    memcpy(to, from, length);
    return to + length;
}

static PyObject *leaf_with(const struct leaf *leaf, uint64_t key, uint64_t value,
                           const Py_buffer *name)
{
    uint64_t at = lower_of(leaf->keys, leaf->count, key), cut = name_at(leaf, at);
    uint64_t length = leaf->length + LEAF_FIXED + (uint64_t)name->len;
    PyObject *result = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)length);
    unsigned char size = (unsigned char)name->len, *to;

    if (result == NULL)
        return NULL;
    to = (unsigned char *)PyBytes_AsString(result);
    to = put(to, leaf->keys, 8 * at);
    to = put(to, &key, 8);
    to = put(to, leaf->keys + 8 * at, 8 * leaf->count); /* with the values before it */
    to = put(to, &value, 8);
    to = put(to, leaf->values + 8 * at, 8 * (leaf->count - at) + at);
    to = put(to, &size, 1);
    to = put(to, leaf->sizes + at, cut - (uint64_t)(leaf->sizes + at - leaf->keys));
    to = put(to, name->buf, (uint64_t)name->len);
    put(to, leaf->keys + cut, leaf->length - cut);
    return result;
}

static const signature leaf_insert_signature = {
    "leaf_insert", {"raw", "count", "key", "value", "name"}, 5, 5};

static PyObject *module_leaf_insert(PyObject *self, PyObject *const *args, Py_ssize_t nargs,
                                    PyObject *keywords)
{
    PyObject *given[5], *result = NULL;
    uint64_t key, value;
    struct leaf leaf;
    Py_buffer name;

    (void)self;
    if (take_args(&leaf_insert_signature, args, nargs, keywords, given) < 0 ||
        take_u64(given[2], "key", &key) < 0 || take_u64(given[3], "value", &value) < 0 ||
        PyObject_GetBuffer(given[4], &name, PyBUF_SIMPLE) < 0)
        return NULL;
    if (name.len < 1 || name.len > UINT8_MAX) {
        PyErr_Format(PyExc_ValueError, "a name has 1 to 255 bytes, not %zd", name.len);
    } else if (take_leaf(given[0], given[1], &leaf) == 0) {
        result = leaf_with(&leaf, key, value, &name);
        PyBuffer_Release(&leaf.buffer);
    }
    PyBuffer_Release(&name);
    return result;
}

static PyObject *leaf_without(const struct leaf *leaf, uint64_t at)
{
    uint64_t cut = name_at(leaf, at), behind = name_at(leaf, at + 1);
    PyObject *result = PyBytes_FromStringAndSize(
        NULL, (Py_ssize_t)(leaf->length - LEAF_FIXED - (behind - cut)));
    unsigned char *to;

    if (result == NULL)
        return NULL;
    to = (unsigned char *)PyBytes_AsString(result);
    to = put(to, leaf->keys, 8 * at);
    to = put(to, leaf->keys + 8 * (at + 1), 8 * (leaf->count - 1));
    to = put(to, leaf->values + 8 * (at + 1), 8 * (leaf->count - 1 - at) + at);
    to = put(to, leaf->sizes + at + 1, cut - (uint64_t)(leaf->sizes + at + 1 - leaf->keys));
    put(to, leaf->keys + behind, leaf->length - behind);
    return result;
}

static const signature leaf_remove_signature = {"leaf_remove", {"raw", "count", "at"}, 3, 3};

static PyObject *module_leaf_remove(PyObject *self, PyObject *const *args, Py_ssize_t nargs,
                                    PyObject *keywords)
{
    PyObject *given[3], *result = NULL;
    uint64_t at;
    struct leaf leaf;

    (void)self;
    if (take_args(&leaf_remove_signature, args, nargs, keywords, given) < 0 ||
        take_u64(given[2], "at", &at) < 0 || take_leaf(given[0], given[1], &leaf) < 0)
        return NULL;
    if (at < leaf.count)
        result = leaf_without(&leaf, at);
    else
        PyErr_Format(PyExc_ValueError, "there is no entry %R", given[2]);
    PyBuffer_Release(&leaf.buffer);
    return result;
}

/* --- records ----------------------------------------------------------------------------------- */

/* A tuple of the same type with the same items; not yet seen by anybody. */
static PyObject *tuple_copy(PyObject *values)
{
    Py_ssize_t size = PyTuple_Size(values);
    PyTypeObject *type = Py_TYPE(values);
    PyObject *copy = ((allocfunc)PyType_GetSlot(type, Py_tp_alloc))(type, size);

    for (Py_ssize_t at = 0; copy != NULL && at < size; at++)
        PyTuple_SetItem(copy, at, Py_NewRef(PyTuple_GetItem(values, at)));
    return copy;
}

static int tuple_change(PyObject *copy, PyObject *places, PyObject *changes)
{
    PyObject *name, *value, *place;
    Py_ssize_t next = 0, at;

    while (PyDict_Next(changes, &next, &name, &value)) {
        if ((place = PyDict_GetItemWithError(places, name)) == NULL) {
            if (!PyErr_Occurred())
                PyErr_SetObject(PyExc_KeyError, name);
            return -1;
        }
        at = PyLong_AsSsize_t(place);
        if ((at == -1 && PyErr_Occurred()) || PyTuple_SetItem(copy, at, Py_NewRef(value)) < 0)
            return -1;
    }
    return 0;
}

static const signature changed_tuple_signature = {
    "changed_tuple", {"values", "places", "changes"}, 3, 3};

static PyObject *module_changed_tuple(PyObject *self, PyObject *const *args, Py_ssize_t nargs,
                                      PyObject *keywords)
{
    PyObject *given[3], *copy;

    (void)self;
    if (take_args(&changed_tuple_signature, args, nargs, keywords, given) < 0)
        return NULL;
    if (!PyTuple_Check(given[0]) || !PyDict_Check(given[1]) || !PyDict_Check(given[2])) {
        PyErr_SetString(PyExc_TypeError, "a tuple, places by name and values by name are wanted");
        return NULL;
    }
    copy = tuple_copy(given[0]);
    if (copy != NULL && tuple_change(copy, given[1], given[2]) < 0)
        Py_CLEAR(copy);
    return copy;
}

static PyMethodDef module_methods[] = {
    {"crc32c", FAST(module_crc32c),
     "crc32c(buffer, seed=0)\n--\n\nCRC-32C of a buffer; seed is the result for what precedes it."},
    {"_crc32c_by_table", FAST(module_crc32c_table),
     "_crc32c_by_table(buffer, seed=0)\n--\n\n"
     "crc32c as on a processor without the instruction, for tests."},
    {"lower_bound", FAST(module_lower_bound),
     "lower_bound(buffer, count, value)\n--\n\n"
     "Index of the first of count packed ascending words that is not below value."},
    {"ascending", FAST(module_ascending),
     "ascending(buffer, count)\n--\n\n"
     "Whether each of count packed words is above the one before it."},
    {"sum_bytes", FAST(module_sum_bytes),
     "sum_bytes(buffer, start, stop)\n--\n\nThe sum of bytes [start, stop)."},
    {"changed_tuple", FAST(module_changed_tuple),
     "changed_tuple(values, places, changes)\n--\n\n"
     "A tuple of the same type with other values at the places that names stand for."},
    {"put_slots", FAST(module_put_slots),
     "put_slots(buffer, start, changes)\n--\n\n"
     "The packed pointers from byte start on, with changes (index, packed pointers) put in;\n"
     "nulls fill the gaps, and none is left at the end."},
    {"leaf_find", FAST(module_leaf_find),
     "leaf_find(raw, count, key, span, name)\n--\n\n"
     "Which of the entries with keys in [key, key + span) bears the name; -1: none."},
    {"leaf_insert", FAST(module_leaf_insert),
     "leaf_insert(raw, count, key, value, name)\n--\n\n"
     "The packed leaf with one entry more, before those with keys from this one on."},
    {"leaf_remove", FAST(module_leaf_remove),
     "leaf_remove(raw, count, at)\n--\n\nThe packed leaf without one entry."},
    {NULL, NULL, 0, NULL}};

static PyTypeObject *add_type(PyObject *module, PyType_Spec *spec)
{
    PyTypeObject *type = (PyTypeObject *)PyType_FromModuleAndSpec(module, spec, NULL);

    if (type != NULL && PyModule_AddType(module, type) < 0)
        Py_CLEAR(type);
    return type;
}

static int module_exec(PyObject *module)
{
    module_state *state = PyModule_GetState(module);

    access_prepare();
    crc_prepare();
    state->memory_type = add_type(module, &memory_spec);
    state->blocks_type = add_type(module, &blocks_spec);
    if (state->memory_type == NULL || state->blocks_type == NULL)
        return -1;
    if (PyModule_AddIntConstant(module, "NORMAL", ACCESS_NORMAL) < 0 ||
        PyModule_AddIntConstant(module, "DEVICE", ACCESS_DEVICE) < 0 ||
        PyModule_AddIntConstant(module, "WRITE_COMBINING", ACCESS_WRITE_COMBINING) < 0)
        return -1;
    return 0;
}

static int module_traverse(PyObject *module, visitproc visit, void *arg)
{
    module_state *state = PyModule_GetState(module);

    Py_VISIT(state->memory_type);
    Py_VISIT(state->blocks_type);
    return 0;
}

static int module_clear(PyObject *module)
{
    module_state *state = PyModule_GetState(module);

    Py_CLEAR(state->memory_type);
    Py_CLEAR(state->blocks_type);
    return 0;
}

static void module_free(void *module)
{
    module_clear(module);
}

static PyModuleDef_Slot module_slots[] = {{Py_mod_exec, module_exec}, {0, NULL}};

static PyModuleDef module_definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "ivshmemfs.region._memory",
    .m_doc = "Shared memory from Python: word accesses, fences, copies, tagged blocks.",
    .m_size = sizeof(module_state),
    .m_methods = module_methods,
    .m_slots = module_slots,
    .m_traverse = module_traverse,
    .m_clear = module_clear,
    .m_free = module_free,
};

PyMODINIT_FUNC PyInit__memory(void)
{
    return PyModuleDef_Init(&module_definition);
}
