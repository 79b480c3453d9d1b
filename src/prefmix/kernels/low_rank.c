/* Two passes over a tile of base logits for K low-rank heads: softmax sums, and expectations under the softmax.
 *
 * Expert k's logits are z + low_k up_k, z the base's, all in bits. The tile is cut into pieces of PIECE columns that stay
 * in the first cache; all that is done to an element of a piece (correction, shift, exp2, sums, products with the small
 * factors) is done there, K times for one reading of z. Plain C with vector extensions (gcc, clang); no headers but the
 * standard library's. Threads: a call touches only the rows or columns that it is given.
 *
 * Legend: C tokens, S columns of the tile, K experts, r rank, P = PIECE, n tokens from which an expert learns.
 */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
enum { LANES = 16, WIDE = 4, ROWS_OF_UP = 8 };
#elif defined(__AVX__)
enum { LANES = 8, WIDE = 2, ROWS_OF_UP = 4 };
#else
enum { LANES = 4, WIDE = 4, ROWS_OF_UP = 8 };
#endif
enum { PIECE = 128, GROUP = 4, BLOCK = 16, ALIGN = 64 };

/* A shift within so many bits of the maximum: the largest term is at least 2^-40 and at most 2^40, far inside float32. */
static const float SAFE_BITS = 40.0f;

typedef float vec __attribute__((vector_size(LANES * 4)));
typedef int32_t ivec __attribute__((vector_size(LANES * 4)));
#define INLINE static inline __attribute__((always_inline))

/* A tile of base logits as the product left it; bits = scale * value + bias. */
typedef struct {
    const void *values; /* [C, S] float32 or, where `half`, bfloat16; strides (row, 1) */
    const float *bias;  /* [S] in bits, or null */
    float scale;
    int32_t half;
    int64_t tokens, columns, row;
} Tile;

/* The experts at the tile's tokens and columns. */
typedef struct {
    const float *low; /* [K, C, r] in bits (A h) log2 e, strides (low_stride, r, 1) */
    const float *up;  /* [K, r, S], strides (up_stride, up_row, 1) */
    int64_t low_stride, up_stride, up_row, experts, rank;
} Heads;

INLINE vec load(const float *from) { return *(const vec *)from; }
INLINE void store(float *to, vec value) { *(vec *)to = value; }
INLINE vec splat(float value) { return value - (vec){0}; }

/* Keeps a value in a register; gcc otherwise reads it from memory in each of the multiplications that share it. */
#if defined(__x86_64__)
#define HOLD(value) __asm__("" : "+v"(value))
#else
#define HOLD(value) (void)0
#endif

/* The larger one; b where either is NaN. */
INLINE vec larger(vec a, vec b)
{
#if defined(__AVX512F__)
    return (vec)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX__)
    return (vec)_mm256_max_ps((__m256)a, (__m256)b);
#else
    const ivec more = a > b;
    return (vec)((more & (ivec)a) | (~more & (ivec)b));
#endif
}

/* 2^x for x <= 127; 2^-126 where x is smaller, NaN where it is NaN. Relative error below 2.2e-7. */
INLINE vec exp2_vec(vec x)
{
    x = larger(splat(-126.0f), x);
#if defined(__AVX512F__)
    const vec f = x - (vec)_mm512_roundscale_ps((__m512)x, 8);
#else
    const vec shifted = x + 12582912.0f; /* 1.5 * 2^23: the integer part lands in the lowest bits */
    const vec f = x - (shifted - 12582912.0f);
#endif
    vec p = 0x1.5c08e4p-10f * f + 0x1.3d0c52p-7f;
    p = p * f + 0x1.c6b6e4p-5f;
    p = p * f + 0x1.ebf918p-3f;
    p = p * f + 0x1.62e428p-1f;
    p = p * f + 0x1.000002p+0f;
#if defined(__AVX512F__)
    return (vec)_mm512_scalef_ps((__m512)p, (__m512)(x - f));
#else
    return p * (vec)(((ivec)shifted << 23) + 0x3f800000);
#endif
}

INLINE float sum_lanes(vec value)
{
    float a[LANES] __attribute__((aligned(ALIGN)));
    store(a, value);
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++)
            a[i] += a[i + half];
    return a[0];
}

INLINE float max_lanes(vec value)
{
    float best = value[0];
    for (int i = 1; i < LANES; i++)
        best = value[i] > best ? value[i] : best;
    return best;
}

/* What becomes of a corrected logit. */
enum Use { KEEP, PROBABILITY, SUM };

