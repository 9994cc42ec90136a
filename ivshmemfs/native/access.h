/* Accesses to the words and bytes of a mapping: fences, compare-and-swap, copies.
 *
 * There are three kinds of mapping.  ACCESS_NORMAL is ordinary cached memory: plain copies and the
 * cheap barriers of the architecture's memory model.  ACCESS_WRITE_COMBINING is weakly ordered and
 * not cached: it needs real fences, and streaming loads where the processor has them.
 * ACCESS_DEVICE (ARM64 device memory) faults on all but naturally aligned words, so it must not be
 * the argument of a library copy.  Every access there is volatile, so the compiler cannot merge two
 * of them.
 */
#ifndef IVSHMEMFS_ACCESS_H
#define IVSHMEMFS_ACCESS_H

#if __SIZEOF_POINTER__ < 8
#error "words in the region are 64 bits wide; a 32-bit program tears them"
#endif
#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "words in the region are little-endian; this machine is not"
#endif

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <emmintrin.h>
#include <smmintrin.h>
#elif defined(__aarch64__)
#include <sys/auxv.h>
#endif

enum { ACCESS_NORMAL = 0, ACCESS_DEVICE = 1, ACCESS_WRITE_COMBINING = 2 };

/* x86: streaming loads (SSE4.1); ARM64: single-instruction CAS.  mapping.c holds it. */
extern bool access_has_extras;

static inline void access_prepare(void)
{
#if defined(__x86_64__)
    access_has_extras = __builtin_cpu_supports("sse4.1");
#elif defined(__aarch64__)
    access_has_extras = (getauxval(AT_HWCAP) & (1u << 8)) != 0; /* HWCAP_ATOMICS */
#endif
}

/* --- fences ----------------------------------------------------------------------------------- */

static inline void compiler_barrier(void)
{
    __asm__ volatile("" ::: "memory");
}

static inline void fence_full(void)
{
#if defined(__x86_64__)
    __asm__ volatile("mfence" ::: "memory");
#elif defined(__aarch64__)
    __asm__ volatile("dmb sy" ::: "memory");
#else
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
#endif
}

/* Loads before it are done before anything after it. */
static inline void fence_acquire(int access)
{
#if defined(__x86_64__)
    if (access == ACCESS_NORMAL)
        compiler_barrier();
    else
        fence_full();
#elif defined(__aarch64__)
    (void)access;
    __asm__ volatile("dmb ld" ::: "memory");
#else
    (void)access;
    fence_full();
#endif
}

/* Everything before it is visible before any store after it. */
static inline void fence_release(int access)
{
#if defined(__x86_64__)
    if (access == ACCESS_NORMAL)
        compiler_barrier();
    else
        fence_full();
#else
    (void)access;
    fence_full();
#endif
}

/* --- words ------------------------------------------------------------------------------------ */

/* Single accesses that the compiler can neither merge nor split.  On ARM64 they do not write the
 * address back.  A hypervisor has to emulate an access to a BAR that is switched off.  It can
 * emulate the plain form only, and stops the guest at any other. */
#if defined(__aarch64__)
#define DEFINE_ACCESS(type, name, load, store)                                                     \
    static inline type name##_peek(const void *address)                                            \
    {                                                                                              \
        type value;                                                                                \
        __asm__ volatile(load " [%1]" : "=r"(value) : "r"(address) : "memory");                    \
        return value;                                                                              \
    }                                                                                              \
    static inline void name##_poke(void *address, type value)                                      \
    {                                                                                              \
        __asm__ volatile(store " [%1]" : : "r"(value), "r"(address) : "memory");                   \
    }
#else
#define DEFINE_ACCESS(type, name, load, store)                                                     \
    static inline type name##_peek(const void *address)                                            \
    {                                                                                              \
        return *(const volatile type *)address;                                                    \
    }                                                                                              \
    static inline void name##_poke(void *address, type value)                                      \
    {                                                                                              \
        *(volatile type *)address = value;                                                         \
    }
#endif

DEFINE_ACCESS(uint64_t, word, "ldr %0,", "str %0,")
DEFINE_ACCESS(uint32_t, half_word, "ldr %w0,", "str %w0,")
DEFINE_ACCESS(uint16_t, quarter_word, "ldrh %w0,", "strh %w0,")
DEFINE_ACCESS(uint8_t, byte, "ldrb %w0,", "strb %w0,")

