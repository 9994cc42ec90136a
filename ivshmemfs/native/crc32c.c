/* CRC-32C (Castagnoli), little-endian, with the processor's instructions where there are some.
 *
 * The instruction takes 8 bytes and has a latency of three cycles.  So the code cuts a long buffer
 * into three lanes that are in flight at once.  To join two remainders it appends LANE zero bytes
 * to the first one, with four table look-ups.
 *
 * Processors with wide carry-less multiplication take WIDE bytes at once, in less than half of the
 * time.  The remainder of a vector's product with x^n, where n is a number of bits, takes the place
 * of the vector n bits further on.
 */
#include "crc32c.h"

#include <stdbool.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#define CRC_TARGET __attribute__((target("sse4.2")))
#define CRC_WORD(crc, word) ((uint32_t)_mm_crc32_u64((crc), (word)))
#define CRC_BYTE(crc, byte) ((uint32_t)_mm_crc32_u8((crc), (byte)))
#elif defined(__aarch64__)
#include <arm_acle.h>
#include <sys/auxv.h>
#define CRC_TARGET __attribute__((target("+crc")))
#define CRC_WORD(crc, word) __crc32cd((crc), (word))
#define CRC_BYTE(crc, byte) __crc32cb((crc), (byte))
#endif

#define CRC_POLYNOMIAL 0x82f63b78u /* reflected */
#define CRC_LANE 256
#define CRC_WIDE 256 /* bytes of four vectors */

static uint32_t crc_slices[8][256]; /* remainder of one byte followed by 0..7 zero bytes */
static uint32_t crc_append[4][256]; /* remainder followed by CRC_LANE zero bytes, by byte */
static bool crc_instruction;
#if defined(__x86_64__)
static bool crc_wide;
/* For the low and the high half of 16 bytes: x^n that moves them on by this many bytes. */
static uint64_t crc_move_wide[2], crc_move_64[2], crc_move_16[2];
#endif

static void crc_fill_slices(void)
{
    for (uint32_t byte = 0; byte < 256; byte++) {
        uint32_t crc = byte;
        for (int bit = 0; bit < 8; bit++)
            crc = (crc >> 1) ^ ((crc & 1) ? CRC_POLYNOMIAL : 0);
        crc_slices[0][byte] = crc;
    }
    for (int slice = 1; slice < 8; slice++)
        for (int byte = 0; byte < 256; byte++) {
            uint32_t crc = crc_slices[slice - 1][byte];
            crc_slices[slice][byte] = (crc >> 8) ^ crc_slices[0][crc & 0xff];
        }
}

/* Appending zeros is linear over the bits, so 32 single bits give the whole table. */
static void crc_fill_append(void)
{
    for (int bit = 0; bit < 32; bit++) {
        uint32_t crc = 1u << bit;
        for (int count = 0; count < CRC_LANE; count++)
            crc = (crc >> 8) ^ crc_slices[0][crc & 0xff];
        for (int byte = 0; byte < 256; byte++)
            if (byte & (1 << (bit & 7)))
                crc_append[bit >> 3][byte] ^= crc;
    }
}

#if defined(__x86_64__)
/* The remainder of x^n, for the product with a half of 16 bytes that moves on by `bytes`. */
static uint64_t crc_power(int bytes, int further)
{
    uint32_t crc = 1u << 31;
    for (int bit = 8 * bytes + further - 33; bit > 0; bit--)
        crc = (crc >> 1) ^ ((crc & 1) ? CRC_POLYNOMIAL : 0);
    return crc;
}

static void crc_fill_moves(uint64_t *moves, int bytes)
{
    moves[0] = crc_power(bytes, 64); /* the high half follows */
    moves[1] = crc_power(bytes, 0);
}
#endif

void crc_prepare(void)
{
    if (crc_slices[0][1] != 0)
        return; /* a second import finds the tables made */
    crc_fill_slices();
    crc_fill_append();
#if defined(__x86_64__)
    crc_instruction = __builtin_cpu_supports("sse4.2");
    crc_wide = crc_instruction && __builtin_cpu_supports("avx512f") &&
               __builtin_cpu_supports("vpclmulqdq") && __builtin_cpu_supports("pclmul");
    crc_fill_moves(crc_move_wide, CRC_WIDE);
    crc_fill_moves(crc_move_64, 64);
    crc_fill_moves(crc_move_16, 16);
#elif defined(__aarch64__)
    crc_instruction = (getauxval(AT_HWCAP) & (1u << 7)) != 0; /* HWCAP_CRC32 */
#endif
}

static uint32_t crc_by_table(uint32_t crc, const unsigned char *data, size_t length)
{
    for (; length >= 8; data += 8, length -= 8) {
        uint64_t word;
        memcpy(&word, data, 8);
        word ^= crc;
        crc = 0;
        for (int byte = 0; byte < 8; byte++)
            crc ^= crc_slices[7 - byte][(word >> (8 * byte)) & 0xff];
    }
    for (; length > 0; data++, length--)
        crc = (crc >> 8) ^ crc_slices[0][(crc ^ *data) & 0xff];
    return crc;
}

