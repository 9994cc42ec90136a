/* CRC-32C (Castagnoli), little-endian, with the processor's instruction where there is one.
 *
 * The instruction takes 8 bytes and has a latency of three cycles.  So the code cuts a long buffer
 * into three lanes that are in flight at once.  To join two remainders it appends LANE zero bytes
 * to the first one, with four table look-ups.
 */
#include "crc32c.h"

#include <stdbool.h>
#include <string.h>

#if defined(__x86_64__)
#include <nmmintrin.h>
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

static uint32_t crc_slices[8][256]; /* remainder of one byte followed by 0..7 zero bytes */
static uint32_t crc_append[4][256]; /* remainder followed by CRC_LANE zero bytes, by byte */
static bool crc_instruction;

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

void crc_prepare(void)
{
    if (crc_slices[0][1] != 0)
        return; /* a second import finds the tables made */
    crc_fill_slices();
    crc_fill_append();
#if defined(__x86_64__)
    crc_instruction = __builtin_cpu_supports("sse4.2");
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

/* The usual form: register starts as all ones (or a previous result), result is inverted. */
uint32_t crc32c_of(uint32_t seed, const unsigned char *data, size_t length)
{
#ifdef CRC_TARGET
    if (crc_instruction)
        return ~crc_by_instruction(~seed, data, length);
#endif
    return ~crc_by_table(~seed, data, length);
}

uint32_t crc32c_by_table_of(uint32_t seed, const unsigned char *data, size_t length)
{
    return ~crc_by_table(~seed, data, length);
}