/* GROUP rows: x = base + low up - shift; stores x, or 2^x, or adds 2^x to sums. */
INLINE void correct(enum Use use, const float *const base[GROUP], const float *const low[GROUP], const float *up,
                    int64_t rank, const float shift[GROUP], float *out, vec sums[GROUP])
{
    for (int64_t s = 0; s < PIECE; s += WIDE * LANES) {
        vec x[GROUP][WIDE];
        for (int m = 0; m < GROUP; m++)
            for (int w = 0; w < WIDE; w++)
                x[m][w] = load(base[m] + s + w * LANES) - shift[m];
        for (int64_t j = 0; j < rank; j++) {
            vec u[WIDE];
            for (int w = 0; w < WIDE; w++)
                u[w] = load(up + j * PIECE + s + w * LANES);
            for (int w = 0; w < WIDE; w++)
                HOLD(u[w]);
            for (int m = 0; m < GROUP; m++)
                for (int w = 0; w < WIDE; w++)
                    x[m][w] += u[w] * low[m][j];
        }
        for (int m = 0; m < GROUP; m++)
            for (int w = 0; w < WIDE; w++) {
                const vec y = use == KEEP ? x[m][w] : exp2_vec(x[m][w]);
                if (use == SUM)
                    sums[m] += y;
                else
                    store(out + m * PIECE + s + w * LANES, y);
            }
    }
}

static float *allocate(int64_t count)
{
    const size_t bytes = ((size_t)count * sizeof(float) + ALIGN - 1) / ALIGN * ALIGN;
    return aligned_alloc(ALIGN, bytes ? bytes : ALIGN);
}

/* Columns start .. start + P of every row, in bits; columns beyond the tile weigh nothing. One more row of zeros. */
static void load_piece(const Tile *tile, int64_t start, float *piece)
{
    const int64_t width = tile->columns - start < PIECE ? tile->columns - start : PIECE;
    for (int64_t t = 0; t < tile->tokens; t++) {
        float *row = piece + t * PIECE;
        const int64_t place = t * tile->row + start;
        if (tile->half) {
            const uint16_t *from = (const uint16_t *)tile->values + place;
            for (int64_t s = 0; s < width; s++) {
                const uint32_t bits = (uint32_t)from[s] << 16;
                float value;
                memcpy(&value, &bits, sizeof value);
                row[s] = value * tile->scale;
            }
        } else {
            const float *from = (const float *)tile->values + place;
            for (int64_t s = 0; s < width; s++)
                row[s] = from[s] * tile->scale;
        }
        if (tile->bias)
            for (int64_t s = 0; s < width; s++)
                row[s] += tile->bias[start + s];
        for (int64_t s = width; s < PIECE; s++)
            row[s] = -INFINITY;
    }
    memset(piece + tile->tokens * PIECE, 0, PIECE * sizeof(float));
}

/* [r, P] of one expert, zeros beyond the tile; in `turned`, where given, also [P, padded r]. */
static void load_up(const Heads *heads, int64_t k, int64_t start, int64_t columns, float *up, float *turned,
                    int64_t padded)
{
    const int64_t width = columns - start < PIECE ? columns - start : PIECE;
    for (int64_t j = 0; j < heads->rank; j++) {
        memcpy(up + j * PIECE, heads->up + k * heads->up_stride + j * heads->up_row + start, width * sizeof(float));
        memset(up + j * PIECE + width, 0, (PIECE - width) * sizeof(float));
    }
    if (turned)
        for (int64_t s = 0; s < PIECE; s++)
            for (int64_t j = 0; j < heads->rank; j++)
                turned[s * padded + j] = up[j * PIECE + s];
}

/* Raises a row's shift where `largest` is larger, and rescales its sum. */
INLINE float raise(float largest, float *shift, float *total)
{
    const float new = largest > *shift ? largest : *shift;
    *total *= *shift == new ? 1.0f : exp2f(*shift - new);
    *shift = new;
    return new;
}

/* The base's sums over a piece. The same operations as an expert's with a correction of zero, so that they are equal. */
static void add_base(const float *piece, int64_t tokens, float *shift, float *total)
{
    for (int64_t t = 0; t < tokens; t++) {
        const float *row = piece + t * PIECE;
        vec largest = load(row), sum = {0};
        for (int64_t s = LANES; s < PIECE; s += LANES)
            largest = larger(load(row + s), largest);
        const float new = raise(max_lanes(largest), shift + t, total + t);
        for (int64_t s = 0; s < PIECE; s += LANES)
            sum += exp2_vec(load(row + s) - new);
        total[t] += sum_lanes(sum);
    }
}