#ifdef CRC_TARGET
static inline uint32_t crc_after_lane(uint32_t crc)
{
    return crc_append[0][crc & 0xff] ^ crc_append[1][(crc >> 8) & 0xff] ^
           crc_append[2][(crc >> 16) & 0xff] ^ crc_append[3][crc >> 24];
}

static inline uint64_t crc_word_at(const unsigned char *data)
{
    uint64_t word;
    memcpy(&word, data, 8);
    return word;
}

CRC_TARGET static uint32_t crc_by_instruction(uint32_t crc, const unsigned char *data,
                                              size_t length)
{
    for (; length >= 3 * CRC_LANE; data += 3 * CRC_LANE, length -= 3 * CRC_LANE) {
        uint32_t second = 0, third = 0;
        for (int at = 0; at < CRC_LANE; at += 8) {
            crc = CRC_WORD(crc, crc_word_at(data + at));
            second = CRC_WORD(second, crc_word_at(data + CRC_LANE + at));
            third = CRC_WORD(third, crc_word_at(data + 2 * CRC_LANE + at));
        }
        crc = crc_after_lane(crc_after_lane(crc) ^ second) ^ third;
    }
    for (; length >= 8; data += 8, length -= 8)
        crc = CRC_WORD(crc, crc_word_at(data));
    for (; length > 0; data++, length--)
        crc = CRC_BYTE(crc, *data);
    return crc;
}
#endif

#if defined(__x86_64__)
#define WIDE_TARGET __attribute__((target("avx512f,vpclmulqdq,pclmul,sse4.2")))

WIDE_TARGET static inline __m512i crc_moves(const uint64_t *moves)
{
    return _mm512_broadcast_i32x4(_mm_loadu_si128((const void *)moves));
}

/* `vector`, moved on to where `next` is, and added to it. */
WIDE_TARGET static inline __m512i crc_onto(__m512i vector, __m512i moves, __m512i next)
{
    const __m512i low = _mm512_clmulepi64_epi128(vector, moves, 0x00);
    const __m512i high = _mm512_clmulepi64_epi128(vector, moves, 0x11);
    return _mm512_xor_si512(_mm512_xor_si512(low, high), next);
}

WIDE_TARGET static inline __m128i crc_onto_16(__m128i part, __m128i next)
{
    const __m128i moves = _mm_loadu_si128((const void *)crc_move_16);
    const __m128i low = _mm_clmulepi64_si128(part, moves, 0x00);
    const __m128i high = _mm_clmulepi64_si128(part, moves, 0x11);
    return _mm_xor_si128(_mm_xor_si128(low, high), next);
}

/* At least CRC_WIDE bytes. */
WIDE_TARGET static uint32_t crc_by_vectors(uint32_t crc, const unsigned char *data, size_t length)
{
    const __m512i wide = crc_moves(crc_move_wide), one = crc_moves(crc_move_64);
    __m512i a = _mm512_loadu_si512(data), b = _mm512_loadu_si512(data + 64);
    __m512i c = _mm512_loadu_si512(data + 128), d = _mm512_loadu_si512(data + 192);
    __m128i part;

    a = _mm512_xor_si512(a, _mm512_zextsi128_si512(_mm_cvtsi32_si128((int)crc)));
    for (data += CRC_WIDE, length -= CRC_WIDE; length >= CRC_WIDE;
         data += CRC_WIDE, length -= CRC_WIDE) {
        a = crc_onto(a, wide, _mm512_loadu_si512(data));
        b = crc_onto(b, wide, _mm512_loadu_si512(data + 64));
        c = crc_onto(c, wide, _mm512_loadu_si512(data + 128));
        d = crc_onto(d, wide, _mm512_loadu_si512(data + 192));
    }
    d = crc_onto(crc_onto(crc_onto(a, one, b), one, c), one, d);
    for (; length >= 64; data += 64, length -= 64)
        d = crc_onto(d, one, _mm512_loadu_si512(data));
    part = crc_onto_16(_mm512_castsi512_si128(d), _mm512_extracti32x4_epi32(d, 1));
    part = crc_onto_16(part, _mm512_extracti32x4_epi32(d, 2));
    part = crc_onto_16(part, _mm512_extracti32x4_epi32(d, 3));
    crc = CRC_WORD(0, (uint64_t)_mm_cvtsi128_si64(part));
    crc = CRC_WORD(crc, (uint64_t)_mm_extract_epi64(part, 1));
    return crc_by_instruction(crc, data, length);
}
#endif

/* The usual form: register starts as all ones (or a previous result), result is inverted. */
uint32_t crc32c_of(uint32_t seed, const unsigned char *data, size_t length)
{
#if defined(__x86_64__)
    if (crc_wide && length >= CRC_WIDE)
        return ~crc_by_vectors(~seed, data, length);
#endif
    return crc32c_by_instruction_of(seed, data, length);
}

uint32_t crc32c_by_instruction_of(uint32_t seed, const unsigned char *data, size_t length)
{
#ifdef CRC_TARGET
    if (crc_instruction)
        return ~crc_by_instruction(~seed, data, length);
#endif
    return crc32c_by_table_of(seed, data, length);
}

uint32_t crc32c_by_table_of(uint32_t seed, const unsigned char *data, size_t length)
{
    return ~crc_by_table(~seed, data, length);
}
