# cython: language_level=3, binding=False, boundscheck=False, wraparound=False
# cython: embedsignature=True, embedsignature.format=clinic, auto_pickle=False
"""Shared memory from Python: word accesses, fences, copies, tagged blocks; requests of FUSE.

The only file that knows both Python and C.  It takes arguments apart, calls the kernel (native.h)
and turns a status into an exception.  _native.pyi says what each function promises.
"""

cimport cython
from cpython.bytearray cimport PyByteArray_AsString, PyByteArray_Resize, PyByteArray_Size
from cpython.bytes cimport PyBytes_CheckExact, PyBytes_FromStringAndSize
from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.mem cimport PyMem_Free, PyMem_Malloc
from cpython.object cimport PyObject
from libc.errno cimport EAGAIN, EINTR, EIO, EROFS
from libc.limits cimport INT_MAX
from libc.stdint cimport (
    INT64_MAX, UINT16_MAX, UINT32_MAX, UINT64_MAX, int64_t, uint8_t, uint16_t, uint32_t, uint64_t,
    uintptr_t,
)
from libc.string cimport memcpy, memset, strerror

from struct import error as StructError


cdef extern from *:
    """
    _Static_assert(sizeof(unsigned long) == sizeof(uint64_t), "arguments are taken as long");

    #ifdef Py_LIMITED_API /* functions where the full interface has macros */
    #define BYTES_DATA PyBytes_AsString
    #define BYTES_SIZE PyBytes_Size
    #define TUPLE_TAKE PyTuple_GetItem
    #define TUPLE_GIVE(tuple, at, item) (void)PyTuple_SetItem(tuple, at, item)
    #else
    #define BYTES_DATA PyBytes_AS_STRING
    #define BYTES_SIZE PyBytes_GET_SIZE
    #define TUPLE_TAKE PyTuple_GET_ITEM
    #define TUPLE_GIVE PyTuple_SET_ITEM
    #endif

    /* The low bytes of a word; the machine is little-endian. */
    static inline void word_put(unsigned char *to, size_t width, uint64_t word)
    {
        if (width == 8)
            memcpy(to, &word, 8);
        else if (width == 4)
            memcpy(to, &word, 4);
        else if (width == 1)
            *to = (unsigned char)word;
        else
            memcpy(to, &word, width);
    }

    static void *gil_leave(void)
    {
        return PyEval_SaveThread();
    }

    static void gil_enter(void *state)
    {
        PyEval_RestoreThread(state);
    }

    /* A tuple of the same type with the same items, which nobody has seen yet. */
    static PyObject *tuple_copy(PyObject *values)
    {
        Py_ssize_t size = PyTuple_Size(values);
        PyTypeObject *type = Py_TYPE(values);
        PyObject *copy = ((allocfunc)PyType_GetSlot(type, Py_tp_alloc))(type, size);

        for (Py_ssize_t at = 0; copy != NULL && at < size; at++) {
            PyObject *item = TUPLE_TAKE(values, at);
            Py_INCREF(item);
            TUPLE_GIVE(copy, at, item);
        }
        return copy;
    }

    /* Replace one item; the tuple is still private.  -1 with IndexError or TypeError. */
    static int tuple_set(PyObject *copy, Py_ssize_t at, PyObject *value)
    {
        Py_INCREF(value);
        return PyTuple_SetItem(copy, at, value);
    }

    static int tuple_put(PyObject *copy, PyObject *place, PyObject *value)
    {
        Py_ssize_t at = PyLong_AsSsize_t(place);

        if (at == -1 && PyErr_Occurred())
            return -1;
        return tuple_set(copy, at, value);
    }

    /* Replace items by name; the tuple is still private.  -1 with KeyError or TypeError. */
    static int tuple_change(PyObject *copy, PyObject *places, PyObject *changes)
    {
        PyObject *name, *value, *place;
        Py_ssize_t next = 0;

        while (PyDict_Next(changes, &next, &name, &value)) {
            if ((place = PyDict_GetItemWithError(places, name)) == NULL) {
                if (!PyErr_Occurred())
                    PyErr_SetObject(PyExc_KeyError, name);
                return -1;
            }
            if (tuple_put(copy, place, value) < 0)
                return -1;
        }
        return 0;
    }
    """
    void word_put(unsigned char *to, size_t width, uint64_t word) noexcept nogil
    void *gil_leave() noexcept nogil
    void gil_enter(void *state) noexcept nogil
    char *BYTES_DATA(object) noexcept
    Py_ssize_t BYTES_SIZE(object) noexcept
    object tuple_copy(object values)
    int tuple_put(object copy, object place, object value) except -1
    int tuple_set(object copy, Py_ssize_t at, object value) except -1
    int tuple_change(object copy, dict places, dict changes) except -1

cdef extern from "Python.h":
    PyObject *PyExc_OverflowError
    uint64_t PyLong_AsUnsignedLong(object) noexcept  # of 64 bits; faster than the one for long long
    PyObject *PyErr_Occurred() noexcept
    int PyErr_ExceptionMatches(PyObject *) noexcept
    void PyErr_Clear() noexcept
    int PyErr_CheckSignals() except -1


NORMAL = ACCESS_NORMAL
DEVICE = ACCESS_DEVICE
WRITE_COMBINING = ACCESS_WRITE_COMBINING

native_prepare()


# --- arguments ---------------------------------------------------------------------------------

cdef int not_a_word(object value, str name) except -1:
    """Turn the OverflowError that is set into ValueError; keep a TypeError."""
    if PyErr_ExceptionMatches(PyExc_OverflowError):
        PyErr_Clear()
        raise ValueError(f"{name} out of range: {value!r}")
    return -1


cdef inline int take(object value, str name, uint64_t *out) except -1:
    """Take an argument that must be an int from 0 to 2^64 - 1."""
    out[0] = PyLong_AsUnsignedLong(value)
    if out[0] == UINT64_MAX and PyErr_Occurred() != NULL:
        return not_a_word(value, name)
    return 0


cdef int take_limited(object value, str name, uint64_t least, uint64_t most,
                      uint64_t *out) except -1:
    take(value, name, out)
    if not least <= out[0] <= most:
        raise ValueError(f"{name} out of range: {value}")
    return 0


# The bytes of an argument.  Exact bytes objects, the usual case, need no buffer.
cdef struct view:
    unsigned char *data
    uint64_t size
    bint held
    Py_buffer buffer


cdef int view_buffer(view *taken, object source, int flags) except -1:
    PyObject_GetBuffer(source, &taken.buffer, flags)
    taken.held = True
    taken.data = <unsigned char *>taken.buffer.buf
    taken.size = <uint64_t>taken.buffer.len
    return 0


cdef inline int view_take(view *taken, object source) except -1:
    if PyBytes_CheckExact(source):
        taken.data = <unsigned char *>BYTES_DATA(source)
        taken.size = <uint64_t>BYTES_SIZE(source)
        taken.held = False
        return 0
    return view_buffer(taken, source, PyBUF_SIMPLE)


cdef inline void view_drop(view *taken) noexcept:
    if taken.held:
        PyBuffer_Release(&taken.buffer)


cdef inline bytes new_bytes(uint64_t size):
    return PyBytes_FromStringAndSize(NULL, <Py_ssize_t>size)


cdef inline bytes bytes_of(const unsigned char *data, uint64_t size):
    return PyBytes_FromStringAndSize(<const char *>data, <Py_ssize_t>size)


# --- what the kernel calls back ----------------------------------------------------------------

cdef int spring(void *context) noexcept:
    """The trap's callback; what it raises is kept for fail()."""
    cdef Memory memory = <Memory>context
    callback = memory.callback
    memory.callback = None
    try:
        if callback is not None:
            callback()
    except BaseException as error:
        if memory.death is None:
            memory.death = type(error)
        memory.raised = error
        return 1
    return 0


cdef int interrupted(void *context) noexcept:
    """After EINTR: run the handlers of signals."""
    try:
        PyErr_CheckSignals()
    except BaseException as error:
        (<Memory>context).raised = error
        return 1
    return 0


# --- memory ------------------------------------------------------------------------------------