/* The largest |row| of [n, r], and the largest |column| of an expert's piece [r, P]. */
static float largest_row(const float *rows, int64_t count, int64_t rank)
{
    float best = 0;
    for (int64_t t = 0; t < count; t++) {
        float sum = 0;
        for (int64_t j = 0; j < rank; j++)
            sum += rows[t * rank + j] * rows[t * rank + j];
        best = sum <= best ? best : sum; /* NaN wins, and then no bound holds */
    }
    return sqrtf(best);
}

static float largest_column(const float *up, int64_t rank)
{
    float best = 0;
    for (int64_t s = 0; s < PIECE; s += LANES) {
        vec sum = {0};
        for (int64_t j = 0; j < rank; j++)
            sum += load(up + j * PIECE + s) * load(up + j * PIECE + s);
        for (int i = 0; i < LANES; i++)
            best = sum[i] <= best ? best : sum[i];
    }
    return sqrtf(best);
}

/* GROUP tokens' sums under one expert over a piece. `near`: no correction exceeds SAFE_BITS, so the base's running
 * maximum, read as `bound`, will do for the expert; otherwise its own is looked for. */
INLINE void add_group(int near, const float *const rows[GROUP], const float *const lows[GROUP], const float *up,
                      int64_t rank, const float *bound, int64_t count, float *shift, float *total, float *work)
{
    float shifts[GROUP] = {0};
    vec sums[GROUP] = {{0}};
    if (near) {
        for (int m = 0; m < count; m++)
            shifts[m] = raise(bound[m], shift + m, total + m);
        correct(SUM, rows, lows, up, rank, shifts, NULL, sums);
    } else {
        correct(KEEP, rows, lows, up, rank, shifts, work, NULL);
        for (int m = 0; m < count; m++) {
            vec largest = load(work + m * PIECE);
            for (int64_t s = LANES; s < PIECE; s += LANES)
                largest = larger(load(work + m * PIECE + s), largest);
            shifts[m] = raise(max_lanes(largest), shift + m, total + m);
            for (int64_t s = 0; s < PIECE; s += LANES)
                sums[m] += exp2_vec(load(work + m * PIECE + s) - shifts[m]);
        }
    }
    for (int m = 0; m < count; m++)
        total[m] += sum_lanes(sums[m]);
}

static void add_expert(const float *piece, int64_t tokens, const float *low, const float *up, int64_t rank, int near,
                       const float *base_shift, float *shift, float *total, float *work)
{
    for (int64_t t = 0; t < tokens; t += GROUP) {
        const float *rows[GROUP], *lows[GROUP];
        const int64_t count = tokens - t < GROUP ? tokens - t : GROUP;
        for (int m = 0; m < GROUP; m++) {
            const int64_t place = m < count ? t + m : t;
            rows[m] = piece + place * PIECE;
            lows[m] = low + place * rank;
        }
        add_group(near, rows, lows, up, rank, base_shift + t, count, shift + t, total + t, work);
    }
}

/* Adds sum_s 2^(logit - shift) of the tile to `total`, where `shift` is no further from the running maximum than
 * SAFE_BITS; both start as -inf and 0.
 *
 * shift, total: [K + 1, C], strides (state_stride, 1), row 0 the base. Returns 0, or 1 without memory. */
int prefmix_add_sums(const Tile *tile, const Heads *heads, float *shift, float *total, int64_t state_stride)
{
    float *piece = allocate((tile->tokens + 1) * PIECE), *up = allocate(heads->rank * PIECE);
    float *work = allocate(GROUP * PIECE), *low_norm = allocate(heads->experts);
    const int failed = !piece || !up || !work || !low_norm;
    for (int64_t k = 0; !failed && k < heads->experts; k++)
        low_norm[k] = largest_row(heads->low + k * heads->low_stride, tile->tokens, heads->rank);
    for (int64_t start = 0; !failed && start < tile->columns; start += PIECE) {
        load_piece(tile, start, piece);
        add_base(piece, tile->tokens, shift, total);
        for (int64_t k = 0; k < heads->experts; k++) {
            load_up(heads, k, start, tile->columns, up, NULL, 0);
            const int near = low_norm[k] * largest_column(up, heads->rank) <= SAFE_BITS;
            add_expert(piece, tile->tokens, heads->low + k * heads->low_stride, up, heads->rank, near, shift,
                       shift + (k + 1) * state_stride, total + (k + 1) * state_stride, work);
        }
    }
    free(piece), free(up), free(work), free(low_norm);
    return failed;
}

