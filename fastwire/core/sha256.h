/* SHA-256 (FIPS 180-4) and HMAC (RFC 2104) over spans, from precomputed keyed states.
 *
 * Three block functions, picked at run time: portable C, and the SHA instructions of x86 and of ARMv8. A keyed HMAC costs
 * two blocks less than starting from the key: the states after the inner and outer pad are kept. */
#ifndef FW_SHA256_H
#define FW_SHA256_H

#include <stdint.h>
#include <string.h>

#if defined(FW_PORTABLE)
/* For the tests: what a CPU without such instructions runs. */
#elif (defined(__x86_64__) || defined(__i386__)) && defined(__GNUC__)
#define FW_X86 1
#include <cpuid.h>
#include <immintrin.h>
#elif defined(__aarch64__) && (defined(__ARM_FEATURE_SHA2) || defined(__ARM_FEATURE_CRYPTO))
#define FW_ARMV8 1
#define FW_ARMV8_TARGET
#include <arm_neon.h>
#elif defined(__aarch64__) && defined(__GNUC__) && !defined(__clang__)
#define FW_ARMV8 1
#define FW_ARMV8_TARGET __attribute__((target("+crypto")))
#include <arm_neon.h>
#endif

#if defined(FW_ARMV8) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

static const uint32_t fw_sha256_k[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
};

typedef void (*fw_sha256_blocks_fn)(uint32_t state[8], const uint8_t *data, size_t blocks);

static inline uint32_t fw_rotr(uint32_t x, int n) { return (x >> n) | (x << (32 - n)); }

static inline uint32_t fw_load_be32(const uint8_t *p) {
    return ((uint32_t)p[0] << 24) | ((uint32_t)p[1] << 16) | ((uint32_t)p[2] << 8) | p[3];
}

static inline void fw_store_be32(uint8_t *p, uint32_t x) {
    p[0] = (uint8_t)(x >> 24);
    p[1] = (uint8_t)(x >> 16);
    p[2] = (uint8_t)(x >> 8);
    p[3] = (uint8_t)x;
}

static void fw_sha256_blocks_portable(uint32_t state[8], const uint8_t *data, size_t blocks) {
    uint32_t w[64];
    for (; blocks; blocks--, data += 64) {
        for (int t = 0; t < 16; t++) w[t] = fw_load_be32(data + 4 * t);
        for (int t = 16; t < 64; t++) {
            uint32_t s0 = fw_rotr(w[t - 15], 7) ^ fw_rotr(w[t - 15], 18) ^ (w[t - 15] >> 3);
            uint32_t s1 = fw_rotr(w[t - 2], 17) ^ fw_rotr(w[t - 2], 19) ^ (w[t - 2] >> 10);
            w[t] = w[t - 16] + s0 + w[t - 7] + s1;
        }
        uint32_t a = state[0], b = state[1], c = state[2], d = state[3];
        uint32_t e = state[4], f = state[5], g = state[6], h = state[7];
        for (int t = 0; t < 64; t++) {
            uint32_t big1 = fw_rotr(e, 6) ^ fw_rotr(e, 11) ^ fw_rotr(e, 25);
            uint32_t t1 = h + big1 + ((e & f) ^ (~e & g)) + fw_sha256_k[t] + w[t];
            uint32_t big0 = fw_rotr(a, 2) ^ fw_rotr(a, 13) ^ fw_rotr(a, 22);
            uint32_t t2 = big0 + ((a & b) ^ (a & c) ^ (b & c));
            h = g, g = f, f = e, e = d + t1, d = c, c = b, b = a, a = t1 + t2;
        }
        state[0] += a, state[1] += b, state[2] += c, state[3] += d;
        state[4] += e, state[5] += f, state[6] += g, state[7] += h;
    }
}

#ifdef FW_X86
/* Two registers hold the state as the instructions want it, ABEF and CDGH; each pass of the inner loop does four
 * rounds and makes the four schedule words that are needed sixteen rounds later. */