/* One load across two words, which the compiler cannot split into aligned ones. */
static inline uint64_t unaligned_peek(const void *address)
{
    uint64_t value;
#if defined(__x86_64__)
    __asm__ volatile("movq (%1), %0" : "=r"(value) : "r"(address) : "memory");
#elif defined(__aarch64__)
    __asm__ volatile("ldr %0, [%1]" : "=r"(value) : "r"(address) : "memory");
#else
    memcpy(&value, address, sizeof value);
#endif
    return value;
}

static inline uint64_t word_load(int access, const void *address)
{
    uint64_t value = word_peek(address);
    fence_acquire(access);
    return value;
}

/* The second fence pushes the word out of a write-combining buffer, where it could linger. */
static inline void word_store(int access, void *address, uint64_t value)
{
    fence_release(access);
    word_poke(address, value);
    if (access != ACCESS_NORMAL)
        fence_full();
}

#define EXCLUSIVE_ATTEMPTS (1u << 20)

/* Compare-and-swap that orders cached memory fully.  False when the mapping cannot do it: ARM64
 * gives no promise for exclusives outside cached memory, and they may fail for ever. */
static inline bool word_swap(void *address, uint64_t expected, uint64_t value, uint64_t *previous)
{
#if defined(__aarch64__)
    if (access_has_extras) {
        uint64_t seen = expected;
        __asm__ volatile(".arch_extension lse\n\tcasal %0, %2, [%1]"
                         : "+r"(seen)
                         : "r"(address), "r"(value)
                         : "memory");
        *previous = seen;
        return true;
    }
    for (uint32_t attempt = 0; attempt < EXCLUSIVE_ATTEMPTS; attempt++) {
        uint64_t seen;
        uint32_t failed;
        __asm__ volatile("ldaxr %0, [%2]\n\t"
                         "mov %w1, #0\n\t"
                         "cmp %0, %3\n\t"
                         "b.ne 1f\n\t"
                         "stlxr %w1, %4, [%2]\n"
                         "1:"
                         : "=&r"(seen), "=&r"(failed)
                         : "r"(address), "r"(expected), "r"(value)
                         : "memory", "cc");
        if (!failed) {
            *previous = seen;
            return true;
        }
    }
    return false;
#else
    *previous = expected;
    __atomic_compare_exchange_n((uint64_t *)address, previous, value, false, __ATOMIC_SEQ_CST,
                                __ATOMIC_SEQ_CST);
    return true;
#endif
}

/* Compare-and-swap is ordered by itself on x86 cached memory; everywhere else fence around it. */
static inline void fence_around_swap(int access)
{
#if defined(__x86_64__)
    if (access == ACCESS_NORMAL)
        return;
#else
    (void)access;
#endif
    fence_full();
}

/* --- copies out of the region ----------------------------------------------------------------- */

/* Bytes up to the next multiple of 8, by the largest naturally aligned access that fits. */
#define EDGE_STEP(address, length)                                                                 \
    ((length) >= 4 && ((uintptr_t)(address)&3) == 0   ? 4                                          \
     : (length) >= 2 && ((uintptr_t)(address)&1) == 0 ? 2                                          \
                                                      : 1)

static inline size_t edge_load(unsigned char *to, const unsigned char *from, size_t length)
{
    size_t step = EDGE_STEP(from, length);
    if (step == 4) {
        uint32_t value = half_word_peek(from);
        memcpy(to, &value, 4);
    } else if (step == 2) {
        uint16_t value = quarter_word_peek(from);
        memcpy(to, &value, 2);
    } else {
        *to = byte_peek(from);
    }
    return step;
}

static inline void device_load(unsigned char *to, const unsigned char *from, size_t length)
{
    while (length > 0 && (((uintptr_t)from & 7) != 0 || length < 8)) {
        size_t step = edge_load(to, from, length);
        to += step, from += step, length -= step;
    }
    for (; length >= 8; to += 8, from += 8, length -= 8) {
        uint64_t value = word_peek(from);
        memcpy(to, &value, 8);
    }
    while (length > 0) {
        size_t step = edge_load(to, from, length);
        to += step, from += step, length -= step;
    }
}