/* One expert's learning tokens, gathered once for a tile; padded to whole blocks with tokens that change nothing. */
typedef struct {
    const int32_t *place; /* [n] which tokens of the tile */
    int64_t count, padded;
    const float **low; /* [padded] rows of r, in bits */
    float *shift;      /* [padded] lse in bits */
    float *weighted;   /* [padded, padded r] coefficient * A h, in nats */
    float *coefficient;
} Learners;

/* low_grad[m] += sum_s p[m, s] up[s], for BLOCK tokens; out [BLOCK, padded]. */
INLINE void expected_up(const float *p, const float *turned, int64_t padded, float *out)
{
    for (int64_t j = 0; j < padded; j += LANES)
        for (int64_t m0 = 0; m0 < BLOCK; m0 += 2 * ROWS_OF_UP) {
            vec sum[2 * ROWS_OF_UP] = {{0}};
            for (int64_t s = 0; s < PIECE; s++) {
                const vec u = load(turned + s * padded + j);
                for (int m = 0; m < 2 * ROWS_OF_UP; m++)
                    sum[m] += u * p[(m0 + m) * PIECE + s];
            }
            for (int m = 0; m < 2 * ROWS_OF_UP; m++)
                store(out + (m0 + m) * padded + j, sum[m]);
        }
}

/* up_grad[j, s] += sum_m weighted[m, j] p[m, s], for BLOCK tokens; out [padded, P]. */
INLINE void outer_products(const float *p, const float *weighted, int64_t padded, float *out)
{
    for (int64_t j = 0; j < padded; j += ROWS_OF_UP)
        for (int64_t s = 0; s < PIECE; s += 2 * LANES) {
            vec sum[ROWS_OF_UP][2];
            for (int i = 0; i < ROWS_OF_UP; i++)
                for (int w = 0; w < 2; w++)
                    sum[i][w] = load(out + (j + i) * PIECE + s + w * LANES);
            for (int m = 0; m < BLOCK; m++) {
                const vec a = load(p + m * PIECE + s), b = load(p + m * PIECE + s + LANES);
                for (int i = 0; i < ROWS_OF_UP; i++) {
                    sum[i][0] += a * weighted[m * padded + j + i];
                    sum[i][1] += b * weighted[m * padded + j + i];
                }
            }
            for (int i = 0; i < ROWS_OF_UP; i++)
                for (int w = 0; w < 2; w++)
                    store(out + (j + i) * PIECE + s + w * LANES, sum[i][w]);
        }
}

/* Buffers of `prefmix_add_expectations`. */
typedef struct {
    float *piece, *up, *turned, *p, *low_sum, *up_sum, *mixed, *zeros;
} Scratch;

/* One expert over one piece. */
static void add_piece(const Tile *tile, int64_t rank, int64_t padded, const Learners *learners, const Scratch *scratch,
                      float *low_grad, int with_up)
{
    const float *dead = scratch->piece + tile->tokens * PIECE;
    for (int64_t n = 0; n < learners->padded; n += BLOCK) {
        for (int64_t g = 0; g < BLOCK; g += GROUP) {
            const float *rows[GROUP];
            for (int m = 0; m < GROUP; m++)
                rows[m] = n + g + m < learners->count ? scratch->piece + learners->place[n + g + m] * PIECE : dead;
            correct(PROBABILITY, rows, learners->low + n + g, scratch->up, rank, learners->shift + n + g,
                    scratch->p + g * PIECE, NULL);
        }
        if (with_up)
            outer_products(scratch->p, learners->weighted + n * padded, padded, scratch->up_sum);
        if (low_grad)
            expected_up(scratch->p, scratch->turned, padded, scratch->low_sum);
        for (int m = 0; m < BLOCK && n + m < learners->count; m++) {
            const int64_t place = learners->place[n + m];
            if (low_grad)
                for (int64_t j = 0; j < rank; j++)
                    low_grad[place * rank + j] += scratch->low_sum[m * padded + j];
            if (scratch->mixed)
                for (int64_t s = 0; s < PIECE; s++)
                    scratch->mixed[place * PIECE + s] += learners->coefficient[n + m] * scratch->p[m * PIECE + s];
        }
    }
}

