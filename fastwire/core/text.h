/* Bytes of text: UTF-8 made, and checked as it arrives, JSON strings skipped in strides, masks taken off. */
#ifndef FW_TEXT_H
#define FW_TEXT_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* Every x86-64 has SSE2. A build with FW_PORTABLE is for the tests: what other CPUs run. */
#if defined(__SSE2__) && !defined(FW_PORTABLE)
#define FW_SSE2 1
#include <emmintrin.h>
#endif

#define FW_EACH_BYTE(c) (0x0101010101010101ULL * (uint8_t)(c))
#define FW_HIGH_BITS FW_EACH_BYTE(0x80)

static inline uint64_t fw_load64(const void *p) {
    uint64_t x;
    memcpy(&x, p, 8);
    return x;
}

/* The first byte that is not ASCII, or end. */
static inline const uint8_t *fw_ascii(const uint8_t *p, const uint8_t *end) {
    size_t n = (size_t)(end - p);
    for (; end - p >= 16; p += 16) {
#ifdef FW_SSE2
        unsigned mask = (unsigned)_mm_movemask_epi8(_mm_loadu_si128((const __m128i *)p));
        if (mask) return p + __builtin_ctz(mask);
#else
        if ((fw_load64(p) | fw_load64(p + 8)) & FW_HIGH_BITS) break;
#endif
    }
    /* When less than a stride is left, it is looked at together with some bytes before it. */
    if (n >= 16 && end - p < 16 && !((fw_load64(end - 16) | fw_load64(end - 8)) & FW_HIGH_BITS)) return end;
    while (p < end && *p < 0x80) p++;
    return p;
}

/* Where a character that is not complete yet must go on: how many bytes are missing, and the range of the next. */
typedef struct {
    uint8_t missing, low, high;
} fw_utf8;

/* 1 while the bytes so far can still become UTF-8 (RFC 3629: no surrogates, no overlong forms, up to U+10FFFF). The
 * text is complete when ``missing`` is 0. */
static int fw_utf8_feed(fw_utf8 *s, const uint8_t *p, size_t n) {
    const uint8_t *end = p + n;
    while (p < end) {
        uint8_t c;
        if (s->missing) {
            c = *p++;
            if (c < s->low || c > s->high) return 0;
            s->missing--, s->low = 0x80, s->high = 0xBF;
            continue;
        }
        if (*p < 0x80) p = fw_ascii(p, end);
        if (p == end) break;
        c = *p++;
        s->low = 0x80, s->high = 0xBF;
        if (c >= 0xC2 && c <= 0xDF) {
            s->missing = 1;
        } else if (c >= 0xE0 && c <= 0xEF) {
            s->missing = 2;
            if (c == 0xE0) s->low = 0xA0;
            if (c == 0xED) s->high = 0x9F;
        } else if (c >= 0xF0 && c <= 0xF4) {
            s->missing = 3;
            if (c == 0xF0) s->low = 0x90;
            if (c == 0xF4) s->high = 0x8F;
        } else {
            return 0;
        }
    }
    return 1;
}

static int fw_utf8_valid(const uint8_t *p, size_t n) {
    fw_utf8 s = {0, 0, 0};
    return fw_utf8_feed(&s, p, n) && !s.missing;
}

/* How many of the characters from ``p`` were ASCII and are at ``out`` now, in strides only; ``kind`` bytes each. */
static inline size_t fw_ascii_of(uint8_t *out, const uint8_t *p, size_t n, int kind) {
    size_t i = 0;
#ifdef FW_SSE2
    const __m128i zero = _mm_setzero_si128();
    if (kind == 1) {
        for (; n - i >= 16; i += 16) {
            __m128i x = _mm_loadu_si128((const __m128i *)(p + i));
            if (_mm_movemask_epi8(x)) break;
            _mm_storeu_si128((__m128i *)(out + i), x);
        }
    } else if (kind == 2) {
        for (; n - i >= 8; i += 8) {
            __m128i x = _mm_loadu_si128((const __m128i *)(p + 2 * i));
            __m128i high = _mm_and_si128(x, _mm_set1_epi16((short)0xFF80));
            if (_mm_movemask_epi8(_mm_cmpeq_epi8(high, zero)) != 0xFFFF) break;
            _mm_storel_epi64((__m128i *)(out + i), _mm_packus_epi16(x, zero));
        }
    } else {
        for (; n - i >= 8; i += 8) {
            __m128i x = _mm_loadu_si128((const __m128i *)(p + 4 * i));
            __m128i y = _mm_loadu_si128((const __m128i *)(p + 4 * i + 16));
            __m128i high = _mm_and_si128(_mm_or_si128(x, y), _mm_set1_epi32((int)0xFFFFFF80));
            if (_mm_movemask_epi8(_mm_cmpeq_epi8(high, zero)) != 0xFFFF) break;
            x = _mm_packs_epi32(x, y);
            _mm_storel_epi64((__m128i *)(out + i), _mm_packus_epi16(x, zero));
        }
    }
#else
    (void)out, (void)p, (void)n, (void)kind;
#endif
    return i;
}

