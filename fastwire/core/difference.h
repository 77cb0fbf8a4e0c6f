/* A text told as what differs from one that is like it: the headers of a kernel's messages have their session, their
 * version and most of their date in common, and each other's names at the same places.
 *
 * A difference is a sequence of steps. Of each: how many bytes are the same, how many of the other text are passed by
 * then, and how many new ones follow, which lie behind these three numbers of one byte each. Who has the other text
 * and the length of the first can read it. */
#ifndef FW_DIFFERENCE_H
#define FW_DIFFERENCE_H

#include "text.h"

#define FW_STEP 3 /* bytes, beside what is new */
#define FW_MOST 255 /* of each number in a step */

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__ && !defined(FW_PORTABLE)
#define FW_STRIDES 1 /* the lowest byte of eight is the first */
#endif

/* How many bytes of both are the same. */
static inline size_t fw_in_common(const uint8_t *a, const uint8_t *b, size_t most) {
    size_t n = 0;
#ifdef FW_STRIDES
    for (; most - n >= 8; n += 8) {
        uint64_t differ = fw_load64(a + n) ^ fw_load64(b + n);
        if (differ) return n + (size_t)__builtin_ctzll(differ) / 8;
    }
#endif
    while (n < most && a[n] == b[n]) n++;
    return n;
}

/* How many bytes stand before the next quote: there two texts that differ are alike again. */
static inline size_t fw_to_quote(const uint8_t *p, size_t size) {
    size_t most = size < FW_MOST ? size : FW_MOST, n = 0;
#ifdef FW_STRIDES
    for (; most - n >= 8; n += 8) {
        uint64_t x = fw_load64(p + n) ^ FW_EACH_BYTE('"');
        uint64_t hit = (x - FW_EACH_BYTE(1)) & ~x & FW_HIGH_BITS; /* its lowest bit is right */
        if (hit) return n + (size_t)__builtin_ctzll(hit) / 8;
    }
#endif
    while (n < most && p[n] != '"') n++;
    return n;
}

/* Writes how `text` differs from `other`, and returns how long that is; 0 where it is longer than `room`. Whatever they
 * are, it is linear in both: a step passes what it looks at, but for a byte of each. It takes FW_STEP bytes of the room,
 * so that a short text costs little beside a long one. */
static size_t fw_difference(uint8_t *out, size_t room, const uint8_t *other, size_t other_size, const uint8_t *text,
                            size_t size) {
    const uint8_t *other_end = other + other_size, *end = text + size;
    uint8_t *start = out;
    while (text < end) {
        size_t left = (size_t)(end - text), others_left = (size_t)(other_end - other);
        size_t most = left < others_left ? left : others_left;
        size_t same = fw_in_common(other, text, most < FW_MOST ? most : FW_MOST);
        size_t passed = 0, new_ones = 0;
        if (same < FW_MOST) {
            passed = fw_to_quote(other + same, others_left - same);
            new_ones = fw_to_quote(text + same, left - same);
            /* Where nothing is left of the other one, its quote is new too. */
            if (others_left == same && new_ones == 0 && left > same) new_ones = 1;
        }
        if ((size_t)(out - start) + FW_STEP + new_ones > room) return 0;
        *out++ = (uint8_t)same, *out++ = (uint8_t)passed, *out++ = (uint8_t)new_ones;
        memcpy(out, text + same, new_ones);
        out += new_ones;
        text += same + new_ones;
        other += same + passed;
    }
    return (size_t)(out - start);
}

/* Writes a text of `size` bytes. */
static void fw_from_difference(uint8_t *out, size_t size, const uint8_t *other, const uint8_t *difference) {
    uint8_t *end = out + size;
    while (out < end) {
        size_t same = difference[0], passed = difference[1], new_ones = difference[2];
        memcpy(out, other, same);
        memcpy(out + same, difference + FW_STEP, new_ones);
        out += same + new_ones;
        other += same + passed;
        difference += FW_STEP + new_ones;
    }
}

/* Where the difference of a text of `size` bytes ends. */
static const uint8_t *fw_end_of_difference(size_t size, const uint8_t *difference) {
    for (size_t read = 0; read < size; difference += FW_STEP + difference[2])
        read += (size_t)difference[0] + difference[2];
    return difference;
}

/* Whether a difference is that of `text`, of which it is known that it has the same size. */
static int fw_is_difference_of(const uint8_t *text, size_t size, const uint8_t *other, const uint8_t *difference) {
    const uint8_t *end = text + size;
    while (text < end) {
        size_t same = difference[0], passed = difference[1], new_ones = difference[2];
        if (memcmp(text, other, same) || memcmp(text + same, difference + FW_STEP, new_ones)) return 0;
        text += same + new_ones;
        other += same + passed;
        difference += FW_STEP + new_ones;
    }
    return 1;
}

#endif