/* Gathers the tokens with a coefficient other than 0 (NaN counts). */
static int gather(const Tile *tile, const Heads *heads, int64_t k, const float *coefficient, const float *lse,
                  int64_t padded, const float *zeros, Learners *to)
{
    int32_t *place = malloc((tile->tokens + 1) * sizeof *place);
    const int64_t most = tile->tokens + BLOCK;
    *to = (Learners){place, 0, 0, malloc(most * sizeof *to->low), allocate(most), allocate(most * padded), allocate(most)};
    if (!place || !to->low || !to->shift || !to->weighted || !to->coefficient)
        return 1;
    for (int64_t t = 0; t < tile->tokens; t++)
        if (coefficient[t] != 0.0f)
            place[to->count++] = (int32_t)t;
    to->padded = (to->count + BLOCK - 1) / BLOCK * BLOCK;
    memset(to->weighted, 0, most * padded * sizeof(float));
    for (int64_t n = 0; n < to->padded; n++) {
        const int64_t t = n < to->count ? place[n] : 0;
        to->low[n] = n < to->count ? heads->low + k * heads->low_stride + t * heads->rank : zeros;
        to->shift[n] = n < to->count ? lse[t] : 0.0f;
        to->coefficient[n] = n < to->count ? coefficient[t] : 0.0f;
        for (int64_t j = 0; n < to->count && j < heads->rank; j++)
            to->weighted[n * padded + j] = coefficient[t] * to->low[n][j] * 0x1.62e430p-1f; /* ln 2: bits to nats */
    }
    return 0;
}

/* Adds expectations under p_k = 2^(logit_k - lse_k) over the tile.
 *
 * coefficient, lse: [K, C], strides (state_stride, 1). low_grad: [K, C, r] += sum_s p up, strides (low_stride, r, 1), or
 * null. up_grad: [K, r, S] += sum_t coefficient (A h) p, strides as `up`, or null. mixed: [C, S] = sum_k coefficient p, strides
 * (row, 1), or null.
 * Tokens with coefficient 0 are passed over. Returns 0, or 1 without memory. */
int prefmix_add_expectations(const Tile *tile, const Heads *heads, const float *coefficient, const float *lse,
                             int64_t state_stride, float *low_grad, float *up_grad, float *mixed)
{
    const int64_t rank = heads->rank, padded = (rank + 15) / 16 * 16, rows = tile->tokens + 1;
    Scratch scratch = {allocate(rows * PIECE),   allocate(padded * PIECE), allocate(PIECE * padded),
                       allocate(BLOCK * PIECE),  allocate(BLOCK * padded), allocate(padded * PIECE),
                       mixed ? allocate(rows * PIECE) : NULL, allocate(padded)};
    Learners *learners = calloc(heads->experts + 1, sizeof *learners);
    int failed = !scratch.piece || !scratch.up || !scratch.turned || !scratch.p || !scratch.low_sum || !scratch.up_sum ||
                 (mixed && !scratch.mixed) || !scratch.zeros || !learners;
    if (!failed) {
        memset(scratch.turned, 0, PIECE * padded * sizeof(float));
        memset(scratch.zeros, 0, padded * sizeof(float));
    }
    for (int64_t k = 0; !failed && k < heads->experts; k++)
        failed = gather(tile, heads, k, coefficient + k * state_stride, lse + k * state_stride, padded, scratch.zeros,
                        learners + k);
    for (int64_t start = 0; !failed && start < tile->columns; start += PIECE) {
        const int64_t width = tile->columns - start < PIECE ? tile->columns - start : PIECE;
        load_piece(tile, start, scratch.piece);
        if (mixed)
            memset(scratch.mixed, 0, rows * PIECE * sizeof(float));
        for (int64_t k = 0; k < heads->experts; k++) {
            if (!learners[k].count)
                continue;
            load_up(heads, k, start, tile->columns, scratch.up, scratch.turned, padded);
            memset(scratch.up_sum, 0, padded * PIECE * sizeof(float));
            add_piece(tile, rank, padded, learners + k, &scratch, low_grad ? low_grad + k * heads->low_stride : NULL,
                      up_grad != NULL);
            for (int64_t j = 0; up_grad && j < rank; j++)
                for (int64_t s = 0; s < width; s++)
                    up_grad[k * heads->up_stride + j * heads->up_row + start + s] += scratch.up_sum[j * PIECE + s];
        }
        for (int64_t t = 0; mixed && t < tile->tokens; t++)
            memcpy(mixed + t * tile->row + start, scratch.mixed + t * PIECE, width * sizeof(float));
    }
    for (int64_t k = 0; learners && k < heads->experts; k++) {
        free((void *)learners[k].place), free(learners[k].low), free(learners[k].shift);
        free(learners[k].weighted), free(learners[k].coefficient);
    }
    free(learners), free(scratch.piece), free(scratch.up), free(scratch.turned), free(scratch.p), free(scratch.low_sum);
    free(scratch.up_sum), free(scratch.mixed), free(scratch.zeros);
    return failed;
}