__attribute__((target("sha,sse4.1,ssse3")))
static void fw_sha256_blocks_shani(uint32_t state[8], const uint8_t *data, size_t blocks) {
    const __m128i big_endian = _mm_set_epi64x(0x0c0d0e0f08090a0bLL, 0x0405060700010203LL);
    __m128i dcba = _mm_loadu_si128((const __m128i *)&state[0]);
    __m128i hgfe = _mm_loadu_si128((const __m128i *)&state[4]);
    __m128i cdab = _mm_shuffle_epi32(dcba, 0xB1);
    __m128i efgh = _mm_shuffle_epi32(hgfe, 0x1B);
    __m128i abef = _mm_alignr_epi8(cdab, efgh, 8);
    __m128i cdgh = _mm_blend_epi16(efgh, cdab, 0xF0);

    for (; blocks; blocks--, data += 64) {
        const __m128i abef_before = abef, cdgh_before = cdgh;
        __m128i w[4];
        for (int i = 0; i < 4; i++)
            w[i] = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)(data + 16 * i)), big_endian);
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) {
            __m128i k = _mm_loadu_si128((const __m128i *)&fw_sha256_k[4 * i]);
            __m128i wk = _mm_add_epi32(w[i & 3], k);
            cdgh = _mm_sha256rnds2_epu32(cdgh, abef, wk);
            abef = _mm_sha256rnds2_epu32(abef, cdgh, _mm_shuffle_epi32(wk, 0x0E));
            if (i < 12) {
                __m128i w9 = _mm_alignr_epi8(w[(i + 3) & 3], w[(i + 2) & 3], 4);
                __m128i next = _mm_add_epi32(_mm_sha256msg1_epu32(w[i & 3], w[(i + 1) & 3]), w9);
                w[i & 3] = _mm_sha256msg2_epu32(next, w[(i + 3) & 3]);
            }
        }
        abef = _mm_add_epi32(abef, abef_before);
        cdgh = _mm_add_epi32(cdgh, cdgh_before);
    }

    __m128i feba = _mm_shuffle_epi32(abef, 0x1B);
    __m128i dchg = _mm_shuffle_epi32(cdgh, 0xB1);
    _mm_storeu_si128((__m128i *)&state[0], _mm_blend_epi16(feba, dchg, 0xF0));
    _mm_storeu_si128((__m128i *)&state[4], _mm_alignr_epi8(dchg, feba, 8));
}

static int fw_cpu_has_sha(void) {
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & (1u << 19)) || !(c & (1u << 9))) return 0;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b & (1u << 29));
}
#endif

#ifdef FW_ARMV8
/* Each pass of the inner loop does four rounds and makes the four schedule words that are needed sixteen rounds later. */
FW_ARMV8_TARGET
static void fw_sha256_blocks_armv8(uint32_t state[8], const uint8_t *data, size_t blocks) {
    uint32x4_t abcd = vld1q_u32(&state[0]), efgh = vld1q_u32(&state[4]);
    for (; blocks; blocks--, data += 64) {
        const uint32x4_t abcd_before = abcd, efgh_before = efgh;
        uint32x4_t w[4];
        for (int i = 0; i < 4; i++) w[i] = vreinterpretq_u32_u8(vrev32q_u8(vld1q_u8(data + 16 * i)));
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) {
            uint32x4_t wk = vaddq_u32(w[i & 3], vld1q_u32(&fw_sha256_k[4 * i])), abcd_was = abcd;
            abcd = vsha256hq_u32(abcd, efgh, wk);
            efgh = vsha256h2q_u32(efgh, abcd_was, wk);
            if (i < 12)
                w[i & 3] = vsha256su1q_u32(vsha256su0q_u32(w[i & 3], w[(i + 1) & 3]), w[(i + 2) & 3], w[(i + 3) & 3]);
        }
        abcd = vaddq_u32(abcd, abcd_before);
        efgh = vaddq_u32(efgh, efgh_before);
    }
    vst1q_u32(&state[0], abcd);
    vst1q_u32(&state[4], efgh);
}

static int fw_cpu_has_sha(void) {
#ifdef __linux__
    return (getauxval(AT_HWCAP) & HWCAP_SHA2) != 0;
#else
    return 1; /* the compiler was told so: every Apple CPU of this kind */
#endif
}
#endif

static fw_sha256_blocks_fn fw_sha256_blocks = fw_sha256_blocks_portable;

/* Which instructions are in use, or NULL when there are none. */
static const char *fw_sha256_select(int portable) {
    fw_sha256_blocks = fw_sha256_blocks_portable;
#ifdef FW_X86
    if (!portable && fw_cpu_has_sha()) {
        fw_sha256_blocks = fw_sha256_blocks_shani;
        return "sha-ni";
    }
#endif
#ifdef FW_ARMV8
    if (!portable && fw_cpu_has_sha()) {
        fw_sha256_blocks = fw_sha256_blocks_armv8;
        return "armv8";
    }
#endif
    (void)portable;
    return NULL;
}

typedef struct {
    uint32_t state[8];
    uint8_t tail[64]; /* bytes that do not fill a block yet */
    uint64_t length;  /* bytes hashed so far, the keyed pad included */
} fw_sha256;

static const uint32_t fw_sha256_start[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                            0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};

static void fw_sha256_init(fw_sha256 *s) {
    memcpy(s->state, fw_sha256_start, sizeof s->state);
    s->length = 0;
}

static void fw_sha256_update(fw_sha256 *s, const void *bytes, size_t n) {
    const uint8_t *p = (const uint8_t *)bytes;
    if (!n) return;
    size_t used = (size_t)(s->length & 63);
    s->length += n;
    if (used) {
        size_t room = 64 - used, part = n < room ? n : room;
        memcpy(s->tail + used, p, part);
        if (part < room) return;
        fw_sha256_blocks(s->state, s->tail, 1);
        p += part, n -= part;
    }
    if (n >= 64) fw_sha256_blocks(s->state, p, n / 64);
    memcpy(s->tail, p + (n & ~(size_t)63), n & 63);
}