#if defined(__x86_64__)
/* A plain load from write-combining memory fetches one word a bus access; this fetches a line. */
__attribute__((target("sse4.1"))) static inline void stream_load(unsigned char *to,
                                                          const unsigned char *from, size_t length)
{
    size_t head = (size_t)(-(uintptr_t)from & 15);
    if (head > length)
        head = length;
    device_load(to, from, head);
    to += head, from += head, length -= head;
    for (; length >= 64; to += 64, from += 64, length -= 64) {
        __m128i *line = (__m128i *)(uintptr_t)from;
        __m128i a = _mm_stream_load_si128(line);
        __m128i b = _mm_stream_load_si128(line + 1);
        __m128i c = _mm_stream_load_si128(line + 2);
        __m128i d = _mm_stream_load_si128(line + 3);
        _mm_storeu_si128((__m128i *)to, a);
        _mm_storeu_si128((__m128i *)(to + 16), b);
        _mm_storeu_si128((__m128i *)(to + 32), c);
        _mm_storeu_si128((__m128i *)(to + 48), d);
    }
    device_load(to, from, length);
}
#endif

static inline void copy_out(int access, void *to, const void *from, size_t length)
{
    if (access == ACCESS_DEVICE) {
        device_load(to, from, length);
        return;
    }
#if defined(__x86_64__)
    if (access == ACCESS_WRITE_COMBINING && access_has_extras) {
        fence_full(); /* streaming loads may be served from a line buffer filled earlier */
        stream_load(to, from, length);
        return;
    }
#endif
    memcpy(to, from, length);
}

/* --- copies into the region ------------------------------------------------------------------- */

static inline size_t edge_store(unsigned char *to, const unsigned char *from, size_t length)
{
    size_t step = EDGE_STEP(to, length);
    if (step == 4) {
        uint32_t value;
        memcpy(&value, from, 4);
        half_word_poke(to, value);
    } else if (step == 2) {
        uint16_t value;
        memcpy(&value, from, 2);
        quarter_word_poke(to, value);
    } else {
        byte_poke(to, *from);
    }
    return step;
}

static inline void device_store(unsigned char *to, const unsigned char *from, size_t length)
{
    while (length > 0 && (((uintptr_t)to & 7) != 0 || length < 8)) {
        size_t step = edge_store(to, from, length);
        to += step, from += step, length -= step;
    }
    for (; length >= 8; to += 8, from += 8, length -= 8) {
        uint64_t value;
        memcpy(&value, from, 8);
        word_poke(to, value);
    }
    while (length > 0) {
        size_t step = edge_store(to, from, length);
        to += step, from += step, length -= step;
    }
}

static inline void copy_in(int access, void *to, const void *from, size_t length)
{
    if (access == ACCESS_DEVICE)
        device_store(to, from, length);
    else
        memcpy(to, from, length);
}

/* Store to cached memory, but past the caches; the caller fences before it publishes the bytes. */
static inline void stream_in(unsigned char *to, const unsigned char *from, size_t length)
{
#if defined(__x86_64__)
    size_t head = (size_t)(-(uintptr_t)to & 63);
    if (head > length)
        head = length;
    memcpy(to, from, head);
    to += head, from += head, length -= head;
    for (; length >= 64; to += 64, from += 64, length -= 64) {
        __m128i a = _mm_loadu_si128((const __m128i *)from);
        __m128i b = _mm_loadu_si128((const __m128i *)(from + 16));
        __m128i c = _mm_loadu_si128((const __m128i *)(from + 32));
        __m128i d = _mm_loadu_si128((const __m128i *)(from + 48));
        __m128i *line = (__m128i *)(uintptr_t)to;
        _mm_stream_si128(line, a);
        _mm_stream_si128(line + 1, b);
        _mm_stream_si128(line + 2, c);
        _mm_stream_si128(line + 3, d);
    }
#endif
    memcpy(to, from, length);
}

static inline void clear_in(int access, unsigned char *to, size_t length)
{
    static const unsigned char zeros[256];

    if (access != ACCESS_DEVICE) {
        memset(to, 0, length);
        return;
    }
    while (length > 0) {
        size_t step = length < sizeof zeros ? length : sizeof zeros;
        device_store(to, zeros, step);
        to += step, length -= step;
    }
}

#endif
