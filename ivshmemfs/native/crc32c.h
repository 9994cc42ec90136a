/* CRC-32C (Castagnoli), little-endian, with the processor's instructions where there are some. */
#ifndef IVSHMEMFS_CRC32C_H
#define IVSHMEMFS_CRC32C_H

#include <stddef.h>
#include <stdint.h>

void crc_prepare(void); /* once, before the others; again is harmless */

/* The usual form: the register starts as all ones (or a previous result), the result is inverted. */
uint32_t crc32c_of(uint32_t seed, const unsigned char *data, size_t length);

/* The same as on a processor with the CRC instruction alone, or without it; for tests. */
uint32_t crc32c_by_instruction_of(uint32_t seed, const unsigned char *data, size_t length);
uint32_t crc32c_by_table_of(uint32_t seed, const unsigned char *data, size_t length);

#endif