@cython.final
cdef class Memory:
    """Memory(fd, length, offset=0, *, writable=True, access=NORMAL)
--

A shared mapping of a file or device. Every access is bounds-checked, and one that the
file or device no longer backs raises OSError(EIO)."""

    cdef mapping map
    cdef object callback  # of the armed trap
    cdef object death  # class of the exception that a trap's callback raised
    cdef object raised  # what a callback raised just now

    def __cinit__(self, fd, length, offset=0, *, writable=True, access=ACCESS_NORMAL):
        cdef uint64_t descriptor, start, kind
        cdef int status
        self.map.writable = bool(writable)
        take_limited(fd, "fd", 0, INT_MAX, &descriptor)
        take_limited(length, "length", 1, INT64_MAX, &self.map.length)
        take_limited(offset, "offset", 0, <uint64_t>INT64_MAX - self.map.length, &start)
        take_limited(access, "access", ACCESS_NORMAL, ACCESS_WRITE_COMBINING, &kind)
        self.map.access = <int>kind
        self.map.host.leave = gil_leave
        self.map.host.enter = gil_enter
        self.map.host.interrupted = interrupted
        self.map.host.spring = spring
        self.map.host.context = <void *>self
        status = mapping_map(&self.map, <int>descriptor, start)
        if status != STATUS_OK:
            self.fail(status)

    def __dealloc__(self):
        mapping_unmap(&self.map)

    @property
    def length(self):
        """Bytes mapped."""
        return self.map.length

    @property
    def writable(self):
        """Whether stores are allowed."""
        return <bint>self.map.writable

    @property
    def access(self):
        """NORMAL, DEVICE or WRITE_COMBINING."""
        return self.map.access

    @property
    def closed(self):
        """Whether close() was called."""
        return <bint>self.map.closed

    @property
    def stores(self):
        """Store events so far."""
        return self.map.stores

    cdef object dead(self):
        """The exception for a store after the trap's callback failed."""
        try:
            error = self.death("the memory is dead")
        except BaseException:
            error = None
        return error if isinstance(error, BaseException) else RuntimeError("the memory is dead")

    cdef object fault(self):
        cdef uint64_t at = <uint64_t>(<uintptr_t>self.map.fault - <uintptr_t>self.map.base)
        if at < self.map.length:
            return OSError(EIO, f"bus error at offset 0x{at:x} of the region: "
                                "it shrank, or cannot be accessed so")
        return OSError(EIO, "bus error outside the region")

    cdef int fail(self, int status) except -1:
        """Raise the exception for a status that is not OK."""
        if status == STATUS_CLOSED:
            raise ValueError("the memory is closed")
        if status == STATUS_READ_ONLY:
            raise OSError(EROFS, "the region is mapped read-only")
        if status == STATUS_DEAD:
            raise self.dead()
        if status == STATUS_TRAPPED or status == STATUS_INTERRUPTED:
            error = self.raised
            self.raised = None
            raise error
        if status == STATUS_FAULT:
            raise self.fault()
        if status == STATUS_UNABLE:
            raise OSError(EIO, "compare-and-swap does not work on this mapping")
        if status == STATUS_SYSTEM:
            raise OSError(self.map.code, strerror(self.map.code).decode())
        if status == STATUS_NO_MEMORY:
            raise MemoryError
        if status == STATUS_CHANGED:
            raise ValueError("the pointers changed while they were used")
        raise SystemError(f"unexpected status {status}")

    cdef int fail_word(self, int status, object offset) except -1:
        if status == STATUS_RANGE:
            raise ValueError(f"offset out of range or not a multiple of 8: {offset!r}")
        return self.fail(status)

    cdef int fail_range(self, int status, object offset, uint64_t length) except -1:
        if status == STATUS_RANGE:
            raise ValueError(f"{length} bytes at offset {offset!r} are outside the region's "
                             f"{self.map.length}")
        return self.fail(status)

    def close(self):
        """Unmap; any later access raises ValueError. Closing twice is harmless."""
        mapping_close(&self.map)

    def load(self, offset):
        """The 64-bit word at offset; later accesses come after it."""
        cdef uint64_t at, value = 0
        cdef int status
        take(offset, "offset", &at)
        status = mapping_use(&self.map)
        if status == STATUS_OK:
            status = word_read(&self.map, at, &value)
            mapping_unuse(&self.map)
        if status != STATUS_OK:
            self.fail_word(status, offset)
        return value

    def await_change(self, offset, value, nanoseconds, naps):
        """The word at offset, once it is not `value` or after so many naps; signals are handled.

        It sleeps without the interpreter's lock, so a nap costs one system call and one load. Naps
        of 0 ns only let other threads of this processor run: the caller stays awake."""
        cdef uint64_t at, unlike, nap, count, found = 0
        cdef int status
        take(offset, "offset", &at)
        take(value, "value", &unlike)
        take_limited(nanoseconds, "nanoseconds", 0, <uint64_t>INT64_MAX, &nap)
        take(naps, "naps", &count)
        status = mapping_use(&self.map)
        if status == STATUS_OK:
            status = word_await(&self.map, at, unlike, nap, count, &found)
            mapping_unuse(&self.map)
        if status != STATUS_OK:
            self.fail_word(status, offset)
        return found

    def store(self, offset, value):
        """Store a 64-bit word after everything stored before."""
        cdef uint64_t at, word
        cdef int status
        take(offset, "offset", &at)
        take(value, "value", &word)
        status = mapping_use_for_stores(&self.map)
        if status == STATUS_OK:
            status = word_write(&self.map, at, word)
            mapping_unuse(&self.map)
        if status != STATUS_OK:
            self.fail_word(status, offset)

    def cas(self, offset, expected, new):
        """Store new if the word equals expected. Returns the word as it was before."""
        cdef uint64_t at, old, word, previous = 0
        cdef int status
        take(offset, "offset", &at)
        take(expected, "expected", &old)
        take(new, "new", &word)
        status = mapping_use_for_stores(&self.map)
        if status == STATUS_OK:
            status = word_compare_and_swap(&self.map, at, old, word, &previous)
            mapping_unuse(&self.map)
        if status != STATUS_OK:
            self.fail_word(status, offset)
        return previous

    def swap_then_see(self, offset, expected, new, other, wanted):
        """Store new if the word equals expected; after that, see whether the word at other is wanted.
Returns how many of both were so: 0, 1 or 2."""
        cdef uint64_t at, old, word, place, value
        cdef uint32_t passed = 0
        cdef int status
        take(offset, "offset", &at)
        take(expected, "expected", &old)
        take(new, "new", &word)
        take(other, "other", &place)
        take(wanted, "wanted", &value)
        status = mapping_use_for_stores(&self.map)
        if status == STATUS_OK:
            status = word_swap_then_see(&self.map, at, old, word, place, value, &passed)
            mapping_unuse(&self.map)
        if status == STATUS_RANGE:
            raise ValueError(f"offsets out of range or not multiples of 8: {offset!r}, {other!r}")
        if status != STATUS_OK:
            self.fail(status)
        return passed

    def replace(self, offset, value, other, wanted):
        """Store a word by compare-and-swap from the value that it has, each time after a look at the
word at other; False when that is not wanted."""
        cdef uint64_t at, word, place, expected
        cdef boolean replaced = False
        cdef int status
        take(offset, "offset", &at)
        take(value, "value", &word)
        take(other, "other", &place)
        take(wanted, "wanted", &expected)
        status = mapping_use_for_stores(&self.map)
        if status == STATUS_OK:
            status = word_replace(&self.map, at, word, place, expected, &replaced)
            mapping_unuse(&self.map)
        if status == STATUS_RANGE:
            raise ValueError(f"offsets out of range or not multiples of 8: {offset!r}, {other!r}")
        if status != STATUS_OK:
            self.fail(status)
        return <bint>replaced

    cdef uint64_t *column(self, object offset, object stride, object count,
                          uint64_t *length) except NULL:
        """Words in a new array, which the caller frees."""
        cdef uint64_t at, step
        cdef uint64_t *words = NULL
        cdef int status
        take(offset, "offset", &at)
        take(stride, "stride", &step)
        take(count, "count", length)
        status = mapping_use(&self.map)
        if status == STATUS_OK:
            status = column_check(&self.map, at, step, length[0])
            if status == STATUS_OK:
                words = <uint64_t *>PyMem_Malloc(WORD_SIZE * (length[0] + 1))
                status = STATUS_NO_MEMORY
                if words != NULL:
                    status = column_read(&self.map, at, step, length[0], words)
            mapping_unuse(&self.map)
        if status == STATUS_OK:
            return words
        PyMem_Free(words)
        if status == STATUS_RANGE:
            raise ValueError(f"offset out of range or not a multiple of 8: {offset!r}; or "
                             f"{count!r} words every {stride!r} bytes leave the region")
        self.fail(status)

    def load_column(self, offset, stride, count):
        """A list of the words at offset, offset + stride, and so on."""
        cdef uint64_t length, at
        cdef uint64_t *words = self.column(offset, stride, count, &length)
        try:
            return [words[at] for at in range(length)]
        finally:
            PyMem_Free(words)

    def indices_at_least(self, offset, stride, count, least):
        """A list of the indices of the words that are at least `least`; the first has index 0."""
        cdef uint64_t length, at, bound
        cdef uint64_t *words
        take_limited(least, "least", 1, UINT64_MAX, &bound)
        words = self.column(offset, stride, count, &length)
        try:
            return [at for at in range(length) if words[at] >= bound]
        finally:
            PyMem_Free(words)

    def indices_where(self, offset, stride, count, mask, value):
        """A list of the indices of the words whose bits of `mask` are `value`."""
        cdef uint64_t length, at, bits, wanted
        cdef uint64_t *words
        take(mask, "mask", &bits)
        take(value, "value", &wanted)
        words = self.column(offset, stride, count, &length)
        try:
            return [at for at in range(length) if words[at] & bits == wanted]
        finally:
            PyMem_Free(words)

    def fence(self):
        """A full barrier."""
        fence()

    def read(self, offset, length):
        """A private copy of a range."""
        cdef uint64_t at, size
        cdef int status
        cdef bytes result = None
        take(offset, "offset", &at)
        take(length, "length", &size)
        status = mapping_use(&self.map)
        if status == STATUS_OK:
            status = range_check(&self.map, at, size)
            if status == STATUS_OK:
                try:
                    result = new_bytes(size)
                    status = range_read(&self.map, at, <unsigned char *>BYTES_DATA(result), size)
                finally:
                    mapping_unuse(&self.map)
            else:
                mapping_unuse(&self.map)
        if status != STATUS_OK:
            self.fail_range(status, offset, size)
        return result

    def write(self, offset, buffer):
        """Store bytes at offset."""
        cdef uint64_t at, size
        cdef int status
        cdef view taken
        take(offset, "offset", &at)
        view_take(&taken, buffer)
        status = mapping_use_for_stores(&self.map)
        if status == STATUS_OK:
            status = range_write(&self.map, at, taken.data, taken.size)
            mapping_unuse(&self.map)
        size = taken.size
        view_drop(&taken)
        if status != STATUS_OK:
            self.fail_range(status, offset, size)

    def zero(self, offset, length):
        """Store zero bytes."""
        cdef uint64_t at, size
        cdef int status
        take(offset, "offset", &at)
        take(length, "length", &size)
        status = mapping_use_for_stores(&self.map)
        if status == STATUS_OK:
            status = range_write(&self.map, at, NULL, size)
            mapping_unuse(&self.map)
        if status != STATUS_OK:
            self.fail_range(status, offset, size)

    def is_zero(self, offset, length):
        """Whether a range holds nothing but zero bytes."""
        cdef uint64_t at, size
        cdef boolean zero = False
        cdef int status
        take(offset, "offset", &at)
        take(length, "length", &size)
        status = mapping_use(&self.map)
        if status == STATUS_OK:
            status = range_is_zero(&self.map, at, size, &zero)
            mapping_unuse(&self.map)
        if status != STATUS_OK:
            self.fail_range(status, offset, size)
        return <bint>zero

    def unaligned_ok(self, offset):
        """Whether the mapping allows a load across two words near offset; false on device memory."""
        cdef uint64_t at
        cdef boolean works = False
        cdef int status
        take(offset, "offset", &at)
        status = mapping_use(&self.map)
        if status == STATUS_OK:
            status = unaligned_load_works(&self.map, at, &works)
            mapping_unuse(&self.map)
        if status != STATUS_OK:
            self.fail_range(status, offset, 2 * WORD_SIZE)
        return <bint>works

    def trap(self, after, callback, loads=False):
        """Call callback() before the (after + 1)-th store event from now, once; None disarms."""
        cdef uint64_t count
        cdef bint also_loads = loads
        take(after, "after", &count)
        if callback is not None and not callable(callback):
            raise TypeError("callback must be callable, or None to disarm")
        self.map.armed = callback is not None
        self.map.trap_loads = also_loads
        self.map.countdown = count
        self.callback = callback