/* The UTF-8 of ``n`` characters of ``kind`` bytes each (PEP 393), at most ``n`` * (1 + kind) bytes, or 4 each; returns its
 * length, or -1 for a lone surrogate. */
static ptrdiff_t fw_utf8_of(uint8_t *out, const void *text, size_t n, int kind) {
    const uint8_t *p = (const uint8_t *)text;
    uint8_t *start = out;
    for (size_t i = 0; i < n;) {
        size_t plain = fw_ascii_of(out, p + i * (size_t)kind, n - i, kind);
        out += plain, i += plain;
        /* Up to a character that is not ASCII, and what of ASCII stands behind it. */
        for (int few = 0; few < 16 && i < n; few++, i++) {
            uint32_t c = kind == 1 ? p[i] : kind == 2 ? ((const uint16_t *)text)[i] : ((const uint32_t *)text)[i];
            if (c < 0x80) {
                *out++ = (uint8_t)c;
            } else if (c < 0x800) {
                *out++ = (uint8_t)(0xC0 | c >> 6);
                *out++ = (uint8_t)(0x80 | (c & 0x3F));
            } else if (c < 0x10000) {
                if (c >= 0xD800 && c <= 0xDFFF) return -1;
                *out++ = (uint8_t)(0xE0 | c >> 12);
                *out++ = (uint8_t)(0x80 | (c >> 6 & 0x3F));
                *out++ = (uint8_t)(0x80 | (c & 0x3F));
            } else {
                *out++ = (uint8_t)(0xF0 | c >> 18);
                *out++ = (uint8_t)(0x80 | (c >> 12 & 0x3F));
                *out++ = (uint8_t)(0x80 | (c >> 6 & 0x3F));
                *out++ = (uint8_t)(0x80 | (c & 0x3F));
            }
        }
    }
    return out - start;
}

/* The first byte that a JSON string cannot hold as it is: a quote, a backslash or a control character; or end. */
static inline const uint8_t *fw_json_plain(const uint8_t *p, const uint8_t *end) {
#ifdef FW_SSE2
    const __m128i quotes = _mm_set1_epi8('"'), slashes = _mm_set1_epi8('\\'), last_control = _mm_set1_epi8(0x1F);
    while (end - p >= 16) {
        __m128i x = _mm_loadu_si128((const __m128i *)p);
        __m128i hits = _mm_or_si128(_mm_cmpeq_epi8(x, quotes), _mm_cmpeq_epi8(x, slashes));
        hits = _mm_or_si128(hits, _mm_cmpeq_epi8(_mm_min_epu8(x, last_control), x));
        unsigned mask = (unsigned)_mm_movemask_epi8(hits);
        if (mask) return p + __builtin_ctz(mask);
        p += 16;
    }
#endif
    while (end - p >= 8) {
        uint64_t x = fw_load64(p);
        uint64_t quote = x ^ FW_EACH_BYTE('"'), slash = x ^ FW_EACH_BYTE('\\');
        /* The usual has-zero-byte trick; a false hit above a true one only ends this loop early. */
        uint64_t hit = ((quote - FW_EACH_BYTE(1)) & ~quote) | ((slash - FW_EACH_BYTE(1)) & ~slash) |
                       ((x - FW_EACH_BYTE(0x20)) & ~x);
        if (hit & FW_HIGH_BITS) break;
        p += 8;
    }
    while (p < end && *p != '"' && *p != '\\' && *p >= 0x20) p++;
    return p;
}

/* Takes a client's mask off (RFC 6455 section 5.3) on the way to ``out``, which may be ``p`` itself; ``offset`` is how
 * far into the payload that is. */
static void fw_unmask(uint8_t *out, const uint8_t *p, size_t n, const uint8_t key[4], uint64_t offset) {
    typedef uint8_t strides __attribute__((vector_size(16)));
    uint8_t turned[16];
    for (int i = 0; i < 16; i++) turned[i] = key[(offset + (uint64_t)i) & 3];
    strides mask, some;
    memcpy(&mask, turned, 16);
    size_t i = 0;
    for (; i + 16 <= n; i += 16) {
        memcpy(&some, p + i, 16);
        some ^= mask;
        memcpy(out + i, &some, 16);
    }
    for (; i < n; i++) out[i] = p[i] ^ turned[i & 15];
}

#endif