static void fw_sha256_final(fw_sha256 *s, uint8_t digest[32]) {
    size_t used = (size_t)(s->length & 63);
    uint64_t bits = s->length * 8;
    s->tail[used++] = 0x80;
    if (used > 56) {
        memset(s->tail + used, 0, 64 - used);
        fw_sha256_blocks(s->state, s->tail, 1);
        used = 0;
    }
    memset(s->tail + used, 0, 56 - used);
    fw_store_be32(s->tail + 56, (uint32_t)(bits >> 32));
    fw_store_be32(s->tail + 60, (uint32_t)bits);
    fw_sha256_blocks(s->state, s->tail, 1);
    for (int i = 0; i < 8; i++) fw_store_be32(digest + 4 * i, s->state[i]);
}

typedef struct {
    uint32_t inner[8], outer[8];
} fw_hmac_key;

typedef struct {
    const void *ptr;
    size_t len;
} fw_span;

static void fw_hmac_init(fw_hmac_key *k, const uint8_t *key, size_t n) {
    uint8_t pad[64] = {0};
    fw_sha256 s;
    fw_sha256_init(&s);
    if (n > 64) {
        fw_sha256_update(&s, key, n);
        fw_sha256_final(&s, pad);
    } else if (n) {
        memcpy(pad, key, n);
    }
    for (int i = 0; i < 64; i++) pad[i] ^= 0x36;
    memcpy(k->inner, fw_sha256_start, sizeof k->inner);
    fw_sha256_blocks(k->inner, pad, 1);
    for (int i = 0; i < 64; i++) pad[i] ^= 0x36 ^ 0x5c;
    memcpy(k->outer, fw_sha256_start, sizeof k->outer);
    fw_sha256_blocks(k->outer, pad, 1);
}

/* The spans from ``*i`` on that follow each other in memory, as one; ``*i`` is behind them then. */
static fw_span fw_next_run(const fw_span *spans, size_t count, size_t *i) {
    fw_span run = spans[(*i)++];
    for (; *i < count && (const char *)spans[*i].ptr == (const char *)run.ptr + run.len; (*i)++) run.len += spans[*i].len;
    return run;
}

/* ``inner`` and ``digest`` may be the same. */
static void fw_hmac_outer(const fw_hmac_key *k, const uint8_t inner[32], uint8_t digest[32]) {
    fw_sha256 s;
    memcpy(s.state, k->outer, sizeof s.state);
    s.length = 64;
    fw_sha256_update(&s, inner, 32);
    fw_sha256_final(&s, digest);
}

static void fw_hmac(const fw_hmac_key *k, const fw_span *spans, size_t count, uint8_t digest[32]) {
    fw_sha256 s;
    memcpy(s.state, k->inner, sizeof s.state);
    s.length = 64;
    for (size_t i = 0; i < count;) {
        fw_span run = fw_next_run(spans, count, &i);
        fw_sha256_update(&s, run.ptr, run.len);
    }
    fw_sha256_final(&s, digest);
    fw_hmac_outer(k, digest, digest);
}

static void fw_hex(const uint8_t *bytes, size_t n, char *out) {
    /* Computed, not looked up, four bytes at a time: which they are takes no different time. */
    const uint64_t each = 0x0101010101010101u;
    for (; n >= 4; n -= 4, bytes += 4, out += 8) {
        uint64_t x = (uint64_t)bytes[0] | (uint64_t)bytes[1] << 16 | (uint64_t)bytes[2] << 32 | (uint64_t)bytes[3] << 48;
        x = (x >> 4 | x << 8) & each * 15;          /* a digit in each byte, in order from the lowest */
        x += each * '0' + ((x + each * 6) >> 4 & each) * ('a' - '0' - 10);
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
        x = __builtin_bswap64(x);
#endif
        memcpy(out, &x, 8);
    }
}

/* The bytes that `fw_hex` spelled like this; of anything else, some. */
static void fw_unhex(const char *text, size_t n, uint8_t *out) {
    for (size_t i = 0; i < n; i++, text += 2) {
        unsigned high = (unsigned char)text[0], low = (unsigned char)text[1];
        out[i] = (uint8_t)(((high & 15) + (high >> 6) * 9) << 4 | ((low & 15) + (low >> 6) * 9));
    }
}

/* Takes the same time wherever the two differ. */
static int fw_equal_constant_time(const void *a, const void *b, size_t n) {
    const uint8_t *x = (const uint8_t *)a, *y = (const uint8_t *)b;
    volatile uint64_t different = 0; /* so that no compiler finds a shorter way */
    for (; n >= 8; n -= 8, x += 8, y += 8) {
        uint64_t left, right;
        memcpy(&left, x, 8);
        memcpy(&right, y, 8);
        different |= left ^ right;
    }
    for (size_t i = 0; i < n; i++) different |= (uint64_t)(x[i] ^ y[i]);
    return different == 0;
}

#endif