# --- blocks ------------------------------------------------------------------------------------

# Not cleared by the garbage collector: a Blocks is never without its Memory, and clearing Memory
# breaks any cycle.
@cython.final
@cython.no_gc_clear
cdef class Blocks:
    """Blocks(memory, tags_offset, data_offset, block_size, block_count)
--

The tagged blocks of a region: claimed, released and copied by packed pointers."""

    cdef readonly Memory memory
    cdef blocks table

    def __cinit__(self, Memory memory not None, tags_offset, data_offset, block_size,
                  block_count):
        cdef char wrong = 0
        self.memory = memory
        self.table.mapping = &memory.map
        take(tags_offset, "tags_offset", &self.table.tags_offset)
        take(data_offset, "data_offset", &self.table.data_offset)
        take(block_size, "block_size", &self.table.block_size)
        take(block_count, "block_count", &self.table.block_count)
        if blocks_check(&self.table, &wrong) == STATUS_OK:
            return
        if wrong == b's':
            raise ValueError(f"block_size must be a multiple of 8, from {NODE_HEADER}: "
                             f"{block_size!r}")
        if wrong == b'c':
            raise ValueError(f"block_count out of range: {block_count!r}")
        name, at = ("tags", tags_offset) if wrong == b't' else ("data", data_offset)
        raise ValueError(f"{name}_offset misaligned or outside the region: {at!r}")

    @property
    def block_size(self):
        """Bytes of a block."""
        return self.table.block_size

    @property
    def block_count(self):
        """How many there are."""
        return self.table.block_count

    cdef int take_block(self, object block, uint64_t *out) except -1:
        take(block, "block", out)
        if out[0] >= self.table.block_count:
            return self.fail_block(out[0])
        return 0

    cdef int fail_block(self, uint64_t block) except -1:
        raise ValueError(f"block {block} is outside the region's {self.table.block_count}")

    cdef int fail_pointers(self, view *taken, int status, uint64_t at) except -1:
        """Drop the pointers and say what is wrong with the one at index `at`."""
        cdef uint64_t size = taken.size
        cdef uint32_t block = 0
        if size % POINTER_SIZE == 0:
            memcpy(&block, taken.data + POINTER_SIZE * at, sizeof(block))
        view_drop(taken)
        if size % POINTER_SIZE != 0:
            raise ValueError(f"pointers must be {POINTER_SIZE} bytes each, got {size} bytes")
        if status == STATUS_NULL:
            raise ValueError(f"pointer {at} is null")
        return self.fail_block(block)

    cdef int take_pointers(self, object pointers, bint nulls, view *taken) except -1:
        """Take packed pointers and refuse those that lead outside; nulls only where allowed."""
        cdef uint64_t at = 0
        cdef int status
        view_take(taken, pointers)
        status = pointers_check(&self.table, taken.data, taken.size // POINTER_SIZE, nulls, &at)
        if status != STATUS_OK or taken.size % POINTER_SIZE != 0:
            return self.fail_pointers(taken, status, at)
        return 0

    cdef int take_tag(self, object tag, uint64_t *out) except -1:
        take(tag, "tag", out)
        if out[0] == 0:
            raise ValueError("tag 0 means free and claims nothing")
        return 0

    def claim(self, count, tag, cursor):
        """Claim up to count free blocks for tag, from block cursor on and around.
Returns their packed pointers and the next cursor."""
        cdef unsigned char few[64 * 16]
        cdef unsigned char *pointers = few
        cdef uint64_t wanted, mine, at, got = 0
        cdef int status
        take(count, "count", &wanted)
        self.take_tag(tag, &mine)
        take(cursor, "cursor", &at)
        if at >= self.table.block_count:
            self.fail_block(at)
        wanted = min(wanted, self.table.block_count)
        if wanted * POINTER_SIZE > sizeof(few):
            pointers = <unsigned char *>PyMem_Malloc(wanted * POINTER_SIZE)
            if pointers == NULL:
                raise MemoryError
        status = mapping_use_for_stores(self.table.mapping)
        if status == STATUS_OK:
            status = tags_claim(&self.table, wanted, mine, &at, pointers, &got)
            mapping_unuse(self.table.mapping)
        try:
            if status != STATUS_OK:
                self.memory.fail(status)
            return bytes_of(pointers, got * POINTER_SIZE), at
        finally:
            if pointers != few:
                PyMem_Free(pointers)

    def reclaim(self, pointers, tag):
        """Claim those of the pointers' blocks that are free, for tag. Returns pointers to them."""
        cdef uint64_t mine, got = 0
        cdef int status
        cdef view taken
        cdef unsigned char *into
        self.take_tag(tag, &mine)
        self.take_pointers(pointers, True, &taken)
        status = STATUS_NO_MEMORY
        into = <unsigned char *>PyMem_Malloc(taken.size + 1)
        if into != NULL:
            status = mapping_use_for_stores(self.table.mapping)
        if status == STATUS_OK:
            status = tags_reclaim(&self.table, taken.data, taken.size // POINTER_SIZE, mine, into,
                                  &got)
            mapping_unuse(self.table.mapping)
        view_drop(&taken)
        try:
            if status != STATUS_OK:
                self.memory.fail(status)
            return bytes_of(into, got * POINTER_SIZE)
        finally:
            PyMem_Free(into)

    def reclaim_last(self, known, count, tag):
        """Cut up to `count` pointers off the end of a bytearray, and claim those of their blocks that
are free. Returns a list of pointers to them."""
        cdef unsigned char places[64 * 16]  # a trap's callback may change the bytearray
        cdef unsigned char few[64 * 16]
        cdef uint64_t mine, wanted, most, at = 0, got = 0
        cdef view taken
        cdef int status
        if not isinstance(known, bytearray):
            raise TypeError("a bytearray is wanted")
        take(count, "count", &wanted)
        self.take_tag(tag, &mine)
        most = <uint64_t>PyByteArray_Size(known) // POINTER_SIZE
        wanted = min(wanted, most, <uint64_t>64)
        if wanted == 0:
            return []
        taken.held = False
        taken.size = wanted * POINTER_SIZE
        taken.data = places
        memcpy(places, PyByteArray_AsString(known) + (most - wanted) * POINTER_SIZE, taken.size)
        PyByteArray_Resize(known, <Py_ssize_t>((most - wanted) * POINTER_SIZE))
        status = pointers_check(&self.table, taken.data, wanted, True, &at)
        if status != STATUS_OK:
            self.fail_pointers(&taken, status, at)
        status = mapping_use_for_stores(self.table.mapping)
        if status == STATUS_OK:
            status = tags_reclaim(&self.table, taken.data, wanted, mine, few, &got)
            mapping_unuse(self.table.mapping)
        if status != STATUS_OK:
            self.memory.fail(status)
        return [bytes_of(few + at * POINTER_SIZE, POINTER_SIZE) for at in range(got)]

    def release(self, pointers):
        """Free the blocks that still have their pointer's tag. Returns how many."""
        cdef uint64_t released = 0
        cdef int status
        cdef view taken
        self.take_pointers(pointers, True, &taken)
        status = mapping_use_for_stores(self.table.mapping)
        if status == STATUS_OK:
            status = tags_release(&self.table, taken.data, taken.size // POINTER_SIZE, &released)
            mapping_unuse(self.table.mapping)
        view_drop(&taken)
        if status != STATUS_OK:
            self.memory.fail(status)
        return released

    def tag(self, block):
        """The tag word of a block; 0 is free."""
        cdef uint64_t at, word = 0
        cdef int status
        self.take_block(block, &at)
        status = mapping_use(self.table.mapping)
        if status == STATUS_OK:
            status = tags_read(&self.table, at, &word)
            mapping_unuse(self.table.mapping)
        if status != STATUS_OK:
            self.memory.fail(status)
        return word

    def check(self, pointers):
        """Whether every pointer's block still has its tag."""
        cdef int status
        cdef view taken
        self.take_pointers(pointers, True, &taken)
        status = mapping_use(self.table.mapping)
        if status == STATUS_OK:
            status = tags_check(&self.table, taken.data, taken.size // POINTER_SIZE)
            mapping_unuse(self.table.mapping)
        view_drop(&taken)
        return self.unless_stale(status)

    cdef inline object unless_stale(self, int status):
        """True, False when a tag or the guard changed, or an exception."""
        if status == STATUS_OK:
            return True
        if status == STATUS_STALE:
            return False
        self.memory.fail(status)

    def guard(self, offset, word):
        """From now on, before a block is filled, the word at offset must be this one. 0: no guard."""
        cdef uint64_t at, guard
        take(offset, "offset", &at)
        take(word, "word", &guard)
        if at % WORD_SIZE != 0 or range_check(self.table.mapping, at, WORD_SIZE) != STATUS_OK:
            raise ValueError(f"there is no word at offset {offset!r}")
        self.table.guard_offset = at
        self.table.guard = guard

    cdef int check_span(self, view *taken, uint64_t start, uint64_t size) except -1:
        cdef uint64_t available = taken.size // POINTER_SIZE * self.table.block_size
        if start > available or size > available - start:
            raise ValueError(f"{size} bytes from {start} on are more than the pointers' "
                             f"{available}")
        return 0

    cdef int check_room(self, view *taken, uint64_t size) except -1:
        cdef uint64_t count = taken.size // POINTER_SIZE
        if size > count * self.table.block_size:
            raise ValueError(f"{size} bytes do not fit {count} blocks of {self.table.block_size}")
        return 0

    def gather(self, pointers, skip, length, into, at=0):
        """Copy bytes [skip, skip + length) of the blocks in a row; False when one is stale."""
        cdef uint64_t start, size, place
        cdef int status
        cdef view taken, target
        take(skip, "skip", &start)
        take(length, "length", &size)
        take(at, "at", &place)
        self.take_pointers(pointers, True, &taken)
        try:
            self.check_span(&taken, start, size)
            view_buffer(&target, into, PyBUF_WRITABLE)
            if place > target.size or size > target.size - place:
                start = target.size
                view_drop(&target)
                raise ValueError(f"{length!r} bytes at {at} do not fit the buffer's {start}")
            status = mapping_use(self.table.mapping)
            if status == STATUS_OK:
                status = blocks_gather(&self.table, taken.data, taken.size // POINTER_SIZE, start,
                                       size, target.data + place)
                mapping_unuse(self.table.mapping)
            view_drop(&target)
        finally:
            view_drop(&taken)
        return self.unless_stale(status)

    def overwrite(self, block, skip, buffer):
        """Store a buffer from byte skip of a block on, over it and those that follow it in the region;
all other bytes stay. False when the guard changed: then only bytes before that were stored."""
        cdef uint64_t at, start
        cdef int status
        cdef view source
        self.take_block(block, &at)
        take(skip, "skip", &start)
        view_take(&source, buffer)
        try:
            status = mapping_use_for_stores(self.table.mapping)
            if status == STATUS_OK:
                status = blocks_overwrite(&self.table, at, start, source.data, source.size)
                mapping_unuse(self.table.mapping)
            size = source.size
        finally:
            view_drop(&source)
        if status == STATUS_RANGE:
            raise ValueError(f"{size} bytes from byte {skip!r} of block {block!r} on leave the region")
        return self.unless_stale(status)

    def scatter(self, pointers, buffer):
        """Store a buffer over the blocks in order; zeros fill the last one used.
False when the guard changed: then only blocks before that were filled."""
        cdef int status
        cdef view taken, source
        self.take_pointers(pointers, False, &taken)
        try:
            view_take(&source, buffer)
            status = STATUS_RANGE
            try:
                self.check_room(&taken, source.size)
                status = mapping_use_for_stores(self.table.mapping)
                if status == STATUS_OK:
                    status = blocks_scatter(&self.table, taken.data, taken.size // POINTER_SIZE,
                                            source.data, source.size)
                    mapping_unuse(self.table.mapping)
            finally:
                view_drop(&source)
        finally:
            view_drop(&taken)
        return self.unless_stale(status)

    def fill(self, pointers, file, at, length):
        """Store up to length bytes, from byte `at` of an open file on, over the blocks in order;
zeros fill the last one used. Returns how many bytes the file had; -1 when the guard changed."""
        cdef uint64_t descriptor, place, size, done = 0
        cdef int status
        cdef view taken
        take_limited(file, "file", 0, INT_MAX, &descriptor)
        take_limited(at, "at", 0, INT64_MAX // 2, &place)
        take(length, "length", &size)
        self.take_pointers(pointers, False, &taken)
        try:
            self.check_room(&taken, size)
            status = mapping_use_for_stores(self.table.mapping)
            if status == STATUS_OK:
                status = blocks_fill(&self.table, taken.data, taken.size // POINTER_SIZE,
                                     <int>descriptor, place, size, &done)
                mapping_unuse(self.table.mapping)
        finally:
            view_drop(&taken)
        if status == STATUS_STALE:
            return -1
        if status != STATUS_OK:
            self.memory.fail(status)
        return done

    def drain(self, pointers, skip, length, file, at):
        """Write bytes [skip, skip + length) of the blocks in a row into an open file, from its byte
`at` on; False when a block is stale, and what was written is of no use."""
        cdef uint64_t descriptor, place, start, size
        cdef int status
        cdef view taken
        take_limited(file, "file", 0, INT_MAX, &descriptor)
        take_limited(at, "at", 0, INT64_MAX // 2, &place)
        take(skip, "skip", &start)
        take(length, "length", &size)
        self.take_pointers(pointers, True, &taken)
        try:
            self.check_span(&taken, start, size)
            status = mapping_use(self.table.mapping)
            if status == STATUS_OK:
                status = blocks_drain(&self.table, taken.data, taken.size // POINTER_SIZE, start,
                                      size, <int>descriptor, place)
                mapping_unuse(self.table.mapping)
        finally:
            view_drop(&taken)
        return self.unless_stale(status)

    cdef int fail_node(self, int status, const node_read *read) except -1:
        if status == STATUS_NODE_SIZE:
            raise ValueError(f"block {read.block}: used size {read.used} is not from {NODE_HEADER} "
                             f"to {self.table.block_size}")
        if status == STATUS_NODE_CHECKSUM:
            raise ValueError(f"block {read.block}: checksum does not match")
        if status == STATUS_NODE_TAG:
            raise ValueError(f"block {read.block}: node names another claim than its block's tag")
        return self.memory.fail(status)

    def read_node(self, block, tag):
        """A checked private copy of a metadata node, None when its tag is another by now."""
        cdef node_read read
        cdef int status
        cdef bytes node = None
        self.take_block(block, &read.block)
        take(tag, "tag", &read.tag)
        if read.tag == 0:
            raise ValueError("tag 0 means free: there is no node to read")
        read.blocks = &self.table
        status = mapping_use(self.table.mapping)
        if status != STATUS_OK:
            self.memory.fail(status)
        try:
            status = node_read_header(&read)
            if status == STATUS_OK:
                node = new_bytes(read.used)
                status = node_read_rest(&read, <unsigned char *>BYTES_DATA(node))
        finally:
            mapping_unuse(self.table.mapping)
        if status == STATUS_STALE:
            return None
        if status != STATUS_OK:
            self.fail_node(status, &read)
        return node

    cdef int store_node(self, uint64_t block, object node, bint sealed) except -1:
        """STATUS_OK, STATUS_STALE, or an exception; within a use of the mapping."""
        cdef int status
        cdef uint64_t size
        cdef view taken
        view_take(&taken, node)
        size = taken.size
        if sealed:
            status = node_store(&self.table, block, taken.data, size)
        else:
            status = node_write(&self.table, block, taken.data, size)
        view_drop(&taken)
        if status == STATUS_RANGE:
            raise ValueError(f"a node has {NODE_HEADER} to {self.table.block_size} bytes and one "
                             f"pointer, not {size} bytes")
        if status != STATUS_OK and status != STATUS_STALE:
            self.memory.fail(status)
        return status

    def write_node(self, block, node):
        """Store a metadata node, with its checksum filled in; False when the guard changed."""
        cdef uint64_t at
        cdef int status
        self.take_block(block, &at)
        status = mapping_use_for_stores(self.table.mapping)
        if status != STATUS_OK:
            self.memory.fail(status)
        try:
            status = self.store_node(at, node, False)
        finally:
            mapping_unuse(self.table.mapping)
        return status == STATUS_OK

    cdef int store_nodes(self, list pointers, list nodes) except -1:
        cdef Py_ssize_t at = 0
        cdef int status = STATUS_OK
        cdef uint32_t block = 0
        cdef uint64_t size
        cdef view taken
        while at < len(pointers) and at < len(nodes) and status == STATUS_OK:
            pointer, node = pointers[at], nodes[at]
            self.take_pointers(pointer, False, &taken)
            size = taken.size
            if size == POINTER_SIZE:
                memcpy(&block, taken.data, sizeof(block))
            view_drop(&taken)
            if size != POINTER_SIZE:
                raise ValueError(f"a node has one pointer of {POINTER_SIZE} bytes, not {size}")
            status = self.store_node(block, node, True)
            at += 1
        return status

    def write_nodes(self, pointers, nodes):
        """Store nodes that `packed_node` made, in order: a list of packed pointers and one of
nodes. False when the guard changed."""
        cdef int status
        if (not isinstance(pointers, list) or not isinstance(nodes, list)
                or len(<list>pointers) != len(<list>nodes)):
            raise TypeError("pointers and nodes must be lists of one length")
        status = mapping_use_for_stores(self.table.mapping)
        if status != STATUS_OK:
            self.memory.fail(status)
        try:
            status = self.store_nodes(pointers, nodes)
        finally:
            mapping_unuse(self.table.mapping)
        return status == STATUS_OK

    def free_count(self, start=0, stop=None):
        """How many blocks are free, of all or of those from start to before stop."""
        cdef uint64_t first, last = self.table.block_count, count = 0
        cdef int status
        take(start, "start", &first)
        if stop is not None:
            take(stop, "stop", &last)
        if first > last or last > self.table.block_count:
            raise ValueError(f"blocks from {first} to {last}: the region has "
                             f"{self.table.block_count}")
        status = mapping_use(self.table.mapping)
        if status == STATUS_OK:
            status = tags_free_count(&self.table, first, last, &count)
            mapping_unuse(self.table.mapping)
        if status != STATUS_OK:
            self.memory.fail(status)
        return count

    def mark(self, pointers, marks):
        """marks[block] = tag for each pointer that is not null."""
        cdef view taken, table
        self.take_pointers(pointers, True, &taken)
        try:
            take_table(&table, marks, "marks", PyBUF_WRITABLE, self.table.block_count)
            tags_mark(&self.table, taken.data, taken.size // POINTER_SIZE, table.data)
            view_drop(&table)
        finally:
            view_drop(&taken)

    def sweep(self, marks, limits, start, stop):
        """Packed pointers of the blocks whose claim is settled and not marked."""
        cdef uint64_t first, last, found = 0
        cdef int status = STATUS_NO_MEMORY
        cdef view marked, limited
        cdef unsigned char *pointers = NULL
        take(start, "start", &first)
        take(stop, "stop", &last)
        if first > last or last > self.table.block_count:
            raise ValueError(f"sweep from {start!r} to {stop!r} is outside the region's "
                             f"{self.table.block_count}")
        take_table(&marked, marks, "marks", PyBUF_SIMPLE, self.table.block_count)
        try:
            take_table(&limited, limits, "limits", PyBUF_SIMPLE, LIMITS)
            # Only the used part of it costs memory.
            pointers = <unsigned char *>PyMem_Malloc((last - first) * POINTER_SIZE + 1)
            if pointers != NULL:
                status = mapping_use(self.table.mapping)
            if status == STATUS_OK:
                status = tags_sweep(&self.table, marked.data, limited.data, first, last, pointers,
                                    &found)
                mapping_unuse(self.table.mapping)
            view_drop(&limited)
            if status != STATUS_OK:
                self.memory.fail(status)
            return bytes_of(pointers, found * POINTER_SIZE)
        finally:
            PyMem_Free(pointers)
            view_drop(&marked)


# --- turns -------------------------------------------------------------------------------------

# As Blocks: never without its Blocks.
@cython.final
@cython.no_gc_clear
cdef class Turn:
    """Turn(blocks, hint_offset, repair_offset, commit_offset, nonce_from_state)
--

The words with which the transactions of one mount begin, commit and end."""

    cdef readonly Blocks blocks
    cdef turn words
    cdef uint64_t nonce_from_state

    def __cinit__(self, Blocks blocks not None, hint_offset, repair_offset, commit_offset,
                  nonce_from_state):
        self.blocks = blocks
        self.words.blocks = &blocks.table
        take(hint_offset, "hint_offset", &self.words.hint_offset)
        take(repair_offset, "repair_offset", &self.words.repair_offset)
        take(commit_offset, "commit_offset", &self.words.commit_offset)
        take(nonce_from_state, "nonce_from_state", &self.nonce_from_state)

    @property
    def passed(self):
        """Steps that the last call did."""
        return self.words.passed

    cdef int use(self) except -1:
        cdef int status
        status = mapping_use_for_stores(self.words.blocks.mapping)
        if status != STATUS_OK:
            self.blocks.memory.fail(status)
        return 0

    cdef int fail(self, int status) except -1:
        if status == STATUS_RANGE:
            raise ValueError("a word of the transaction is outside of the region")
        return self.blocks.memory.fail(status)

    def begin(self, state_offset, hint, repairs, idle, active, nonce):
        """Take the hint, begin a transaction, load the commit word. Returns it, or -1 when a word was
not what was expected."""
        cdef uint64_t mine, repaired, before, after, own, commit = 0
        cdef int status
        self.words.passed = 0
        take(state_offset, "state_offset", &self.words.state_offset)
        self.words.nonce_offset = self.words.state_offset + self.nonce_from_state
        take(hint, "hint", &mine)
        take(repairs, "repairs", &repaired)
        take(idle, "idle", &before)
        take(active, "active", &after)
        take(nonce, "nonce", &own)
        self.use()
        status = turn_begin(&self.words, mine, repaired, before, after, own, &commit)
        mapping_unuse(self.words.blocks.mapping)
        if status == STATUS_STALE:
            return -1
        if status != STATUS_OK:
            self.fail(status)
        return commit

    def commit(self, pointers, nodes, planned_on, root):
        """Store nodes as `Blocks.write_nodes` does, then swap the commit word for the next one, which
names the block of pointer root. Returns it; 0 when it was not planned_on; -1 when the guard changed."""
        cdef uint64_t word, commit = 0
        cdef uint32_t block = 0
        cdef unsigned char *claim = NULL
        cdef int status
        self.words.passed = 0
        take(planned_on, "planned_on", &word)
        take_pointer(root, &claim)
        memcpy(&block, claim, sizeof(block))
        if (not isinstance(pointers, list) or not isinstance(nodes, list)
                or len(<list>pointers) != len(<list>nodes)):
            raise TypeError("pointers and nodes must be lists of one length")
        self.use()
        try:
            if self.blocks.store_nodes(pointers, nodes) != STATUS_OK:
                return -1
            status = turn_commit(&self.words, word, block, &commit)
        finally:
            mapping_unuse(self.words.blocks.mapping)
        if status == STATUS_STALE:
            return 0
        if status != STATUS_OK:
            self.fail(status)
        return commit

    def end(self, state_offset, active, idle, repairs, pointers, hint):
        """End the transaction, free blocks, give the hint back unless it is 0. False when a word was
not what was expected."""
        cdef uint64_t before, after, repaired, mine
        cdef int status
        cdef view taken
        self.words.passed = 0
        take(state_offset, "state_offset", &self.words.state_offset)
        take(active, "active", &before)
        take(idle, "idle", &after)
        take(repairs, "repairs", &repaired)
        take(hint, "hint", &mine)
        self.blocks.take_pointers(pointers, True, &taken)
        try:
            self.use()
            status = turn_end(&self.words, before, after, repaired, taken.data,
                              taken.size // POINTER_SIZE, mine)
            mapping_unuse(self.words.blocks.mapping)
        finally:
            view_drop(&taken)
        if status != STATUS_STALE and status != STATUS_OK:
            self.fail(status)
        return status == STATUS_OK


cdef int take_table(view *taken, object source, str name, int flags, uint64_t words) except -1:
    cdef uint64_t size
    view_buffer(taken, source, flags)
    size = taken.size
    if size != WORD_SIZE * words:
        view_drop(taken)
        raise ValueError(f"{name} must be {words} words of {WORD_SIZE} bytes, got {size} bytes")
    return 0


# --- checksums ---------------------------------------------------------------------------------

cdef int take_seed(object seed, uint32_t *out) except -1:
    cdef uint64_t wide
    take_limited(seed, "seed", 0, UINT32_MAX, &wide)
    out[0] = <uint32_t>wide
    return 0


# A way to compute the sum: seed, data, length.
ctypedef uint32_t (*sum_way)(uint32_t, const unsigned char *, size_t) noexcept nogil


cdef object checksum(sum_way way, object buffer, object seed):
    cdef uint32_t crc
    cdef view taken
    take_seed(seed, &crc)
    view_take(&taken, buffer)
    crc = way(crc, taken.data, taken.size)
    view_drop(&taken)
    return crc


def crc32c(buffer, seed=0):
    """CRC-32C of a buffer; seed is the result for what precedes it."""
    return checksum(crc32c_of, buffer, seed)


def _crc32c_by_instruction(buffer, seed=0):
    """crc32c as on a processor that has the CRC instruction alone, for tests."""
    return checksum(crc32c_by_instruction_of, buffer, seed)


def _crc32c_by_table(buffer, seed=0):
    """crc32c as on a processor without such an instruction, for tests."""
    return checksum(crc32c_by_table_of, buffer, seed)


# --- packed words and bytes in private memory --------------------------------------------------

cdef int fail_counted(view *taken, uint64_t count, str things) except -1:
    cdef uint64_t size = taken.size
    view_drop(taken)
    raise ValueError(f"{count} {things} are more than {size} bytes hold")


cdef inline int take_words(view *taken, object buffer, object count, uint64_t *length) except -1:
    take(count, "count", length)
    view_take(taken, buffer)
    if length[0] > taken.size // WORD_SIZE:
        return fail_counted(taken, length[0], "words")
    return 0


def lower_bound(buffer, count, value):
    """Index of the first of count packed ascending words that is not below value."""
    cdef uint64_t length, sought
    cdef view taken
    take(value, "value", &sought)
    take_words(&taken, buffer, count, &length)
    length = packed_lower_bound(taken.data, length, sought)
    view_drop(&taken)
    return length


def range_of(buffer, count, value):
    """Index of the last of count packed ascending words that is not above value; 0 if all are."""
    cdef uint64_t length, sought
    cdef view taken
    take(value, "value", &sought)
    take_words(&taken, buffer, count, &length)
    length = packed_range(taken.data, length, sought)
    view_drop(&taken)
    return length


def word_at(buffer, at):
    """The packed word at this index."""
    cdef uint64_t index, word = 0
    cdef bint inside
    cdef view taken
    take(at, "at", &index)
    view_take(&taken, buffer)
    inside = index < taken.size // WORD_SIZE
    if inside:
        memcpy(&word, taken.data + WORD_SIZE * index, sizeof(word))
    view_drop(&taken)
    if not inside:
        raise ValueError(f"there is no word {at!r}")
    return word


def put_bytes(raw, at, part):
    """The bytes with a part of them, from byte `at` on, replaced by others."""
    cdef uint64_t place, size = bytes_size(raw), length = bytes_size(part)
    cdef unsigned char *made
    cdef bytes result
    take(at, "at", &place)
    if place > size or length > size - place:
        raise ValueError(f"{length} bytes do not fit {size} bytes from byte {at!r} on")
    result = new_bytes(size)
    made = <unsigned char *>BYTES_DATA(result)
    memcpy(made, BYTES_DATA(raw), size)
    memcpy(made + place, BYTES_DATA(part), length)
    return result


def ascending(buffer, count):
    """Whether each of count packed words is above the one before it."""
    cdef uint64_t length
    cdef bint result
    cdef view taken
    take_words(&taken, buffer, count, &length)
    result = packed_ascending(taken.data, length)
    view_drop(&taken)
    return result


def sum_bytes(buffer, start, stop):
    """The sum of bytes [start, stop)."""
    cdef uint64_t first, last
    cdef view taken
    take(start, "start", &first)
    take(stop, "stop", &last)
    view_take(&taken, buffer)
    first = packed_sum(taken.data, first, min(last, taken.size))
    view_drop(&taken)
    return first


# --- packed nodes and pointers -----------------------------------------------------------------

cdef inline int take_pointer(object pointer, unsigned char **data) except -1:
    if not PyBytes_CheckExact(pointer) or BYTES_SIZE(pointer) != <Py_ssize_t>POINTER_SIZE:
        raise ValueError(f"a pointer is {POINTER_SIZE} bytes, not {pointer!r}")
    data[0] = <unsigned char *>BYTES_DATA(pointer)
    return 0


cdef inline uint64_t bytes_size(object part) except? 1:
    if not PyBytes_CheckExact(part):
        raise TypeError(f"bytes are wanted, not {part!r}")
    return <uint64_t>BYTES_SIZE(part)


cdef int take_header(node_header *header, object pointer, object kind, object level, object owner,
                     object count) except -1:
    cdef unsigned char *claim = NULL
    take_pointer(pointer, &claim)
    memcpy(&header.tag, claim + POINTER_TAG_AT, sizeof(header.tag))
    take_limited(kind, "kind", 0, 0xff, &header.kind)
    take_limited(level, "level", 0, 0xff, &header.level)
    take_limited(count, "count", 0, 0xffff, &header.count)
    return take(owner, "owner", &header.owner)


def packed_node(pointer, kind, level, owner, count, body, more=b"", rest=b""):
    """A node for the block of a packed pointer: its header with the checksum, then the parts."""
    cdef node_header header
    cdef uint64_t first = bytes_size(body), second = bytes_size(more), third = bytes_size(rest)
    cdef uint64_t size = NODE_HEADER + first + second + third
    cdef unsigned char *node
    cdef bytes result
    take_header(&header, pointer, kind, level, owner, count)
    if size > UINT32_MAX:
        raise ValueError(f"{size} bytes are too many for a node")
    result = new_bytes(size)
    node = <unsigned char *>BYTES_DATA(result)
    memcpy(node + NODE_HEADER, BYTES_DATA(body), first)
    if second + third:
        memcpy(node + NODE_HEADER + first, BYTES_DATA(more), second)
        memcpy(node + NODE_HEADER + first + second, BYTES_DATA(rest), third)
    node_seal(&header, node, size)
    return result


def with_weight(pointer, weight):
    """The packed pointer with another weight."""
    cdef uint64_t wide
    cdef uint32_t blocks
    cdef unsigned char *had = NULL
    cdef unsigned char *made
    cdef bytes result
    take_pointer(pointer, &had)
    take_limited(weight, "weight", 0, UINT32_MAX, &wide)
    blocks = <uint32_t>wide
    result = new_bytes(POINTER_SIZE)
    made = <unsigned char *>BYTES_DATA(result)
    memcpy(made, had, POINTER_SIZE)
    memcpy(made + POINTER_WEIGHT_AT, &blocks, sizeof(blocks))
    return result


cdef inline int take_slots(view *taken, object pointers) except -1:
    view_take(taken, pointers)
    if taken.size % POINTER_SIZE != 0:
        view_drop(taken)
        raise ValueError("half a pointer")
    return 0


def weight_of(pointers):
    """The sum of the weights of packed pointers: the blocks that they lead to."""
    cdef uint64_t sum
    cdef view taken
    take_slots(&taken, pointers)
    sum = packed_weight(taken.data, taken.size // POINTER_SIZE)
    view_drop(&taken)
    return sum


def split_pointers(pointers):
    """A list of packed pointers, from one after another."""
    cdef uint64_t at
    cdef view taken
    take_slots(&taken, pointers)
    try:
        return [bytes_of(taken.data + at * POINTER_SIZE, POINTER_SIZE)
                for at in range(taken.size // POINTER_SIZE)]
    finally:
        view_drop(&taken)


# --- packed slots of pointers ------------------------------------------------------------------

cdef int take_change(object change, uint64_t base, uint64_t *offset, unsigned char **slots,
                     uint64_t *size) except -1:
    """Take apart a change of slots, (index, packed slots), of a node that begins at `base`."""
    if not isinstance(change, tuple) or len(<tuple>change) != 2:
        raise TypeError("a change is (index, packed slots)")
    index, packed = (<tuple>change)[0], (<tuple>change)[1]
    if not isinstance(packed, bytes):
        raise TypeError("a change is (index, packed slots)")
    take(index, "index", offset)
    if offset[0] < base or offset[0] - base > MAX_SLOTS:
        raise ValueError(f"index out of range: {index}")
    offset[0] = (offset[0] - base) * POINTER_SIZE
    slots[0] = <unsigned char *>BYTES_DATA(packed)
    size[0] = <uint64_t>BYTES_SIZE(packed)
    if size[0] % POINTER_SIZE != 0:
        raise ValueError("half a slot")
    return 0


# Changes `first` to before `stop` of a list, of a node that begins at index `base`.
cdef struct section:
    Py_ssize_t first
    Py_ssize_t stop
    uint64_t base


cdef int take_all(section *part, object changes) except -1:
    if not isinstance(changes, list):
        raise TypeError("changes must be a list")
    part.first = 0
    part.stop = len(<list>changes)
    part.base = 0
    return 0


cdef int take_section(section *part, object changes, object first, object stop,
                      object base) except -1:
    take_all(part, changes)
    part.stop = min(<Py_ssize_t>stop, part.stop)
    part.first = first
    if part.first < 0:
        raise ValueError(f"first out of range: {first}")
    return take(base, "base", &part.base)


cdef bytes changed_slots(uint64_t header, const unsigned char *had, uint64_t length, list changes,
                         const section *part):
    """The changed slots, after `header` bytes that the caller fills in."""
    cdef uint64_t size = length, kept, offset, run
    cdef Py_ssize_t at
    cdef unsigned char *slots
    cdef unsigned char *source
    cdef bytes result
    for at in range(part.first, part.stop):
        take_change(changes[at], part.base, &offset, &source, &run)
        size = max(size, offset + run)
    result = new_bytes(header + size)
    slots = <unsigned char *>BYTES_DATA(result) + header
    memcpy(slots, had, length)
    memset(slots + length, 0, size - length)
    for at in range(part.first, part.stop):
        take_change(changes[at], part.base, &offset, &source, &run)
        memcpy(slots + offset, source, run)
    kept = slots_trimmed(slots, size)
    return result if kept == size else bytes_of(slots - header, header + kept)


def put_slots(buffer, start, changes):
    """The packed pointers from byte start on, with changes (index, packed pointers) put in;
nulls fill the gaps, and none is left at the end."""
    cdef uint64_t first
    cdef section part
    cdef view taken
    take(start, "start", &first)
    view_take(&taken, buffer)
    try:
        if first > taken.size or (taken.size - first) % POINTER_SIZE != 0:
            raise ValueError("the buffer does not end with whole slots")
        take_all(&part, changes)
        return changed_slots(0, taken.data + first, taken.size - first, changes, &part)
    finally:
        view_drop(&taken)


cdef uint64_t leaves_in(const unsigned char *slots, uint64_t size) noexcept:
    """The blocks that a run of slots leads to; one slot counts whatever its weight."""
    if size == POINTER_SIZE:
        return slots_trimmed(slots, size) // POINTER_SIZE
    return packed_weight(slots, size // POINTER_SIZE)


cdef int64_t swap_run(const unsigned char *had, uint64_t length, object change, uint64_t base,
                      list gone) except? -1:
    """Append what a change of slots replaces to `gone`; the change of the weight."""
    cdef uint64_t offset, run, kept, before
    cdef unsigned char *source
    take_change(change, base, &offset, &source, &run)
    kept = min(run, length - offset) if offset < length else 0
    before = leaves_in(had + offset, kept)
    if before:
        gone.append(bytes_of(had + offset, kept))
    return <int64_t>leaves_in(source, run) - <int64_t>before


cdef bytes swapped_slots(uint64_t header, view *taken, uint64_t start, list changes,
                         const section *part, list gone, int64_t *gain):
    cdef Py_ssize_t at
    if start > taken.size or (taken.size - start) % POINTER_SIZE != 0:
        raise ValueError("the buffer does not end with whole slots")
    gain[0] = 0
    for at in range(part.first, part.stop):
        gain[0] += swap_run(taken.data + start, taken.size - start, changes[at], part.base, gone)
    return changed_slots(header, taken.data + start, taken.size - start, changes, part)


def swap_slots(buffer, start, changes):
    """Do the same where each pointer leads to one block. Returns (slots, what each change
replaced, without nulls alone, change of the weight)."""
    cdef uint64_t first
    cdef int64_t gain
    cdef list gone = []
    cdef section part
    cdef view taken
    take(start, "start", &first)
    take_all(&part, changes)
    view_take(&taken, buffer)
    try:
        slots = swapped_slots(0, &taken, first, changes, &part, gone, &gain)
    finally:
        view_drop(&taken)
    return slots, gone, gain


def swapped_node(pointer, kind, owner, old, had, changes, first, stop, base):
    """The lowest node `had` with changes `first` to before `stop` put in. That node begins at index
`base`; `old` is its packed pointer, or null. Returns (the packed pointer with the new weight, a node
for its block with header and checksum, what each change replaced). A node without slots has the
weight 0."""
    cdef node_header header
    cdef int64_t gain
    cdef uint64_t size
    cdef uint32_t blocks = 0
    cdef unsigned char *before = NULL
    cdef unsigned char *made
    cdef list gone = []
    cdef bytes place, node
    cdef section part
    cdef view taken
    take_header(&header, pointer, kind, 0, owner, 0)
    take_pointer(old, &before)
    take_section(&part, changes, first, stop, base)
    view_take(&taken, had)
    try:
        node = swapped_slots(NODE_HEADER, &taken, NODE_HEADER, changes, &part, gone, &gain)
    finally:
        view_drop(&taken)
    size = <uint64_t>BYTES_SIZE(node)
    node_seal(&header, <unsigned char *>BYTES_DATA(node), size)
    if size > NODE_HEADER:
        gain += max(<int64_t>packed_weight(before, 1), 1)
        if not 0 <= gain <= UINT32_MAX:
            raise ValueError(f"weight out of range: {gain}")
        blocks = <uint32_t>gain
    place = bytes_of(<unsigned char *>BYTES_DATA(pointer), POINTER_SIZE)
    made = <unsigned char *>BYTES_DATA(place)
    memcpy(made + POINTER_WEIGHT_AT, &blocks, sizeof(blocks))
    return place, node, gone


# --- packed directory leaves -------------------------------------------------------------------

cdef inline int take_leaf(view *taken, object raw, object count, leaf *found) except -1:
    take(count, "count", &found.count)
    view_take(taken, raw)
    found.raw = taken.data
    found.length = taken.size
    if leaf_check(found) != STATUS_OK:
        return fail_counted(taken, found.count, "entries")
    return 0


def leaf_find(raw, count, key, span, name):
    """Which of the entries with keys in [key, key + span) has the name; -1: none."""
    cdef uint64_t lowest, width
    cdef int64_t found
    cdef leaf searched
    cdef view taken, sought
    take(key, "key", &lowest)
    take(span, "span", &width)
    take_leaf(&taken, raw, count, &searched)
    try:
        view_take(&sought, name)
        found = leaf_search(&searched, lowest, width, sought.data, sought.size)
        view_drop(&sought)
    finally:
        view_drop(&taken)
    return found


cdef bytes leaf_entered(const leaf *old, uint64_t gone, object key, object span, object value,
                        object name):
    """The packed leaf with one entry more, and without entry `gone`; None: no key is free."""
    cdef uint64_t lowest, width, word
    cdef view added
    cdef bytes result = None
    take(key, "key", &lowest)
    take(span, "span", &width)
    take(value, "value", &word)
    view_take(&added, name)
    try:
        if not 1 <= added.size <= LEAF_NAME_MAX:
            raise ValueError(f"a name has 1 to {LEAF_NAME_MAX} bytes, not {added.size}")
        if leaf_free_key(old, gone, width, &lowest):
            result = new_bytes(leaf_size_with(old, gone, added.size))
            leaf_with(old, gone, lowest, word, added.data, added.size,
                      <unsigned char *>BYTES_DATA(result))
    finally:
        view_drop(&added)
    return result


def leaf_insert(raw, count, key, span, value, name):
    """The packed leaf with one entry more. It has the lowest free key in [key, key + span); None when
there is none."""
    cdef leaf old
    cdef view taken
    take_leaf(&taken, raw, count, &old)
    try:
        return leaf_entered(&old, old.count, key, span, value, name)
    finally:
        view_drop(&taken)


def leaf_move(raw, count, at, key, span, value, name):
    """The packed leaf with another entry instead of entry `at`; its key as for leaf_insert."""
    cdef uint64_t gone
    cdef leaf old
    cdef view taken
    take(at, "at", &gone)
    take_leaf(&taken, raw, count, &old)
    try:
        if gone >= old.count:
            raise ValueError(f"there is no entry {at!r}")
        return leaf_entered(&old, gone, key, span, value, name)
    finally:
        view_drop(&taken)


def leaf_remove(raw, count, at):
    """The packed leaf without one entry."""
    cdef uint64_t place
    cdef leaf old
    cdef view taken
    cdef bytes result
    take(at, "at", &place)
    take_leaf(&taken, raw, count, &old)
    try:
        if place >= old.count:
            raise ValueError(f"there is no entry {at!r}")
        result = new_bytes(leaf_size_without(&old, place))
        leaf_without(&old, place, <unsigned char *>BYTES_DATA(result))
    finally:
        view_drop(&taken)
    return result


def filter_index(ino):
    """The index of the bit of the open filter that lists an inode."""
    cdef uint64_t number
    take(ino, "ino", &number)
    return filter_bit(number)


def is_name(name):
    """Whether these bytes can be a name in a directory."""
    cdef bint fit
    cdef view taken
    view_take(&taken, name)
    fit = name_is_fit(taken.data, taken.size)
    view_drop(&taken)
    return fit


# --- records -----------------------------------------------------------------------------------

cdef struct column:  # one field of a record: a row of the plan that Layout makes
    uint16_t offset
    uint16_t width
    char code  # 'u', 's' (signed), 'b' (bytes)
    char unused


cdef inline int put_field(unsigned char *raw, const column *place, object value) except -1:
    cdef uint64_t word, above  # the bits that the field has no room for
    cdef int64_t signed
    if place.code == b'b':
        if not isinstance(value, bytes):
            raise StructError(f"bytes are wanted, not {value!r}")
        memcpy(raw + place.offset, BYTES_DATA(value),
               min(BYTES_SIZE(value), <Py_ssize_t>place.width))
        return 0
    if place.code == b's':
        signed = value
        word = <uint64_t>signed
        above = <uint64_t>(signed >> (8 * place.width - 1))
        above = 0 if above == UINT64_MAX else above
    else:
        word = value
        above = word >> (8 * place.width) if place.width < WORD_SIZE else 0
    if above != 0:
        raise OverflowError
    word_put(raw + place.offset, place.width, word)
    return 0


cdef int put_record(unsigned char *raw, uint64_t size, tuple values, bytes plan) except -1:
    """Pack a record into `size` bytes."""
    cdef Py_ssize_t at = 0, count = len(values)
    cdef const column *places = <const column *>BYTES_DATA(plan)
    if count * <Py_ssize_t>sizeof(column) != BYTES_SIZE(plan):
        raise StructError(f"a record of {BYTES_SIZE(plan) // <Py_ssize_t>sizeof(column)} fields "
                          f"is wanted, not of {count}")
    memset(raw, 0, size)
    try:
        for at in range(count):
            if places[at].offset + <uint64_t>places[at].width > size:
                raise ValueError("a field is outside of its record")
            put_field(raw, &places[at], values[at])
    except (OverflowError, TypeError):
        raise StructError(f"no integer that fits {places[at].width} bytes: "
                          f"{values[at]!r}") from None
    return 0


def packed_tuple(values, plan, size):
    """The bytes of a record, by a plan of its fields; raises struct.error if one does not fit."""
    cdef uint64_t wide
    cdef bytes result
    if not isinstance(values, tuple) or not PyBytes_CheckExact(plan):
        raise TypeError("a tuple and a plan are wanted")
    take_limited(size, "size", 0, UINT16_MAX, &wide)
    result = new_bytes(wide)
    put_record(<unsigned char *>BYTES_DATA(result), wide, <tuple>values, <bytes>plan)
    return result


def record_node(pointer, kind, owner, values, plan, size, more=b"", rest=b""):
    """A node for the block of a packed pointer: its header with the checksum, then a record, packed
by a plan of its fields, and the parts."""
    cdef node_header header
    cdef uint64_t wide, second = bytes_size(more), third = bytes_size(rest)
    cdef unsigned char *node
    cdef bytes result
    if not isinstance(values, tuple) or not PyBytes_CheckExact(plan):
        raise TypeError("a tuple and a plan are wanted")
    take_header(&header, pointer, kind, 0, owner, 0)
    take_limited(size, "size", 0, UINT16_MAX, &wide)
    if second + third > UINT32_MAX - NODE_HEADER - wide:
        raise ValueError(f"{second + third} bytes are too many for a node")
    result = new_bytes(NODE_HEADER + wide + second + third)
    node = <unsigned char *>BYTES_DATA(result)
    put_record(node + NODE_HEADER, wide, <tuple>values, <bytes>plan)
    memcpy(node + NODE_HEADER + wide, BYTES_DATA(more), second)
    memcpy(node + NODE_HEADER + wide + second, BYTES_DATA(rest), third)
    node_seal(&header, node, NODE_HEADER + wide + second + third)
    return result


def placed_tuple(values, places, new):
    """A tuple of the same type with `new` values at these places."""
    cdef Py_ssize_t at
    if not (isinstance(values, tuple) and isinstance(places, tuple) and isinstance(new, tuple)):
        raise TypeError("three tuples are wanted")
    if len(<tuple>places) != len(<tuple>new):
        raise ValueError("as many values as places are wanted")
    copy = tuple_copy(values)
    for at in range(len(<tuple>places)):
        tuple_put(copy, (<tuple>places)[at], (<tuple>new)[at])
    return copy


def picked_tuple(model, places, first, second):
    """A tuple of the type of `model` with the items at these places of two tuples in a row."""
    cdef Py_ssize_t at, place, before
    if not (isinstance(model, tuple) and isinstance(places, tuple) and isinstance(first, tuple)
            and isinstance(second, tuple)):
        raise TypeError("four tuples are wanted")
    if len(<tuple>places) != len(<tuple>model):
        raise ValueError("as many places as items are wanted")
    before = len(<tuple>first)
    copy = tuple_copy(model)
    for at in range(len(<tuple>places)):
        place = (<tuple>places)[at]
        if place < 0 or place >= before + len(<tuple>second):
            raise IndexError(f"there is no item {place}")
        tuple_set(copy, at, (<tuple>first)[place] if place < before
                  else (<tuple>second)[place - before])
    return copy


def changed_tuple(values, places, changes):
    """A tuple of the same type with other values at the places that names stand for."""
    if not (isinstance(values, tuple) and isinstance(places, dict) and isinstance(changes, dict)):
        raise TypeError("a tuple, places by name and values by name are wanted")
    copy = tuple_copy(values)
    tuple_change(copy, <dict>places, <dict>changes)
    return copy


# --- requests of FUSE --------------------------------------------------------------------------

@cython.final
cdef class Requests:
    """Requests(fd, buffer, kind)
--

The requests of a FUSE descriptor that does not block. Each one is read into the buffer; kind
is the class of callers: a tuple of uid, gid, pid and 0."""

    cdef requests queue
    cdef view buffer
    cdef object blank  # a caller without values
    cdef object caller  # of the last request
    cdef uint32_t uid, gid, pid  # of that caller

    def __cinit__(self, fd, buffer, kind):
        cdef uint64_t descriptor
        take_limited(fd, "fd", 0, INT_MAX, &descriptor)
        view_buffer(&self.buffer, buffer, PyBUF_WRITABLE)
        self.queue.file = <int>descriptor
        self.queue.into = self.buffer.data
        self.queue.room = self.buffer.size
        if self.buffer.size < sizeof(fuse_in_header):
            raise ValueError("the buffer has no room for a request")
        self.caller = self.blank = kind(0, 0, 0, 0)

    def __dealloc__(self):
        view_drop(&self.buffer)

    cdef int learn_caller(self, const fuse_in_header *header) except -1:
        """Keep the caller of a request; the one before it is mostly the same."""
        caller = tuple_copy(self.blank)
        tuple_put(caller, 0, header.uid)
        tuple_put(caller, 1, header.gid)
        tuple_put(caller, 2, header.pid)
        self.caller, self.uid, self.gid, self.pid = caller, header.uid, header.gid, header.pid
        return 0

    def read(self, spin, nap):
        """Read a request: (size, opcode, unique, node, caller); None if none comes in time."""
        cdef uint64_t awake, asleep
        cdef fuse_in_header header
        cdef int code = requests_read(&self.queue)
        if code == EAGAIN:
            take(spin, "spin", &awake)
            take_limited(nap, "nap", 0, INT_MAX, &asleep)
            while True:
                with nogil:
                    code = requests_await(&self.queue, awake, <int>asleep)
                if code != EINTR:
                    break
                PyErr_CheckSignals()
            if code == EAGAIN:
                return None
        if code != 0:
            raise OSError(code, strerror(code).decode())
        memcpy(&header, self.queue.into, sizeof(header))
        if header.pid != self.pid or header.uid != self.uid or header.gid != self.gid:
            self.learn_caller(&header)
        return self.queue.size, header.opcode, header.unique, header.nodeid, self.caller

    def answer(self, unique, body):
        """Write the answer to a request: bytes, or None for an empty body."""
        cdef uint64_t request
        cdef view taken
        cdef int code
        take(unique, "unique", &request)
        if body is None:
            code = requests_answer(&self.queue, request, 0, NULL, 0)
        else:
            view_take(&taken, body)
            code = requests_answer(&self.queue, request, 0, taken.data, taken.size)
            view_drop(&taken)
        if code != 0:
            raise OSError(code, strerror(code).decode())

    def refuse(self, unique, error):
        """Write the answer to a request: an errno."""
        cdef uint64_t request, number
        cdef int code
        take(unique, "unique", &request)
        take_limited(error, "error", 0, INT_MAX, &number)
        code = requests_answer(&self.queue, request, <int>number, NULL, 0)
        if code != 0:
            raise OSError(code, strerror(code).decode())


cdef int take_half(object value, uint32_t *out) except -1:
    cdef uint64_t word
    take_limited(value, "attribute", 0, UINT32_MAX, &word)
    out[0] = <uint32_t>word
    return 0


cdef int take_attributes(fuse_attr *attr, object values, object number, object block) except -1:
    cdef tuple fields
    if not isinstance(values, tuple) or len(<tuple>values) != 11:
        raise ValueError("11 attributes are wanted")
    fields = <tuple>values
    take(number, "number", &attr.ino)
    take_half(fields[1], &attr.mode)
    take_half(fields[2], &attr.nlink)
    take_half(fields[3], &attr.uid)
    take_half(fields[4], &attr.gid)
    take_half(fields[5], &attr.rdev)
    take(fields[6], "size", &attr.size)
    take(fields[7], "blocks", &attr.blocks)
    requests_time(fields[8], &attr.atime, &attr.atimensec)
    requests_time(fields[9], &attr.mtime, &attr.mtimensec)
    requests_time(fields[10], &attr.ctime, &attr.ctimensec)
    return take_half(block, &attr.blksize)


def packed_entry(node, number, attributes, block):
    """The answer to LOOKUP: node, and these attributes, with number as st_ino; kept for 0 s."""
    cdef fuse_entry_out entry
    memset(&entry, 0, sizeof(entry))
    take(node, "node", &entry.nodeid)
    take_attributes(&entry.attr, attributes, number, block)
    return bytes_of(<const unsigned char *>&entry, sizeof(entry))


def packed_attributes(number, attributes, block):
    """The answer to GETATTR: these attributes, with number as st_ino; kept for 0 s."""
    cdef fuse_attr_out answer
    memset(&answer, 0, sizeof(answer))
    take_attributes(&answer.attr, attributes, number, block)
    return bytes_of(<const unsigned char *>&answer, sizeof(answer))


def cut(buffer, start, stop):
    """Bytes [start, stop) of the buffer, as far as it has them."""
    cdef uint64_t first, last
    cdef view taken
    cdef bytes result
    take(start, "start", &first)
    take(stop, "stop", &last)
    view_take(&taken, buffer)
    last = min(last, taken.size)
    first = min(first, last)
    try:
        result = bytes_of(taken.data + first, last - first)
    finally:
        view_drop(&taken)
    return result
